"""How many checkpoints some requests make in a part of a run, and of how many bytes."""

from __future__ import annotations

from collections import defaultdict
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

from noether.core.schedules.forecast import Occasions, count_until, fires

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from noether.core.event import Event
    from noether.core.run import Run
    from noether.core.schedules.forecast import Firing
    from noether.core.schedules.schedule import Schedule
    from noether.planning.requests import Ask, Slot


class Span(NamedTuple):
    """A part of a run: the updates after `low` up to `high`; one after -1 begins before training."""

    low: int
    high: int


class Amount(NamedTuple):
    """A number of checkpoints, and their bytes."""

    number: int
    size_bytes: int


def whole(run: Run) -> Span:
    """Return all of a run."""
    return Span(-1, run.final.update)


def made(own: Iterable[Ask], written: Iterable[Ask], span: Span, run: Run) -> Amount:
    """Return the checkpoints that some requests make: those of one event for one slot make one.

    Args:
        own: The requests whose checkpoints count.
        written: Those that say what is in a checkpoint; where they fall together, each adds its parts.
        span: The part of the run.
        run: The run.
    """
    number = size_bytes = 0
    together = by_slot(written)
    for slot, asks in by_slot(own).items():
        number += times(asks, span, run)
        size_bytes += sum(size * meetings([asks, askers], span, run) for askers, size in _askers(together[slot]))
    return Amount(number, size_bytes)


def by_slot(asks: Iterable[Ask]) -> Mapping[Slot, list[Ask]]:
    """Return the requests that become one checkpoint where they fall together."""
    slots: dict[Slot, list[Ask]] = defaultdict(list)
    for ask in asks:
        slots[ask.slot].append(ask)
    return slots


def sizes_of(asks: Iterable[Ask]) -> dict[str, int]:
    """Return the bytes of each part of the checkpoint that requests for one slot make together."""
    return {name: size for ask in asks for name, size in ask.sizes.items()}


def times(asks: Iterable[Ask], span: Span, run: Run) -> int:
    """Return at how many events any of the requests is made."""
    schedule: Schedule | None = None
    once: set[type[Event]] = set()
    for ask in asks:
        once.update(ask.occasions.once)
        if ask.occasions.schedule is not None:
            schedule = ask.occasions.schedule if schedule is None else schedule | ask.occasions.schedule
    occasions = Occasions(schedule, tuple(once))
    before, through = (0 if update < 0 else count_until(occasions, run.iteration_after(update), run) for update in span)
    return through - before


def meetings(groups: Sequence[Sequence[Ask]], span: Span, run: Run) -> int:
    """Return at how many events a request of each group is made; there are one or two of them."""
    total = sum(times(asks, span, run) for asks in groups)
    return total - times(chain.from_iterable(groups), span, run) if len(groups) > 1 else total


def made_at(asks: Iterable[Ask], at: Firing, run: Run) -> list[Ask]:
    """Return the requests that are made at an event."""
    return [ask for ask in asks if fires(ask.occasions, at, run)]


def _askers(asks: Sequence[Ask]) -> Iterator[tuple[list[Ask], int]]:
    """Yield `(requests, bytes)` of the parts of a checkpoint that the same requests ask for."""
    by_askers: dict[tuple[int, ...], int] = defaultdict(int)
    for name, size in sizes_of(asks).items():
        by_askers[tuple(index for index, ask in enumerate(asks) if name in ask.sizes)] += size
    for indices, size in by_askers.items():
        yield [asks[index] for index in indices], size
