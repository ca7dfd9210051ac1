"""The lengths of a run and of its epochs, and the arithmetic of counters that follows from them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from noether.core.iteration import COUNTERS, Counter, TrainingIteration


@dataclass(frozen=True, kw_only=True, eq=False)
class RunLengths:
    """Where a run ends, and how long its epochs are; `Run` has them, too.

    Args:
        end: The end of the run, a point on one counter.
        updates_per_epoch: Optimizer updates in one epoch, >= 1.
        samples_per_epoch: Training samples in one epoch, >= 1.
        effective_batch_size: Samples of every update, >= 1; the last one of an epoch may have fewer.

    Example:
        >>> end = TrainingIteration(epoch=2)
        >>> lengths = RunLengths(end=end, updates_per_epoch=3, samples_per_epoch=10, effective_batch_size=4)
        >>> str(lengths.final)
        'E2_U6_S20'
    """

    end: TrainingIteration
    updates_per_epoch: int
    samples_per_epoch: int
    effective_batch_size: int

    def iteration_after(self, update: int) -> TrainingIteration:
        """Return the iteration after `update` updates, counting every epoch that they complete."""
        epoch, rest = divmod(update, self.updates_per_epoch)
        sample = epoch * self.samples_per_epoch
        if rest:
            sample += min(rest * self.effective_batch_size, self.samples_per_epoch)
        return TrainingIteration(epoch, update, sample)

    def updates_until(self, sample: int) -> int:
        """Return the number of updates after which at least `sample` samples are completed.

        Example:
            >>> RunLengths(
            ...     end=TrainingIteration(epoch=1), updates_per_epoch=3, samples_per_epoch=10, effective_batch_size=4
            ... ).updates_until(11)
            4
        """
        epoch, rest = divmod(sample, self.samples_per_epoch)
        return epoch * self.updates_per_epoch + -(-rest // self.effective_batch_size)

    def updates_to(self, counter: Counter, count: int) -> int:
        """Return the number of updates after which `count` of `counter` are completed."""
        if counter == "epoch":
            return count * self.updates_per_epoch
        return count if counter == "update" else self.updates_until(count)

    @property
    def final(self) -> TrainingIteration:
        """The last iteration of the run, unless a callback stops it early."""
        return _find_final(self.end, self.updates_per_epoch, self.samples_per_epoch, self.effective_batch_size)


@lru_cache(maxsize=32)  # progress reads it several times per line
def _find_final(end: TrainingIteration, *lengths: int) -> TrainingIteration:
    updates_per_epoch, samples_per_epoch, effective_batch_size = lengths
    run = RunLengths(
        end=end,
        updates_per_epoch=updates_per_epoch,
        samples_per_epoch=samples_per_epoch,
        effective_batch_size=effective_batch_size,
    )
    return run.iteration_after(max(run.updates_to(name, getattr(end, name)) for name in COUNTERS))
