"""Pending events: the `AfterUpdate` that an error or a signal cut short, which a resumed run dispatches again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from noether.core.event import AfterUpdate
from noether.core.loop import dispatch
from noether.core.tensors.donation import ALREADY_UPDATED, DonatedTree
from noether.core.tensors.memory import check_savable
from noether.core.tensors.tree import FrozenDict, freeze, map_leaves, plain_number

if TYPE_CHECKING:
    from collections.abc import Callable

    from noether.core.callback import Callback, Effects
    from noether.core.event import Event
    from noether.core.run import Run
    from noether.core.state import TrainState

_SUPPLIED_ON_RESUME: Final = frozenset({"run", "time_s"})
"""Fields of an event that the resumed process supplies."""
_UPDATED: Final = "moved"
"""Entry of `pending`: names and keys of the memories that the event has already updated in place."""


def set_pending(state: TrainState, event: AfterUpdate) -> TrainState:
    """Return the state at `event` with the readings of the event in `pending`.

    A loop saves it when an error or a signal cuts the event short. What no checkpoint can hold of the model's outputs,
    and of the fields of a subclass, is left out. A callback such as an EMA may already have updated a donated memory in
    place; then the state gets the updated memory, and `pending` names it, so that the memory is not updated a second
    time.

    Args:
        state: The state at the event, before any callback.
        event: The event.

    Example:
        >>> from noether import AfterUpdate, TrainState
        >>> set_pending(TrainState().advance(samples=4), AfterUpdate(samples=4)).pending["samples"]
        4
    """
    readings = {name: value for name, value in vars(event).items() if name not in _SUPPLIED_ON_RESUME}
    for name, value in readings.items():
        if name == "outputs" or name not in AfterUpdate.__dataclass_fields__:
            try:
                check_savable(name, value)
            except TypeError:
                readings[name] = None
    updated: list[tuple[str, str]] = []
    memories = {name: _with_successors(name, memory, updated) for name, memory in state.callback_states.items()}
    if updated:
        state = state.replace(callback_states=FrozenDict(memories))
        readings[_UPDATED] = tuple(updated)
    return state.replace(pending=freeze(map_leaves(plain_number, readings)))


def _with_successors(name: str, memory: Any, updated: list[tuple[str, str]]) -> Any:
    """Return a memory with the trees that replaced its own in place; append the keys of those trees to `updated`."""
    if type(memory) is not FrozenDict:
        return memory
    successors = {
        key: tree.successor
        for key, tree in memory.items()
        if isinstance(tree, DonatedTree) and tree.is_taken and tree.successor is not None
    }
    updated += [(name, key) for key in successors]
    return FrozenDict({**memory, **successors}) if successors else memory


def dispatch_pending(
    state: TrainState,
    run: Run,
    reducer: Callback,
    interpreter: Callable[[Effects, TrainState, Event], None],
    time_s: float = 0.0,
    *,
    event_type: type[AfterUpdate] = AfterUpdate,
) -> TrainState:
    """Dispatch the event that `set_pending` recorded, and return the new state; the same state if there is none.

    A loop calls it after `BeforeTraining` of a resumed run.

    Args:
        state: The resumed state.
        run: The constants of the run.
        reducer: As for `dispatch`.
        interpreter: As for `dispatch`.
        time_s: Wall-clock time in seconds since 1970.
        event_type: The type of event that the loop dispatches after an update, if that is a subclass.

    Raises:
        TypeError: If the recorded event has a field that `event_type` does not have.

    Example:
        >>> from noether import AfterUpdate, LogText, Run, TrainState, on
        >>> show = on(AfterUpdate)(lambda state, event: (state, (LogText(f"{event.samples} samples"),)))
        >>> state = set_pending(TrainState().advance(samples=4), AfterUpdate(samples=4))
        >>> state = dispatch_pending(state, Run(), show, lambda effects, state, event: print(effects))
        (LogText(text='4 samples'),)
        >>> state.pending is None
        True
    """
    if state.pending is None:
        return state
    state, readings = take_pending(state)
    return dispatch(state, event_type.of(run=run, time_s=time_s, **readings), reducer, interpreter)


def take_pending(state: TrainState) -> tuple[TrainState, dict[str, Any]]:
    """Return the state without `pending`, and the readings of the pending event; no readings if there is none.

    Memories that the event has already updated in place are marked, so that dispatching it leaves them as they are.

    Example:
        >>> from noether import AfterUpdate, TrainState
        >>> state, readings = take_pending(set_pending(TrainState().advance(samples=4), AfterUpdate(samples=4)))
        >>> state.pending, readings["samples"]
        (None, 4)
    """
    readings, memories = dict(state.pending or {}), dict(state.callback_states)
    for name, key in readings.pop(_UPDATED, ()):
        memories[name] = FrozenDict({**memories[name], key: DonatedTree(dict(memories[name][key]), ALREADY_UPDATED)})
    return state.replace(pending=None, callback_states=FrozenDict(memories)), readings
