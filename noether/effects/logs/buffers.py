"""Buffered logs: the interval between flushes, and buffers whose copies a forked process discards."""

from __future__ import annotations

import math
import os
import weakref
from typing import TYPE_CHECKING, Final, Protocol, final

if TYPE_CHECKING:
    from noether.core.event import Event

_INTERVAL_S: Final = 1.0


@final
class FlushInterval:
    """Says when to flush: at most once a second at events of the given types, and at every other event.

    Time is the time that events carry. A loop that sets no time flushes at every event.

    Args:
        event_types: Types of events at which a flush may be postponed.

    Example:
        >>> from noether import AfterEpoch, AfterUpdate
        >>> interval = FlushInterval(AfterUpdate)
        >>> [interval.is_due(AfterUpdate(time_s=time_s)) for time_s in (1.0, 1.5, 2.0, 2.5)]
        [True, False, True, False]
        >>> interval.is_due(AfterEpoch(time_s=2.5))
        True
    """

    def __init__(self, *event_types: type[Event]) -> None:
        self._event_types = event_types
        self._last_s = -math.inf

    def is_due(self, event: Event) -> bool:
        """Return whether to flush at this event."""
        time_s = event.time_s
        if not isinstance(event, self._event_types) or not time_s:
            return True
        if 0 <= time_s - self._last_s < _INTERVAL_S:
            return False
        self._last_s = time_s
        return True


class Buffered(Protocol):
    """An object with a buffer of unwritten data."""

    def discard_buffer(self) -> None:
        """Discard the unwritten data."""


_BUFFERED: Final[weakref.WeakSet[Buffered]] = weakref.WeakSet()


def discard_after_fork(buffered: Buffered) -> None:
    """Make a forked child process discard its copy of a buffer, because the parent process writes it."""
    _BUFFERED.add(buffered)


def discard_all_buffers() -> None:
    """Discard every registered buffer."""
    for each in _BUFFERED:
        each.discard_buffer()


os.register_at_fork(after_in_child=discard_all_buffers)
