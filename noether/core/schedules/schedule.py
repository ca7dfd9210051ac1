"""The schedules that a user writes: every n epochs, updates or samples, and single points."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Final, Self, final

from noether.core.errors import Problem, check_whole, raise_problems
from noether.core.iteration import COUNTERS, LETTERS, Counter, TrainingIteration
from noether.core.schedules.base import OneCounter, check_point
from noether.core.schedules.counting import updates_crossing_multiples
from noether.core.schedules.window import ALWAYS, START, Window

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from noether.core.run_lengths import RunLengths
    from noether.core.schedules.base import Schedule


@dataclass(frozen=True)
class _EveryN(OneCounter):
    """A schedule that is due at every multiple of n."""

    n: int
    window: Window = ALWAYS

    def __post_init__(self) -> None:
        raise_problems([check_whole(f"every_n_{self.counter}s", self.n)])

    def __str__(self) -> str:
        return f"{LETTERS[self.counter]}{self.n}"

    @property
    def interval(self) -> int:
        return self.n

    @property
    def singles(self) -> tuple[int, ...]:
        return ()

    def thresholds_in(self, low: int, high: int) -> int:
        return high // self.n - low // self.n

    def threshold_after(self, value: int) -> int | None:
        return (value // self.n + 1) * self.n

    def updates_crossing(self, updates: int, run: RunLengths) -> int:
        return updates_crossing_multiples(self.n, updates, run)

    def within(self, window: Window) -> Self:
        return type(self)(self.n, window)


@final
class EveryNEpochs(_EveryN):
    """Due at the end of every n-th epoch.

    Args:
        n: Epochs between firings, >= 1.

    Raises:
        SettingsError: If `n` is not a whole number >= 1.

    Example:
        >>> EveryNEpochs(2).due(TrainingIteration(epoch=3), TrainingIteration(epoch=4))
        True
    """

    counter: ClassVar[Counter] = "epoch"


@final
class EveryNUpdates(_EveryN):
    """Due after every n-th optimizer update.

    Args:
        n: Updates between firings, >= 1.

    Raises:
        SettingsError: If `n` is not a whole number >= 1.

    Example:
        >>> EveryNUpdates(2.7)
        Traceback (most recent call last):
        noether.core.errors.SettingsError: every_n_updates: 2.7 is not a whole number of at least 1
    """

    counter: ClassVar[Counter] = "update"


@final
class EveryNSamples(_EveryN):
    """Due after every update that crosses a multiple of n samples; once, even if it crosses several.

    Args:
        n: Samples between firings, >= 1.

    Raises:
        SettingsError: If `n` is not a whole number >= 1.

    Example:
        >>> EveryNSamples(10).due(TrainingIteration(sample=8), TrainingIteration(sample=12))
        True
    """

    counter: ClassVar[Counter] = "sample"


INTERVALS: Final[Mapping[str, Callable[[int], Schedule]]] = {
    "every_n_epochs": EveryNEpochs,
    "every_n_updates": EveryNUpdates,
    "every_n_samples": EveryNSamples,
}
"""Schedule classes by the name of their setting."""


@final
@dataclass(frozen=True, init=False)
class At(OneCounter):
    """Due at each update or epoch that reaches one of the given points.

    Args:
        points: Points on the same counter; a repeated point counts once.
        window: The part of the run in which it may be due.

    Raises:
        SettingsError: If no point is given, one is no `TrainingIteration`, or they lie on different counters.

    Example:
        >>> At(TrainingIteration(update=1), TrainingIteration(update=10)).next_due(TrainingIteration(update=1))
        Thresholds(epoch=None, update=10, sample=None)
    """

    points: tuple[TrainingIteration, ...]
    window: Window

    def __init__(self, *points: TrainingIteration, window: Window = ALWAYS) -> None:
        raise_problems(check_point("At", point) for point in points)
        used = {name for point in points for name in COUNTERS if getattr(point, name)}
        if len(used) != 1 or START in points:
            right = "points on one counter, e.g. At(TrainingIteration(update=100)); unite two counters with |"
            raise_problems([Problem("At", f"{', '.join(map(str, points)) or 'no point'}: give {right}")])
        object.__setattr__(self, "points", tuple(sorted(set(points), key=lambda p: (p.epoch, p.update, p.sample))))
        object.__setattr__(self, "window", window)

    @property
    def counter(self) -> Counter:
        """The counter that the points lie on."""
        return next(name for name in COUNTERS if getattr(self.points[0], name))

    @property
    def interval(self) -> None:
        """None, as its thresholds are single points."""
        return

    @property
    def singles(self) -> tuple[int, ...]:
        """The counts of the points."""
        return tuple(getattr(point, self.counter) for point in self.points)

    def __str__(self) -> str:
        return "at_" + "_".join(f"{LETTERS[self.counter]}{value}" for value in self.singles)

    def thresholds_in(self, low: int, high: int) -> int:
        """Return the number of points in `(low, high]`."""
        return bisect_right(self.singles, high) - bisect_right(self.singles, low)

    def threshold_after(self, value: int) -> int | None:
        """Return the first point after `value`, or None."""
        return next((point for point in self.singles if point > value), None)

    def updates_crossing(self, updates: int, run: RunLengths) -> int:
        """Return how many of the first `updates` updates of `run` have a point among their samples."""
        crossing = {run.updates_until(sample) for sample in self.singles}
        return sum(update <= updates for update in crossing)

    def within(self, window: Window) -> Self:
        """Return the schedule with its window replaced."""
        return type(self)(*self.points, window=window)
