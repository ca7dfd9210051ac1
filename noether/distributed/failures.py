"""How the failure of one rank ends all ranks of a run, each with the error of the rank that failed first."""

from __future__ import annotations

import json
import re
import time
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Final, cast, final

import torch

from noether.core.errors import NoetherError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch.distributed.distributed_c10d import Store

NO_RANK: Final = -1
"""In place of a rank, where no single rank is to blame."""
_QUIET_S: Final = 1.0
"""After this time without a further arrival, a rank takes those that have not arrived as absent."""
_POLL_S: Final = 0.02
_LONGEST_TEXT: Final = 16_000
_KEY: Final = "first"
_TIMEOUTS: Final = ("timed out", "timeout")
_CLOSED: Final = ("closed by peer", "connection closed", "reset by peer", "broken pipe", "connection refused")
_BLAMED: Final = re.compile(r"ranks? ([\d, ]+) failed to pass monitoredbarrier")
_BACKENDS: Final = ("gloo", "nccl")
_BARRIER: Final = "monitoredbarrier"
"""In the error of a rank that ended or hangs, under `TORCH_DISTRIBUTED_DEBUG=DETAIL`."""


@final
@dataclass(frozen=True, kw_only=True)
class RankFailure:
    """The first failure among the ranks of a run.

    Args:
        rank: The rank that failed; `NO_RANK` if it is not known, or no single one.
        text: What happened.
        reporter: The rank that noticed it: the same, or one that waited for it. It shows the failure to the user.
        time_s: When it was noticed, in seconds since the epoch.
    """

    rank: int
    text: str
    reporter: int
    time_s: float

    def __str__(self) -> str:
        return f"rank {self.rank} failed: {self.text}" if self.rank == self.reporter else self.text


class RankError(NoetherError, RuntimeError):
    """Another rank of the run failed, ended or hangs, so this rank ends as well.

    Args:
        failure: What was noticed first among all ranks.
    """

    def __init__(self, failure: RankFailure) -> None:
        super().__init__(str(failure))
        self.failure = failure


@final
class Failures:
    """Where the ranks of a run report the first failure, and find out why a collective failed.

    Args:
        store: A store that all ranks share, with keys that no earlier run used; None for one process.
        rank: This rank.
        world_size: Number of ranks.
        timeout_s: Seconds that a rank waits in a collective.

    Example:
        >>> from torch.distributed import HashStore
        >>> failures = Failures(HashStore(), rank=1, world_size=2)
        >>> str(failures.report(ValueError("no such file")))
        'rank 1 failed: ValueError: no such file'
    """

    def __init__(
        self, store: Store | None = None, *, rank: int = 0, world_size: int = 1, timeout_s: float = 0.0
    ) -> None:
        self._store = store
        self._rank = rank
        self._world_size = world_size
        self._timeout_s = timeout_s

    def report(self, error: BaseException, *, is_of_all: bool = False) -> RankFailure | None:
        """Report an error of this rank, unless a failure was reported before; return the first failure.

        Args:
            error: The error.
            is_of_all: Whether it is usually that of all ranks, so that rank 0 reports it; as for any error of noether
                itself, such as one in the configuration.

        Returns:
            The first failure of all ranks; None for one process.
        """
        if self._store is None:
            return None
        if isinstance(error, RankError):
            return error.failure
        if _is_of_backend(error) and (cause := self._find_cause("a collective", str(error).lower())) is not None:
            return cause  # of a collective outside of `explain`, such as one of the model
        if (is_of_all or isinstance(error, NoetherError)) and self._rank != 0:
            self._await_first()
        notes = "".join(f"\n  {note}" for note in getattr(error, "__notes__", ()))
        text = f"{type(error).__name__}: {error}".removesuffix(": ") + notes
        return self._report(RankFailure(rank=self._rank, text=text, reporter=self._rank, time_s=time.time()))

    def first(self) -> RankFailure | None:
        """Return the first failure that a rank reported; None if there is none yet."""
        if self._store is None:
            return None
        try:
            return RankFailure(**json.loads(self._store.get(_KEY))) if self._store.check([_KEY]) else None
        except RuntimeError:  # the process that holds the store has ended
            return None

    def await_ranks(self, what: str, timeout_s: float) -> list[int]:
        """Wait until all ranks have called this; return those that have not in time.

        Args:
            what: Name of what the ranks wait for, the same on all ranks and another one for each call.
            timeout_s: Seconds to wait.

        Raises:
            RankError: If a rank reports a failure before.
        """
        if self._store is None:
            return []
        deadline_s = time.monotonic() + timeout_s
        self._store.set(f"{what}/{self._rank}", "")
        arrived = self._store.add(what, 1)
        while arrived < self._world_size:
            if (first := self.first()) is not None:
                raise RankError(first)
            if time.monotonic() >= deadline_s:
                return [rank for rank in range(self._world_size) if not self._store.check([f"{what}/{rank}"])]
            time.sleep(_POLL_S)
            arrived = self._store.add(what, 0)
        return []

    @contextmanager
    def announce_work(self, what: str) -> Iterator[None]:
        """Tell the ranks that wait for this one what it does in the block, for their error if that takes too long.

        Args:
            what: What it does, such as `a save at E1_U8_S32`.
        """
        if self._store is None:
            yield
            return
        self._announce(what)
        try:
            yield
        finally:
            self._announce("")

    def _announce(self, what: str) -> None:
        with suppress(RuntimeError):  # the process that holds the store has ended
            cast("Store", self._store).set(f"works/{self._rank}", what)

    def _await_first(self) -> None:
        deadline_s = time.monotonic() + _QUIET_S
        while self.first() is None and time.monotonic() < deadline_s:
            time.sleep(_POLL_S)

    @contextmanager
    def explain(self, what: str) -> Iterator[None]:
        """Raise a `RankError` in place of the error of a collective in the block that another rank caused.

        Args:
            what: Name of what the ranks do together, for the error.

        Raises:
            RankError: If another rank failed, ended or does not take part, with its error or with its rank.
        """
        try:
            yield
        except NoetherError:
            raise
        except RuntimeError as error:
            if self._store is None or isinstance(error, torch.OutOfMemoryError):
                raise
            cause = self._find_cause(what, str(error).lower())
            if cause is None:
                raise
            raise RankError(cause) from error

    def _find_cause(self, what: str, message: str) -> RankFailure | None:
        """Return the first failure; if no rank reported one, report the ranks that are absent; None if that fails."""
        store = cast("Store", self._store)
        try:
            if not any(each in message for each in (*_TIMEOUTS, *_CLOSED, _BARRIER)):
                return self.first()
            store.set(f"arrived/{self._rank}", what)
            absent = self._find_absent(store)
            if (blamed := _BLAMED.search(message)) is not None:  # others wait for these, without an error yet
                named = {int(rank) for rank in blamed[1].split(",")}
                absent = [rank for rank in absent if rank in named] or absent
            if (first := self.first()) is not None:
                return first
            if absent:
                text = self._describe_work(store, what, absent, message) or self._describe_absent(what, absent, message)
            else:
                text = self._describe_waits(store)
        except RuntimeError:
            absent, text = [], f"the process that holds the store (torchrun, or rank 0) ended during {what}"
        rank = absent[0] if len(absent) == 1 else NO_RANK
        return self._report(RankFailure(rank=rank, text=text, reporter=self._rank, time_s=time.time()))

    def _find_absent(self, store: Store) -> list[int]:
        """Return the ranks that have not met the error of a collective, or [] once a failure is reported."""
        absent, deadline_s = list(range(self._world_size)), time.monotonic() + _QUIET_S
        while absent and time.monotonic() < deadline_s:
            if store.check([_KEY]):
                return []
            still = [rank for rank in absent if not store.check([f"arrived/{rank}"])]
            if still != absent:
                absent, deadline_s = still, time.monotonic() + _QUIET_S
            time.sleep(_POLL_S)
        return absent

    def _describe_absent(self, what: str, absent: list[int], message: str) -> str:
        one_of = "" if len(absent) == 1 else "one of "
        ranks = f"rank{'s' if len(absent) > 1 else ''} {', '.join(map(str, absent))}"
        if _BARRIER in message:
            return f"{one_of}{ranks} ended or hangs during {what}"
        if any(each in message for each in _TIMEOUTS):
            verb, them = ("hangs", "it") if len(absent) == 1 else ("hang", "them")
            return f"{ranks} {verb}: the others waited {self._timeout_s:g} s for {them} in {what}"
        return f"{one_of}{ranks} ended without a message (killed, or out of memory?) during {what}"

    def _describe_work(self, store: Store, what: str, absent: list[int], message: str) -> str | None:
        """Return what the one absent rank has announced to do, and for how long the others waited; else None."""
        if len(absent) != 1 or not any(each in message for each in _TIMEOUTS):
            return None
        key = f"works/{absent[0]}"
        work = store.get(key).decode() if store.check([key]) else ""
        if not work:
            return None
        return (
            f"rank {absent[0]} hangs in {work}, or needs longer for it than the {self._timeout_s:g} s for which the "
            f"others waited in {what}: trainer.rank_timeout_s sets how long they wait"
        )

    def _describe_waits(self, store: Store) -> str:
        places = (f"rank {rank} in {store.get(f'arrived/{rank}').decode()}" for rank in range(self._world_size))
        return f"the ranks lost each other after up to {self._timeout_s:g} s: {', '.join(places)}"

    def _report(self, failure: RankFailure) -> RankFailure:
        """Write a failure to the store unless it has one; return the one that it has."""
        text = json.dumps(asdict(replace(failure, text=failure.text[:_LONGEST_TEXT])))
        try:
            return RankFailure(**json.loads(cast("Store", self._store).compare_set(_KEY, "", text)))
        except RuntimeError:  # the process that holds the store has ended
            return failure


def _is_of_backend(error: BaseException) -> bool:
    """Return whether a backend of torch.distributed raised an error because another rank is gone."""
    message = str(error).lower()
    is_of_torch = isinstance(error, RuntimeError) and not isinstance(error, NoetherError)
    is_of_backend = is_of_torch and any(each in message for each in _BACKENDS)
    return is_of_backend and any(each in message for each in (*_TIMEOUTS, *_CLOSED))
