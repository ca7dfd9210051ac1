"""The laws of schedules: their closed forms against a run that is walked event by event."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from hypothesis import strategies as st

from noether.core.iteration import TrainingIteration
from noether.testing.counterexamples import LawError, assert_law
from noether.testing.strategies import batch_sizes, run_lengths

if TYPE_CHECKING:
    from collections.abc import Iterator

    from noether.core.iteration import Counter
    from noether.core.run import Run
    from noether.core.schedules.base import Schedule

_EXAMPLES: Final = 200


def check_schedule(schedule: Schedule, *, examples: int = _EXAMPLES) -> None:
    """Return if what a schedule says of a run without walking it is what a walk finds.

    `count` is the number of firings, and additive over adjoining parts of a run; nothing is due before `next_due`; and
    whether samples or updates are due does not depend on how they were split into batches.

    Args:
        schedule: Any schedule.
        examples: How many runs to try for each law, >= 1.

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
    """
    ends = st.tuples(*[st.integers(0, 1000)] * 3).map(sorted)
    assert_law(lambda run, places: _check_count(schedule, run, places), run_lengths(), ends, examples=examples)
    assert_law(lambda run: _check_next_due(schedule, run), run_lengths(), examples=examples)
    assert_law(
        lambda start, sizes: _check_batches(schedule, start, sizes), run_starts(), batch_sizes(), examples=examples
    )


def run_starts() -> st.SearchStrategy[TrainingIteration]:
    """Iterations at the start of an update."""
    return st.builds(lambda u, s: TrainingIteration(0, u, u + s), st.integers(0, 40), st.integers(0, 40))


def walked(run: Run) -> Iterator[tuple[tuple[Counter, ...], TrainingIteration, TrainingIteration]]:
    """Yield the counters that each event of a run reads, and the iterations before and at it."""
    for update in range(run.final.update):
        previous, after = run.iteration_after(update), run.iteration_after(update + 1)
        seen = TrainingIteration(previous.epoch, after.update, after.sample)
        yield ("update", "sample"), previous, seen
        if after.epoch > previous.epoch:
            yield ("epoch",), previous, after


def _fires(schedule: Schedule, counters: tuple[Counter, ...], before: TrainingIteration, at: TrainingIteration) -> bool:
    part = schedule.reading(*counters)
    return part is not None and part.due(before, at)


def _check_count(schedule: Schedule, run: Run, places: list[int]) -> None:
    a, b, c = (run.iteration_after(min(place, run.final.update)) for place in places)
    fired = [at for counters, before, at in walked(run) if _fires(schedule, counters, before, at)]
    inside = [at for at in fired if at != a and at.reached(a) and c.reached(at)]
    counted = schedule.count(a, c, run)
    if counted != len(inside):
        raise LawError(_told(schedule, f"counts {counted} firings from {a} to {c}, and fires {len(inside)} times", run))
    parts = schedule.count(a, b, run) + schedule.count(b, c, run)
    if parts != counted:
        raise LawError(_told(schedule, f"counts {counted} firings from {a} to {c}, and by way of {b} {parts}", run))


def _check_next_due(schedule: Schedule, run: Run) -> None:
    for counters, before, at in walked(run):
        part = schedule.reading(*counters)
        if part is not None and part.due(before, at) and not part.next_due(before).reached(at):
            raise LawError(_told(schedule, f"is due at {at}, before its next_due after {before}", run))


def _check_batches(schedule: Schedule, start: TrainingIteration, sizes: tuple[int, ...]) -> None:
    """Check that a batch is due if one of its samples alone is."""
    part = schedule.reading("sample")
    if part is None or any(_limits_others(member.window) for member in part.members):
        return
    before = start
    for size in sizes:
        after = before.advance(samples=size)
        singly = [
            sample
            for sample in range(before.sample, after.sample)
            if part.due(TrainingIteration(0, before.update, sample), TrainingIteration(0, after.update, sample + 1))
        ]
        if part.due(before, after) != bool(singly):
            due = "is" if not singly else "is not"
            raise LawError(f"{_name(schedule)} {due} due for a batch from {before} to {after}, unlike its samples")
        before = after


def _limits_others(window: object) -> bool:
    """Return whether a window is limited by updates or epochs, which are other for other batches."""
    start, until = window.start, window.until  # type: ignore[attr-defined]  # a Window
    return bool(start.epoch or start.update or until.epoch or until.update)


def _told(schedule: Schedule, what: str, run: Run) -> str:
    shape = f"{run.samples_per_epoch} samples an epoch in batches of {run.effective_batch_size}"
    return f"{_name(schedule)} {what}, in a run to {run.end} of {shape}"


def _name(schedule: Schedule) -> str:
    return f"{type(schedule).__name__} {' | '.join(str(member) for member in schedule.members)}"
