"""How often a schedule of one counter fires between two iterations of a run, without walking through the run."""

from __future__ import annotations

from math import gcd
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from noether.core.iteration import TrainingIteration
    from noether.core.run import Run
    from noether.core.schedules.schedule import OneCounter


def count_firings(member: OneCounter, start: TrainingIteration, end: TrainingIteration, run: Run) -> int:
    """Return how often a schedule of one counter fires in `(start, end]`; for several see `unions`."""
    if member.counter == "epoch":
        return _count_epochs(member, start, end, run)
    if member.counter == "update":
        return _count_updates(member, start, end, run)
    return _count_samples(member, start, end, run)


def _count_epochs(member: OneCounter, start: TrainingIteration, end: TrainingIteration, run: Run) -> int:
    low, high = member.window.clip("epoch", start.epoch, end.epoch)
    first, last = member.window.updates(run, apart_from="epoch")
    # An epoch lies in the window of another counter with its last update.
    if first:
        low = max(low, first // run.updates_per_epoch)
    if last is not None:
        high = min(high, last // run.updates_per_epoch)
    return member.thresholds_in(low, high) if low < high else 0


def _count_updates(member: OneCounter, start: TrainingIteration, end: TrainingIteration, run: Run) -> int:
    low, high = member.window.clip("update", start.update, end.update)
    first, last = member.window.updates(run, apart_from="update")
    low, high = max(low, first), high if last is None else min(high, last)
    return member.thresholds_in(low, high) if low < high else 0


def _count_samples(member: OneCounter, start: TrainingIteration, end: TrainingIteration, run: Run) -> int:
    first, last = member.window.updates(run, apart_from="sample")
    low, high = max(start.update, first), end.update if last is None else min(end.update, last)
    if low >= high:
        return 0
    low_sample, high_sample = run.iteration_after(low).sample, run.iteration_after(high).sample
    clipped_low, clipped_high = member.window.clip("sample", low_sample, high_sample)
    if clipped_low >= clipped_high:
        return 0
    # The window may begin and end inside of a batch: those two updates are looked at by themselves.
    opening, closing = run.updates_until(clipped_low + 1), run.updates_until(clipped_high)
    if opening == closing:
        return int(member.thresholds_in(clipped_low, clipped_high) > 0)
    whole = member.updates_crossing(closing - 1, run) - member.updates_crossing(opening, run)
    opened = member.thresholds_in(clipped_low, run.iteration_after(opening).sample) > 0
    closed = member.thresholds_in(run.iteration_after(closing - 1).sample, clipped_high) > 0
    return whole + opened + closed


def updates_crossing_multiples(n: int, updates: int, run: Run) -> int:
    """Return how many of the first `updates` updates have a multiple of `n` among their samples.

    Example:
        >>> from noether.core.run import Run
        >>> updates_crossing_multiples(3, 5, Run(updates_per_epoch=5, samples_per_epoch=9, effective_batch_size=2))
        3
    """
    if n >= run.effective_batch_size:  # no batch is long enough for two multiples
        return run.iteration_after(updates).sample // n
    short = run.samples_per_epoch - (run.updates_per_epoch - 1) * run.effective_batch_size
    if short >= n:  # every batch is long enough for one
        return updates
    # Only the last batch of an epoch can miss: it ends at k * samples_per_epoch, for k = 1, 2, ...
    epochs, length = updates // run.updates_per_epoch, run.samples_per_epoch
    crossing = floor_sum(epochs, n, length, length) - floor_sum(epochs, n, length, length - short)
    return updates - epochs + crossing


def multiples_crossing(step: int, n: int, updates: int, run: Run) -> int:
    """Return at how many of the first `updates` updates, only every `step`-th looked at, `n` has a multiple.

    Epoch's ends and multiples of `step` lie to each other as at the beginning after their least common multiple. So
    the updates that are looked at come in rows, one for each place in that period, with equal batches in each row and
    as many samples from one to the next; and along a row, floors of a line are added up.

    Example:
        >>> from noether.core.run import Run
        >>> run = Run(updates_per_epoch=5, samples_per_epoch=9, effective_batch_size=2)
        >>> multiples_crossing(2, 3, 8, run), [run.iteration_after(update).sample for update in (2, 4, 6, 8)]
        (2, [4, 8, 11, 15])
    """
    length, samples = batch_period(run)
    shared = gcd(length, step)
    looked_at, rows, row_samples = updates // step, length // shared, step // shared * samples
    crossing = 0
    for first in range(1, min(rows, looked_at) + 1):
        terms = (looked_at - first) // rows + 1
        low, high = (run.iteration_after(update).sample for update in (first * step - 1, first * step))
        if high - low >= n:
            crossing += terms
        else:  # a batch holds one multiple at most
            crossing += floor_sum(terms, n, row_samples, high) - floor_sum(terms, n, row_samples, low)
    return crossing


def batch_period(run: Run) -> tuple[int, int]:
    """Return the updates, and their samples, after which batches come as before: those of an epoch, or just one.

    Example:
        >>> from noether.core.run import Run
        >>> batch_period(Run(updates_per_epoch=5, samples_per_epoch=9, effective_batch_size=2))
        (5, 9)
        >>> batch_period(Run(updates_per_epoch=5, samples_per_epoch=10, effective_batch_size=2))
        (1, 2)
    """
    even = run.updates_per_epoch * run.effective_batch_size == run.samples_per_epoch
    return (1, run.effective_batch_size) if even else (run.updates_per_epoch, run.samples_per_epoch)


def floor_sum(terms: int, divisor: int, slope: int, offset: int) -> int:
    """Return the sum of `(slope * i + offset) // divisor` for `0 <= i < terms`, in logarithmic time.

    Counting the lattice points below a line, by the same steps as Euclid's algorithm; see Graham, Knuth, Patashnik,
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
