"""When something is due: pure predicates on `(previous, iteration)`, and their arithmetic in closed form.

A schedule is due when a *threshold* (for `EveryNUpdates(n)`, a multiple of n) lies in `(previous, iteration]` on its
counter. Nothing is remembered and no remainder is taken, so batches of any size, resumes and states taken back to an
earlier iteration all give the same firings.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Final, Self, final

from noether.core.errors import Problem, check_whole, raise_problems
from noether.core.iteration import COUNTERS, LETTERS, Counter, TrainingIteration
from noether.core.schedules.counting import count_firings, updates_crossing_multiples
from noether.core.schedules.unions import count_union

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from noether.core.run import Run

_START: Final = TrainingIteration()


@dataclass(frozen=True, slots=True)
class Thresholds:
    """The next threshold on each counter, or None where nothing more is due. Nothing is due before one is reached.

    Example:
        >>> EveryNUpdates(4).next_due(TrainingIteration(update=9))
        Thresholds(epoch=None, update=12, sample=None)
    """

    epoch: int | None = None
    update: int | None = None
    sample: int | None = None

    def merge(self, other: Thresholds) -> Thresholds:
        """Return the earlier threshold on each counter."""
        return Thresholds(*(_least(getattr(self, name), getattr(other, name)) for name in COUNTERS))

    def reached(self, iteration: TrainingIteration) -> bool:
        """Return whether `iteration` has reached any of the thresholds."""
        return (
            (self.epoch is not None and iteration.epoch >= self.epoch)
            or (self.update is not None and iteration.update >= self.update)
            or (self.sample is not None and iteration.sample >= self.sample)
        )


@dataclass(frozen=True, slots=True)
class Window:
    """Where a schedule may be due: from `start`, once all its counters are reached, until any of `until` was reached.

    Both ends are included. A counter of `start` that is 0, or of `until` that is None, does not limit.
    """

    start: TrainingIteration = _START
    until: Thresholds = Thresholds()

    def is_open(self, previous: TrainingIteration, iteration: TrainingIteration) -> bool:
        """Return whether the update from `previous` to `iteration` lies in the window."""
        return iteration.reached(self.start) and not self.until.reached(previous)

    def clip(self, counter: Counter, low: int, high: int) -> tuple[int, int]:
        """Return the part of `(low, high]` on `counter` in which thresholds count."""
        last = getattr(self.until, counter)
        return max(low, getattr(self.start, counter) - 1), high if last is None else min(high, last)

    def updates(self, run: Run, *, apart_from: Counter) -> tuple[int, int | None]:
        """Return `(low, high]`, the updates of `run` for which the window is open on all but one counter."""
        lows, highs = [0], list[int]()
        for counter in set(COUNTERS) - {apart_from}:
            start, last = getattr(self.start, counter), getattr(self.until, counter)
            if start:
                # The epoch is counted after its last update, so the first update that sees it is the one after.
                lows.append(run.updates_to(counter, start) - (counter != "epoch"))
            if last is not None:
                highs.append(run.updates_to(counter, last))
        return max(lows), min(highs, default=None)


_ALWAYS: Final = Window()


class Schedule(ABC):
    """A pure predicate on `(previous, iteration)`. Unite schedules with `|`, limit them with `starting` and `until`.

    Example:
        >>> schedule = EveryNUpdates(2) | EveryNUpdates(3).starting(TrainingIteration(update=4))
        >>> [u for u in range(1, 10) if schedule.due(TrainingIteration(update=u - 1), TrainingIteration(update=u))]
        [2, 4, 6, 8, 9]
    """

    __slots__ = ()

    @property
    @abstractmethod
    def members(self) -> tuple[OneCounter, ...]:
        """The schedules of one counter that this one is the union of."""

    def due(self, previous: TrainingIteration, iteration: TrainingIteration) -> bool:
        """Return whether a threshold lies in `(previous, iteration]`."""
        return any(member.due(previous, iteration) for member in self.members)

    def next_due(self, iteration: TrainingIteration) -> Thresholds:
        """Return the next threshold on each counter after `iteration`: nothing is due before one of them is reached.

        A threshold is the first firing, unless a window on another counter is still shut there.
        """
        following = Thresholds()
        for member in self.members:
            following = following.merge(member.next_due(iteration))
        return following

    def count(self, start: TrainingIteration, end: TrainingIteration, run: Run) -> int:
        """Return how often it fires after `start` and up to `end`, both iterations of `run` between two events.

        An update or an epoch's end at which several thresholds lie is one firing. The run is not walked: this is a
        closed form, except that a union of multiples of several numbers of samples is walked for one period of theirs,
        whatever the length of the run; see `unions`.

        Args:
            start: Where counting begins, itself not counted.
            end: Where counting ends, itself counted.
            run: Where epochs and batches lie. What is read of it depends on the schedule.

        Example:
            >>> from noether.core.run import Run
            >>> run = Run(updates_per_epoch=10, samples_per_epoch=100, effective_batch_size=10)
            >>> EveryNSamples(32).count(TrainingIteration(), run.iteration_after(10**9), run)
            312500000
        """
        parts = (self.reading("update", "sample"), self.reading("epoch"))
        return sum(_count(part, start, end, run) for part in parts if part is not None)

    def reading(self, *counters: Counter) -> Schedule | None:
        """Return the part of the schedule that reads one of `counters`, or None."""
        members = tuple(member for member in self.members if member.counter in counters)
        if not members:
            return None
        return members[0] if len(members) == 1 else Union(members)

    def starting(self, point: TrainingIteration) -> Schedule:
        """Return the schedule that is due only once `point` is reached."""
        return _united(member.starting(point) for member in self.members)

    def until(self, point: TrainingIteration) -> Schedule:
        """Return the schedule that is due for the last time where `point` is reached."""
        return _united(member.until(point) for member in self.members)

    def __or__(self, other: Schedule) -> Schedule:
        """Return the union: due when either is."""
        return _united(self.members + other.members)


@final
@dataclass(frozen=True)
class Union(Schedule):
    """Due when any of its members is; made by `|`, which keeps it flat and without repetition."""

    parts: tuple[OneCounter, ...]

    @property
    def members(self) -> tuple[OneCounter, ...]:
        """The schedules of one counter that this one is the union of."""
        return self.parts


class OneCounter(Schedule):
    """A schedule whose thresholds lie on one counter; a subclass says where, in functions of whole numbers."""

    window: Window

    @property
    @abstractmethod
    def counter(self) -> Counter:
        """The counter that its thresholds lie on."""

    @property
    @abstractmethod
    def interval(self) -> int | None:
        """The n of whose multiples all are thresholds, or None if they are single points."""

    @property
    @abstractmethod
    def singles(self) -> tuple[int, ...]:
        """The thresholds, if they are single points."""

    @abstractmethod
    def thresholds_in(self, low: int, high: int) -> int:
        """Return the number of thresholds in `(low, high]`, for `low <= high`."""

    @abstractmethod
    def threshold_after(self, value: int) -> int | None:
        """Return the first threshold greater than `value`, or None."""

    @abstractmethod
    def updates_crossing(self, updates: int, run: Run) -> int:
        """Return how many of the first `updates` updates of `run` have a threshold among their samples."""

    @abstractmethod
    def within(self, window: Window) -> Self:
        """Return the schedule with `window` in place of its own."""

    @property
    def members(self) -> tuple[OneCounter, ...]:
        """The schedule itself."""
        return (self,)

    def due(self, previous: TrainingIteration, iteration: TrainingIteration) -> bool:
        """Return whether a threshold lies in `(previous, iteration]`."""
        low, high = getattr(previous, self.counter), getattr(iteration, self.counter)
        # At most updates there is none, which is cheap to see; a window can only take some away.
        if low >= high or not self.thresholds_in(low, high):
            return False
        if self.window is _ALWAYS:
            return True
        if not self.window.is_open(previous, iteration):
            return False
        low, high = self.window.clip(self.counter, low, high)
        return low < high and self.thresholds_in(low, high) > 0

    def next_due(self, iteration: TrainingIteration) -> Thresholds:
        """Return the next threshold on each counter after `iteration`."""
        low, _ = self.window.clip(self.counter, getattr(iteration, self.counter), 0)
        threshold, last = self.threshold_after(low), getattr(self.window.until, self.counter)
        if threshold is None or self.window.until.reached(iteration) or (last is not None and threshold > last):
            return Thresholds()
        return Thresholds(**{self.counter: threshold})

    def starting(self, point: TrainingIteration) -> Self:
        """Return the schedule that is due only once `point` is reached."""
        start = TrainingIteration(*(max(getattr(self.window.start, c), getattr(point, c)) for c in COUNTERS))
        return self.within(Window(start, self.window.until))

    def until(self, point: TrainingIteration) -> Self:
        """Return the schedule that is due for the last time where `point` is reached."""
        if point == _START:
            raise_problems(
                [
                    Problem(
                        "until", "E0_U0_S0 names no point that a run reaches; name one like TrainingIteration(epoch=2)"
                    )
                ]
            )
        last = Thresholds(*(getattr(point, counter) or None for counter in COUNTERS))
        return self.within(Window(self.window.start, self.window.until.merge(last)))


@dataclass(frozen=True)
class _EveryN(OneCounter):
    """Due at every multiple of n."""

    n: int
    window: Window = _ALWAYS

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

    def updates_crossing(self, updates: int, run: Run) -> int:
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
    """Due after every update among whose samples lies a multiple of n; once, even if several do.

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
"""Schedules by the name of the setting that asks for them."""


@final
@dataclass(frozen=True, init=False)
class At(OneCounter):
    """Due where one of the given points is reached.

    Args:
        points: Points on one and the same counter; one that is given twice counts once.
        window: Where it may be due.

    Raises:
        SettingsError: If there is no point, or they are not all on one counter.

    Example:
        >>> At(TrainingIteration(update=1), TrainingIteration(update=10)).next_due(TrainingIteration(update=1))
        Thresholds(epoch=None, update=10, sample=None)
    """

    points: tuple[TrainingIteration, ...]
    window: Window

    def __init__(self, *points: TrainingIteration, window: Window = _ALWAYS) -> None:  # it is immutable
        used = {name for point in points for name in COUNTERS if getattr(point, name)}
        if len(used) != 1 or _START in points:
            right = "points on one counter, e.g. At(TrainingIteration(update=100)); unite two counters with |"
            raise_problems([Problem("At", f"{', '.join(map(str, points)) or 'no point'}: give {right}")])
        object.__setattr__(self, "points", tuple(sorted(set(points), key=lambda p: (p.epoch, p.update, p.sample))))
        object.__setattr__(self, "window", window)

    @property
    def counter(self) -> Counter:
        """The counter that the points are on."""
        return next(name for name in COUNTERS if getattr(self.points[0], name))

    @property
    def interval(self) -> None:
        """None: its thresholds are single points."""
        return

    @property
    def singles(self) -> tuple[int, ...]:
        """The points on their counter."""
        return tuple(getattr(point, self.counter) for point in self.points)

    def __str__(self) -> str:
        return "at_" + "_".join(f"{LETTERS[self.counter]}{value}" for value in self.singles)

    def thresholds_in(self, low: int, high: int) -> int:
        """Return the number of points in `(low, high]`."""
        return bisect_right(self.singles, high) - bisect_right(self.singles, low)

    def threshold_after(self, value: int) -> int | None:
        """Return the first point after `value`, or None."""
        return next((point for point in self.singles if point > value), None)

    def updates_crossing(self, updates: int, run: Run) -> int:
        """Return how many of the first `updates` updates of `run` have a point among their samples."""
        crossing = {run.updates_until(sample) for sample in self.singles}
        return sum(update <= updates for update in crossing)

    def within(self, window: Window) -> Self:
        """Return the schedule with `window` in place of its own."""
        return type(self)(*self.points, window=window)


def _united(members: Iterable[OneCounter]) -> Union:
    return Union(tuple(dict.fromkeys(members)))


def _count(part: Schedule, start: TrainingIteration, end: TrainingIteration, run: Run) -> int:
    if len(part.members) > 1:
        return count_union(part, start, end, run)
    return count_firings(part.members[0], start, end, run)


def _least(*values: int | None) -> int | None:
    return min((value for value in values if value is not None), default=None)
