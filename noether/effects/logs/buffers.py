"""Buffered logs: the interval between flushes, and buffers whose copies a forked process discards."""

from __future__ import annotations

import math
import os
import weakref
from typing import TYPE_CHECKING, Final, Protocol, final

from noether.core.event import kind_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from noether.core.event import Event

FLUSH_INTERVAL_S: Final = 1.0
"""Seconds from one flush of a log to the next, by the times of events."""
EPOCH_FLUSH_INTERVAL_S: Final = 0.05
"""The same for lines at the ends of epochs: so short that only those of very short epochs are buffered."""


@final
class FlushInterval:
    """Says when to flush: at events of the given types at most once in some seconds, and at every other event.

    Time is the time that events carry. A loop that sets no time flushes at every event.

    Args:
        seconds: By type of event, the seconds that have to pass since the last such flush.

    Example:
        >>> from noether import AfterEpoch, AfterUpdate
        >>> interval = FlushInterval({AfterUpdate: 1.0})
        >>> [interval.is_due(AfterUpdate(time_s=time_s)) for time_s in (1.0, 1.5, 2.0, 2.5)]
        [True, False, True, False]
        >>> interval.is_due(AfterEpoch(time_s=2.5))
        True
    """

    def __init__(self, seconds: Mapping[type[Event], float]) -> None:
        self._seconds = dict(seconds)
        self._last_s = -math.inf

    def is_due(self, event: Event) -> bool:
        """Return whether to flush at this event."""
        time_s, event_type = event.time_s, type(event)
        seconds = self._seconds.get(event_type if event_type in self._seconds else kind_of(event_type))
        if seconds is None or not time_s:
            return True
        if 0 <= time_s - self._last_s < seconds:
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
