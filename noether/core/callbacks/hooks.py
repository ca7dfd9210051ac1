"""Checks of callback classes: hooks take the arguments that noether passes, and have the right names."""

from __future__ import annotations

import dataclasses
import inspect
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Final

from noether.core.callables import describe_misfit
from noether.core.errors import Problem

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_SIMILAR: Final = 0.85
"""How similar the name of a method has to be to that of a hook to be taken for a misspelling of it, up to 1."""


def find_hook_problems(callback: Any, hooks: Sequence[str]) -> Iterator[Problem]:
    """Yield a problem for each hook that cannot be called as noether calls it, and for each misspelt name.

    Args:
        callback: An instance of a callback class.
        hooks: Names of the methods that a subclass may define.
    """
    kind = type(callback)
    defined = []
    for hook in hooks:
        first = next(base for base in reversed(kind.__mro__) if hook in vars(base))
        method = getattr(callback, hook)
        if inspect.getattr_static(kind, hook) is vars(first)[hook]:
            continue
        defined.append(hook)
        arguments = list(inspect.signature(vars(first)[hook]).parameters)
        expected = f"def {hook}({', '.join(arguments)})"
        if misfit := describe_misfit(method, *arguments[1:]):
            yield Problem("", f"{kind.__name__}.{hook} {misfit}: write {expected}")
    yield from _find_misspelt_hooks(kind, [hook for hook in hooks if hook not in defined])


def _find_misspelt_hooks(kind: type, hooks: Sequence[str]) -> Iterator[Problem]:
    """Yield a problem for each method of the user's classes with almost the name of a hook that they do not define."""
    own = [base for base in kind.__mro__ if not base.__module__.startswith("noether.core.callbacks.")]
    known = {name for base in kind.__mro__ if base not in own for name in vars(base)}
    for name, value in ((name, value) for base in own for name, value in vars(base).items()):
        if name.startswith("_") or name in known or not callable(value):
            continue
        for hook in get_close_matches(name, hooks, n=1, cutoff=_SIMILAR):
            yield Problem("", f"{kind.__name__}.{name} is no hook, so it is never called; did you mean {hook!r}?")


def find_scalars(callback: Any) -> Iterator[Problem]:
    """Yield a problem for each setting that is a single value although its annotation is a sequence."""
    for each in dataclasses.fields(callback):
        value = getattr(callback, each.name)
        is_sequence = str(each.type).startswith(("tuple[", "list[", "Sequence["))
        if is_sequence and (value is not None) and isinstance(value, str | int | float):
            yield Problem(each.name, f"{value!r} is not a list; write [{value!r}]")
