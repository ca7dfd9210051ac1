"""An update whose event was cut short, by an error or a signal: its readings are kept, and dispatched again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from noether.core.event import AfterUpdate
from noether.core.loop import dispatch
from noether.core.tensors.donation import MOVED, DonatedTree
from noether.core.tensors.memory import check_savable
from noether.core.tensors.tree import FrozenDict, freeze, map_leaves, plain_number

if TYPE_CHECKING:
    from collections.abc import Callable

    from noether.core.callback import Callback, Effects
    from noether.core.event import Event
    from noether.core.run import Run
    from noether.core.state import TrainState

_OF_THE_PROCESS: Final = frozenset({"run", "time_s"})
"""Fields of an event that the resumed process supplies."""
_MOVED: Final = "moved"
"""Entry of `pending`: names and keys of the memories that the event has moved already."""


def keep_event(state: TrainState, event: AfterUpdate) -> TrainState:
    """Return the state before `event` was dispatched, as a checkpoint keeps it: it remembers the event's readings.

    A loop saves it when an error or a signal cuts the event short. Outputs of the model that no checkpoint can hold
    are left out. A callback may have written its memory over the one of the state; the state then gets the new one, and
    remembers which memories the event has moved already.

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
    moved: list[tuple[str, str]] = []
    memories = {name: _follow(name, memory, moved) for name, memory in state.callback_states.items()}
    if moved:
        state = state.replace(callback_states=FrozenDict(memories))
        readings[_MOVED] = tuple(moved)
    return state.replace(pending=freeze(map_leaves(plain_number, readings)))


def _follow(name: str, memory: Any, moved: list[tuple[str, str]]) -> Any:
    """Return a memory with the trees that were written over its own; append the keys of those trees to `moved`."""
    if not isinstance(memory, FrozenDict):
        return memory
    successors = {
        key: tree.successor
        for key, tree in memory.items()
        if isinstance(tree, DonatedTree) and tree.is_taken and tree.successor is not None
    }
    moved += [(name, key) for key in successors]
    return FrozenDict({**memory, **successors}) if successors else memory


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
    readings = dict(state.pending)
    memories = dict(state.callback_states)
    for name, key in readings.pop(_MOVED, ()):
        memories[name] = FrozenDict({**memories[name], key: DonatedTree(dict(memories[name][key]), MOVED)})
    event = AfterUpdate.of(run=run, time_s=time_s, **readings)
    return dispatch(state.replace(pending=None, callback_states=FrozenDict(memories)), event, reducer, interpreter)
