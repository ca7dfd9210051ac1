"""The calls that a reducer may make to a callback once for several deferred updates."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from noether.core.callback import Callback, Effects
    from noether.core.event import AfterUpdate
    from noether.core.state import TrainState
    from noether.core.stretch import CompletedUpdate

    CallForUpdates = Callable[[TrainState, Sequence[CompletedUpdate]], tuple[TrainState, Effects]]
    """A method such as `track_updates`, which a reducer may call once for several updates."""


class DeferredCalls(NamedTuple):
    """What a reducer may call once for several updates: the attribute `_deferred_calls` of a callback.

    Args:
        track: Tracks updates at which the callback is not due; None if it has to be called at each.
        fire: Tracks updates, and fires at those at which the callback is due; None if it has to be called at each
            update at which it is due.
        condition: Returns whether an update can be deferred; None if every update can.
    """

    track: CallForUpdates | None = None
    fire: CallForUpdates | None = None
    condition: Callable[[TrainState, AfterUpdate], bool] | None = None


_NO_CALLS: Final = DeferredCalls()


def deferred_calls_of(callback: Callback) -> DeferredCalls:
    """Return the deferred calls of a callback; a plain function has none.

    Example:
        >>> deferred_calls_of(lambda state, event: (state, ()))
        DeferredCalls(track=None, fire=None, condition=None)
    """
    found: DeferredCalls = getattr(callback, "_deferred_calls", _NO_CALLS)
    return found
