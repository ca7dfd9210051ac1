"""How often schedules fire between two iterations of a run, without walking through the run.

Updates and samples are counted at updates, epochs at the ends of epochs; these events are the *ticks*. One schedule is
counted in closed form. For several, the ticks at which windows start and end and at which single points lie are tested
one by one. Between them a fixed set of multiples remains, which is counted by inclusion and exclusion.

The time does not grow with the run. It grows with
- the number of points and windows;
- the updates of an epoch, if multiples of samples and of updates are united and the last batch of an epoch is short;
- the firings in one period, if multiples of several numbers of samples are united. The period is the least common
  multiple of all intervals and an epoch.
"""

from __future__ import annotations

import dataclasses
from collections import Counter as Multiset
from math import gcd, lcm
from typing import TYPE_CHECKING, NamedTuple, Protocol

from noether.core.iteration import COUNTERS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from noether.core.iteration import Counter, TrainingIteration
    from noether.core.run_lengths import RunLengths
    from noether.core.schedules.window import Window

_AROUND = (-1, 0, 1, 2)
"""Offsets of the ticks to test one by one around a tick at which a window starts or ends, or a single point lies."""


class Countable(Protocol):
    """What counting reads of a schedule of one counter; `OneCounter` documents each member."""

    window: Window

    @property
    def counter(self) -> Counter: ...  # noqa: D102  # OneCounter documents it
    @property
    def interval(self) -> int | None: ...  # noqa: D102  # OneCounter documents it
    @property
    def singles(self) -> tuple[int, ...]: ...  # noqa: D102  # OneCounter documents it
    def due(self, previous: TrainingIteration, iteration: TrainingIteration) -> bool: ...  # noqa: D102  # OneCounter documents it
    def thresholds_in(self, low: int, high: int) -> int: ...  # noqa: D102  # OneCounter documents it
    def updates_crossing(self, updates: int, run: RunLengths) -> int: ...  # noqa: D102  # OneCounter documents it


def count_firings(
    members: Sequence[Countable], start: TrainingIteration, end: TrainingIteration, run: RunLengths
) -> int:
    """Return how often the union of schedules of one counter fires in `(start, end]`.

    Example:
        >>> from noether import EveryNUpdates, Run, TrainingIteration
        >>> run = Run(updates_per_epoch=10, samples_per_epoch=100, effective_batch_size=10)
        >>> both = (EveryNUpdates(2), EveryNUpdates(3))
        >>> count_firings(both, TrainingIteration(), run.iteration_after(3 * 10**9), run)
        2000000000
    """
    firings = 0
    for counters in (("update", "sample"), ("epoch",)):
        part = [member for member in members if member.counter in counters]
        if len(part) > 1:
            firings += _count_union(part, start, end, run)
        elif part:
            firings += _count_one(part[0], start, end, run)
    return firings


# One schedule


def _count_one(member: Countable, start: TrainingIteration, end: TrainingIteration, run: RunLengths) -> int:
    if member.counter == "epoch":
        return _count_epochs(member, start, end, run)
    if member.counter == "update":
        return _count_updates(member, start, end, run)
    return _count_samples(member, start, end, run)


def _count_epochs(member: Countable, start: TrainingIteration, end: TrainingIteration, run: RunLengths) -> int:
    low, high = member.window.clip("epoch", start.epoch, end.epoch)
    first, last = member.window.updates(run, apart_from="epoch")
    # An epoch lies in the window of another counter if its last update does.
    if first:
        low = max(low, first // run.updates_per_epoch)
    if last is not None:
        high = min(high, last // run.updates_per_epoch)
    return member.thresholds_in(low, high) if low < high else 0


def _count_updates(member: Countable, start: TrainingIteration, end: TrainingIteration, run: RunLengths) -> int:
    low, high = member.window.clip("update", start.update, end.update)
    first, last = member.window.updates(run, apart_from="update")
    low, high = max(low, first), high if last is None else min(high, last)
    return member.thresholds_in(low, high) if low < high else 0


def _count_samples(member: Countable, start: TrainingIteration, end: TrainingIteration, run: RunLengths) -> int:
    first, last = member.window.updates(run, apart_from="sample")
    low, high = max(start.update, first), end.update if last is None else min(end.update, last)
    if low >= high:
        return 0
    low_sample, high_sample = run.iteration_after(low).sample, run.iteration_after(high).sample
    clipped_low, clipped_high = member.window.clip("sample", low_sample, high_sample)
    if clipped_low >= clipped_high:
        return 0
    # The window may start or end inside a batch, so the first and last update are tested separately.
    opening, closing = run.updates_until(clipped_low + 1), run.updates_until(clipped_high)
    if opening == closing:
        return int(member.thresholds_in(clipped_low, clipped_high) > 0)
    between = member.updates_crossing(closing - 1, run) - member.updates_crossing(opening, run)
    at_opening = member.thresholds_in(clipped_low, run.iteration_after(opening).sample) > 0
    at_closing = member.thresholds_in(run.iteration_after(closing - 1).sample, clipped_high) > 0
    return between + at_opening + at_closing


def updates_crossing_multiples(n: int, updates: int, run: RunLengths) -> int:
    """Return how many of the first `updates` updates have a multiple of `n` among their samples.

    Example:
        >>> from noether import Run
        >>> updates_crossing_multiples(3, 5, Run(updates_per_epoch=5, samples_per_epoch=9, effective_batch_size=2))
        3
    """
    if n >= run.effective_batch_size:  # no batch is long enough for two multiples
        return run.iteration_after(updates).sample // n
    short = _shortest_batch(run)
    if short >= n:  # every batch is long enough for one multiple
        return updates
    # Only the last batch of an epoch can miss: it ends at k * samples_per_epoch, for k = 1, 2, ...
    epochs, length = updates // run.updates_per_epoch, run.samples_per_epoch
    crossing = floor_sum(epochs, n, length, length) - floor_sum(epochs, n, length, length - short)
    return updates - epochs + crossing


def steps_crossing_multiples(step: int, n: int, updates: int, run: RunLengths) -> int:
    """Return how many of the updates `step`, `2 * step`, ... up to `updates` cross a multiple of `n` samples.

    The positions of epoch ends relative to multiples of `step` repeat after their least common multiple. So the tested
    updates form rows, one for each position in that period. Within a row all batches have the same size and the same
    number of samples lies between them, so each row is a sum of floors of a line.

    Example:
        >>> from noether import Run
        >>> run = Run(updates_per_epoch=5, samples_per_epoch=9, effective_batch_size=2)
        >>> steps_crossing_multiples(2, 3, 8, run), [run.iteration_after(update).sample for update in (2, 4, 6, 8)]
        (2, [4, 8, 11, 15])
    """
    length, samples = batch_period(run)
    shared = gcd(length, step)
    tested, rows, row_samples = updates // step, length // shared, step // shared * samples
    crossing = 0
    for first in range(1, min(rows, tested) + 1):
        terms = (tested - first) // rows + 1
        low, high = (run.iteration_after(update).sample for update in (first * step - 1, first * step))
        if high - low >= n:
            crossing += terms
        else:  # a batch contains one multiple at most
            crossing += floor_sum(terms, n, row_samples, high) - floor_sum(terms, n, row_samples, low)
    return crossing


def batch_period(run: RunLengths) -> tuple[int, int]:
    """Return the updates and samples after which batch sizes repeat: those of an epoch, or of one batch.

    Example:
        >>> from noether import Run
        >>> batch_period(Run(updates_per_epoch=5, samples_per_epoch=9, effective_batch_size=2))
        (5, 9)
        >>> batch_period(Run(updates_per_epoch=5, samples_per_epoch=10, effective_batch_size=2))
        (1, 2)
    """
    even = run.updates_per_epoch * run.effective_batch_size == run.samples_per_epoch
    return (1, run.effective_batch_size) if even else (run.updates_per_epoch, run.samples_per_epoch)


def _shortest_batch(run: RunLengths) -> int:
    return run.samples_per_epoch - (run.updates_per_epoch - 1) * run.effective_batch_size


def floor_sum(terms: int, divisor: int, slope: int, offset: int) -> int:
    """Return the sum of `(slope * i + offset) // divisor` for `0 <= i < terms`, in logarithmic time.

    It counts the lattice points below a line with the steps of Euclid's algorithm; see Graham, Knuth, Patashnik,
    Concrete Mathematics, section 3.5.

    Example:
        >>> floor_sum(4, 10, 6, 3), sum((6 * i + 3) // 10 for i in range(4))
        (3, 3)
    """
    total = 0
    while terms > 0:
        total += terms * (terms - 1) // 2 * (slope // divisor) + terms * (offset // divisor)
        slope, offset = slope % divisor, offset % divisor
        height = slope * terms + offset
        terms, offset = divmod(height, divisor)
        slope, divisor = divisor, slope
        if divisor == 0:
            break
    return total


# Unions


def _count_union(
    members: Sequence[Countable], start: TrainingIteration, end: TrainingIteration, run: RunLengths
) -> int:
    """Return how often any of several schedules fires in `(start, end]`, where all read the same kind of event."""
    on_epoch = members[0].counter == "epoch"
    length = run.updates_per_epoch if on_epoch else 1
    low, high = (start.epoch, end.epoch) if on_epoch else (start.update, end.update)
    tested = sorted(tick for tick in _special_ticks(members, run, length) if low < tick <= high)
    firings = sum(_fires(members, tick * length, run, on_epoch=on_epoch) for tick in tested)
    for begin, stop in zip([low, *tested], [*(tick - 1 for tick in tested), high], strict=True):
        if begin < stop:
            active = _active_multiples(members, stop * length, run, on_epoch=on_epoch)
            firings += _count_multiples(active, begin, stop, run)
    return firings


def _special_ticks(members: Iterable[Countable], run: RunLengths, length: int) -> set[int]:
    """Return the ticks near which a window starts or ends, or a single point lies."""
    ticks: set[int] = set()
    for member in members:
        bounds = [(name, getattr(end, name)) for end in (member.window.start, member.window.until) for name in COUNTERS]
        for counter, value in (*bounds, *((member.counter, point) for point in member.singles)):
            if value:
                ticks.update(run.updates_to(counter, value) // length + distance for distance in _AROUND)
    return ticks


def _fires(members: Iterable[Countable], update: int, run: RunLengths, *, on_epoch: bool) -> bool:
    previous, iteration = _event_at(update, run, on_epoch=on_epoch)
    return any(member.due(previous, iteration) for member in members)


def _event_at(update: int, run: RunLengths, *, on_epoch: bool) -> tuple[TrainingIteration, TrainingIteration]:
    """Return the previous and the present iteration at the event after `update` updates."""
    previous, iteration = run.iteration_after(update - 1), run.iteration_after(update)
    # At an update, the epoch that it completes is not counted yet.
    return previous, iteration if on_epoch else dataclasses.replace(iteration, epoch=previous.epoch)


class _Multiples(NamedTuple):
    """Intervals whose multiples are counted together, in ticks and in samples."""

    ticks: tuple[int, ...]
    samples: tuple[int, ...]


def _active_multiples(members: Iterable[Countable], update: int, run: RunLengths, *, on_epoch: bool) -> _Multiples:
    """Return the intervals whose window is open at `update`."""
    previous, iteration = _event_at(update, run, on_epoch=on_epoch)
    active = [m for m in members if m.interval is not None and m.window.is_open(previous, iteration)]
    ticks = {m.interval or 0 for m in active if m.counter != "sample"}
    samples = {m.interval or 0 for m in active if m.counter == "sample"}
    if samples and min(samples) <= _shortest_batch(run):  # every batch contains a multiple
        ticks.add(1)
    return _Multiples(_drop_multiples(ticks), () if 1 in ticks else _drop_multiples(samples))


def _drop_multiples(numbers: Iterable[int]) -> tuple[int, ...]:
    """Return the numbers that are no multiple of another one."""
    independent: list[int] = []
    for number in sorted(set(numbers)):
        if all(number % other for other in independent):
            independent.append(number)
    return tuple(independent)


def _count_multiples(active: _Multiples, low: int, high: int, run: RunLengths) -> int:
    """Return at how many ticks in `(low, high]` a multiple lies."""
    if len(active.samples) > 1:
        return _walk_multiples(active, low, high, run)
    return _multiples_until(active, high, run) - _multiples_until(active, low, run)


def _multiples_until(active: _Multiples, limit: int, run: RunLengths) -> int:
    """Return at how many of the first `limit` ticks a multiple lies, for at most one interval of samples."""
    ticks = multiples_of_any(active.ticks, limit)
    for n in active.samples:
        both = sum(
            sign * steps_crossing_multiples(each, n, limit, run) for each, sign in _signed_terms(active.ticks, limit)
        )
        ticks += updates_crossing_multiples(n, limit, run) - both
    return ticks


def multiples_of_any(numbers: Sequence[int], limit: int) -> int:
    """Return how many of the numbers from 1 to `limit` are a multiple of any of `numbers`.

    Example:
        >>> multiples_of_any((4, 6), 24), sum(n % 4 == 0 or n % 6 == 0 for n in range(1, 25))
        (8, 8)
    """
    return sum(sign * (limit // multiple) for multiple, sign in _signed_terms(numbers, limit))


def _signed_terms(numbers: Sequence[int], limit: int) -> Iterable[tuple[int, int]]:
    """Return `(multiple, sign)`, the terms of inclusion and exclusion that count each multiple of `numbers` once.

    The multiples that several numbers have in common are those of their least common multiple. Terms above `limit` are
    left out and equal ones are added up, so not every subset of the numbers is formed.
    """
    terms: Multiset[int] = Multiset()
    for number in numbers:
        overlaps: Multiset[int] = Multiset({number: 1})
        for multiple, sign in terms.items():
            overlaps[lcm(multiple, number)] -= sign
        terms.update({multiple: sign for multiple, sign in overlaps.items() if multiple <= limit and sign})
    return terms.items()


def _walk_multiples(active: _Multiples, low: int, high: int, run: RunLengths) -> int:
    """Return at how many updates in `(low, high]` a multiple lies, by walking from firing to firing for one period."""
    period = _period(active, run)
    periods, rest = divmod(high - low, period)
    next_multiple = _next_multiple_function(active, run)
    part = _count_steps(next_multiple, low, low + rest)
    return part + periods * (part + _count_steps(next_multiple, low + rest, low + period)) if periods else part


def _period(active: _Multiples, run: RunLengths) -> int:
    """Return the number of updates after which the positions of multiples and batches repeat."""
    updates, samples = batch_period(run)
    return updates * lcm(
        *(number // gcd(number, updates) for number in active.ticks),
        *(number // gcd(number, samples) for number in active.samples),
    )


def _next_multiple_function(active: _Multiples, run: RunLengths) -> Callable[[int], int]:
    """Return the function from an update to the next one at which a multiple lies."""

    def next_multiple(update: int) -> int:
        sample = run.iteration_after(update).sample
        updates = [(update // n + 1) * n for n in active.ticks]
        return min([*updates, *(run.updates_until((sample // n + 1) * n) for n in active.samples)])

    return next_multiple


def _count_steps(next_multiple: Callable[[int], int], low: int, high: int) -> int:
    steps, update = 0, next_multiple(low)
    while update <= high:
        steps, update = steps + 1, next_multiple(update)
    return steps
