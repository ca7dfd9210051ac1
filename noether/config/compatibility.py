"""Settings under older names, and settings that have no meaning here: those of a class-based framework's YAML."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from noether.core.errors import Problem, SettingsError, refuse

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


class ConfigWarning(UserWarning):
    """Something in a configuration has no effect."""


def translated(target: Callable[..., Any], settings: Mapping[str, Any]) -> tuple[dict[str, Any], list[Problem]]:
    """Return settings under the names that `target` gives them, and what was left out because it has no meaning.

    Args:
        target: A callback class; `renamed`, `meaningless` and `elsewhere` on it say which.
        settings: As they were written. Null for a list is the same as leaving it out.

    Raises:
        SettingsError: If a setting is given under both of its names, or is done in another way here.

    Example:
        >>> from noether.core.callbacks import BestMetricCallback
        >>> translated(BestMetricCallback, {"source_metric_key": "val/accuracy", "target_metric_keys": None})
        ({'metric_key': 'val/accuracy'}, [])
    """
    renamed: Mapping[str, str] = getattr(target, "renamed", {})
    own = inspect.signature(target).parameters
    meaningless = {name: why for name, why in getattr(target, "meaningless", {}).items() if name not in own}
    elsewhere: Mapping[str, str] = getattr(target, "elsewhere", {})
    wrong = {name: how for name, how in elsewhere.items() if settings.get(name) is not None}
    refuse(Problem(name, f"is no setting here: {how}") for name, how in wrong.items())
    lists = {each.name for each in own.values() if isinstance(each.default, tuple)}
    kept: dict[str, Any] = {}
    for written, value in settings.items():
        name = renamed.get(written, written)
        if name != written and name in settings:
            raise SettingsError([Problem(written, f"is an older name of {name}, which is given too; leave it out")])
        absent = written in meaningless or (value is None and (name in lists or written in elsewhere))
        if not absent:
            kept[name] = [value] if name != written and name in lists and isinstance(value, str) else value
    said = f"has no meaning for {target.__name__} and is left out"
    return kept, [
        Problem(name, f"{said}: {why}") for name, why in meaningless.items() if settings.get(name) is not None
    ]
