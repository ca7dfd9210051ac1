"""Forecasts: at which events of a run a callback fires, from its schedule and without walking the run."""

from __future__ import annotations

import dataclasses
from bisect import bisect_left
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, final

from noether.core.event import AfterEpoch, AfterTraining, AfterUpdate, AtEval, BeforeTraining, Event
from noether.core.schedules.gate import Gate
from noether.core.schedules.schedule import EveryNEpochs, EveryNUpdates
from noether.core.schedules.window import START
from noether.core.state import TrainState

if TYPE_CHECKING:
    from noether.core.callback import Declaration
    from noether.core.iteration import TrainingIteration
    from noether.core.run import Run
    from noether.core.schedules.base import Schedule

EARLY: Final = (BeforeTraining, AtEval)
"""The events before the first update, in order."""


@final
@dataclass(frozen=True)
class Firing:
    """One event at which a callback fires.

    Args:
        event: Type of the event.
        iteration: The iteration of the state there; at an update, the epoch that it completes is not counted yet.
    """

    event: type[Event]
    iteration: TrainingIteration

    def __str__(self) -> str:
        if self.event is AfterEpoch:
            return f"E{self.iteration.epoch}"
        return f"U{self.iteration.update}" if self.event is AfterUpdate else _NAMES[self.event]


_NAMES: Final[dict[type[Event], str]] = {BeforeTraining: "start", AtEval: "start", AfterTraining: "end"}


@final
@dataclass(frozen=True)
class Firings:
    """The firings of a callback in a part of a run.

    Args:
        first: The first firing, or None if the callback does not fire.
        last: The last firing, likewise.
        count: Number of firings.
    """

    first: Firing | None
    last: Firing | None
    count: int


@final
@dataclass(frozen=True)
class Occasions:
    """When a callback fires: when a schedule is due, and at events that come once in a run.

    Args:
        schedule: The schedule, read as a `Gate` does; None if it fires at single events only.
        once: The events among `BeforeTraining`, `AtEval` (before the first update) and `AfterTraining` at which it
            fires.

    Example:
        >>> from noether import Run, TrainingIteration
        >>> run = Run(end=TrainingIteration(epoch=10**6), updates_per_epoch=1000, samples_per_epoch=8000,
        ...           effective_batch_size=8)
        >>> each = firings(Occasions(EveryNUpdates(7) | EveryNEpochs(3), (AfterTraining,)), run)
        >>> str(each.first), str(each.last), each.count
        ('U7', 'end', 143190476)
    """

    schedule: Schedule | None = None
    once: tuple[type[Event], ...] = ()


def occasions_of(declaration: Declaration, event_types: tuple[type[Event], ...], run: Run) -> Occasions:
    """Return when a callback fires: when its gate opens; without a gate, at every event that it listens to.

    Args:
        declaration: The declaration of the callback.
        event_types: The types of events that it listens to.
        run: The run, whose end decides whether a gate with `at_end` opens after training.
    """
    gate = declaration.gate
    if gate is not None:
        at_end = gate.due(AfterTraining, state_at(Firing(AfterTraining, run.final), run)) is not None
        return Occasions(gate.schedule, (AfterTraining,) if at_end else ())
    every = {AfterUpdate: EveryNUpdates(1), AfterEpoch: EveryNEpochs(1)}
    parts = [schedule for event_type, schedule in every.items() if event_type in event_types]
    schedule = parts[0] | parts[1] if len(parts) > 1 else next(iter(parts), None)
    return Occasions(schedule, tuple(kind for kind in (*EARLY, AfterTraining) if kind in event_types))


def state_at(firing: Firing, run: Run) -> TrainState:
    """Return a state with the counters at an event, which is all that a gate reads."""
    update = firing.iteration.update
    previous = run.iteration_after(update - 1) if update else START
    return TrainState(iteration=firing.iteration, previous=previous, ended=firing.event is AfterTraining)


def firings(
    occasions: Occasions, run: Run, start: TrainingIteration | None = None, end: TrainingIteration | None = None
) -> Firings:
    """Return the firings in a part of a run; the time does not grow with its length.

    Args:
        occasions: When the callback fires.
        run: The run, not stopped early.
        start: The part starts after this iteration; None for the start of the run, early events included.
        end: The part ends with this iteration; None for the end of the run.
    """
    before = 0 if start is None else count_until(occasions, start, run)
    through = count_until(occasions, run.final if end is None else end, run)
    if before == through:
        return Firings(None, None, 0)
    first, last = (nth_firing(occasions, n, run) for n in (before + 1, through))
    return Firings(first, last, through - before)


def count_until(occasions: Occasions, iteration: TrainingIteration, run: Run) -> int:
    """Return the number of firings up to an iteration, including all events after its last update.

    Example:
        >>> from noether import Run, TrainingIteration
        >>> run = Run(end=TrainingIteration(epoch=3), updates_per_epoch=4, samples_per_epoch=8, effective_batch_size=2)
        >>> count_until(Occasions(EveryNUpdates(2), (BeforeTraining,)), run.iteration_after(5), run)
        3
    """
    early = sum(kind in occasions.once for kind in EARLY)
    over = AfterTraining in occasions.once and iteration.update >= run.final.update
    return early + _count_scheduled(occasions, iteration, run) + over


def events_at(update: int, run: Run) -> tuple[Firing, ...]:
    """Return the events after an update: its own, and the ends of the epoch and of the run if they follow it.

    Example:
        >>> from noether import Run, TrainingIteration
        >>> run = Run(end=TrainingIteration(epoch=3), updates_per_epoch=4, samples_per_epoch=8, effective_batch_size=2)
        >>> [list(map(str, events_at(update, run))) for update in (0, 3, 4, 12)]
        [['start', 'start'], ['U3'], ['U4', 'E1'], ['U12', 'E3', 'end']]
    """
    if not update:
        return tuple(Firing(kind, START) for kind in EARLY)
    iteration, epoch = run.iteration_after(update), run.iteration_after(update - 1).epoch
    events = [Firing(AfterUpdate, dataclasses.replace(iteration, epoch=epoch))]
    events += [Firing(AfterEpoch, iteration)] if iteration.epoch > epoch else []
    return (*events, *([Firing(AfterTraining, iteration)] if update == run.final.update else []))


def fires(occasions: Occasions, at: Firing, run: Run) -> bool:
    """Return whether a callback fires at an event of the run."""
    gate = None if occasions.schedule is None else Gate(occasions.schedule)
    return at.event in occasions.once or (gate is not None and gate.due(at.event, state_at(at, run)) is not None)


def nth_firing(occasions: Occasions, n: int, run: Run) -> Firing:
    """Return the n-th firing, starting at 1.

    It is found by bisection: the number of firings up to an update has a closed form and never falls.

    Raises:
        ValueError: If the callback fires less often.
    """
    early = [kind for kind in EARLY if kind in occasions.once]
    if 1 <= n <= len(early):
        return Firing(early[n - 1], START)
    total = _count_scheduled(occasions, run.final, run)
    if len(early) < n <= len(early) + total and occasions.schedule is not None:
        return _nth_scheduled(occasions.schedule, n - len(early), run)
    if AfterTraining not in occasions.once or n != len(early) + total + 1:
        raise ValueError(f"there is no firing {n}; there are {count_until(occasions, run.final, run)}")
    return Firing(AfterTraining, run.final)


def _nth_scheduled(schedule: Schedule, n: int, run: Run) -> Firing:
    def until(update: int) -> int:
        return schedule.count(START, run.iteration_after(update), run)

    update = bisect_left(range(run.final.update + 1), n, key=until)
    firings_there = [at for at in events_at(update, run) if fires(Occasions(schedule), at, run)]
    return firings_there[n - until(update - 1) - 1]


def _count_scheduled(occasions: Occasions, iteration: TrainingIteration, run: Run) -> int:
    return 0 if occasions.schedule is None else occasions.schedule.count(START, iteration, run)
