"""The run before the run: which events something happens at, from schedules alone and without walking the run."""

from __future__ import annotations

import dataclasses
from bisect import bisect_left
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, final

from noether.core.event import AfterEpoch, AfterTraining, AfterUpdate, AtEval, BeforeTraining, Event
from noether.core.iteration import TrainingIteration
from noether.core.schedules.gate import Gate
from noether.core.schedules.schedule import EveryNEpochs, EveryNUpdates
from noether.core.state import TrainState

if TYPE_CHECKING:
    from noether.core.callback import Declaration
    from noether.core.run import Run
    from noether.core.schedules.base import Schedule

_START: Final = TrainingIteration()
EARLY: Final = (BeforeTraining, AtEval)
"""The events that come before the first update, in their order."""


@final
@dataclass(frozen=True)
class Firing:
    """One event at which something happens.

    Args:
        event: Type of the event.
        iteration: What is completed there; after an update, the epoch that it fills is not counted yet.
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
    """All events at which something happens in a part of a run.

    Args:
        first: The first of them, or None if there is none.
        last: The last of them, likewise.
        count: How many there are.
    """

    first: Firing | None
    last: Firing | None
    count: int


@final
@dataclass(frozen=True)
class Occasions:
    """When something happens: where a schedule is due, and at events that come once in a run.

    Args:
        schedule: Where it is due, updates and samples read after an update and epochs after an epoch.
        once: `BeforeTraining`, `AtEval` (before the first update) and `AfterTraining`, as far as they are among them.

    Example:
        >>> from noether.core.run import Run
        >>> run = Run(end=TrainingIteration(epoch=10**6), updates_per_epoch=1000, samples_per_epoch=8000,
        ...           effective_batch_size=8)
        >>> each = firings(Occasions(EveryNUpdates(7) | EveryNEpochs(3), (AfterTraining,)), run)
        >>> str(each.first), str(each.last), each.count
        ('U7', 'end', 143190476)
    """

    schedule: Schedule | None = None
    once: tuple[type[Event], ...] = ()


def occasions_of(declared: Declaration, listened: tuple[type[Event], ...], run: Run) -> Occasions:
    """Return when a callback acts: where its gate opens; without one, at every event that it listens to.

    Args:
        declared: What it says about itself.
        listened: The types of events that it listens to.
        run: The run, which says whether a gate with `at_end` opens there.
    """
    if declared.gate is not None:
        return Occasions(declared.gate.schedule, (AfterTraining,) if _opens_at_end(declared.gate, run) else ())
    every = {AfterUpdate: EveryNUpdates(1), AfterEpoch: EveryNEpochs(1)}
    parts = [schedule for event_type, schedule in every.items() if event_type in listened]
    schedule = parts[0] | parts[1] if len(parts) > 1 else next(iter(parts), None)
    return Occasions(schedule, tuple(kind for kind in (*EARLY, AfterTraining) if kind in listened))


def state_at(firing: Firing, run: Run) -> TrainState:
    """Return the state at an event, as far as counters tell: what gates read."""
    update = firing.iteration.update
    previous = run.iteration_after(update - 1) if update else _START
    return TrainState(iteration=firing.iteration, previous=previous, ended=firing.event is AfterTraining)


def firings(
    occasions: Occasions, run: Run, start: TrainingIteration | None = None, end: TrainingIteration | None = None
) -> Firings:
    """Return the firings in a part of a run, in a time that does not grow with its length.

    Args:
        occasions: When it happens.
        run: The run; nothing stops it early.
        start: Where the part begins, itself not counted; None for the very beginning.
        end: Where it ends, itself counted; None for the end of the run.
    """
    before = 0 if start is None else count_until(occasions, start, run)
    through = count_until(occasions, run.final if end is None else end, run)
    if before == through:
        return Firings(None, None, 0)
    first, last = (nth_firing(occasions, n, run) for n in (before + 1, through))
    return Firings(first, last, through - before)


def count_until(occasions: Occasions, iteration: TrainingIteration, run: Run) -> int:
    """Return the number of firings up to an iteration between two updates, all at that update included.

    Example:
        >>> from noether.core.run import Run
        >>> run = Run(end=TrainingIteration(epoch=3), updates_per_epoch=4, samples_per_epoch=8, effective_batch_size=2)
        >>> count_until(Occasions(EveryNUpdates(2), (BeforeTraining,)), run.iteration_after(5), run)
        3
    """
    early = sum(kind in occasions.once for kind in EARLY)
    over = AfterTraining in occasions.once and iteration.update >= run.final.update
    return early + _scheduled(occasions, iteration, run) + over


def events_at(update: int, run: Run) -> tuple[Firing, ...]:
    """Return the events after the update of this number, that of the epoch's end and the run's if they come with it.

    Example:
        >>> from noether.core.run import Run
        >>> run = Run(end=TrainingIteration(epoch=3), updates_per_epoch=4, samples_per_epoch=8, effective_batch_size=2)
        >>> [list(map(str, events_at(update, run))) for update in (0, 3, 4, 12)]
        [['start', 'start'], ['U3'], ['U4', 'E1'], ['U12', 'E3', 'end']]
    """
    if not update:
        return tuple(Firing(kind, _START) for kind in EARLY)
    iteration, epoch = run.iteration_after(update), run.iteration_after(update - 1).epoch
    events = [Firing(AfterUpdate, dataclasses.replace(iteration, epoch=epoch))]
    events += [Firing(AfterEpoch, iteration)] if iteration.epoch > epoch else []
    return (*events, *([Firing(AfterTraining, iteration)] if update == run.final.update else []))


def fires(occasions: Occasions, at: Firing, run: Run) -> bool:
    """Return whether it happens at an event of the run."""
    gate = None if occasions.schedule is None else Gate(occasions.schedule)
    return at.event in occasions.once or (gate is not None and gate.due(at.event, state_at(at, run)) is not None)


def nth_firing(occasions: Occasions, n: int, run: Run) -> Firing:
    """Return the n-th firing, 1 being the first.

    Found by bisection: how many there are up to an update is known in closed form, and never falls.

    Raises:
        ValueError: If there are not so many.
    """
    early = [kind for kind in EARLY if kind in occasions.once]
    if 1 <= n <= len(early):
        return Firing(early[n - 1], _START)
    total = _scheduled(occasions, run.final, run)
    if len(early) < n <= len(early) + total and occasions.schedule is not None:
        return _nth_scheduled(occasions.schedule, n - len(early), run)
    if AfterTraining not in occasions.once or n != len(early) + total + 1:
        raise ValueError(f"there is no firing {n}; there are {count_until(occasions, run.final, run)}")
    return Firing(AfterTraining, run.final)


def _nth_scheduled(schedule: Schedule, n: int, run: Run) -> Firing:
    def until(update: int) -> int:
        return schedule.count(_START, run.iteration_after(update), run)

    update = bisect_left(range(run.final.update + 1), n, key=until)
    there = [at for at in events_at(update, run) if fires(Occasions(schedule), at, run)]
    return there[n - until(update - 1) - 1]


def _scheduled(occasions: Occasions, iteration: TrainingIteration, run: Run) -> int:
    return 0 if occasions.schedule is None else occasions.schedule.count(_START, iteration, run)


def _opens_at_end(gate: Gate, run: Run) -> bool:
    return gate.due(AfterTraining, state_at(Firing(AfterTraining, run.final), run)) is not None
