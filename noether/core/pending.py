"""An update whose event was cut short, by an error or a signal: its readings are kept, and dispatched again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from noether.core.event import AfterUpdate
from noether.core.loop import dispatch
from noether.core.tensors.memory import check_savable
from noether.core.tensors.tree import freeze, map_leaves, plain_number

if TYPE_CHECKING:
    from collections.abc import Callable

    from noether.core.callback import Callback, Effects
    from noether.core.event import Event
    from noether.core.run import Run
    from noether.core.state import TrainState

_OF_THE_PROCESS: Final = frozenset({"run", "time_s"})
"""Fields of an event that the resumed process supplies."""


def keep_event(state: TrainState, event: AfterUpdate) -> TrainState:
    """Return the state before `event` was dispatched, as a checkpoint keeps it: it remembers the event's readings.

    A loop saves it when an error or a signal cuts the event short. Outputs of the model that no checkpoint can hold
    are left out.

    Args:
        state: The state at the event, before any callback.
        event: The event.

    Example:
        >>> from noether import AfterUpdate, TrainState
        >>> keep_event(TrainState().advance(samples=4), AfterUpdate(samples=4)).pending["samples"]
        4
    """
    readings = {name: value for name, value in vars(event).items() if name not in _OF_THE_PROCESS}
    try:
        check_savable("outputs", event.outputs)
    except TypeError:
        readings["outputs"] = None
    return state.replace(pending=freeze(map_leaves(plain_number, readings)))


def dispatch_pending(
    state: TrainState,
    run: Run,
    reducer: Callback,
    interpreter: Callable[[Effects, TrainState, Event], None],
    time_s: float = 0.0,
) -> TrainState:
    """Dispatch the event that `keep_event` kept, and return the new state; the same state if there is none.

    A loop calls it after `BeforeTraining` of a resumed run.

    Args:
        state: The resumed state.
        run: The constants of the run.
        reducer: As for `dispatch`.
        interpreter: As for `dispatch`.
        time_s: Wall-clock time in seconds since 1970.

    Example:
        >>> from noether import AfterUpdate, LogText, Run, TrainState, on
        >>> show = on(AfterUpdate)(lambda state, event: (state, (LogText(f"{event.samples} samples"),)))
        >>> state = keep_event(TrainState().advance(samples=4), AfterUpdate(samples=4))
        >>> state = dispatch_pending(state, Run(), show, lambda effects, state, event: print(effects))
        (LogText(text='4 samples'),)
        >>> state.pending is None
        True
    """
    if state.pending is None:
        return state
    event = AfterUpdate.of(run=run, time_s=time_s, **state.pending)
    return dispatch(state.replace(pending=None), event, reducer, interpreter)
