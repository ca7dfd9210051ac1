"""Calls a class or function with settings from YAML, after checking them against its signature."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from noether.config.errors import (
    InvalidValueError,
    collect_errors,
    location,
    parse_path,
    problems_in,
    raise_together,
    type_name,
)
from noether.config.structure.signatures import keywords_type, parameters, resolve_annotations, signature_parameters
from noether.core.errors import SettingsError, suggest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from cattrs import Converter

    from noether.config.errors import SettingPath


class _InvalidKeyError(InvalidValueError):
    """A setting is missing or unknown, so a constructor has no value to check."""


def construct(converter: Converter, target: Callable[..., Any], value: object, **given: object) -> Any:
    """Return `target` called with the settings in `value` and with `given`, checked against its signature.

    Raises:
        cattrs.errors.ClassValidationError: With every problem of the settings, including those the constructor raises.
    """
    return construct_with_settings(converter, target, value, dict, **given)[0]


def construct_with_settings(
    converter: Converter,
    target: Callable[..., Any],
    value: object,
    build: Callable[[dict[str, Any]], dict[str, Any]],
    **given: object,
) -> tuple[Any, dict[str, Any]]:
    """Return the result of `construct` and the keyword arguments that `arguments` found in `value`.

    Args:
        converter: As for `construct`.
        target: As for `construct`.
        value: As for `construct`.
        build: Makes what `target` is called with of the keyword arguments.
        given: As for `construct`.

    Raises:
        cattrs.errors.ClassValidationError: As `construct`.
    """
    settings, errors = arguments(converter, target, value, given=given)
    invalid = {str(part): error for error in errors for part in location(error)[:1]}
    # The constructor also receives the invalid values, so that it reports all its problems at the same time.
    received = dict(settings)
    if invalid:
        written: Mapping[str, object] = value if isinstance(value, dict) else {}
        received |= {name: written.get(name, _MISSING) for name in invalid if name in parameters(target)}
    try:
        instance = target(**given, **build(received))
    except SettingsError as error:
        errors = _merge_errors(invalid, error)
    except Exception as error:  # noqa: BLE001 - as in `structure`; an invalid value, reported already, may have caused it
        errors = errors or [error]
    raise_together(errors, target)
    return instance, settings


def arguments(
    converter: Converter,
    target: Callable[..., Any],
    value: object,
    *,
    given: Iterable[str] = (),
    beside: Sequence[str] = (),
) -> tuple[dict[str, Any], list[Exception]]:
    """Return the settings in `value` as keyword arguments of `target`, and an error for each invalid one.

    Defaults that YAML can express are filled in, except None, which is the same as an absent setting.

    Args:
        converter: Structures the values of annotated parameters; a parameter without annotation takes any plain value.
        target: A class or function.
        value: Its settings.
        given: Parameters that the caller passes itself; they are no settings.
        beside: Settings of the same section that are not parameters of `target`, for suggestions.
    """
    if not isinstance(value, Mapping):
        return {}, [InvalidValueError(f"{value!r} is not a mapping of settings")]
    reserved = (*given, *beside)
    signature = signature_parameters(target)
    others = next((each for each in signature if each.kind is inspect.Parameter.VAR_KEYWORD), None)
    known = {name: each for name, each in resolve_annotations(target, signature).items() if name not in reserved}
    settings: dict[str, Any] = {}
    errors: list[Exception] = []
    for name in [*known, *(name for name in value if name not in known)]:
        with collect_errors(errors, name):
            if name in known:
                settings |= _argument(converter, known[name], value)
            elif others is not None and name not in reserved:
                settings[name] = converter.structure(value[name], keywords_type(target, others))
            else:
                names = [*known, *beside]
                hint = suggest(name, names) or f"; known are {', '.join(names) or 'no settings'}"
                raise _InvalidKeyError(f"unknown setting{hint}")
    return settings, errors


class _Missing:
    """Takes the place of a required setting that is absent."""


_MISSING = _Missing()


def _argument(converter: Converter, parameter: inspect.Parameter, value: Mapping[str, object]) -> dict[str, object]:
    """Return one argument as a mapping, which is empty where the constructor uses its own default."""
    name, default = parameter.name, parameter.default
    if name in value:
        unset = value[name] is None and default is None
        return {} if unset else {name: converter.structure(value[name], parameter.annotation)}
    if default is parameter.empty:
        raise _InvalidKeyError("is missing")
    return _default_argument(converter, parameter)


def _default_argument(converter: Converter, parameter: inspect.Parameter) -> dict[str, object]:
    """Return a default as an argument if YAML can express exactly that value."""
    default = parameter.default
    try:
        value = converter.structure(_plain_default(default), parameter.annotation)
        exact = value is not None and (type(value) is type(default) or type(value) is float) and value == default
    except Exception:  # noqa: BLE001 - a default may be of any type, and compare in any way
        exact = False
    return {parameter.name: value} if exact else {}


def _plain_default(default: object) -> object:
    """Return a default as YAML holds it, with tuples as lists."""
    if isinstance(default, list | tuple):
        return [_plain_default(each) for each in default]
    if default is None or type(default) in (bool, int, float, str):
        return default
    raise TypeError(f"YAML cannot hold a {type_name(type(default))}")


def _merge_errors(invalid: Mapping[str, Exception], refusal: SettingsError) -> list[Exception]:
    """Return the errors of types and those of the constructor, with one error for each setting.

    For a plain value that is the constructor's, which knows its range; for a nested one the type's, which has the path.
    """
    replaced = {each.setting for each in refusal.problems if type(invalid.get(each.setting)) is InvalidValueError}
    reported = [path for error in invalid.values() for path, _ in problems_in(error)]
    added = [
        each
        for each in refusal.problems
        if each.setting in replaced or not _overlaps(parse_path(each.setting), reported)
    ]
    errors = [error for name, error in invalid.items() if name not in replaced]
    return [*errors, SettingsError(added)] if added else errors


def _overlaps(path: SettingPath, others: Sequence[SettingPath]) -> bool:
    """Return whether another path leads to, into or around `path`; the empty path, the whole object, overlaps none."""
    return path != () and any(path[: len(each)] == each[: len(path)] for each in others)
