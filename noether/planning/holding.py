"""How many bytes of passing checkpoints, those that are removed again, can lie on the disk at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from noether.core.event import AfterTraining
from noether.core.schedules.forecast import Occasions, firings

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from noether.core.effect import SaveCheckpoint
    from noether.core.run import Run
    from noether.planning.requests import Ask


class _Reason(NamedTuple):
    """Why checkpoints stay.

    Args:
        asks: Of all that these requests make, the newest stay.
        keep: How many of them.
        follows: Whether it always holds the newest; a pointer that a metric moves may stay behind.
    """

    asks: list[Ask]
    keep: int
    follows: bool


def is_resumable(save: SaveCheckpoint) -> bool:
    """Return whether a run could go on from the checkpoint."""
    return save.weights and save.optimizer and not save.models and save.weights_of is None


def may_be_resumable(ask: Ask, asks: Iterable[Ask]) -> bool:
    """Return whether it makes a checkpoint that a run could go on from, by itself or with others of the same event."""
    if is_resumable(ask.save):
        return True
    together = [other for other in asks if other.slot == ask.slot]
    with_weights = any(other.save.weights for other in together)
    return with_weights and any(other.save.optimizer for other in together) and ask.save.weights_of is None


def most_held(asks: Sequence[Ask], run: Run) -> int:
    """Return an upper bound, one that is being written included.

    A checkpoint stays because it is among the newest of whoever asked for it, because a pointer names it, or because it
    is the newest that the run could go on from. Each of these reasons counts with the largest that it can hold, unless
    what it holds is held for a reason that was counted before.
    """
    if not asks:
        return 0
    counted: list[_Reason] = []
    for reason in _reasons(asks, run):
        if not _is_covered(reason, counted):
            counted.append(reason)
    held = sum(reason.keep * max(_size(ask, asks) for ask in reason.asks) for reason in counted)
    return held + max(_size(ask, asks) for ask in asks)


def _reasons(asks: Sequence[Ask], run: Run) -> Iterator[_Reason]:
    for owner in dict.fromkeys(owner for ask in asks for owner in ask.save.retention):
        own = [ask for ask in asks if owner in ask.save.retention]
        keep = max(ask.save.retention[owner] or 0 for ask in own)
        if keep:
            yield _Reason(own, min(keep, sum(firings(ask.occasions, run).count for ask in own)), follows=True)
    # Those that are set at the end only name what others name, too.
    pointers = dict.fromkeys(pointer for ask in asks for pointer in ask.save.pointers)
    setting = [[ask for ask in asks if pointer in ask.save.pointers] for pointer in pointers]
    for own in sorted(setting, key=_at_end_only):
        yield _Reason(own, 1, follows=all(ask.certain for ask in own))
    resumable = [ask for ask in asks if may_be_resumable(ask, asks)]
    if resumable:
        yield _Reason(resumable, 1, follows=True)


def _is_covered(reason: _Reason, counted: Iterable[_Reason]) -> bool:
    """Return whether the newest of what its requests make is always held for other reasons.

    The newest of several is the newest of one of them: so it is if each request belongs to a reason that holds the
    newest of these requests and no others, or is kept for good.
    """
    others = [other for other in counted if other.follows]
    return reason.follows and all(
        None in ask.save.retention.values() or any(_covers(other, ask, reason) for other in others)
        for ask in reason.asks
    )


def _covers(other: _Reason, ask: Ask, reason: _Reason) -> bool:
    if not any(ask is each for each in other.asks):
        return False
    if _at_end_only(reason.asks):  # nothing newer follows, but from the same event
        return sum(map(_is_at_end, other.asks)) == 1
    return all(any(each is own for own in reason.asks) for each in other.asks)


def _at_end_only(asks: Iterable[Ask]) -> bool:
    return all(map(_is_at_end, asks))


def _is_at_end(ask: Ask) -> bool:
    return ask.occasions == Occasions(None, (AfterTraining,))


def _size(ask: Ask, asks: Iterable[Ask]) -> int:
    """Return the bytes of the largest checkpoint that it is a part of."""
    return sum({part: size for other in asks if other.slot == ask.slot for part, size in other.sizes.items()}.values())
