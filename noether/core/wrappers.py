"""Callbacks around another callback: each decorator of `combinators` returns one of these objects."""

from __future__ import annotations

import copy
import inspect
import sys
from dataclasses import dataclass, fields, replace
from importlib import import_module
from typing import TYPE_CHECKING, Any, Self, final

from noether.core.callback import (
    attribute_of,
    callable_while_closed,
    init_of,
    label_of,
    listens_to,
    memory_names,
    merge_keys,
    parts_of,
    tracker_of,
)
from noether.core.errors import CallbackError
from noether.core.event import AfterUpdate, Event
from noether.core.tensors.tree import FrozenDict

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from noether.core.callback import Callback, Effects
    from noether.core.effect import Effect
    from noether.core.schedules.gate import Gate
    from noether.core.state import Memory, TrainState


@dataclass(frozen=True)
class Wrapper:
    """Base of the callbacks around another callback; it has the attributes of that one.

    Args:
        callback: The callback inside.
    """

    callback: Callback

    @property
    def __wrapped__(self) -> Callback:  # for `inspect.unwrap`
        return self.callback

    @property
    def __name__(self) -> str:
        return label_of(self.callback)

    @property
    def gate(self) -> Gate | None:
        """When its callback acts; None if that has no gate."""
        gate: Gate | None = attribute_of(self.callback, "gate")
        return gate

    @property
    def produces(self) -> tuple[str, ...] | None:
        """Patterns of the metric keys that its callback logs; None if it may log any."""
        produces: tuple[str, ...] | None = attribute_of(self.callback, "produces")
        return produces

    @property
    def consumes(self) -> tuple[str, ...]:
        """Metric keys that its callback consumes."""
        consumes: tuple[str, ...] = attribute_of(self.callback, "consumes")
        return consumes

    @property
    def readings(self) -> tuple[str, ...]:
        """Costly fields of `AfterUpdate` that its callback reads."""
        readings: tuple[str, ...] = attribute_of(self.callback, "readings")
        return readings

    @property
    def effects(self) -> tuple[type[Effect], ...]:
        """Types of effects that its callback requests."""
        effects: tuple[type[Effect], ...] = attribute_of(self.callback, "effects")
        return effects

    def init(self, state: TrainState) -> Mapping[str, Memory]:
        """Return the memory that its callback starts with."""
        return init_of(self.callback, state)

    @property
    def _tracker(self) -> Callback | None:
        return None if tracker_of(self.callback) is None else self  # type: ignore[return-value]  # subclasses are callable

    def _listens(self, event_type: type[Event]) -> bool:
        return listens_to(self.callback, event_type)

    @property
    def _inside(self) -> tuple[Callback, ...]:
        return (self.callback,)

    @property
    def _parts(self) -> tuple[Callback, ...]:
        parts = parts_of(self.callback)
        whole = len(parts) == 1 and parts[0] is self.callback
        return (self,) if whole else tuple(self._wrap_part(part) for part in parts)  # type: ignore[return-value]  # subclasses are callable

    def _wrap_part(self, part: Callback) -> Callback:
        return replace(self, callback=part)  # type: ignore[return-value]  # subclasses are callable

    def _memory_names(self, state: TrainState) -> tuple[str, ...]:
        return memory_names(self.callback, state)

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return type(self)(**{each.name: copy.deepcopy(getattr(self, each.name), memo) for each in fields(self)})

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle a decorated function of a module by its name there, anything else by its fields."""
        reference = _find_in_module(self, inspect.unwrap(self))  # type: ignore[arg-type]  # subclasses are callable
        if reference is not None:
            return _load_from_module, reference
        settings = {each.name: getattr(self, each.name) for each in fields(self)}
        # The name of a decorated function leads to its decorator, so pickle would not find the function.
        reference = _find_in_module(self.callback, self.callback)
        if reference is not None and reference[-1]:
            return _rebuild_around_reference, (type(self), reference, {**settings, "callback": None})
        return _rebuild, (type(self), settings)


_Reference = tuple[str, str, int]
"""Module, qualified name in it, and how many decorators lie between the object of that name and the one meant."""


def _find_in_module(target: Any, function: Any) -> _Reference | None:
    """Return where to find `target`, a function or one of its decorators, from the name of the function."""
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    found: Any = sys.modules.get(str(module))
    for part in str(name).split("."):
        found = getattr(found, part, None)
    depth = 0
    while found is not target and isinstance(found, Wrapper):
        found, depth = found.callback, depth + 1
    return (str(module), str(name), depth) if found is target else None


def _load_from_module(module: str, name: str, depth: int) -> Any:
    found: Any = import_module(module)
    for part in (*name.split("."), *["callback"] * depth):
        found = getattr(found, part)
    return found


def _rebuild(kind: Callable[..., Any], settings: Mapping[str, Any]) -> Any:
    return kind(**settings)


def _rebuild_around_reference(kind: Callable[..., Any], reference: _Reference, settings: Mapping[str, Any]) -> Any:
    return kind(**{**settings, "callback": _load_from_module(*reference)})


@final
@dataclass(frozen=True)
class Gated(Wrapper):
    """Calls its callback when its gate is open."""

    own_gate: Gate

    def __call__(self, state: TrainState, event: Event) -> tuple[TrainState, Effects]:
        """Return the result of the callback, or the state unchanged."""
        if self.own_gate.opens(state, event) is None:
            return state, ()
        return self.callback(state, event)

    @property
    def gate(self) -> Gate:
        """When it acts."""
        return self.own_gate

    def _listens(self, event_type: type[Event]) -> bool:
        return self.own_gate.listens(event_type) and listens_to(self.callback, event_type)


@final
@dataclass(frozen=True)
class On(Wrapper):
    """Calls its callback on events of the given types."""

    event_types: tuple[type[Event], ...]

    def __call__(self, state: TrainState, event: Event) -> tuple[TrainState, Effects]:
        """Return the result of the callback, or the state unchanged."""
        return self.callback(state, event) if isinstance(event, self.event_types) else (state, ())

    def _listens(self, event_type: type[Event]) -> bool:
        return issubclass(event_type, self.event_types) and listens_to(self.callback, event_type)


@final
@dataclass(frozen=True)
class When(Wrapper):
    """Calls its callback when a predicate is true."""

    predicate: Callable[[TrainState, Event], bool]

    def __call__(self, state: TrainState, event: Event) -> tuple[TrainState, Effects]:
        """Return the result of the callback, or the state unchanged."""
        answer = self.predicate(state, event)
        if answer is None:
            raise CallbackError(f"the predicate {label_of(self.predicate)!r} of when returned None, not True or False")
        return self.callback(state, event) if answer else (state, ())


@final
@dataclass(frozen=True)
class Remembering(Wrapper):
    """Gives its callback a name, memory and declarations; made by `callback`, whose arguments are its fields."""

    name: str
    own_init: Callable[[TrainState], Any] | None
    track: Callable[[Any, AfterUpdate], Any] | None
    own_produces: tuple[str, ...] | None
    own_consumes: tuple[str, ...]
    own_readings: tuple[str, ...]
    own_effects: tuple[type[Effect], ...] = ()

    def __call__(self, state: TrainState, event: Event) -> tuple[TrainState, Effects]:
        """Return the result of the callback, with the memory initialized and the update tracked first."""
        state, _ = self._track_update(state, event)
        # A reducer may call this at updates only for `track`; the callback itself need not listen to them.
        return self.callback(state, event) if listens_to(self.callback, type(event)) else (state, ())

    def _track_update(self, state: TrainState, event: Event) -> tuple[TrainState, Effects]:
        if self.own_init is not None and self.name not in state.callback_states:
            state = state.remember(self.name, self.own_init(state))
        if self.track is not None and isinstance(event, AfterUpdate):
            before = state.memory(self.name)
            memory = self.track(before, event)
            if memory is None and before is not None:
                raise CallbackError(f"track of {self.name!r} returned None, not the memory: write `return memory`")
            state = state.remember(self.name, memory)
        return state, ()

    @property
    def _tracker(self) -> Callback | None:
        if self.track is not None:
            return self._track_update if callable_while_closed(self.callback) is None else self
        tracker = tracker_of(self.callback)
        return self if tracker is self.callback else tracker

    @property
    def produces(self) -> tuple[str, ...] | None:
        """Patterns of the metric keys that it logs: those given, or those of its callback."""
        return super().produces if self.own_produces is None else self.own_produces

    @property
    def consumes(self) -> tuple[str, ...]:
        """Metric keys that it or its callback consumes."""
        return merge_keys(*super().consumes, *self.own_consumes)

    @property
    def readings(self) -> tuple[str, ...]:
        """Costly fields of `AfterUpdate` that it or its callback reads."""
        return tuple(dict.fromkeys((*super().readings, *self.own_readings)))

    @property
    def effects(self) -> tuple[type[Effect], ...]:
        """Types of effects that it or its callback requests."""
        return tuple(dict.fromkeys((*super().effects, *self.own_effects)))

    def init(self, state: TrainState) -> Mapping[str, Memory]:
        """Return the memory that it and its callback start with."""
        memory = {} if self.own_init is None else {self.name: self.own_init(state)}
        return {**super().init(state), **memory}

    def _wrap_part(self, part: Callback) -> Callback:
        return replace(self, callback=part, name=f"{self.name}/{label_of(part)}")

    @property
    def _parts(self) -> tuple[Callback, ...]:
        return super()._parts if self.own_produces is None else (self,)  # it declares the keys of all its parts

    def _memory_names(self, state: TrainState) -> tuple[str, ...]:
        return (*super()._memory_names(state), *(() if self.own_init is None else (self.name,)))

    def _listens(self, event_type: type[Event]) -> bool:
        return super()._listens(event_type) or (self.track is not None and issubclass(event_type, AfterUpdate))


@final
@dataclass(frozen=True)
class Bound(Wrapper):
    """Calls a function with settings: the keyword-only parameters that follow state and event."""

    settings: Mapping[str, Any]

    def __call__(self, state: TrainState, event: Event) -> tuple[TrainState, Effects]:
        """Return the result of the function."""
        function: Callable[..., tuple[TrainState, Effects]] = self.callback
        return function(state, event, **self.settings)

    @property
    def __signature__(self) -> inspect.Signature:
        """The signature of the function without the bound settings."""
        signature = inspect.signature(self.callback)
        return signature.replace(
            parameters=[p for name, p in signature.parameters.items() if name not in self.settings]
        )


def bind_settings(callback: Callback, settings: Mapping[str, Any]) -> Callback:
    """Return `callback` with settings bound to the function inside its decorators.

    Example:
        >>> from noether import AfterEpoch, LogText, TrainState, every_n_epochs
        >>> @every_n_epochs(1)
        ... def greet(state, event, *, greeting="hello"):
        ...     return state, (LogText(greeting),)
        >>> bind_settings(greet, {"greeting": "hi"})(TrainState().next_epoch(), AfterEpoch())[1]
        (LogText(text='hi'),)
    """
    if isinstance(callback, Wrapper):
        return replace(callback, callback=bind_settings(callback.callback, settings))
    return Bound(callback, FrozenDict(settings))
