"""How often a schedule of one counter fires between two iterations of a run, without walking through the run."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from noether.core.iteration import TrainingIteration
    from noether.core.run import Run
    from noether.core.schedule import OneCounter


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
