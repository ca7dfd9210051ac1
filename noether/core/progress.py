"""Progress of slow work, such as generating a dataset; the work does not know which display shows it."""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Final, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_Item = TypeVar("_Item")


class ProgressDisplay(Protocol):
    """A display of the progress of iterations, such as the console of a run."""

    def track(self, iterable: Iterable[_Item], description: str, total: int | None = None) -> Iterator[_Item]:
        """Yield the items, and show how many of them are done."""


_DISPLAY: Final[ContextVar[ProgressDisplay | None]] = ContextVar("noether_progress_display", default=None)


def track_progress(iterable: Iterable[_Item], description: str, total: int | None = None) -> Iterator[_Item]:
    """Yield the items of an iterable, and show a progress bar if there is a display.

    `noether train` displays it while it constructs datasets, models and callbacks.

    Args:
        iterable: The items.
        description: Label of the bar, such as `generating fields`.
        total: The number of items; None takes `len(iterable)` if it has one.

    Example:
        >>> [2 * number for number in track_progress(range(3), "generating numbers")]
        [0, 2, 4]
    """
    display = _DISPLAY.get()
    if display is None:
        yield from iterable
    else:
        yield from display.track(iterable, description, total)


@contextmanager
def show_progress_on(display: ProgressDisplay | None) -> Iterator[None]:
    """Let `track_progress` show its progress on a display inside the block.

    Args:
        display: The display; None for no display.

    Example:
        >>> class Printed:
        ...     def track(self, iterable, description, total=None):
        ...         print(description, total)
        ...         yield from iterable
        >>> with show_progress_on(Printed()):
        ...     list(track_progress("ab", "reading", total=2))
        reading 2
        ['a', 'b']
    """
    token = _DISPLAY.set(display)
    try:
        yield
    finally:
        _DISPLAY.reset(token)
