"""What every schedule can do: a pure predicate on `(previous, iteration)`, with its arithmetic in closed form.

A schedule is due when a *threshold* (for `EveryNUpdates(n)`, a multiple of n) lies in `(previous, iteration]` on its
counter. A schedule has no memory and tests no remainder. So it misses no threshold, whatever the batch sizes, and fires
at the same iterations after a resume or a return to an earlier iteration.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self, final

from noether.core.errors import Problem, raise_problems
from noether.core.iteration import COUNTERS, Counter, TrainingIteration
from noether.core.schedules.counting import count_firings
from noether.core.schedules.window import ALWAYS, START, Thresholds, Window, earliest_thresholds

if TYPE_CHECKING:
    from collections.abc import Iterable

    from noether.core.run_lengths import RunLengths


class Schedule(ABC):
    """A pure predicate on `(previous, iteration)`; unite two with `|`, limit one with `starting` and `until`.

    Example:
        >>> from noether import EveryNUpdates
        >>> schedule = EveryNUpdates(2) | EveryNUpdates(3).starting(TrainingIteration(update=4))
        >>> [u for u in range(1, 10) if schedule.due(TrainingIteration(update=u - 1), TrainingIteration(update=u))]
        [2, 4, 6, 8, 9]
    """

    __slots__ = ()

    @property
    @abstractmethod
    def members(self) -> tuple[OneCounter, ...]:
        """The schedules on a single counter each that make up this one; it is due when any of them is."""

    def due(self, previous: TrainingIteration, iteration: TrainingIteration) -> bool:
        """Return whether a threshold lies in `(previous, iteration]`."""
        return any(member.due(previous, iteration) for member in self.members)

    def next_due(self, iteration: TrainingIteration) -> Thresholds:
        """Return the next threshold on each counter after `iteration`; the schedule is not due before one is reached.

        It is due at the first of them, unless a window on another counter is still closed there.
        """
        return earliest_thresholds(member.next_due(iteration) for member in self.members)

    def count(self, start: TrainingIteration, end: TrainingIteration, run: RunLengths) -> int:
        """Return how often the schedule fires in `(start, end]`, without walking through the run.

        Several thresholds at one update, or at the end of one epoch, are one firing. The time does not grow with the
        run; see `noether.core.schedules.counting` for what it grows with.

        Args:
            start: Counting starts after this iteration of `run`, which lies between two events.
            end: Counting ends with this iteration, likewise.
            run: Gives the sizes of epochs and batches; which of its fields are read depends on the schedule.

        Example:
            >>> from noether import EveryNSamples, Run
            >>> run = Run(updates_per_epoch=10, samples_per_epoch=100, effective_batch_size=10)
            >>> EveryNSamples(32).count(TrainingIteration(), run.iteration_after(10**9), run)
            312500000
        """
        return count_firings(self.members, start, end, run)

    def select_counters(self, *counters: Counter) -> Schedule | None:
        """Return the part of the schedule that reads one of `counters`, or None."""
        members = tuple(member for member in self.members if member.counter in counters)
        if not members:
            return None
        return members[0] if len(members) == 1 else Union(members)

    def starting(self, point: TrainingIteration) -> Schedule:
        """Return the schedule that is not due before `point` is reached."""
        return _unite(member.starting(point) for member in self.members)

    def until(self, point: TrainingIteration) -> Schedule:
        """Return the schedule that is due for the last time at the update that reaches `point`."""
        return _unite(member.until(point) for member in self.members)

    def __or__(self, other: Schedule) -> Schedule:
        """Return the union: due when either schedule is.

        Raises:
            TypeError: If `other` is not a schedule.
        """
        if not isinstance(other, Schedule):
            raise TypeError(f"a schedule can be united with a schedule only, like EveryNUpdates(2); got {other!r}")
        return _unite(self.members + other.members)

    def __ror__(self, other: object) -> Schedule:
        """Refuse `None | schedule`, as `schedule | None` is refused."""
        return self | other  # type: ignore[operator]  # which raises the error


@final
@dataclass(frozen=True)
class Union(Schedule):
    """A schedule that is due when any of its parts is; `|` makes one, without nesting and duplicates."""

    parts: tuple[OneCounter, ...]

    @property
    def members(self) -> tuple[OneCounter, ...]:
        """The parts."""
        return self.parts


class OneCounter(Schedule):
    """A schedule whose thresholds lie on one counter. A subclass defines where they lie."""

    window: Window

    @property
    @abstractmethod
    def counter(self) -> Counter:
        """The counter that the thresholds lie on."""

    @property
    @abstractmethod
    def interval(self) -> int | None:
        """The n whose multiples are the thresholds; None if the thresholds are single points."""

    @property
    @abstractmethod
    def singles(self) -> tuple[int, ...]:
        """The thresholds if they are single points; else empty."""

    @abstractmethod
    def thresholds_in(self, low: int, high: int) -> int:
        """Return the number of thresholds in `(low, high]`, for `low <= high`."""

    @abstractmethod
    def threshold_after(self, value: int) -> int | None:
        """Return the first threshold greater than `value`, or None."""

    @abstractmethod
    def updates_crossing(self, updates: int, run: RunLengths) -> int:
        """Return how many of the first `updates` updates of `run` have a threshold among their samples."""

    @abstractmethod
    def within(self, window: Window) -> Self:
        """Return the schedule with its window replaced."""

    @property
    def members(self) -> tuple[OneCounter, ...]:
        """The schedule itself."""
        return (self,)

    def due(self, previous: TrainingIteration, iteration: TrainingIteration) -> bool:
        """Return whether a threshold lies in `(previous, iteration]`."""
        low, high = getattr(previous, self.counter), getattr(iteration, self.counter)
        # Most updates cross no threshold, which this finds fast; a window can only take firings away.
        if low >= high or not self.thresholds_in(low, high):
            return False
        if self.window is ALWAYS:
            return True
        if not self.window.is_open(previous, iteration):
            return False
        low, high = self.window.clip(self.counter, low, high)
        return low < high and self.thresholds_in(low, high) > 0

    def next_due(self, iteration: TrainingIteration) -> Thresholds:
        """Return the next threshold after `iteration`, on the schedule's counter."""
        low, _ = self.window.clip(self.counter, getattr(iteration, self.counter), 0)
        threshold, last = self.threshold_after(low), getattr(self.window.until, self.counter)
        if threshold is None or self.window.until.reached(iteration) or (last is not None and threshold > last):
            return Thresholds()
        return Thresholds(**{self.counter: threshold})

    def starting(self, point: TrainingIteration) -> Self:
        """Return the schedule that is not due before `point` is reached.

        Raises:
            SettingsError: If `point` is no `TrainingIteration`.
        """
        raise_problems([check_point("starting", point)])
        start = TrainingIteration(*(max(getattr(self.window.start, c), getattr(point, c)) for c in COUNTERS))
        return self.within(Window(start, self.window.until))

    def until(self, point: TrainingIteration) -> Self:
        """Return the schedule that is due for the last time at the update that reaches `point`.

        Raises:
            SettingsError: If `point` is the start of the run, or no `TrainingIteration`.
        """
        raise_problems([check_point("until", point)])
        if point == START:
            right = "the point must be greater than zero, e.g. TrainingIteration(epoch=2)"
            raise_problems([Problem("until", f"{START} is the start of the run; {right}")])
        last = Thresholds(*(getattr(point, counter) or None for counter in COUNTERS))
        return self.within(Window(self.window.start, earliest_thresholds((self.window.until, last))))


def check_point(name: str, point: object) -> Problem | None:
    """Return the problem of a setting that has to be a point of a run, or None.

    Example:
        >>> print(check_point("until", 3))
        until: 3 is not a point of a run: write TrainingIteration(epoch=3), TrainingIteration(update=3) or ...
    """
    if isinstance(point, TrainingIteration):
        return None
    n = point if type(point) is int and point > 0 else 3
    right = f"TrainingIteration(epoch={n}), TrainingIteration(update={n}) or TrainingIteration(sample={n})"
    return Problem(name, f"{point!r} is not a point of a run: write {right}")


def _unite(members: Iterable[OneCounter]) -> Union:
    return Union(tuple(dict.fromkeys(members)))
