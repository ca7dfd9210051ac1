"""Inspects callables without a call: which arguments they take, and whether a call returns its result at once."""

from __future__ import annotations

import dis
import functools
import inspect
import types
from contextlib import suppress
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterator


def signature_of(target: Any) -> inspect.Signature:
    """Return the signature with which `target` is called.

    For a wrapper made with `functools.wraps`, this is the wrapper's own signature; if it has `*args` or `**kwargs`,
    that of the wrapped function, because the wrapper passes them on.

    Raises:
        TypeError: If it is not callable.
        ValueError: If it has no signature, like some functions written in C.

    Example:
        >>> def scaled(outputs, batch, factor): ...
        >>> @functools.wraps(scaled)
        ... def doubled(outputs, batch): return scaled(outputs, batch, 2)
        >>> signature_of(doubled)
        <Signature (outputs, batch)>
    """
    function = without_partial(target)
    if isinstance(function, types.FunctionType) and hasattr(function, "__wrapped__"):
        own = inspect.signature(target, follow_wrapped=False)
        kinds = {each.kind for each in own.parameters.values()}
        if not kinds & {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}:
            return own
    return inspect.signature(target)


def accepts(target: Any, *arguments: str) -> bool:
    """Return whether `target` can be called with these positional arguments; keyword-only parameters are settings.

    Example:
        >>> accepts(lambda state, event, *, factor: None, "state", "event"), accepts(len, "state", "event")
        (True, False)
    """
    try:
        signature = signature_of(target)  # raises if it is not callable
        positional = [each for each in signature.parameters.values() if each.kind is not each.KEYWORD_ONLY]
        signature.replace(parameters=positional).bind(*arguments)
    except (TypeError, ValueError):
        return False
    return True


def may_accept(target: Any, *arguments: str) -> bool:
    """Return whether `target` can be called with these positional arguments; True if it has no signature to read."""
    try:
        signature_of(target)
    except ValueError:  # a function written in C
        return True
    except TypeError:
        return False
    return accepts(target, *arguments)


def describe_misfit(target: Any, *arguments: str) -> str | None:
    """Return why a call of `target` with these positional arguments does not return its result, or None if it does.

    Args:
        target: Any callable.
        arguments: Names of the arguments. A parameter with one of these names has to be at its position.

    Example:
        >>> describe_misfit(lambda state: None, "state", "event")
        'takes (state), not (state, event)'
        >>> describe_misfit(lambda event, state: None, "state", "event")
        'takes (event, state), not (state, event)'
        >>> describe_misfit(lambda s, e, *, factor: None, "state", "event")
    """
    if not callable(target):
        return f"is {target!r}, not a function"
    if deferred := describe_deferred(target):
        return f"is {deferred}, but its result is needed at once"
    expected = ", ".join(arguments)
    if not may_accept(target, *arguments):
        return f"takes {_signature_text(target)}, not ({expected})"
    names = positional_names(target)
    if any(name in arguments and arguments.index(name) != index for index, name in enumerate(names)):
        return f"takes {_signature_text(target)}, not ({expected})"
    return None


def _signature_text(target: Any) -> str:
    signature = signature_of(target)
    bare = [each.replace(annotation=each.empty) for each in signature.parameters.values()]
    return str(signature.replace(parameters=bare, return_annotation=signature.empty))


def positional_names(target: Any) -> list[str]:
    """Return the names of the parameters that `target` takes by position; none if it has no signature to read."""
    try:
        signature = signature_of(target)
    except ValueError:
        return []
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [each.name for each in signature.parameters.values() if each.kind in positional]


def takes_by_name(target: Any, name: str) -> bool:
    """Return whether `target` has a parameter of this name that can be passed by name and has no value yet.

    A default is not a value, and a setting that a `functools.partial` binds is one. `**kwargs` has no names.

    Example:
        >>> def ring(effect, state, event, *, directory): ...
        >>> takes_by_name(ring, "directory"), takes_by_name(functools.partial(ring, directory="."), "directory")
        (True, False)
    """
    bound = {key for each in _partials_of(target) for key in each.keywords}
    try:
        parameter = signature_of(target).parameters.get(name)
    except (TypeError, ValueError):
        return False
    by_name = parameter is not None and parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    return by_name and name not in bound


def _partials_of(target: Any) -> Iterator[functools.partial[Any]]:
    while isinstance(target, functools.partial):
        yield target
        target = target.func


def unbound_settings(target: Any) -> list[str]:
    """Return the keyword-only parameters of `target` that have no value.

    Example:
        >>> unbound_settings(lambda state, event, *, factor, scale=1.0: None)
        ['factor']
    """
    try:
        signature = signature_of(target)
    except (TypeError, ValueError):
        return []
    settings = (each for each in signature.parameters.values() if each.kind is each.KEYWORD_ONLY)
    return [each.name for each in settings if each.default is each.empty]


def describe_deferred(target: Any) -> str | None:
    """Return which kind of async or generator function a callable is, or None if a call returns its result at once.

    Example:
        >>> async def wait(state, event): ...
        >>> describe_deferred(wait), describe_deferred(accepts)
        ('an async function', None)
    """
    function = _function_of(target)
    if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
        return "an async function"
    return "a generator function" if inspect.isgeneratorfunction(function) else None


def without_partial(target: Any) -> Any:
    """Return the function inside of `functools.partial`, or `target`."""
    while isinstance(target, functools.partial):
        target = target.func
    return target


def _function_of(target: Any) -> Any:
    """Return the function that a call of `target` runs."""
    target = inspect.unwrap(without_partial(target))
    is_instance = not inspect.isroutine(target) and not isinstance(target, type) and callable(target)
    return type(target).__call__ if is_instance else target


def held_objects(target: Any) -> Iterator[Any]:
    """Yield the objects that a call of `target` may call.

    They are the function and arguments in a `functools.partial`, the owner of a bound method, the attributes of an
    instance, and the attributes and defaults of a function with the variables from outside that it uses for more than
    their attributes; of those of its module, functions are left out. Lists, tuples and dicts are looked into.

    Example:
        >>> def repeat(callback):
        ...     return lambda state, event: callback(state, event)
        >>> list(held_objects(repeat(len)))
        [<built-in function len>]
    """
    if isinstance(target, functools.partial):
        held = [target.func, *target.args, target.keywords]
    elif isinstance(target, types.MethodType):
        held = [target.__self__]
    elif isinstance(target, types.FunctionType):
        defaults = [*(target.__defaults__ or ()), target.__kwdefaults__ or {}]
        held = [vars(target), *defaults, *_variables_from_outside(target)]
    else:
        slots = (name for base in type(target).__mro__ for name in vars(base).get("__slots__", ()))
        held = [getattr(target, "__dict__", {}), *(getattr(target, name, None) for name in slots)]
    for each in held:
        yield from _flatten_containers(each)


_LONGEST: Final = 100
_DEEPEST: Final = 4
"""Containers that are longer or deeper hold data, not callbacks."""


def _flatten_containers(value: Any, depth: int = 0) -> Iterator[Any]:
    """Yield the elements of nested lists, tuples and dicts, or the value itself."""
    if not isinstance(value, list | tuple | dict):
        yield value
    elif len(value) <= _LONGEST and depth < _DEEPEST:
        for part in value.values() if isinstance(value, dict) else value:
            yield from _flatten_containers(part, depth + 1)


_CALLING: Final = ("__call__", "after_", "track_", "periodic_callback")
"""How the attributes begin through which a function calls a callback."""


def _variables_from_outside(function: types.FunctionType) -> Iterator[Any]:
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    for load, following in pairwise(dis.get_instructions(function)):
        if following.opname in ("LOAD_ATTR", "LOAD_METHOD") and not following.argval.startswith(_CALLING):
            continue  # it reads an attribute, such as the name of a callback
        if load.opname == "LOAD_GLOBAL" and not inspect.isroutine(value := function.__globals__.get(load.argval)):
            yield value
        elif load.opname == "LOAD_DEREF" and load.argval in cells:
            with suppress(ValueError):  # the variable has no value yet
                yield cells[load.argval].cell_contents
