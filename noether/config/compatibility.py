"""Settings under older names, and settings that have no meaning here: those of a class-based framework's YAML."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from noether.core.errors import Problem, raise_problems

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping


class ConfigWarning(UserWarning):
    """Something in a configuration has no effect."""


def translate_settings(target: Callable[..., Any], settings: Mapping[str, Any]) -> tuple[dict[str, Any], list[Problem]]:
    """Return settings under the names that `target` gives them, and what was left out because it has no meaning.

    Args:
        target: A callback class; `renamed`, `meaningless` and `elsewhere` on it say which.
        settings: As they were written. Null for a list, or under a name that is not used here, is nothing.

    Raises:
        SettingsError: If a setting is given under both of its names, or is done in another way here.

    Example:
        >>> from noether.core.callbacks import BestMetricCallback
        >>> translate_settings(BestMetricCallback, {"source_metric_key": "val/accuracy", "target_metric_keys": None})
        ({'metric_key': 'val/accuracy'}, [])
    """
    parameters = inspect.signature(target).parameters
    lists = {each.name for each in parameters.values() if isinstance(each.default, tuple)}
    renamed: Mapping[str, str] = getattr(target, "renamed", {})
    elsewhere: Mapping[str, str] = getattr(target, "elsewhere", {})
    meaningless = {name: why for name, why in getattr(target, "meaningless", {}).items() if name not in parameters}
    absent = {*lists, *elsewhere, *meaningless, *renamed}
    given = {name: value for name, value in settings.items() if not (value is None and name in absent)}
    raise_problems(_misplaced(given, renamed, elsewhere))
    kept = {renamed.get(name, name): value for name, value in given.items() if name not in meaningless}
    for older, name in renamed.items():
        if older in given and name in lists:
            kept[name] = [given[older]]  # the older name is that of a single one
    said = f"has no meaning for {target.__name__} and is left out"
    return kept, [Problem(name, f"{said}: {why}") for name, why in meaningless.items() if name in given]


def _misplaced(given: Mapping[str, Any], renamed: Mapping[str, str], elsewhere: Mapping[str, str]) -> Iterator[Problem]:
    for name in given:
        if name in elsewhere:
            yield Problem(name, f"is no setting here: {elsewhere[name]}")
        if renamed.get(name) in given:
            yield Problem(name, f"is an older name of {renamed[name]}, which is given too; leave it out")
