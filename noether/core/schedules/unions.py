"""How often any of several schedules fires at events of one kind, without walking through the run.

The events are numbered by *ticks*: an update is a tick, or an epoch is. Where windows begin and end and where single
points lie, the ticks are looked at one by one; between them a fixed set of multiples is left, and that is counted in
closed form.
"""

from __future__ import annotations

import dataclasses
from collections import Counter as Multiset
from math import gcd, lcm
from typing import TYPE_CHECKING, NamedTuple

from noether.core.iteration import COUNTERS
from noether.core.schedules.counting import batch_period, multiples_crossing, updates_crossing_multiples

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from noether.core.iteration import TrainingIteration
    from noether.core.run import Run
    from noether.core.schedules.schedule import OneCounter, Schedule

_AROUND = (-1, 0, 1, 2)
"""The ticks beside one at which a window begins or ends that may see only a part of it."""


def count_union(schedule: Schedule, start: TrainingIteration, end: TrainingIteration, run: Run) -> int:
    """Return how often `schedule` fires in `(start, end]`, where all of it reads the same kind of event.

    The time that it takes does not grow with the run. It grows with the number of points and windows; where multiples
    of samples are united with those of updates and epochs have a short last batch, with the updates of an epoch; and
    where multiples of several numbers of samples are united, with the firings in one period: after the least common
    multiple of all intervals and an epoch, updates, samples and batches lie to each other as at the beginning.

    Example:
        >>> from noether.core.iteration import TrainingIteration
        >>> from noether.core.run import Run
        >>> from noether.core.schedules.schedule import EveryNUpdates
        >>> run = Run(updates_per_epoch=10, samples_per_epoch=100, effective_batch_size=10)
        >>> both = EveryNUpdates(2) | EveryNUpdates(3)
        >>> count_union(both, TrainingIteration(), run.iteration_after(3 * 10**9), run)
        2000000000
    """
    on_epoch = schedule.members[0].counter == "epoch"
    length = run.updates_per_epoch if on_epoch else 1
    low, high = (start.epoch, end.epoch) if on_epoch else (start.update, end.update)
    looked_at = sorted(tick for tick in _special(schedule.members, run, length) if low < tick <= high)
    firings = sum(_fires(schedule, tick * length, run, on_epoch=on_epoch) for tick in looked_at)
    for begin, stop in zip([low, *looked_at], [*(tick - 1 for tick in looked_at), high], strict=True):
        if begin < stop:
            active = _active(schedule.members, stop * length, run, on_epoch=on_epoch)
            firings += _multiples_of(active, begin, stop, run)
    return firings


def _special(members: Iterable[OneCounter], run: Run, length: int) -> set[int]:
    """Return the ticks beside which a window begins or ends, or a single point lies."""
    ticks: set[int] = set()
    for member in members:
        bounds = [(name, getattr(end, name)) for end in (member.window.start, member.window.until) for name in COUNTERS]
        for counter, value in (*bounds, *((member.counter, point) for point in member.singles)):
            if value:
                ticks.update(run.updates_to(counter, value) // length + beside for beside in _AROUND)
    return ticks


def _fires(schedule: Schedule, update: int, run: Run, *, on_epoch: bool) -> bool:
    return schedule.due(*_event_at(update, run, on_epoch=on_epoch))


def _event_at(update: int, run: Run, *, on_epoch: bool) -> tuple[TrainingIteration, TrainingIteration]:
    """Return previous and present iteration of the event after `update` updates."""
    previous, iteration = run.iteration_after(update - 1), run.iteration_after(update)
    # After an update, the epoch that it fills is not counted yet.
    return previous, iteration if on_epoch else dataclasses.replace(iteration, epoch=previous.epoch)


class _Multiples(NamedTuple):
    """Intervals of multiples that are counted together: in ticks, and in samples."""

    ticks: tuple[int, ...]
    samples: tuple[int, ...]


def _active(members: Iterable[OneCounter], update: int, run: Run, *, on_epoch: bool) -> _Multiples:
    """Return what is due at multiples in the part of the run in which that update lies."""
    previous, iteration = _event_at(update, run, on_epoch=on_epoch)
    inside = [m for m in members if m.interval is not None and m.window.is_open(previous, iteration)]
    ticks = {m.interval or 0 for m in inside if m.counter != "sample"}
    samples = {m.interval or 0 for m in inside if m.counter == "sample"}
    if samples and min(samples) <= _shortest(run):  # every batch holds a multiple
        ticks.add(1)
    return _Multiples(_independent(ticks), () if 1 in ticks else _independent(samples))


def _shortest(run: Run) -> int:
    return run.samples_per_epoch - (run.updates_per_epoch - 1) * run.effective_batch_size


def _independent(numbers: Iterable[int]) -> tuple[int, ...]:
    """Return the numbers without those that are multiples of another one."""
    kept: list[int] = []
    for number in sorted(set(numbers)):
        if all(number % other for other in kept):
            kept.append(number)
    return tuple(kept)


def _multiples_of(active: _Multiples, low: int, high: int, run: Run) -> int:
    """Return at how many ticks in `(low, high]` a multiple lies."""
    if len(active.samples) > 1:
        return _walked(active, low, high, run)
    return _multiples_until(active, high, run) - _multiples_until(active, low, run)


def _multiples_until(active: _Multiples, limit: int, run: Run) -> int:
    """Return at how many of the first `limit` ticks a multiple lies, of one number of samples at most."""
    ticks = multiples_of_any(active.ticks, limit)
    for n in active.samples:
        both = sum(times * multiples_crossing(each, n, limit, run) for each, times in _terms(active.ticks, limit))
        ticks += updates_crossing_multiples(n, limit, run) - both
    return ticks


def multiples_of_any(numbers: Sequence[int], limit: int) -> int:
    """Return how many of the numbers from 1 to `limit` are a multiple of any of `numbers`.

    Example:
        >>> multiples_of_any((4, 6), 24), sum(n % 4 == 0 or n % 6 == 0 for n in range(1, 25))
        (8, 8)
    """
    return sum(times * (limit // multiple) for multiple, times in _terms(numbers, limit))


def _terms(numbers: Sequence[int], limit: int) -> Iterable[tuple[int, int]]:
    """Return `(number, times)`: how often to count its multiples, that each multiple of any of `numbers` counts once.

    By inclusion and exclusion: what is a multiple of several of them is one of their least common multiple. Those
    beyond `limit` are left out, and equal ones are taken together, so that not all subsets are formed.
    """
    terms: Multiset[int] = Multiset()
    for number in numbers:
        overlaps: Multiset[int] = Multiset({number: 1})
        for multiple, times in terms.items():
            overlaps[lcm(multiple, number)] -= times
        terms.update({multiple: times for multiple, times in overlaps.items() if multiple <= limit and times})
    return terms.items()


def _walked(active: _Multiples, low: int, high: int, run: Run) -> int:
    """Return the same from firing to firing, through one period at most."""
    period = _period(active, run)
    whole, rest = divmod(high - low, period)
    step = _stepper(active, run)
    part = _steps(step, low, low + rest)
    return part + whole * (part + _steps(step, low + rest, low + period)) if whole else part


def _period(active: _Multiples, run: Run) -> int:
    """Return the number of updates after which multiples and batches lie as before."""
    updates, samples = batch_period(run)
    return updates * lcm(
        *(number // gcd(number, updates) for number in active.ticks),
        *(number // gcd(number, samples) for number in active.samples),
    )


def _stepper(active: _Multiples, run: Run) -> Callable[[int], int]:
    """Return the function from an update to the next one at which a multiple lies."""

    def step(update: int) -> int:
        sample = run.iteration_after(update).sample
        updates = [(update // n + 1) * n for n in active.ticks]
        return min([*updates, *(run.updates_until((sample // n + 1) * n) for n in active.samples)])

    return step


def _steps(step: Callable[[int], int], low: int, high: int) -> int:
    firings, update = 0, step(low)
    while update <= high:
        firings, update = firings + 1, step(update)
    return firings
