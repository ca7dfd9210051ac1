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
    for hook in hooks:
        first = next(base for base in reversed(kind.__mro__) if hook in vars(base))
        method = getattr(callback, hook)
        if inspect.getattr_static(kind, hook) is vars(first)[hook]:
            continue
        arguments = list(inspect.signature(vars(first)[hook]).parameters)
        expected = f"def {hook}({', '.join(arguments)})"
        if misfit := describe_misfit(method, *arguments[1:]):
            yield Problem("", f"{kind.__name__}.{hook} {misfit}: write {expected}")
    yield from _find_misspelt_hooks(kind, hooks)


def _find_misspelt_hooks(kind: type, hooks: Sequence[str]) -> Iterator[Problem]:
    """Yield a problem for each method of the user's classes with almost the name of a hook that they do not define."""
    own = [base for base in kind.__mro__ if not base.__module__.startswith("noether.core.callbacks.")]
    hooks = [hook for hook in hooks if not any(hook in vars(base) for base in own)]
    known = {name for base in kind.__mro__ if base not in own for name in vars(base)}
    for name, value in ((name, value) for base in own for name, value in vars(base).items()):
        if name in known or not callable(value):
            continue
        # A private method is a helper, unless it has the name of a hook after the underscore, as in other frameworks.
        is_private = name.startswith("_")
        for hook in get_close_matches(name.removeprefix("_"), hooks, n=1, cutoff=1.0 if is_private else _SIMILAR):
            yield Problem("", f"{kind.__name__}.{name} is no hook, so it is never called; did you mean {hook!r}?")


def find_mistyped(callback: Any) -> Iterator[Problem]:
    """Yield a problem for each setting that is no sequence, text or bool although its annotation is one."""
    for each in dataclasses.fields(callback):
        value, annotation = getattr(callback, each.name), str(getattr(each.type, "__name__", each.type))
        if value is each.default or (value is None and "None" in annotation):
            continue
        kind = annotation.removesuffix(" | None")
        if kind.startswith(("tuple[", "list[", "Sequence[")):
            if value is None:
                yield Problem(each.name, "None is not a list; leave it out")
            elif isinstance(value, str | int | float):
                yield Problem(each.name, f"{value!r} is not a list; write [{value!r}]")
        elif kind == "str" and not isinstance(value, str):
            yield Problem(each.name, f"{value!r} is not text")
        elif kind == "bool" and not isinstance(value, bool):
            yield Problem(each.name, f"{value!r} is not True or False")
