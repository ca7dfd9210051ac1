"""The laws of schedules: their closed forms agree with a walk through the events of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from hypothesis import strategies as st

from noether.core.iteration import COUNTERS, TrainingIteration
from noether.core.schedules.window import Thresholds
from noether.testing.counterexamples import LawError, assert_law
from noether.testing.strategies import batch_sizes, points, run_lengths, schedules

if TYPE_CHECKING:
    from collections.abc import Iterator

    from noether.core.iteration import Counter
    from noether.core.run import Run
    from noether.core.schedules.base import Schedule

_EXAMPLES: Final = 200


def check_schedule(schedule: Schedule, *, examples: int = _EXAMPLES) -> None:
    """Raise unless the closed forms of a schedule agree with a walk through the events of a run.

    - `count` equals the number of firings and is additive over adjoining parts of a run, also in a union with another
      schedule and limited by `starting` or `until`.
    - The schedule is not due before `next_due`. It is due when one of its `members` is, and gates read only these.
    - Limited to a part of the run, it is due there as before, and nowhere else.
    - Whether it is due at a sample does not depend on how samples are split into batches.

    Args:
        schedule: Any schedule. Users define one as a subclass of `Schedule` that has `members`, or of `OneCounter` that
            says where the thresholds lie on one counter.
        examples: Largest number of runs to try for each law, >= 1.

    Raises:
        LawError: With the simplest run that breaks a law.

    Example:
        >>> from dataclasses import dataclass
        >>> from noether import EveryNUpdates
        >>> check_schedule(EveryNUpdates(3) | EveryNUpdates(4).starting(TrainingIteration(epoch=1)))
        >>> class Remainder(EveryNUpdates):  # type: ignore[misc]  # what not to do
        ...     def due(self, previous, iteration):
        ...         return iteration.sample % self.n == 0
        >>> check_schedule(Remainder(3))
        Traceback (most recent call last):
        noether.testing.counterexamples.LawError: Remainder ...

        A schedule that fires often at first, made of others, obeys the laws:

        >>> from noether.core.schedules.base import Schedule
        >>> @dataclass(frozen=True)
        ... class OftenAtFirst(Schedule):
        ...     n: int
        ...     @property
        ...     def members(self):
        ...         often = EveryNUpdates(1).until(TrainingIteration(update=self.n))
        ...         return (often | EveryNUpdates(self.n)).members
        >>> check_schedule(OftenAtFirst(4))
    """
    ends = st.tuples(*[st.integers(0, 1000)] * 3).map(sorted)
    assert_law(lambda run, places: _check_count(schedule, run, places), run_lengths(), ends, examples=examples)
    assert_law(lambda run: _check_next_due(schedule, run), run_lengths(), examples=examples)
    assert_law(lambda run: _check_members(schedule, run), run_lengths(), examples=examples)
    assert_law(
        lambda run, point, places: _check_limits(schedule, run, point, places),
        run_lengths(),
        points(),
        ends,
        examples=examples,
    )
    assert_law(
        lambda run, other, places: _check_count(schedule | other, run, places, schedule),
        run_lengths(),
        schedules(12),
        ends,
        examples=examples,
    )
    assert_law(
        lambda start, sizes: _check_batches(schedule, start, sizes), run_starts(), batch_sizes(), examples=examples
    )


def run_starts() -> st.SearchStrategy[TrainingIteration]:
    """Iterations at the start of an update."""
    return st.builds(lambda u, s: TrainingIteration(0, u, u + s), st.integers(0, 40), st.integers(0, 40))


def walk_events(run: Run) -> Iterator[tuple[tuple[Counter, ...], TrainingIteration, TrainingIteration]]:
    """Yield for each event of a run the counters that a schedule reads there, and the iterations before and at it."""
    for update in range(run.final.update):
        previous, after = run.iteration_after(update), run.iteration_after(update + 1)
        yield ("update", "sample"), previous, TrainingIteration(previous.epoch, after.update, after.sample)
        if after.epoch > previous.epoch:
            yield ("epoch",), previous, after


def _check_count(schedule: Schedule, run: Run, places: list[int], tested: Schedule | None = None) -> None:
    """Check that `count` equals the number of firings, and that the counts of two parts add up to it.

    Args:
        schedule: The schedule to count.
        run: The run.
        places: Numbers of updates, in order, at which the parts start and end.
        tested: The schedule that `schedule` was made from, for the message.
    """
    made_from = "" if tested is None else f"united or limited to {_members_text(schedule)}, "
    named = schedule if tested is None else tested
    a, b, c = (run.iteration_after(min(place, run.final.update)) for place in places)
    fired = [
        at
        for counters, before, at in walk_events(run)
        if (part := schedule.select_counters(*counters)) is not None and part.due(before, at)
    ]
    firings = sum(at != a and at.reached(a) and c.reached(at) for at in fired)
    count = schedule.count(a, c, run)
    if count != firings:
        raise _law_error(named, f"{made_from}counts {count} firings from {a} to {c}, but fires {firings} times", run)
    parts = schedule.count(a, b, run) + schedule.count(b, c, run)
    if parts != count:
        raise _law_error(named, f"{made_from}counts {count} firings from {a} to {c}, but {parts} if split at {b}", run)


def _check_next_due(schedule: Schedule, run: Run) -> None:
    """Check that no event before `next_due` is due."""
    for counters, before, at in walk_events(run):
        part = schedule.select_counters(*counters)
        if part is None or not part.due(before, at):
            continue
        if not (part.next_due(before).reached(at) and schedule.next_due(before).reached(at)):
            raise _law_error(schedule, f"is due at {at}, before its next_due({before})", run)


def _check_members(schedule: Schedule, run: Run) -> None:
    """Check that the schedule is due exactly if one of its members is."""
    for _, before, at in walk_events(run):
        due = schedule.due(before, at)
        if due != any(member.due(before, at) for member in schedule.members):
            said, members = ("is", "none of its members is") if due else ("is not", "one of its members is")
            hint = "a gate reads the members, so give them what `due` says"
            raise _law_error(schedule, f"{said} due at {at}, but {members}; {hint}", run)


def _check_limits(schedule: Schedule, run: Run, point: TrainingIteration, places: list[int]) -> None:
    """Check the parts of a schedule before and after a point: where they are due, and how often."""
    starting, until = schedule.starting(point), schedule.until(point)
    ends = Thresholds(*(getattr(point, counter) or None for counter in COUNTERS))
    for _, before, at in walk_events(run):
        due = schedule.due(before, at)
        for limited, name, outside, inside in (
            (starting, "starting", not at.reached(point), before.reached(point)),
            (until, "until", ends.reached(before), not ends.reached(at)),
        ):
            expected = False if outside else due if inside else None  # None at the update that reaches the point
            if expected is not None and limited.due(before, at) != expected:
                said = "is not" if expected else "is"
                raise _law_error(schedule, f"limited by {name}({point!r}) {said} due at {at}", run)
    for limited in (starting, until):
        _check_count(limited, run, places, schedule)


def _check_batches(schedule: Schedule, start: TrainingIteration, sizes: tuple[int, ...]) -> None:
    """Check that the schedule is due at a batch exactly if it is due at one of its samples alone."""
    part = schedule.select_counters("sample")
    if part is None:
        return
    windows: list[Any] = [member.window for member in part.members]
    limits = [point for window in windows for point in (window.start, window.until)]
    if any(point.epoch or point.update for point in limits):
        return  # with other batch sizes, limits on updates and epochs lie at other samples
    before = start
    for size in sizes:
        after = before.advance(samples=size)
        sample_due = any(
            part.due(TrainingIteration(0, before.update, sample), TrainingIteration(0, after.update, sample + 1))
            for sample in range(before.sample, after.sample)
        )
        if part.due(before, after) != sample_due:
            batch, samples = ("is not", "one of its samples is") if sample_due else ("is", "none of its samples is")
            raise LawError(f"{_name(schedule)} {batch} due for the batch from {before} to {after}, but {samples}")
        before = after


def _law_error(schedule: Schedule, violation: str, run: Run) -> LawError:
    shape = f"{run.samples_per_epoch} samples per epoch in batches of {run.effective_batch_size}"
    return LawError(f"{_name(schedule)} {violation}, in a run to {run.end} with {shape}")


def _name(schedule: Schedule) -> str:
    members = _members_text(schedule)
    name = type(schedule).__name__
    return name if members == name else f"{name} {members}"


def _members_text(schedule: Schedule) -> str:
    return " | ".join(
        type(member).__name__ if type(member).__str__ is object.__str__ else str(member) for member in schedule.members
    )
