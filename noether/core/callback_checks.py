"""Checks of single callbacks: where they are composed or decorated, and of what they return."""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING, Any

from noether.core.callables import describe_misfit, held_objects, unbound_settings
from noether.core.callback import check_readings, declaration_of, describe_effect_types, init_of, label_of, tracker_of
from noether.core.effect import Effect
from noether.core.errors import CallbackError
from noether.core.schedules.gate import Gate
from noether.core.state import TrainState

if TYPE_CHECKING:
    from collections.abc import Iterator

    from noether.core.callback import Callback, Effects


def check_callback(callback: Any, caller: str) -> None:
    """Refuse an object that cannot be called as a callback.

    Args:
        callback: Any object.
        caller: The function or decorator that it was passed to, for the message.

    Raises:
        CallbackError: If it is a class, cannot be called with `(state, event)`, or is an async or generator function.
        SettingsError: If it declares an unknown reading.

    Example:
        >>> check_callback(lambda state: state, "compose")
        Traceback (most recent call last):
        noether.core.errors.CallbackError: compose takes callbacks (state, event) -> (state, effects), got '<lambda>',
        which takes (state), not (state, event)
    """
    expected = f"{caller} takes callbacks (state, event) -> (state, effects), got"
    if isinstance(callback, type):
        raise CallbackError(f"{expected} {callback!r}: pass an instance, {callback.__name__}(...)")
    if not callable(callback):
        hint = f": write {caller}(*callbacks)" if isinstance(callback, list | tuple) else ""
        raise CallbackError(f"{expected} {callback!r}{hint}")
    if misfit := describe_misfit(callback, "state", "event"):
        raise CallbackError(f"{expected} {label_of(callback)!r}, which {misfit}")
    _check_wrapper(callback)
    declared = declaration_of(callback)
    check_key_tuples(declared.label, produces=declared.produces, consumes=declared.consumes, readings=declared.readings)
    check_effect_types(declared.label, declared.effects)
    check_readings(callback)


def check_key_tuples(label: str, **declared: Any) -> None:
    """Refuse what is not several keys, such as a single text, whose letters would count as keys.

    Raises:
        CallbackError: If one of `declared` is text or a method, with its name.
    """
    for name, keys in declared.items():
        if isinstance(keys, str):
            raise CallbackError(f"{label}: {name} is {keys!r}, not a tuple: write ({keys!r},)")
        if callable(keys):
            raise CallbackError(f"{label}: {name} is a method, not a tuple: write @property above def {name}")


def check_effect_types(label: str, effects: Any) -> None:
    """Refuse declared effects that are not a tuple of types of effects.

    Raises:
        CallbackError: If they are something else, saying what to write.

    Example:
        >>> check_effect_types("Bell", Effect)
        Traceback (most recent call last):
        noether.core.errors.CallbackError: Bell: effects is the class Effect, not a tuple: write (Effect,)
    """
    if problem := describe_effect_types(effects):
        raise CallbackError(f"{label}: {problem}")


def check_bound(callback: Callback) -> None:
    """Refuse a function with a keyword-only parameter that has no value.

    Raises:
        CallbackError: If there is one.
    """
    if names := unbound_settings(callback):
        label, given = label_of(callback), ", ".join(f"{name}=..." for name in names)
        raise CallbackError(f"{label} has no value for {', '.join(names)}: pass functools.partial({label}, {given})")


def _check_wrapper(callback: Callback) -> None:
    """Refuse a partial or wrapped function without the memory, readings and effects of the callback inside."""
    attributes: Any = getattr(callback, "__dict__", {})  # not those of its class, such as noether's decorators
    inner = callback.func if isinstance(callback, functools.partial) else attributes.get("__wrapped__")
    if inner is None:
        return
    hidden = {
        "init": _has_memory(inner),
        "readings": _declares(inner, "readings"),
        "effects": _declares(inner, "effects"),
    }
    for name in (name for name, is_set in hidden.items() if is_set):
        if not getattr(callback, name, ()):
            raise CallbackError(
                f"the wrapper around {label_of(inner)} hides its {name}: wrap the function inside instead, or set "
                f"wrapper.{name} = callback.{name}"
            )


def _declares(callback: Callback, name: str) -> bool:
    return bool(getattr(callback, name, ()))


def _has_memory(callback: Callback) -> bool:
    try:
        return bool(init_of(callback, TrainState()))
    except Exception:  # noqa: BLE001  # a memory may depend on what this state does not have
        return True


def check_unscheduled(callback: Callback, gate: str) -> None:
    """Refuse to put a gate around a callback that tracks every update, or has a schedule, however deep inside.

    Args:
        callback: The callback.
        gate: `this gate`, `on` or `when`, for the message.

    Raises:
        CallbackError: If it tracks, has a schedule, or calls a callback that does.
    """
    # Reducers and decorators come last, so that the message names the callback in them.
    for each in sorted(_callbacks_inside(callback), key=lambda inside: hasattr(inside, "_inside")):
        if tracker_of(each) is not None:
            raise CallbackError(
                f"{label_of(each)} tracks every update, but behind {gate} it would miss some: "
                "put @callback(track=...) above the gate, or give it an interval"
            )
        if isinstance(declaration_of(each).gate, Gate):
            fix = "unite both with |" if gate == "this gate" else f"put {gate} below it, next to the function,"
            raise CallbackError(f"{label_of(each)} already has a schedule: {fix} or remove one")


def _callbacks_inside(callback: Any, seen: set[int] | None = None) -> Iterator[Callback]:
    """Yield `callback`, and what a call of it may call, at any depth."""
    seen = set() if seen is None else seen
    yield callback
    for each in held_objects(callback):
        if callable(each) and not isinstance(each, type) and id(each) not in seen:
            seen.add(id(each))
            yield from _callbacks_inside(each, seen)


def check_effects(callback: Callback, effects: Any, hook: str = "") -> None:
    """Refuse what a callback returned as its effects, unless it is a tuple of effects.

    Raises:
        CallbackError: If it is something else, naming the callback and what to write.
    """
    if isinstance(effects, tuple):
        for each in effects:
            if not isinstance(each, Effect):
                raise CallbackError(f"{_name(callback, hook)} returned {_describe_no_effect(each)}")
    elif isinstance(effects, Effect):
        fix = "write `return state, (effect,)`"
        raise CallbackError(f"{_name(callback, hook)} returned {effects!r} as effects, not a tuple: {fix}")
    else:
        found = "None" if effects is None else f"a {type(effects).__name__}"
        fix = "write `return state, (effect,)`, or `return state, ()` for none"
        raise CallbackError(f"{_name(callback, hook)} returned {found} as effects, not a tuple: {fix}")


def check_result(callback: Callback, result: Any, hook: str = "") -> tuple[TrainState, Effects]:
    """Return what a callback returned, if it is a state and a tuple of effects.

    Args:
        callback: The callback.
        result: What it returned.
        hook: Name of the method that returned it; empty for the callback itself.

    Raises:
        CallbackError: If it is something else, naming the callback and what to write.

    Example:
        >>> check_result(lambda state, event: None, None)
        Traceback (most recent call last):
        noether.core.errors.CallbackError: <lambda> returned None, not (state, effects): write `return state, ()` where
        it does nothing
    """
    if not isinstance(result, tuple) or len(result) != 2 or not isinstance(result[0], TrainState):  # noqa: PLR2004  # state and effects
        if inspect.iscoroutine(result):
            result.close()  # else Python warns that it was never awaited
        raise CallbackError(
            f"{_name(callback, hook)} returned {_describe(result)}, not (state, effects): "
            "write `return state, ()` where it does nothing"
        )
    state, effects = result
    check_effects(callback, effects, hook)
    return state, effects


def _describe_no_effect(value: Any) -> str:
    if isinstance(value, TrainState):
        return "a state among its effects: write `return log(...)`, which is (state, effects) already"
    if isinstance(value, type):
        return f"the class {value.__name__} among its effects: write {value.__name__}(...)"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} among its effects: write `return state, (*first, *second)`"
    return f"{value!r} among its effects: effects are objects such as LogText({str(value)!r})"


def _name(callback: Callback, hook: str) -> str:
    return f"{label_of(callback)}.{hook}" if hook else label_of(callback)


def _describe(result: Any) -> str:
    if result is None:
        return "None"
    if isinstance(result, tuple):
        return f"({', '.join(type(each).__name__ for each in result)})"
    return f"a {type(result).__name__}"
