"""How many checkpoints a run will write and keep, and their bytes, by arithmetic on who asks for what and when."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, final

from noether.planning.amounts import by_slot, made, sizes_of, whole
from noether.planning.holding import is_resumable, may_be_resumable, most_held
from noether.planning.keeping import kept

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from noether.core.run import Run
    from noether.planning.requests import Ask


class Bounds(NamedTuple):
    """A number that is not known exactly where metrics decide."""

    at_least: int
    at_most: int


@final
@dataclass(frozen=True)
class Checkpoints:
    """What a run writes and keeps, if nothing stops it early.

    Bytes are those of tensors. The text beside them (their names and shapes, `state.json`, hashes) is not counted: some
    of its numbers are only known in training.

    Args:
        written: How many checkpoints are written.
        kept: How many are there at the end.
        each_bytes: Bytes of one, for each different size.
        written_bytes: Bytes of all that are written.
        kept_bytes: Bytes of all that are there at the end.
        peak_bytes: The most that can be on the disk at any time: one is written before another one is removed.
    """

    written: Bounds
    kept: Bounds
    each_bytes: tuple[int, ...]
    written_bytes: Bounds
    kept_bytes: Bounds
    peak_bytes: int


def checkpoints(asks: Sequence[Ask], run: Run) -> Checkpoints:
    """Return what comes of all requests together: those of one event for one slot become one checkpoint.

    Args:
        asks: What is asked for, and when.
        run: The run.
    """
    certain, lasting = [ask for ask in asks if ask.certain], _lasting(asks)
    least_written, most_written = (made(each, each, whole(run), run) for each in (certain, asks))
    least_kept = kept(certain, certain, run)
    most_kept = kept(certain, asks, run) if len(certain) < len(asks) else least_kept
    extra = _kept_by_metrics(asks, run)
    largest = max((sum(sizes_of(own).values()) for own in by_slot(asks).values()), default=0)
    most_bytes = most_kept.size_bytes + extra * largest
    return Checkpoints(
        written=Bounds(least_written.number, most_written.number),
        kept=Bounds(least_kept.number, most_kept.number + extra),
        each_bytes=tuple(sorted({sum(ask.sizes.values()) for ask in asks})),
        written_bytes=Bounds(least_written.size_bytes, most_written.size_bytes),
        kept_bytes=Bounds(least_kept.size_bytes, most_bytes),
        peak_bytes=max(most_bytes, made(lasting, asks, whole(run), run).size_bytes + most_held(asks, run)),
    )


def _lasting(asks: Iterable[Ask]) -> list[Ask]:
    return [ask for ask in asks if None in ask.save.retention.values()]


def _kept_by_metrics(asks: Sequence[Ask], run: Run) -> int:
    """Return how many checkpoints can stay at most beside those that are certain: of those that a metric decides."""
    uncertain = [ask for ask in asks if not ask.certain]
    lasting = _lasting(uncertain)
    others = [ask for ask in uncertain if ask not in lasting]
    pointers = {pointer for ask in others for pointer in ask.save.pointers}
    owners = {owner: keep or 0 for ask in others for owner, keep in ask.save.retention.items()}
    # What a pointer names anyway counts once.
    resumable = any(
        may_be_resumable(ask, asks) and not (is_resumable(ask.save) and ask.save.pointers) for ask in others
    )
    lasting_number, passing_number = (made(each, each, whole(run), run).number for each in (lasting, others))
    return lasting_number + min(len(pointers) + sum(owners.values()) + resumable, passing_number)
