"""Turns plain values into typed objects, strictly: 2.7 is not rounded to a whole number, and "3" stays text.

cattrs chooses the hook for a type, and its error groups and notes collect every problem with the path to it. The hooks
are written here because those of cattrs convert values where they can, and do not read the signature of a plain class.
"""

from __future__ import annotations

import dataclasses
import enum
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cattrs import Converter
from cattrs.errors import IterableValidationError

from noether.config.errors import InvalidValueError, LocatedProblem, collect_errors, problems_in, type_name
from noether.config.structure.construction import construct
from noether.config.yaml_values import EnvironmentText
from noether.core.errors import suggest

if TYPE_CHECKING:
    from noether.config.errors import SettingPath
    from noether.config.source import Source

_NOUNS: dict[object, str] = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    type(None): "null",
    Path: "text",
    bytes: "something that YAML can hold",
}
_SEQUENCES = (list, tuple, set, frozenset, Sequence, Collection, Iterable, AbstractSet)


def structure(
    source: Source, path: SettingPath, target: Any, problems: list[LocatedProblem], using: Converter | None = None
) -> Any:
    """Return the value at `path` as a `target`, or None after appending every problem to `problems`.

    Args:
        source: The document.
        path: Path to the value in the document.
        target: A type: a dataclass, or any type that can annotate a field of one.
        problems: Receives every problem with its place.
        using: A converter that knows more types; the default is `make_converter()`.

    Example:
        >>> from noether.config.source import parse
        >>> structure(parse("sizes: [3, 4]", "a.yaml"), ("sizes",), tuple[int, ...], problems := [])
        (3, 4)
        >>> structure(parse("sizes: [3, 4.5]", "a.yaml"), ("sizes",), tuple[int, ...], problems := [])
        >>> print(*problems)
        a.yaml:1: sizes[1]: 4.5 is not a whole number
    """
    try:
        return (using or make_converter()).structure(source.value(path), target)
    except Exception as error:  # noqa: BLE001 - whatever a constructor raises is a problem of its settings
        located = [((*path, *inner), message) for inner, message in problems_in(error)]
        for each, message in located:
            reference = source.reference(each)
            origin = "" if reference is None else f" (written as {reference})"
            problems.append(LocatedProblem(source.place(each), each, f"{message}{origin}"))
        return None


def make_converter() -> Converter:
    """Return a converter that structures plain values strictly.

    Example:
        >>> make_converter().structure(1, float)
        1.0
        >>> make_converter().structure(True, int)
        Traceback (most recent call last):
        noether.config.errors.InvalidValueError: True is not a whole number
    """
    converter = Converter(detailed_validation=True)
    for kind, noun in _NOUNS.items():
        converter.register_structure_hook(kind, _scalar_hook(kind, noun))
    hooks: tuple[tuple[Callable[[Any], bool], Callable[[Any, Any], Any]], ...] = (
        (lambda kind: kind in (Any, object), lambda value, _: read_untyped(value)),
        (dataclasses.is_dataclass, lambda value, kind: construct(converter, kind, value)),
        (has_origin(Mapping, dict), lambda value, kind: _structure_mapping(converter, value, kind)),
        (has_origin(*_SEQUENCES), lambda value, kind: _structure_sequence(converter, value, kind)),
        (has_origin(typing.Literal), _structure_literal),
        (lambda kind: isinstance(kind, type) and issubclass(kind, enum.Enum), _structure_member),
        (has_origin(typing.Union, types.UnionType), lambda value, kind: _structure_union(converter, value, kind)),
    )
    for predicate, hook in hooks:
        converter.register_structure_hook_func(predicate, hook)
    return converter


def _scalar_hook(kind: object, noun: str) -> Callable[[Any, Any], Any]:
    def structure_scalar(value: object, _: object) -> object:
        if isinstance(value, EnvironmentText):
            value = str(value) if kind in (str, Path) else value.scalar
        if kind is float and type(value) is int and abs(value) < 2**1023:  # larger ones overflow
            return float(value)
        if kind is Path and type(value) is str:
            return Path(value)
        if type(value) is not kind:
            raise InvalidValueError(f"{value!r} is not {noun}")
        return value

    return structure_scalar


def read_untyped(value: object) -> object:
    """Return a value for a setting of any type."""
    return value.scalar if isinstance(value, EnvironmentText) else value


def has_origin(*origins: object) -> Callable[[Any], bool]:
    """Return a predicate of types: whether one is among `origins`, such as `dict[str, int]` for `dict`."""
    return lambda kind: any((typing.get_origin(kind) or kind) is origin for origin in origins)


def is_function_type(kind: Any) -> bool:
    """Return whether a setting of this type holds a function or a class: a `Callable`, a `type` or a callable protocol.

    Example:
        >>> is_function_type(Callable[[int], int]), is_function_type(type[int]), is_function_type(int)
        (True, True, False)
    """
    is_protocol = getattr(kind, "_is_protocol", False) and "__call__" in vars(kind)
    return is_protocol or has_origin(Callable, type)(kind)


def _structure_literal(value: object, kind: object) -> object:
    choices = typing.get_args(kind)
    if isinstance(value, EnvironmentText):
        value = str(value) if str(value) in choices else value.scalar
    if any(value == each and type(value) is type(each) for each in choices):
        return value
    close = suggest(value, [each for each in choices if isinstance(each, str)]) if isinstance(value, str) else ""
    raise InvalidValueError(f"{value!r} is not one of {', '.join(map(repr, choices))}{close}")


def _structure_member(value: object, kind: type[enum.Enum]) -> enum.Enum:
    """Return the member of an enumeration with this value, or else with this name."""
    found = [value, value.scalar] if isinstance(value, EnvironmentText) else [value]
    members = [each for each in kind for one in found if each.value == one and type(each.value) is type(one)]
    members += [each for each in kind if each.name == value]
    if not members:
        values = ", ".join(
            repr(each.value) if isinstance(each.value, (str, int, float)) else each.name for each in kind
        )
        raise InvalidValueError(f"{value!r} is not one of {values}")
    return members[0]


def _structure_union(converter: Converter, value: object, kind: object) -> object:
    """Return `value` as the first member that accepts it, trying the value's own type first.

    Text with a dot, or a mapping with a text as its `kind`, names a function if one of the members is a function type,
    even if another one is text or a mapping.
    """
    members = [each for each in typing.get_args(kind) if each is not type(None)]
    if isinstance(value, EnvironmentText) and str not in members:
        value = value.scalar
    if value is None and type(None) in typing.get_args(kind):
        return None
    path = value.get("kind") if isinstance(value, dict) else value
    if isinstance(path, str) and ("." in path or path is not value):
        members = list(filter(is_function_type, members))[:1] or members
    if len(members) == 1:
        return converter.structure(value, members[0])
    for member in sorted(members, key=lambda member: member is not type(value)):
        with suppress(Exception):  # the next member may accept it
            return converter.structure(value, member)
    raise InvalidValueError(f"{value!r} is not {' or '.join(map(_type_noun, typing.get_args(kind)))}")


def _type_noun(kind: object) -> str:
    if has_origin(*_SEQUENCES)(kind):
        return "a list"
    if has_origin(typing.Literal)(kind):
        return " or ".join(map(repr, typing.get_args(kind)))
    if is_function_type(kind):
        return "a function, given as its dotted path or as {kind: ...}"
    return _NOUNS.get(kind) or f"a {type_name(kind)}"


def _structure_sequence(converter: Converter, value: object, kind: Any) -> object:
    if not isinstance(value, list):
        raise InvalidValueError(f"{value!r} is not a list")
    origin, inner = typing.get_origin(kind) or kind, typing.get_args(kind)
    fixed = origin is tuple and inner and inner[-1] is not Ellipsis
    if fixed and len(value) != len(inner):
        raise InvalidValueError(f"{value!r} has {len(value)} elements, not {len(inner)}")
    kinds = inner if fixed else [inner[0] if inner else Any] * len(value)
    container = origin if origin in (list, set, frozenset) else frozenset if origin is AbstractSet else tuple
    return container(_structure_parts(converter, zip(range(len(value)), value, kinds, strict=True)).values())


def _structure_mapping(converter: Converter, value: object, kind: Any) -> object:
    if not isinstance(value, dict):
        raise InvalidValueError(f"{value!r} is not a mapping")
    key_kind, value_kind = typing.get_args(kind) or (Any, Any)
    _structure_parts(converter, ((key, key, key_kind) for key in value))
    return _structure_parts(converter, ((key, each, value_kind) for key, each in value.items()))


def _structure_parts(converter: Converter, parts: Iterable[tuple[Any, object, Any]]) -> dict[Any, Any]:
    """Return every part by its key or index, or raise the problems of all of them at once."""
    structured: dict[Any, Any] = {}
    errors: list[Exception] = []
    for part, value, kind in parts:
        with collect_errors(errors, part):
            structured[part] = converter.structure(value, kind)
    if errors:
        raise IterableValidationError("elements", errors, dict)
    return structured
