"""Inspects callables without a call: their arguments, their package, and whether they are async or generators."""

from __future__ import annotations

import functools
import inspect
import sys
import types
from typing import Any


def accepts(target: Any, *arguments: str) -> bool:
    """Return whether `target` can be called with these positional arguments; keyword-only parameters are settings.

    Example:
        >>> accepts(lambda state, event, *, factor: None, "state", "event"), accepts(len, "state", "event")
        (True, False)
    """
    try:
        signature = inspect.signature(target)  # raises if it is not callable
        positional = [each for each in signature.parameters.values() if each.kind is not each.KEYWORD_ONLY]
        signature.replace(parameters=positional).bind(*arguments)
    except (TypeError, ValueError):
        return False
    return True


def may_accept(target: Any, *arguments: str) -> bool:
    """Return whether `target` can be called with these positional arguments; True if it has no signature to read."""
    try:
        inspect.signature(target)
    except ValueError:  # a function written in C
        return True
    except TypeError:
        return False
    return accepts(target, *arguments)


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


def is_lambda(target: Any) -> bool:
    """Return whether `target` is a bare lambda, which has no name."""
    return isinstance(target, types.FunctionType) and target.__name__ == "<lambda>"


def is_from(target: Any, *packages: str) -> bool:
    """Return whether the class or function that `target` is, or is an instance of, was defined in one of `packages`."""
    return _package_of(target) in packages


def is_foreign(target: Any) -> bool:
    """Return whether `target` comes from torch or from Python's own library."""
    package = _package_of(target)
    return package == "torch" or package in sys.stdlib_module_names - {"__main__"}


def _package_of(target: Any) -> str:
    module = getattr(_without_partial(target), "__module__", None)
    return str(module).partition(".")[0]


def _without_partial(target: Any) -> Any:
    while isinstance(target, functools.partial):
        target = target.func
    return target


def _function_of(target: Any) -> Any:
    """Return the function that a call of `target` runs."""
    target = inspect.unwrap(_without_partial(target))
    is_instance = not inspect.isroutine(target) and not isinstance(target, type) and callable(target)
    return type(target).__call__ if is_instance else target
