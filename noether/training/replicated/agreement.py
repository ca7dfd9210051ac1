"""Whether all ranks have the same state: a callback may compute something that differs between them."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, final

import torch
from torch import Tensor

from noether.core.errors import NoetherError
from noether.core.tensors.checksums import sum_bits

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from noether.core.state import TrainState
    from noether.distributed.ranks import Ranks

_LOGGER: Final = logging.getLogger(__name__)
_TRAINED: Final = ("hyperparams", "params", "buffers", "opt_state")
_MEMORY: Final = ("callback_states",)
_DIGEST_BYTES: Final = 6
"""float64 holds whole numbers of so many bytes exactly."""
CAUSE: Final = (
    "A callback decides by something that differs between ranks, such as event.outputs, event.run.rank, random numbers "
    "or a clock: combine outputs by event.run.gather(name, value), and read the time from event.time_s"
)


class RankStateError(NoetherError, RuntimeError):
    """Ranks of a run have different states, so they no longer train the same model."""


@final
class StateAgreement:
    """Compares the states of all ranks where an epoch or the run ends, with the exchange of the time of rank 0.

    Sharded tensors, of which each rank has another part, are left out.

    Args:
        ranks: The ranks of the run.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._has_warned = False

    def compare(self, what: str, state: TrainState, time_s: float) -> float:
        """Return the time of rank 0.

        Args:
            what: Name of the exchange, for errors.
            state: The state of this rank.
            time_s: Its time.

        Raises:
            RankStateError: On all ranks, if a rank has other params, buffers, optimizer memory or hyperparameters.
        """
        sums = {kind: _sums(state, fields) for kind, fields in (("trained", _TRAINED), ("memory", _MEMORY))}
        digests = {kind: _digest(each) for kind, each in sums.items()}
        reduced = self._ranks.control.reduce(
            what,
            of_rank_0={"time_s": time_s},
            largest={f"largest {kind}": digest for kind, digest in digests.items()},
            smallest={f"smallest {kind}": digest for kind, digest in digests.items()},
        )
        for kind, own in sums.items():
            if reduced[f"largest {kind}"] != reduced[f"smallest {kind}"] and not (
                kind == "memory" and self._has_warned
            ):
                found = _describe_difference(self._ranks.control.gather(f"{kind} of {what}", own))
                if kind == "trained":
                    raise RankStateError(f"at {state.iteration}, {found}. {CAUSE}")
                self._has_warned = True
                if self._ranks.is_first:
                    _LOGGER.warning("at %s, %s; checkpoints have those of rank 0. %s", state.iteration, found, CAUSE)
        return reduced["time_s"]


def _sums(state: TrainState, fields: Sequence[str]) -> dict[str, str]:
    """Return a text for each part of the state, by its path, that differs if its values do."""
    parts = dict(part for field in fields for part in _find_parts(getattr(state, field), f"state.{field}"))
    tensors = {path: part for path, part in parts.items() if isinstance(part, Tensor)}
    sums = dict(zip(tensors, sum_bits(list(tensors.values())), strict=True))
    return {
        path: f"{part.dtype} {tuple(part.shape)} {sums[path]}" if isinstance(part, Tensor) else repr(part)
        for path, part in parts.items()
    }


def _find_parts(tree: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yield each part of a tree that holds no others, with its path."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _find_parts(value, f"{path}[{key!r}]")
    elif isinstance(tree, tuple):
        for index, value in enumerate(tree):
            yield from _find_parts(value, f"{path}[{index}]")
    elif not isinstance(tree, Tensor) or (
        tree.layout is torch.strided and not hasattr(tree, "placements") and not (tree.is_quantized or tree.is_nested)
    ):
        yield path, tree


def _digest(sums: Mapping[str, str]) -> float:
    content = repr(sorted(sums.items())).encode()
    return float(int.from_bytes(hashlib.sha256(content).digest()[:_DIGEST_BYTES], "little"))


def _describe_difference(by_rank: Sequence[Mapping[str, str]]) -> str:
    first = by_rank[0]
    for rank, other in enumerate(by_rank):
        names = [path for path in {**first, **other} if first.get(path) != other.get(path)]
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            return f"rank {rank} and rank 0 have different values of {names[0]}{more}"
    return "the ranks have different values"
