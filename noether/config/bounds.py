"""Ranges of numbers in the configuration, read from the checks themselves: which of a few values do they refuse?"""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any, final

from noether.core.errors import SettingsError

_TINY = 1e-9


@final
@dataclasses.dataclass(frozen=True)
class Bounds:
    """The range of a number.

    Args:
        minimum: The least number that is accepted, or the greatest that is not if it is `exclusive`; None if any is.
        exclusive: Whether `minimum` itself is refused.
    """

    minimum: int | None = None
    exclusive: bool = False

    def __str__(self) -> str:
        return "" if self.minimum is None else f"{'above' if self.exclusive else 'at least'} {self.minimum}"


def find_bounds(section: type, field: str, annotation: Any) -> Bounds:
    """Return the range of a field of a settings class.

    Args:
        section: The class.
        field: Name of the field.
        annotation: Its type.

    Example:
        >>> from noether.config.schema import RunSettings
        >>> print(find_bounds(RunSettings, "seed", int))
        at least 0
    """
    kinds = {*typing.get_args(annotation)} if isinstance(annotation, types.UnionType) else {annotation}
    if kinds.isdisjoint({int, float}) or not _is_refused(section, field, -1):
        return Bounds()
    if not _is_refused(section, field, 0):
        return Bounds(0)
    return Bounds(0, exclusive=True) if float in kinds and not _is_refused(section, field, _TINY) else Bounds(1)


def describe_bounds(section: type, field: str, annotation: Any) -> str:
    """Return the range of a field in words, such as `at least 1`; empty if every number is accepted."""
    return str(find_bounds(section, field, annotation))


def _is_refused(section: type, field: str, value: float) -> bool:
    """Return whether the checks of a class refuse a value of a field; problems of other fields do not count."""
    required = {each.name: _placeholder(each) for each in dataclasses.fields(section) if _is_required(each)}
    try:
        section(**required | {field: value})
    except SettingsError as error:
        return any(each.setting == field and each.message.startswith(f"{value!r} is not a") for each in error.problems)
    return False


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _placeholder(field: dataclasses.Field[Any]) -> Any:
    """Return a value of the type of a required field."""
    text = str(field.type)
    return {"int": 1, "float": 1.0, "str": "text"}.get(text, {} if text.startswith("Mapping") else ())
