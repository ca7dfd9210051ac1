"""The calls of a reducer at an update, and at several updates at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

from noether.core.callback import attribute_of, callable_while_closed
from noether.core.event import AfterUpdate
from noether.core.schedules.pending import PendingSchedules, is_always_due

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from noether.core.callback import Callback, Effects
    from noether.core.event import Event
    from noether.core.schedules.base import Schedule
    from noether.core.schedules.gate import Gate
    from noether.core.state import TrainState
    from noether.core.stretch import CompletedUpdate

    Call = tuple[Callback, Callback]  # a member, and the callable to call for it
    CallForUpdates = Callable[[TrainState, Sequence[CompletedUpdate]], tuple[TrainState, Effects]]
    """A method such as `track_updates`, which a reducer may call once for several updates."""


@final
class CallsAtUpdates:
    """Selects what to call at an update: of most members, nothing while their gate is closed."""

    def __init__(self, members: Iterable[Callback], event_type: type[Event]) -> None:
        # In order: a member, the callable to call while it is not due, and its index in `_pending`.
        self._members: list[tuple[Callback, Callback | None, int | None]] = []
        pending: list[Schedule] = []
        acting: list[Schedule] = []  # of members that have to be called at the update at which they are due
        for member in members:
            closed, schedule = callable_while_closed(member, event_type), _schedule_at_updates(member)
            if schedule is None or closed is member or is_always_due(schedule):
                self._members.append((member, closed if schedule is None else member, None))
            else:
                self._members.append((member, closed, len(pending)))
                pending.append(schedule)
                acting += [] if _may_fire_later(member) else [schedule]
        self._pending, self._acting = PendingSchedules(pending), PendingSchedules(acting)
        self._while_closed = self._calls(())  # the calls of most updates, at which no gate opens
        self.for_updates = self._find_calls_for_updates()
        """What to call once for several updates, none of which has to be told at once; None if a member needs each."""
        conditions = (getattr(member, "_can_wait", None) for member, _ in self.for_updates or ())
        self._conditions = tuple(condition for condition in conditions if condition is not None)

    def can_wait(self, state: TrainState, event: AfterUpdate) -> bool:
        """Return whether the calls in `for_updates` can come later for the update of `state`."""
        if self.for_updates is None or self._acting.due(state.previous, state.iteration):
            return False
        return not self._conditions or all(condition(state, event) for condition in self._conditions)

    def select(self, state: TrainState) -> tuple[Call, ...]:
        """Return the calls at the update of `state`."""
        due = self._pending.due(state.previous, state.iteration)
        return self._calls(due) if due else self._while_closed

    def _calls(self, due: Iterable[int]) -> tuple[Call, ...]:
        due = frozenset(due)
        return tuple(
            [
                (member, call)
                for member, closed, index in self._members
                if (call := member if index in due else closed) is not None
            ]
        )

    def _find_calls_for_updates(self) -> tuple[tuple[Callback, CallForUpdates], ...] | None:
        """Return what to call once for several updates, none of which needs an answer; None if a member has nothing."""
        found: list[tuple[Callback, CallForUpdates]] = []
        for member, closed, index in self._members:
            fires = closed is member or (index is not None and _may_fire_later(member))
            if closed is not None or fires:
                call = getattr(member, "_fire_updates" if fires else "_track_updates", None)
                if call is None:
                    return None
                found.append((member, call))
        return tuple(found)


def _may_fire_later(member: Callback) -> bool:
    return getattr(member, "_fire_updates", None) is not None


def _schedule_at_updates(member: Callback) -> Schedule | None:
    """Return the part of a member's schedule that its gate reads at updates."""
    gate: Gate | None = attribute_of(member, "gate")
    return None if gate is None else gate.parts.get(AfterUpdate)
