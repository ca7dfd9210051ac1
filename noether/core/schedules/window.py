"""Next thresholds on the counters, and the window in which a schedule may fire."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from noether.core.iteration import COUNTERS, Counter, TrainingIteration

if TYPE_CHECKING:
    from collections.abc import Iterable

    from noether.core.run_lengths import RunLengths

START: Final = TrainingIteration()
"""The iteration before the first update."""


@dataclass(frozen=True, slots=True)
class Thresholds:
    """The next threshold on each counter; None where no threshold follows. A schedule is not due before one is reached.

    Example:
        >>> from noether import EveryNUpdates
        >>> EveryNUpdates(4).next_due(TrainingIteration(update=9))
        Thresholds(epoch=None, update=12, sample=None)
    """

    epoch: int | None = None
    update: int | None = None
    sample: int | None = None

    def reached(self, iteration: TrainingIteration) -> bool:
        """Return whether `iteration` has reached any of the thresholds."""
        return (
            (self.epoch is not None and iteration.epoch >= self.epoch)
            or (self.update is not None and iteration.update >= self.update)
            or (self.sample is not None and iteration.sample >= self.sample)
        )


def earliest_thresholds(several: Iterable[Thresholds]) -> Thresholds:
    """Return the earliest threshold on each counter.

    Example:
        >>> earliest_thresholds([Thresholds(update=12), Thresholds(update=9, sample=80)])
        Thresholds(epoch=None, update=9, sample=80)
    """
    epoch = update = sample = None
    for each in several:
        if each.epoch is not None and (epoch is None or each.epoch < epoch):
            epoch = each.epoch
        if each.update is not None and (update is None or each.update < update):
            update = each.update
        if each.sample is not None and (sample is None or each.sample < sample):
            sample = each.sample
    return Thresholds(epoch, update, sample)


@dataclass(frozen=True, slots=True)
class Window:
    """The part of a run in which a schedule may fire, both ends included.

    Args:
        start: The window opens once all counters of this iteration are reached; a counter that is 0 does not limit.
        until: The window closes after the update at which any of these is reached; a counter that is None does not
            limit.
    """

    start: TrainingIteration = START
    until: Thresholds = Thresholds()

    def is_open(self, previous: TrainingIteration, iteration: TrainingIteration) -> bool:
        """Return whether the update from `previous` to `iteration` lies in the window."""
        return iteration.reached(self.start) and not self.until.reached(previous)

    def clip(self, counter: Counter, low: int, high: int) -> tuple[int, int]:
        """Return the part of `(low, high]` on `counter` that lies in the window."""
        last = getattr(self.until, counter)
        return max(low, getattr(self.start, counter) - 1), high if last is None else min(high, last)

    def updates(self, run: RunLengths, *, apart_from: Counter) -> tuple[int, int | None]:
        """Return `(low, high]`, the updates of `run` at which the window is open on every counter but one."""
        lows, highs = [0], list[int]()
        for counter in set(COUNTERS) - {apart_from}:
            start, last = getattr(self.start, counter), getattr(self.until, counter)
            if start:
                # An epoch is counted after its last update, so the next update is the first that sees it.
                lows.append(run.updates_to(counter, start) - (counter != "epoch"))
            if last is not None:
                highs.append(run.updates_to(counter, last))
        return max(lows), min(highs, default=None)


ALWAYS: Final = Window()
"""The window that is always open."""
