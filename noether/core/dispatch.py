"""One event through the callbacks and out into the world."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from noether.core.callback import Callback, Effects
    from noether.core.event import Event
    from noether.core.state import TrainState


def dispatch(
    state: TrainState,
    event: Event,
    reducer: Callback,
    interpreter: Callable[[Effects, TrainState, Event], None],
) -> TrainState:
    """Return the state that the callbacks settled on, after what they asked for was done.

    Args:
        state: The state at the event.
        event: What happened.
        reducer: Any callback, most often the result of `compose`.
        interpreter: Carries the effects out, on the settled state.

    Example:
        >>> from noether import AfterTraining, LogText, TrainState, dispatch, on
        >>> bye = on(AfterTraining)(lambda state, event: (state, (LogText("bye"),)))
        >>> state = dispatch(TrainState(), AfterTraining(), bye, lambda effects, state, event: print(effects))
        (LogText(text='bye'),)
    """
    state, effects = reducer(state, event)
    interpreter(effects, state, event)
    return state
