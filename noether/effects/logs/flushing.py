"""What is to be written may wait for more of its kind: for how long, and not in a forked process."""

from __future__ import annotations

import math
import os
import weakref
from typing import TYPE_CHECKING, Final, Protocol, final

if TYPE_CHECKING:
    from noether.core.event import Event

_WAIT_S: Final = 1.0


@final
class Pace:
    """Lets events of some types wait, for a second at most by the time that events carry; no other event waits.

    Args:
        waits: Types of events.

    Example:
        >>> from noether import AfterEpoch, AfterUpdate
        >>> pace = Pace(AfterUpdate)
        >>> [pace.is_due(AfterUpdate(time_s=time_s)) for time_s in (1.0, 1.5, 2.0, 2.5)]
        [True, False, True, False]
        >>> pace.is_due(AfterEpoch(time_s=2.5))
        True
    """

    def __init__(self, *waits: type[Event]) -> None:
        self._waits = waits
        self._since_s = -math.inf

    def is_due(self, event: Event) -> bool:
        """Return whether to write now."""
        if not isinstance(event, self._waits) or not event.time_s:  # a loop that does not read the time waits for none
            return True
        if 0 <= event.time_s - self._since_s < _WAIT_S:
            return False
        self._since_s = event.time_s
        return True


class Waits(Protocol):
    """Holds what is to be written."""

    def forget(self) -> None:
        """Drop what waits."""


_WAITING: Final[weakref.WeakSet[Waits]] = weakref.WeakSet()


def forget_in_children(each: Waits) -> None:
    """Have a forked process drop its copy of what waits: its parent writes that."""
    _WAITING.add(each)


def _forget() -> None:
    for each in _WAITING:
        each.forget()


os.register_at_fork(after_in_child=_forget)
