"""The calls of a reducer at one update, and for several deferred updates."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, final

from noether.core.callback import attribute_of, callable_while_closed
from noether.core.deferred_calls import deferred_calls_of
from noether.core.event import AfterUpdate
from noether.core.schedules.pending import PendingSchedules, is_always_due

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from noether.core.callback import Callback
    from noether.core.deferred_calls import CallForUpdates
    from noether.core.event import Event
    from noether.core.schedules.base import Schedule
    from noether.core.schedules.gate import Gate
    from noether.core.state import TrainState

    Call = tuple[Callback, Callback]  # a member, and the callable to call for it


class _Member(NamedTuple):
    """A member of a reducer, and when to call it at updates.

    Args:
        callback: The member.
        while_closed: The callable to call at updates at which the member is not due; None for no call.
        schedule: When the member is due; None if `while_closed` is called at each update.
    """

    callback: Callback
    while_closed: Callback | None
    schedule: Schedule | None


@final
class CallsAtUpdates:
    """Selects the calls at an update: a member whose gate is closed is not called, or only to track the update.

    Attributes:
        deferred: Each member with its call for several deferred updates; None if no update can be deferred, because a
            member has to be called at each.
    """

    def __init__(self, members: Iterable[Callback], event_type: type[Event]) -> None:
        self._members = tuple(_find_schedule(member, event_type) for member in members)
        schedules = {
            index: member.schedule for index, member in enumerate(self._members) if member.schedule is not None
        }
        at_once = [
            schedule for index, schedule in schedules.items() if not _can_fire_later(self._members[index].callback)
        ]
        self._indexes = tuple(schedules)
        self._pending = PendingSchedules(tuple(schedules.values()))
        self._pending_at_once = PendingSchedules(at_once)  # of the members whose firings cannot be deferred
        self._calls_while_closed = self._calls(())  # the calls of most updates, at which no gate opens
        self.deferred = self._find_deferred_calls()
        conditions = (deferred_calls_of(member).condition for member, _ in self.deferred or ())
        self._conditions = tuple(condition for condition in conditions if condition is not None)

    def can_defer(self, state: TrainState, event: AfterUpdate) -> bool:
        """Return whether all members can be called later for the update of `state`."""
        if self.deferred is None or self._pending_at_once.due(state.previous, state.iteration):
            return False
        return not self._conditions or all(condition(state, event) for condition in self._conditions)

    def select(self, state: TrainState) -> tuple[Call, ...]:
        """Return the calls at the update of `state`."""
        due = self._pending.due(state.previous, state.iteration)
        return self._calls([self._indexes[each] for each in due]) if due else self._calls_while_closed

    def _calls(self, due: Collection[int]) -> tuple[Call, ...]:
        """Return the calls at an update at which the members with these indexes are due."""
        return tuple(
            [
                (member, call)
                for index, (member, while_closed, _) in enumerate(self._members)
                if (call := member if index in due else while_closed) is not None
            ]
        )

    def _find_deferred_calls(self) -> tuple[tuple[Callback, CallForUpdates], ...] | None:
        found: list[tuple[Callback, CallForUpdates]] = []
        for member, while_closed, schedule in self._members:
            fires = while_closed is member or (schedule is not None and _can_fire_later(member))
            if while_closed is not None or fires:
                calls = deferred_calls_of(member)
                call = calls.fire if fires else calls.track
                if call is None:
                    return None
                found.append((member, call))
        return tuple(found)


def _find_schedule(member: Callback, event_type: type[Event]) -> _Member:
    while_closed = callable_while_closed(member, event_type)
    gate: Gate | None = attribute_of(member, "gate")
    schedule = None if gate is None else gate.parts.get(AfterUpdate)
    if schedule is not None and (while_closed is member or is_always_due(schedule)):
        return _Member(member, member, None)
    return _Member(member, while_closed, schedule)


def _can_fire_later(member: Callback) -> bool:
    return deferred_calls_of(member).fire is not None
