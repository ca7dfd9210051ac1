"""Plain values into typed objects, without coercion: 2.7 is no whole number, true is no number, "3" is text.

cattrs chooses the hook by type and carries the errors up with the way to each of them (its notes). The hooks are ours,
because cattrs' own convert where they can, and because a class of the user's is known by its signature only.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cattrs import Converter, IterableValidationNote
from cattrs.errors import (
    BaseValidationError,
    ClassValidationError,
    IterableValidationError,
    StructureHandlerNotFoundError,
)

from noether.config.errors import LocatedProblem
from noether.core.errors import NoetherError, SettingsError, suggest

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

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
_SEQUENCES = (list, tuple, set, frozenset, Sequence, AbstractSet)


class InvalidValueError(NoetherError, ValueError):
    """A value does not fit where it stands; the message holds the value and what would be right."""


class _WrongKeyError(InvalidValueError):
    """A setting is missing or unknown: there is no value that a constructor could judge."""


def structure(
    source: Source, path: SettingPath, target: Any, problems: list[LocatedProblem], using: Converter | None = None
) -> Any:
    """Return the value at `path` as a `target`, or None after adding what is wrong with it to `problems`.

    Args:
        source: The document.
        path: Way to the value in the document.
        target: A type: a dataclass, or anything that annotates a field of one.
        problems: Every problem is appended here, with its place.
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
        found = [((*path, *way), message) for way, message in _messages(error)]
        problems.extend(LocatedProblem(source.place(way), way, message) for way, message in found)
        return None


def make_converter() -> Converter:
    """Return a converter that structures plain values strictly.

    Example:
        >>> make_converter().structure(1, float)
        1.0
        >>> make_converter().structure(True, int)
        Traceback (most recent call last):
        noether.config.structure.InvalidValueError: True is not a whole number
    """
    made = Converter(detailed_validation=True)
    for kind, noun in _NOUNS.items():
        made.register_structure_hook(kind, _scalar(kind, noun))
    made.register_structure_hook_func(lambda kind: kind in (Any, object), lambda value, _: value)
    made.register_structure_hook_func(dataclasses.is_dataclass, lambda value, kind: construct(made, kind, value))
    made.register_structure_hook_func(_is(Mapping, dict), lambda value, kind: _mapping(made, value, kind))
    made.register_structure_hook_func(_is(*_SEQUENCES), lambda value, kind: _sequence(made, value, kind))
    made.register_structure_hook_func(_is(typing.Literal), _literal)
    made.register_structure_hook_func(_is(typing.Union, types.UnionType), lambda value, kind: _union(made, value, kind))
    return made


def construct(using: Converter, target: Callable[..., Any], value: object, **given: object) -> Any:
    """Return `target` called with what is `given` and with the settings in `value`, checked against its signature.

    Raises:
        cattrs.errors.ClassValidationError: With every problem of the settings, those of the constructor included.
    """
    settings, errors = arguments(using, target, value, given=given)
    wrong = {_setting(error): error for error in errors}
    # The constructor sees the values that do not fit, too: what it says about the others is then said in the same go.
    raw = dict.fromkeys(wrong, _MISSING) | (value if isinstance(value, dict) else {})
    seen = settings | {name: raw[name] for name in wrong if name in parameters(target)}
    try:
        made = target(**given, **seen)
    except SettingsError as error:
        errors = _merged(wrong, error)
    except Exception as error:  # noqa: BLE001 - as in `structure`; after a problem of type it says nothing new
        errors = errors or [error]
    if errors:
        raise ClassValidationError("settings", errors, _class(target))
    return made


def arguments(
    using: Converter,
    target: Callable[..., Any],
    value: object,
    *,
    given: Iterable[str] = (),
    beside: Sequence[str] = (),
) -> tuple[dict[str, Any], list[Exception]]:
    """Return the settings in `value` as keyword arguments of `target`, and what is wrong with them.

    Defaults that can be written in YAML are filled in, except None: a setting that is absent says the same.

    Args:
        using: Structures the values of annotated parameters; those without annotation take any plain value.
        target: A class or function.
        value: Its settings.
        given: Parameters that are no settings, because the caller gives them.
        beside: Settings that stand beside these and are not among them.
    """
    if not isinstance(value, Mapping):
        return {}, [InvalidValueError(f"{value!r} is not a mapping of settings")]
    known = {name: each for name, each in parameters(target).items() if name not in (*given, *beside)}
    open_ended = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in _signature(target))
    settings: dict[str, Any] = {}
    errors: list[Exception] = []
    for name in [*known, *(name for name in value if name not in known)]:
        try:
            if name in known:
                settings |= _argument(using, known[name], value)
            elif open_ended and name not in (*given, *beside):
                settings[name] = value[name]
            else:
                raise _WrongKeyError(f"unknown setting{suggest(name, [*known, *beside]) or _listed([*known, *beside])}")  # noqa: TRY301
        except Exception as error:  # noqa: BLE001 - collected, with the way to it
            errors.append(noted(error, name))
    return settings, errors


def parameters(target: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Return the parameters of `target` that can be given by name, with their annotations as types.

    An annotation that cannot be resolved, as when it names what is imported for type checkers only, is left out.
    """
    named = [each for each in _signature(target) if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)]
    known = _hints(target)
    return {each.name: each.replace(annotation=_resolved(each, known)) for each in named}


def _resolved(parameter: inspect.Parameter, known: Mapping[str, Any]) -> object:
    written = parameter.annotation
    return known.get(parameter.name, Any) if isinstance(written, str) or written is parameter.empty else written


def noted(error: Exception, part: str | int) -> Exception:
    """Return `error` with a note that it lies inside of `part`: a key of a mapping or an index of a list."""
    error.add_note(IterableValidationNote(f"inside of {part!r}", part, Any))
    return error


def _messages(error: BaseException) -> Iterator[tuple[SettingPath, str]]:
    """Yield every problem in a tree of errors with the way to it."""
    way: SettingPath = tuple(
        note.index for note in reversed(getattr(error, "__notes__", ())) if isinstance(note, IterableValidationNote)
    )
    if isinstance(error, BaseValidationError):
        inside = (found for each in error.exceptions for found in _messages(each))
    elif isinstance(error, SettingsError):
        inside = ((_way(each.setting), each.message) for each in error.problems)
    elif isinstance(error, StructureHandlerNotFoundError):
        inside = (each for each in [((), f"a {_name(error.type_)} cannot be written in YAML")])
    elif isinstance(error, InvalidValueError | ValueError | TypeError) and str(error):
        inside = (each for each in [((), str(error))])
    else:
        inside = (each for each in [((), f"{type(error).__name__}: {error}")])
    return ((way + rest, message) for rest, message in inside)


def _way(setting: str) -> SettingPath:
    """Return the dotted name of a setting as a path; numbers are indices of lists."""
    return tuple(int(part) if part.isdecimal() else part for part in setting.split(".") if part)


class _Missing:
    """Stands for a setting that is required and was not given."""


_MISSING = _Missing()


def _argument(using: Converter, parameter: inspect.Parameter, value: Mapping[str, object]) -> dict[str, object]:
    """Return the one argument as a mapping, empty where the default is taken and cannot be written down."""
    name, default = parameter.name, parameter.default
    if name not in value:
        if default is parameter.empty:
            raise _WrongKeyError("is missing")
        return _default(using, parameter)
    if value[name] is None and default is None:
        return {}
    return {name: using.structure(value[name], parameter.annotation)}


def _default(using: Converter, parameter: inspect.Parameter) -> dict[str, object]:
    try:
        written = (
            using.structure(_written(parameter.default), parameter.annotation) if _plain(parameter.default) else None
        )
        same = type(written) is type(parameter.default) or isinstance(written, float)
        kept = same and written is not None and written == parameter.default
    except Exception:  # noqa: BLE001 - a default may be of any type, and compare as it likes
        kept = False
    return {parameter.name: written} if kept else {}


def _plain(default: object) -> bool:
    """Return whether a default can be written in YAML."""
    if isinstance(default, list | tuple):
        return all(map(_plain, default))
    return default is None or type(default) in (bool, int, float, str)


def _written(default: object) -> object:
    return [_written(each) for each in default] if isinstance(default, tuple) else default


def _merged(wrong: Mapping[str, Exception], refusal: SettingsError) -> list[Exception]:
    """Return the errors of types beside those of the constructor; about one plain value the constructor knows more."""
    replaced = {each.setting for each in refusal.problems if type(wrong.get(each.setting)) is InvalidValueError}
    known = [way for error in wrong.values() for way, _ in _messages(error)]
    kept = [each for each in refusal.problems if each.setting in replaced or not _about(_way(each.setting), known)]
    errors = [error for name, error in wrong.items() if name not in replaced]
    return [*errors, SettingsError(kept)] if kept else errors


def _about(way: SettingPath, known: Sequence[SettingPath]) -> bool:
    """Return whether `way` leads to, into or around one of the `known` ones."""
    return any(way[: len(each)] == each[: len(way)] for each in known) and bool(way)


def _setting(error: Exception) -> str:
    notes = [note for note in getattr(error, "__notes__", ()) if isinstance(note, IterableValidationNote)]
    return str(notes[-1].index) if notes else ""


def _signature(target: Callable[..., Any]) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(target).parameters.values())
    except (TypeError, ValueError):  # some of C's functions have none: they take what they take
        return [inspect.Parameter("settings", inspect.Parameter.VAR_KEYWORD)]


def _hints(target: Callable[..., Any]) -> dict[str, Any]:
    """Return the annotations that can be resolved, each in the module that wrote it."""
    if inspect.isclass(target) and dataclasses.is_dataclass(target):
        owners = [
            (vars(each).get("__annotations__", {}), vars(sys.modules[each.__module__])) for each in target.__mro__[::-1]
        ]
    else:
        called = (
            target.__init__
            if inspect.isclass(target)
            else target
            if inspect.isroutine(target)
            else type(target).__call__
        )
        plain = inspect.unwrap(called)
        owners = [(getattr(plain, "__annotations__", {}), getattr(plain, "__globals__", {}))]
    return {name: _hint(each, names) for annotations, names in owners for name, each in annotations.items()}


def _hint(annotation: object, names: dict[str, Any]) -> Any:
    holder = types.SimpleNamespace(__annotations__={"it": annotation})
    try:
        return typing.get_type_hints(holder, names, include_extras=True)["it"]
    except Exception:  # noqa: BLE001 - evaluating an annotation can raise anything
        return Any


def _scalar(kind: object, noun: str) -> Callable[[Any, Any], Any]:
    def hook(value: object, _: object) -> object:
        if kind is float and type(value) is int and abs(value) < 2**1023:
            return float(value)
        if kind is Path and type(value) is str:
            return Path(value)
        if type(value) is not kind:
            raise InvalidValueError(f"{value!r} is not {noun}")
        return value

    return hook


def _is(*origins: object) -> Callable[[Any], bool]:
    return lambda kind: any((typing.get_origin(kind) or kind) is origin for origin in origins)


def _literal(value: object, kind: object) -> object:
    choices = typing.get_args(kind)
    if any(value == each and type(value) is type(each) for each in choices):
        return value
    close = suggest(value, [each for each in choices if isinstance(each, str)]) if isinstance(value, str) else ""
    raise InvalidValueError(f"{value!r} is not one of {', '.join(map(repr, choices))}{close}")


def _union(using: Converter, value: object, kind: object) -> object:
    """Return `value` as the first member that takes it: its own type, or the function that a dotted path names."""
    if value is None and type(None) in typing.get_args(kind):
        return None
    members = [each for each in typing.get_args(kind) if each is not type(None)]
    if isinstance(value, str) and "." in value:
        members.sort(key=lambda member: not _is(Callable, type)(member))
        if _is(Callable, type)(members[0]):
            return using.structure(value, members[0])
    members.sort(key=lambda member: member is not type(value))
    if len(members) == 1:
        return using.structure(value, members[0])
    for member in members:
        try:
            return using.structure(value, member)
        except Exception:  # noqa: BLE001, S112 - the next member may take it
            continue
    raise InvalidValueError(f"{value!r} is not {' or '.join(_noun(each) for each in typing.get_args(kind))}")


def _noun(kind: object) -> str:
    if _is(*_SEQUENCES)(kind):
        return "a list"
    if _is(typing.Literal)(kind):
        return " or ".join(map(repr, typing.get_args(kind)))
    return _NOUNS.get(kind) or f"a {_name(kind)}"


def _sequence(using: Converter, value: object, kind: Any) -> object:
    if not isinstance(value, list):
        raise InvalidValueError(f"{value!r} is not a list")
    origin, inner = typing.get_origin(kind) or kind, typing.get_args(kind)
    fixed = origin is tuple and inner and inner[-1] is not Ellipsis
    if fixed and len(value) != len(inner):
        raise InvalidValueError(f"{value!r} has {len(value)} elements, not {len(inner)}")
    kinds = inner if fixed else [inner[0] if inner else Any] * len(value)
    made = origin if origin in (list, set, frozenset) else frozenset if origin is AbstractSet else tuple
    return made(_each(using, zip(range(len(value)), value, kinds, strict=True)).values())


def _mapping(using: Converter, value: object, kind: Any) -> object:
    if not isinstance(value, dict):
        raise InvalidValueError(f"{value!r} is not a mapping")
    keys, values = typing.get_args(kind) or (Any, Any)
    _each(using, ((key, key, keys) for key in value))
    return _each(using, ((key, each, values) for key, each in value.items()))


def _each(using: Converter, items: Iterable[tuple[Any, object, Any]]) -> dict[Any, Any]:
    """Return every element structured, or raise the problems of all of them."""
    made, errors = {}, []
    for part, value, kind in items:
        try:
            made[part] = using.structure(value, kind)
        except Exception as error:  # noqa: BLE001 - collected, with the way to it
            errors.append(noted(error, part))
    if errors:
        raise IterableValidationError("elements", errors, dict)
    return made


def _class(target: object) -> type:
    return target if isinstance(target, type) else type(target)


def _name(kind: object) -> str:
    return getattr(kind, "__qualname__", None) or str(kind)


def _listed(known: Iterable[str]) -> str:
    names = ", ".join(known)
    return f"; known are {names}" if names else "; there are none"
