"""Finds the ranges of numbers in the configuration: it tries a few values and reads which of them the checks refuse."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any, Final, final

from noether.core.errors import SettingsError

_TINY: Final = 1e-9
_HUGE: Final = 2**63
_EXACT: Final = 2**53


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class Bounds:
    """The range of a number, or of each number in a list.

    Args:
        at_least: The least number that is accepted; None if `above` says it, or if there is none.
        above: A number that is refused, with all below it.
        at_most: The greatest number that is accepted.
        below: A number that is refused, with all above it.
        in_list: Whether it is the range of each number in a list.
    """

    at_least: int | None = None
    above: int | None = None
    at_most: int | None = None
    below: int | None = None
    in_list: bool = False

    def __str__(self) -> str:
        words = {name.replace("_", " "): getattr(self, name) for name in ("at_least", "above", "at_most", "below")}
        parts = [f"{word} {_describe(number)}" for word, number in words.items() if number is not None]
        return ("each " if self.in_list and parts else "") + " and ".join(parts)


def find_bounds(section: type, field: str, annotation: Any) -> Bounds:
    """Return the range of a field of a settings class or callback.

    Args:
        section: The class.
        field: Name of the field.
        annotation: Its type.

    Example:
        >>> from noether.config.optimizer_settings import ScheduleSettings
        >>> from noether.config.schema import RunSettings
        >>> print(find_bounds(RunSettings, "seed", int))
        at least 0 and below 2**63
        >>> print(find_bounds(ScheduleSettings, "milestone_epochs", tuple[int, ...]))
        each at least 1
    """
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    kinds = list(typing.get_args(annotation) if is_union else (annotation,))
    elements = [typing.get_args(each)[0] for each in kinds if typing.get_origin(each) is tuple]
    in_list = int in elements or float in elements
    kinds = elements if in_list else kinds
    if int not in kinds and float not in kinds:
        return Bounds()

    def is_refused(value: float) -> bool:
        return _is_refused(section, field, value, in_list=in_list)

    limits: dict[str, int] = {}
    if is_refused(-1):
        is_above = float in kinds and is_refused(0) and not is_refused(_TINY)
        limits["above" if is_above else "at_least"] = 0 if is_above or not is_refused(0) else 1
    if float in kinds and is_refused(2):
        limits["below" if is_refused(1) else "at_most"] = 1
    elif is_refused(_HUGE):
        limits["below"] = _HUGE
    return Bounds(**limits, in_list=in_list)


def _is_refused(section: type, field: str, value: float, *, in_list: bool) -> bool:
    """Return whether the checks of a class refuse a value of a field; problems of other fields do not count."""
    required = {each.name: _placeholder(each) for each in dataclasses.fields(section) if _is_required(each)}
    given: Any = (value,) if in_list else value
    try:
        section(**required | {field: given})
    except SettingsError as error:
        beginnings = (f"{value!r} is not ", f"{given!r} is not ")
        problems = [each for each in error.problems if each.setting in {field, f"{field}.0"}]
        return any(each.message.startswith(beginnings) for each in problems)
    return False


def _is_required(field: dataclasses.Field[Any]) -> bool:
    is_init = field.init and field.default is dataclasses.MISSING
    return is_init and field.default_factory is dataclasses.MISSING


def _placeholder(field: dataclasses.Field[Any]) -> Any:
    """Return a value of the type of a required field."""
    text = str(field.type)
    return {"int": 1, "float": 1.0, "str": "text"}.get(text, {} if text.startswith("Mapping") else ())


def _describe(number: int) -> str:
    return f"2**{number.bit_length() - 1}" if number > _EXACT else str(number)
