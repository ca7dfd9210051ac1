"""What a callback is, and what it may say about itself.

A callback is any `(state, event) -> (state, effects)`. A bare function says nothing about itself and is called on every
event. Base classes and combinators add attributes, all optional, which this file gives their names and defaults.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from noether.core.event import AfterUpdate

if TYPE_CHECKING:
    from collections.abc import Mapping

    from noether.core.effect import Effect
    from noether.core.event import Event
    from noether.core.schedules.gate import Gate
    from noether.core.state import Memory, TrainState

Effects = tuple["Effect", ...]


class Callback(Protocol):
    """A pure function of a state and an event.

    Example:
        >>> from noether import AfterEpoch, LogText, TrainState
        >>> def say_epoch(state, event):
        ...     if isinstance(event, AfterEpoch):
        ...         return state, (LogText(f"epoch {state.iteration.epoch} is done"),)
        ...     return state, ()
        >>> say_epoch(TrainState().next_epoch(), AfterEpoch())[1]
        (LogText(text='epoch 1 is done'),)
    """

    def __call__(self, state: TrainState, event: Event, /) -> tuple[TrainState, Effects]:
        """Return the state after the event, the same object if nothing happened, and what is asked of the outside."""
        ...


@dataclass(frozen=True)
class Declaration:
    """What a callback says about itself.

    Args:
        label: How messages call it.
        gate: When it acts; None if it acts on whatever it listens to.
        tracks: Whether it also looks at every update or accumulation step, its gate open or not.
        produces: Patterns of the metric keys it logs; None if it does not say.
        consumes: Metric keys that it needs current when it acts.
        uses: Metric keys that it reads if they are current.
        keeps: Those it produces that are current at every update, its gate open or not.
        readings: Fields of `AfterUpdate` that it needs and that cost the loop something, such as `grad_norm`.
    """

    label: str
    gate: Gate | None
    tracks: bool
    produces: tuple[str, ...] | None
    consumes: tuple[str, ...]
    uses: tuple[str, ...]
    keeps: tuple[str, ...]
    readings: tuple[str, ...]


def declaration_of(callback: Callback) -> Declaration:
    """Return what `callback` says about itself."""
    return Declaration(
        label=label_of(callback),
        gate=getattr(callback, "gate", None),
        tracks=getattr(callback, "tracks", False),
        produces=getattr(callback, "produces", None),
        consumes=getattr(callback, "consumes", ()),
        uses=getattr(callback, "uses", ()),
        keeps=getattr(callback, "keeps", ()),
        readings=getattr(callback, "readings", ()),
    )


def label_of(callback: Callback) -> str:
    """Return how messages call `callback`."""
    name: Any = getattr(callback, "name", None) or getattr(callback, "__name__", None)
    return str(name or type(callback).__name__)


def listens_to(callback: Callback, event_type: type[Event]) -> bool:
    """Return whether `callback` can do anything on events of this type."""
    answer = getattr(callback, "listens", None)
    return True if answer is None else bool(answer(event_type))


def init_of(callback: Callback, state: TrainState) -> Mapping[str, Memory]:
    """Return the memory that `callback` begins with, by name."""
    init = getattr(callback, "init", None)
    memory: Mapping[str, Memory] = {} if init is None else init(state)
    return memory


def idle_of(callback: Callback) -> Callback | None:
    """Return what is to be called in place of `callback` at updates at which its gate is closed; None for nothing.

    That is what it names `idle`; without that, all of it if it tracks or has no gate that is read at updates.
    """
    if not listens_to(callback, AfterUpdate):
        return None
    declared = declaration_of(callback)
    if declared.gate is None:
        return callback
    restless = declared.tracks or AfterUpdate not in declared.gate.parts
    idle: Callback | None = getattr(callback, "idle", callback if restless else None)
    return idle


def is_due(callback: Callback, event_type: type[Event], state: TrainState) -> bool:
    """Return whether `callback` would act on an event of this type, the ones that only track aside."""
    if not listens_to(callback, event_type):
        return False
    due = getattr(callback, "due", None)
    if due is not None:
        return bool(due(event_type, state))
    gate: Gate | None = getattr(callback, "gate", None)
    return gate is None or not gate.listens(event_type) or gate.due(event_type, state) is not None
