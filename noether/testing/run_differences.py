"""The first difference between two runs of a callback, as the error of a law."""

from __future__ import annotations

from typing import TYPE_CHECKING

from noether.core.callback import label_of
from noether.testing.comparison import differences
from noether.testing.counterexamples import LawError

if TYPE_CHECKING:
    from noether.core.callback import Callback
    from noether.testing.traces import DrivenRun, Trace


def compare_runs(callback: Callback, violation: str, found: DrivenRun, expected: DrivenRun, trace: Trace) -> None:
    """Raise an error with the first difference between two runs, if there is one.

    Args:
        callback: The callback that the law is about.
        violation: What the callback does wrong, for the message.
        found: One run.
        expected: The run that it should equal.
        trace: The trace of both.

    Raises:
        LawError: If the runs differ.
    """
    difference = _first_difference(found, expected)
    if difference is not None:
        labels = " and ".join(map(label_of, getattr(callback, "members", (callback,))))
        raise LawError(f"{labels} {violation}\n  {difference}\n  in {trace}")


def _first_difference(found: DrivenRun, expected: DrivenRun) -> str | None:
    """Return the first event at which two runs differ, with the found and the expected value, or None."""
    for number in range(min(len(found.events), len(expected.events))):
        place = event_text(expected, number)
        if type(found.events[number]) is not type(expected.events[number]):
            return f"at {place}: the event is {event_text(found, number)}"
        for name, ours, theirs in (
            ("state", found.states[number], expected.states[number]),
            ("effects", found.effects[number], expected.effects[number]),
        ):
            for path, one, other in differences(ours, theirs):
                return f"at {place}: {name}{path} is {one}, expected {other}"
    if len(found.events) != len(expected.events):
        return f"the run has {len(found.events)} events, expected {len(expected.events)}"
    return None


def event_text(driven: DrivenRun, number: int) -> str:
    """Return the type of the event with index `number`, and the iteration there."""
    return f"{type(driven.events[number]).__name__} {driven.states[number].iteration}"
