"""What a callback is, and the attributes with which it describes itself.

A callback is any callable `(state, event) -> (state, effects)`. A bare function is called on every event. These
attributes are all that a callback may add; each is optional:

| attribute | value | without it |
|---|---|---|
| `name` | its name in messages, and of its memory | the name of the function or class |
| `init` | `state -> {name: memory}`, the memory that it starts with | it has no memory |
| `gate` | the `Gate` that says when it acts | it acts on every event |
| `produces` | patterns of the metric keys that it logs | it may log any key |
| `consumes` | metric keys that must be current when it acts; a `SkippableKey` or `OptionalKey` need not be | none |
| `readings` | names of the costly fields of `AfterUpdate` that it reads, listed in `READINGS` | none |
| `effects` | types of effects of yours that it requests; without a handler for each, no run starts | none |

`CallbackBase`, `@callback(...)` and the other decorators set them. Classes of noether also have private attributes:
`_listens` (see `listens_to`) and `_tracker` (see `tracker_of`), from which a reducer knows when it need not call them;
`_deferred_calls` (see `DeferredCalls`), which a reducer may call once for several deferred updates; and
`_inside` (see `leaves_of`), `_parts` (see `parts_of`) and `_memory_names` (see `memory_names`), which show the inside.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol, final

from noether.core.callables import without_partial
from noether.core.effect import Effect
from noether.core.errors import CallbackError, raise_problems
from noether.core.event import AfterUpdate, check_reading

if TYPE_CHECKING:
    from collections.abc import Callable

    from noether.core.event import Event
    from noether.core.schedules.gate import Gate
    from noether.core.state import Memory, TrainState

Effects = tuple["Effect", ...]


class Callback(Protocol):
    """A pure function of a state and an event.

    It may have the attributes `name`, `init`, `gate`, `produces`, `consumes`, `readings` and `effects`; see
    `noether.core.callback`.

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
        """Return the state after the event (the same object if nothing changed) and the requested effects."""
        ...


@final
class OptionalKey(str):
    """A metric key in `consumes` that the callback reads only where it is current.

    Nothing has to produce it. If a callback does, that one has to come first.

    Example:
        >>> OptionalKey("loss/val/total")
        OptionalKey('loss/val/total')
        >>> OptionalKey("loss/val/total") == "loss/val/total"
        True
    """

    __slots__ = ()

    def __repr__(self) -> str:
        return f"OptionalKey({super().__repr__()})"


@final
class SkippableKey(str):
    """A metric key in `consumes` that a callback before the consumer has to produce, but not at every event.

    The consumer does nothing at an event where the metric is not current.

    Example:
        >>> SkippableKey("val/auc")
        SkippableKey('val/auc')
        >>> SkippableKey("val/auc") == "val/auc"
        True
    """

    __slots__ = ()

    def __repr__(self) -> str:
        return f"SkippableKey({super().__repr__()})"


@dataclass(frozen=True)
class Declaration:
    """The attributes of a callback, with their defaults filled in.

    Args:
        label: Its name in messages.
        gate: When it acts; None if it acts on every event that it listens to.
        produces: Patterns of the metric keys that it logs; None if it may log any.
        consumes: Metric keys that have to be current when it acts, and each `SkippableKey` and `OptionalKey` that it
            reads if current.
        readings: Costly fields of `AfterUpdate` that it reads, such as `grad_norm`.
        effects: Types of effects that it requests and that need a handler of the user's.
    """

    label: str
    gate: Gate | None
    produces: tuple[str, ...] | None
    consumes: tuple[str, ...]
    readings: tuple[str, ...]
    effects: tuple[type[Effect], ...] = ()

    @property
    def required(self) -> tuple[str, ...]:
        """The keys of `consumes` that a callback has to produce: those that are not optional."""
        return tuple(key for key in self.consumes if not isinstance(key, OptionalKey))


_DEFAULTS: Final[Mapping[str, Any]] = {"gate": None, "produces": None, "consumes": (), "readings": (), "effects": ()}


def attribute_of(callback: Callback, name: str) -> Any:
    """Return one attribute of `callback` that a `Declaration` has, or its default.

    Wrappers and reducers read theirs from the callbacks inside by this function: a whole declaration at each level
    would read the innermost callback a number of times that grows exponentially with the levels.
    """
    return getattr(callback, name, _DEFAULTS[name])


def declaration_of(callback: Callback) -> Declaration:
    """Return the attributes of `callback`, with their defaults filled in."""
    return Declaration(label=label_of(callback), **{name: attribute_of(callback, name) for name in _DEFAULTS})


def merge_keys(*keys: str) -> tuple[str, ...]:
    """Return metric keys without repetition, each in its strictest form: required, then skippable, then optional.

    Example:
        >>> merge_keys(OptionalKey("a"), "b", "a")
        ('a', 'b')
    """
    merged: dict[str, str] = {}
    for key in keys:
        if key not in merged or _STRICTEST_FIRST.index(type(key)) < _STRICTEST_FIRST.index(type(merged[key])):
            merged[key] = key
    return tuple(merged.values())


_STRICTEST_FIRST: Final = (str, SkippableKey, OptionalKey)


def check_readings(callback: Callback) -> None:
    """Refuse a callback that declares an unknown reading.

    Raises:
        SettingsError: If one of its `readings` is not in `READINGS`, naming the nearest one.
    """
    declared = declaration_of(callback)
    raise_problems(check_reading(declared.label, name) for name in declared.readings)


def describe_effect_types(effects: Any) -> str | None:
    """Return what is wrong with the types of effects that a callback declares, or None if nothing is.

    Example:
        >>> from noether import LogText
        >>> describe_effect_types((LogText("done"),))
        "effects holds LogText(text='done'), not a type of effect: write LogText"
    """
    if isinstance(effects, type):
        return f"effects is the class {effects.__name__}, not a tuple: write ({effects.__name__},)"
    if callable(effects):
        return "effects is a method, not a tuple: write @property above def effects"
    if not isinstance(effects, (tuple, list)):
        return f"effects is {effects!r}, not a tuple: write (MyEffect,)"
    for each in effects:
        if not (isinstance(each, type) and issubclass(each, Effect)):
            fix = type(each).__name__ if isinstance(each, Effect) else "a subclass of noether.Effect"
            return f"effects holds {each!r}, not a type of effect: write {fix}"
    return None


def label_of(callback: Callback | Callable[..., Any]) -> str:
    """Return the name of `callback` in messages."""
    function = without_partial(callback)
    name: Any = getattr(function, "name", None) or getattr(function, "__name__", None)
    return str(name or type(function).__name__)


def init_of(callback: Callback, state: TrainState) -> Mapping[str, Memory]:
    """Return the memory that `callback` starts with, by name.

    Raises:
        CallbackError: If its `init` returns something else than a mapping.
    """
    init = getattr(callback, "init", None)
    memory: Mapping[str, Memory] = {} if init is None else init(state)
    if not isinstance(memory, Mapping):
        raise CallbackError(f"init of {label_of(callback)} returned {memory!r}, not {{name: memory}}")
    return memory


def memory_names(callback: Callback, state: TrainState) -> tuple[str, ...]:
    """Return the name of each memory of `callback`; a name that callbacks inside of it share, as often as they do."""
    names = getattr(callback, "_memory_names", None)
    return tuple(init_of(callback, state) if names is None else names(state))


def leaves_of(callback: Callback) -> tuple[Callback, ...]:
    """Return the functions and objects inside of all decorators and reducers, in order.

    Example:
        >>> from noether import AfterEpoch, compose, on
        >>> def say(state, event):
        ...     return state, ()
        >>> leaves_of(compose(on(AfterEpoch)(say), compose(say))) == (say, say)
        True
    """
    inside: tuple[Callback, ...] | None = getattr(callback, "_inside", None)
    return (callback,) if inside is None else tuple(leaf for each in inside for leaf in leaves_of(each))


def parts_of(callback: Callback) -> tuple[Callback, ...]:
    """Return the callbacks to compare in checks: those that `callback` is composed of, each inside its decorators."""
    parts: tuple[Callback, ...] | None = getattr(callback, "_parts", None)
    return (callback,) if parts is None else parts


def listens_to(callback: Callback, event_type: type[Event]) -> bool:
    """Return whether `callback` can do anything on events of this type.

    A loop asks this to leave out costly events, such as `AfterAccumulationStep`.

    Example:
        >>> from noether import AfterEpoch, AfterTraining, compose, identity, on
        >>> reducer = compose(on(AfterEpoch)(lambda state, event: (state, ())))
        >>> listens_to(reducer, AfterEpoch), listens_to(reducer, AfterTraining)
        (True, False)
    """
    answer = getattr(callback, "_listens", None)
    return True if answer is None else bool(answer(event_type))


def tracker_of(callback: Callback) -> Callback | None:
    """Return the part of `callback` to call at every update, even while its gate is closed; None if it has none."""
    tracker: Callback | None = getattr(callback, "_tracker", None)
    return tracker


def callable_while_closed(callback: Callback, event_type: type[Event] = AfterUpdate) -> Callback | None:
    """Return the callable to call at an update while the gate of `callback` is closed, or None."""
    if not listens_to(callback, event_type):
        return None
    gate: Gate | None = getattr(callback, "gate", None)
    if gate is None:
        return callback
    tracker = tracker_of(callback)
    # A gate that reads no updates, such as one on epochs, does not restrict the calls at updates.
    return callback if tracker is None and AfterUpdate not in gate.parts else tracker
