"""Gates: a schedule that is read at the events that move its counters."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Final, Literal, final

from noether.core.event import AfterEpoch, AfterTraining, AfterUpdate, Event, kind_of

if TYPE_CHECKING:
    from noether.core.iteration import Counter, TrainingIteration
    from noether.core.schedules.base import Schedule
    from noether.core.state import TrainState

Interval = Literal["epoch", "update", "sample", "end", "eval"]
"""Why a periodic callback runs: the counter that was due, the end of training, or standalone evaluation."""

_COUNTERS_AT: Final[dict[type[Event], tuple[Counter, ...]]] = {
    AfterUpdate: ("update", "sample"),
    AfterEpoch: ("epoch",),
}


@final
@dataclass(frozen=True)
class Gate:
    """Opens when `schedule` is due; with `at_end` also after training, unless the schedule was due there.

    Args:
        schedule: When it opens. `AfterUpdate` reads updates and samples, `AfterEpoch` reads epochs.
        at_end: Whether it opens on `AfterTraining` if the schedule was not due at the last update and epoch.

    Example:
        >>> from noether.core.schedules.schedule import EveryNUpdates
        >>> from noether.core.state import TrainState
        >>> gate = Gate(EveryNUpdates(2))
        >>> state = TrainState().advance(samples=1).advance(samples=1)
        >>> gate.opens(state, AfterUpdate(samples=1)), gate.opens(state.next_epoch(), AfterEpoch())
        ('update', None)
    """

    schedule: Schedule
    at_end: bool = False

    def opens(self, state: TrainState, event: Event) -> Interval | None:
        """Return why the gate opens for `event`, or None if it stays closed."""
        return self.due(type(event), state)

    def due(self, event_type: type[Event], state: TrainState) -> Interval | None:
        """Return why the gate would open for an event of this type, or None."""
        kind = event_type if event_type in self.parts else kind_of(event_type)
        if kind is AfterTraining:
            return "end" if self.at_end and not self._was_due(state) else None
        part = self.parts.get(kind)
        for member in () if part is None else part.members:
            if member.due(state.previous, state.iteration):
                return member.counter
        return None

    def _was_due(self, state: TrainState) -> bool:
        # At the last update, the epoch that it completed was not counted yet.
        at_update = dataclasses.replace(state.iteration, epoch=state.previous.epoch)
        read: dict[type[Event], TrainingIteration] = {AfterUpdate: at_update, AfterEpoch: state.iteration}
        return any(part.due(state.previous, read[event_type]) for event_type, part in self.parts.items())

    @cached_property
    def parts(self) -> dict[type[Event], Schedule]:
        """The part of the schedule that each event reads."""
        parts = {event_type: self.schedule.select_counters(*counters) for event_type, counters in _COUNTERS_AT.items()}
        return {event_type: part for event_type, part in parts.items() if part is not None}

    def listens(self, event_type: type[Event]) -> bool:
        """Return whether the gate can open on events of this type."""
        kind = kind_of(event_type)
        return kind in self.parts or (self.at_end and kind is AfterTraining)
