"""Reads the settings of a class or function from its signature."""

from __future__ import annotations

import dataclasses
import inspect
import sys
import types
import typing
from typing import TYPE_CHECKING, Any

from noether.core.callables import signature_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def signature_parameters(target: Callable[..., Any]) -> list[inspect.Parameter]:
    """Return every parameter of `target`; a function written in C without a signature takes any keyword argument."""
    try:
        return list(signature_of(target).parameters.values())
    except (TypeError, ValueError):
        return [inspect.Parameter("settings", inspect.Parameter.VAR_KEYWORD)]


def parameters(target: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Return the parameters of `target` that can be passed by name, with their annotations resolved to types.

    An annotation that cannot be resolved, such as a name imported only for type checkers, becomes `Any`.
    """
    return resolve_annotations(target, signature_parameters(target))


def resolve_annotations(target: Callable[..., Any], signature: list[inspect.Parameter]) -> dict[str, inspect.Parameter]:
    """Return the parameters of a signature that can be passed by name, with the types that `target` annotates."""
    hints = dict(_annotations(target))
    resolved: dict[str, inspect.Parameter] = {}
    for each in signature:
        if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY):
            unresolved = isinstance(each.annotation, str) or each.annotation is each.empty
            annotation = hints.get(each.name, Any) if unresolved else each.annotation
            resolved[each.name] = each.replace(annotation=annotation)
    return resolved


def keywords_type(target: Callable[..., Any], keywords: inspect.Parameter) -> Any:
    """Return the type that `target` annotates for the values of `**keywords`, `Any` if none."""
    hints = {name: kind for name, kind in _annotations(target) if name == keywords.name}
    return hints.get(keywords.name, Any)


def _annotations(target: Callable[..., Any]) -> Iterator[tuple[str, Any]]:
    """Yield the name and type of each annotation, resolved in the module that wrote it."""
    if inspect.isclass(target) and dataclasses.is_dataclass(target):
        for each in reversed(target.__mro__):
            namespace = vars(sys.modules[each.__module__])
            for name, annotation in vars(each).get("__annotations__", {}).items():
                yield name, _resolve_annotation(annotation, namespace)
        return
    function = target if inspect.isroutine(target) else type(target).__call__
    function = inspect.unwrap(target.__init__ if inspect.isclass(target) else function)
    for name, annotation in getattr(function, "__annotations__", {}).items():
        yield name, _resolve_annotation(annotation, getattr(function, "__globals__", {}))


def _resolve_annotation(annotation: object, namespace: dict[str, Any]) -> Any:
    holder = types.SimpleNamespace(__annotations__={"it": annotation})
    try:
        return typing.get_type_hints(holder, namespace, include_extras=True)["it"]
    except Exception:  # noqa: BLE001 - evaluating an annotation can raise anything
        return Any
