"""Saves of a sharded state: rank 0 sends commands to the other ranks; an error on one rank fails the save on all."""

from __future__ import annotations

import hashlib
import json
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar, final

from noether.core.effect import SaveCheckpoint
from noether.core.errors import NoetherError
from noether.core.tensors.tree import tensors
from noether.effects.checkpoints.contents import checkpoint_files
from noether.effects.checkpoints.converter import CONVERTER, error_text
from noether.effects.checkpoints.file_names import FILES, file_of
from noether.effects.checkpoints.listing import CheckpointError
from noether.effects.checkpoints.shards import is_sharded

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping

    from noether.core.state import TrainState
    from noether.effects.checkpoints.contents import Pieces
    from noether.effects.checkpoints.writer import Writer

    Command = Mapping[str, Any]
    """What the other ranks have to do; the last one of a save has the key `end`, with an error text or None."""

_Result = TypeVar("_Result")
_END: Final = "end"
_COMMAND: Final = "command of rank 0 for a checkpoint"
_RESULT: Final = "results of ranks for a checkpoint"
_TREES: Final = ("params", "buffers", "opt_state", "callback_states", "pending")


class RankSaveError(NoetherError):
    """A rank could not write its files of a checkpoint; the message names the rank."""


class Exchange(Protocol):
    """What `noether.distributed.channel.Channel` is for the ranks that save."""

    def gather(self, what: str, value: Any) -> list[Any]:
        """Return a value of each rank, in the order of ranks."""


class SavingRanks(Protocol):
    """The ranks of a run, as `noether.distributed.ranks.Ranks` describes them to those that save."""

    @property
    def rank(self) -> int:
        """Index of this process."""

    @property
    def world_size(self) -> int:
        """Number of processes."""

    @property
    def saving(self) -> Exchange:
        """What they exchange while they save."""

    @property
    def control(self) -> Exchange:
        """What their main threads exchange."""


@final
class _Alone:
    rank, world_size = 0, 1

    @property
    def saving(self) -> Exchange:
        return self

    control = saving

    def gather(self, what: str, value: Any) -> list[Any]:
        del what
        return [value]


ALONE: Final[SavingRanks] = _Alone()
"""The only process of a run, for `effects`, which cannot import `ONE_PROCESS` of `noether.distributed`."""


def has_shards(state: TrainState) -> bool:
    """Return whether ranks store different parts of a tensor of a state, so that all ranks have to save it together.

    Example:
        >>> from noether import TrainState
        >>> has_shards(TrainState())
        False
    """
    return any(is_sharded(tensor) for tree in _TREES for _, tensor in tensors(getattr(state, tree)))


@final
class JointSaves:
    """Saves of a sharded state that all ranks write together.

    In each save rank 0 sends any number of commands, which all ranks carry out at the same time, and then ends the
    save. So the decisions of a save, such as its tag and which files an earlier checkpoint has, are those of rank 0.

    Args:
        ranks: The ranks of the run.
        writer: Writes the files of this rank.
    """

    def __init__(self, ranks: SavingRanks, writer: Writer) -> None:
        self._writer = writer
        self.rank, self.world_size = ranks.rank, ranks.world_size
        self._exchange, self._control = ranks.saving, ranks.control
        self._is_leading = False
        self.failure: BaseException | None = None
        """Why an exchange failed, after which the ranks cannot save together; None as long as none did."""

    @property
    def are_several(self) -> bool:
        """Whether there is more than one rank."""
        return self.world_size > 1

    @contextmanager
    def lead(self) -> Iterator[None]:
        """End the save on all ranks on exit; an error that leaves the block is raised on all. For rank 0.

        Inside of another such block it does nothing, so one save can be tried twice.
        """
        if self._is_leading:
            yield
            return
        self._is_leading = True
        try:
            yield
        except BaseException as error:
            if self.failure is not None:  # no disk failed, and no retry helps
                raise self.failure from None
            self._gather(_COMMAND, {_END: str(error) if isinstance(error, NoetherError) else error_text(error)})
            raise
        else:
            self._gather(_COMMAND, {_END: None})
        finally:
            self._is_leading = False

    def write(self, tag: str, effect: SaveCheckpoint, files: Mapping[str, Pieces]) -> dict[str, tuple[int, str]]:
        """Write the files of a checkpoint on all ranks that have some; return size and SHA-256 by name. For rank 0.

        Args:
            tag: Tag of the checkpoint, whose temporary directory exists.
            effect: The request.
            files: The files of this rank, as `checkpoint_files` returns them.

        Raises:
            RankSaveError: If another rank failed; the message names the rank and its error.
        """
        return self._run_if_sharded({"do": "write", "tag": tag}, effect, files, lambda: self._writer.write(tag, files))

    def hash_files(
        self, effect: SaveCheckpoint, state: TrainState, names: Collection[str]
    ) -> Iterator[tuple[str, str]]:
        """Yield name and SHA-256 of the files that a save would write, those of this rank first. For rank 0.

        Args:
            effect: The request.
            state: The state.
            names: Names of the files; shards belong to the file of which they are parts.
        """
        files = checkpoint_files(effect, state, 0, self.world_size)
        yield from _hashes(files, names)
        command = {"do": "hash", "names": tuple(sorted(names))}
        yield from self._run_if_sharded(command, effect, files, dict[str, str]).items()

    def _run_if_sharded(
        self,
        command: Command,
        effect: SaveCheckpoint,
        files: Mapping[str, Pieces],
        carry_out: Callable[[], Mapping[str, _Result]],
    ) -> dict[str, _Result]:
        """Return the results of all ranks if files have shards, else those of rank 0, which others do not wait for."""
        if FILES.issuperset(files):
            return dict(carry_out())
        results = self._run({**command, "request": json.dumps(CONVERTER.unstructure(effect))}, carry_out)
        return {name: result for each in results for name, result in each.items()}

    def _run(self, command: Command, carry_out: Callable[[], _Result]) -> list[_Result]:
        """Send a command to the other ranks, carry it out here, and return the results of all ranks."""
        self._gather(_COMMAND, command)
        error: Exception | None = None
        result: _Result | None = None
        try:
            result = carry_out()
        except Exception as caught:  # noqa: BLE001  # raised below, once the others have ended
            error = caught
        reports = self._gather(_RESULT, {"result": result, "error": None if error is None else str(error)})
        if error is not None:
            raise error
        for rank, report in enumerate(reports):
            if report["error"] is not None:
                raise RankSaveError(f"rank {rank}: {report['error']}")
        return [report["result"] for report in reports]

    def follow(self, state: TrainState) -> None:
        """Carry out the commands of rank 0 for a state until it ends the save. For all other ranks.

        Raises:
            CheckpointError: If the save failed, with the error of rank 0.
        """
        while True:
            command = self._gather(_COMMAND, None)[0]
            if _END in command:
                if command[_END] is not None:
                    raise CheckpointError(command[_END])
                return
            report: dict[str, Any] = {"result": None, "error": None}
            try:
                report["result"] = self._carry_out(state, command)
            except Exception as error:  # noqa: BLE001  # rank 0 raises it
                is_clear = isinstance(error, (OSError, NoetherError, TypeError))
                report["error"] = str(error) if is_clear else error_text(error)
            self._gather(_RESULT, report)

    def _carry_out(self, state: TrainState, command: Command) -> dict[str, Any]:
        """Write the shards of this rank, or return their hashes."""
        request = CONVERTER.structure(json.loads(command["request"]), SaveCheckpoint)
        files = checkpoint_files(request, state, self.rank, self.world_size)
        if command["do"] == "hash":
            return dict(_hashes(files, command["names"]))
        return dict(self._writer.write(command["tag"], files))

    def answer_of_rank_0(self, what: str, answer: bool) -> bool:  # noqa: FBT001  # it is data
        """Return the answer of rank 0 on all ranks, asked in the main thread."""
        return bool(self._control.gather(what, answer)[0])

    def _gather(self, what: str, value: Any) -> list[Any]:
        try:
            return self._exchange.gather(what, value)
        except BaseException as error:
            self.failure = error
            raise


def _hashes(files: Mapping[str, Pieces], names: Collection[str]) -> Iterator[tuple[str, str]]:
    for name, pieces in files.items():
        if file_of(name) in names:
            digest = hashlib.sha256()
            for piece in pieces:
                digest.update(piece)
            yield name, digest.hexdigest()
