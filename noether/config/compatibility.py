"""Settings in YAML that was written for a class-based framework: older names, and settings that have no effect here."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, final

from noether.core.errors import Problem, raise_problems
from noether.core.schedules.schedule import INTERVALS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping


class ConfigWarning(UserWarning):
    """A setting in a configuration has no effect."""


@final
@dataclass(frozen=True, kw_only=True)
class Translation:
    """How the settings of a callback in YAML for a class-based framework become settings of noether.

    Args:
        renamed: New name by older name. Both are accepted.
        ignored: Reason by name of a setting that has no effect here; a warning says so.
        replaced: What to write instead, by name of a setting that is refused.
    """

    renamed: Mapping[str, str] = field(default_factory=dict)
    ignored: Mapping[str, str] = field(default_factory=dict)
    replaced: Mapping[str, str] = field(default_factory=dict)

    def __or__(self, other: Translation) -> Translation:
        """Return both together; where both translate a setting, `other` does."""
        return Translation(
            renamed={**self.renamed, **other.renamed},
            ignored={**self.ignored, **other.ignored},
            replaced={**self.replaced, **other.replaced},
        )


_ACTS_ONCE: Final = Translation(ignored=dict.fromkeys(INTERVALS, "it acts before training"))

TRANSLATIONS: Final[Mapping[str, Translation]] = {
    "CallbackBase": Translation(ignored={"batch_size": "it iterates no dataset"}),
    "BestCheckpointCallback": Translation(
        renamed={"model_name": "model_names"},
        ignored={"save_frozen_weights": "a checkpoint is whole, frozen weights included"},
    ),
    "BestMetricCallback": Translation(renamed={"source_metric_key": "metric_key"}),
    "CheckpointCallback": Translation(renamed={"model_name": "model_names"}),
    "DatasetStatsCallback": _ACTS_ONCE,
    "EMACallback": Translation(
        replaced={"eval_callbacks": "list those callbacks after this one, each with weights: ema=FACTOR"}
    ),
    "FixedUpdateEarlyStopping": Translation(ignored=dict.fromkeys(INTERVALS, "it looks at every update")),
    "HyperparamsCallback": _ACTS_ONCE,
    "ParamCountCallback": _ACTS_ONCE,
}
"""Translations by the name of the callback in `noether.core.callbacks`; they hold for its subclasses, too."""


def translation_of(target: object) -> Translation:
    """Return the translation for a callback class, with those of its base classes; empty for a function.

    Example:
        >>> from noether.core.callbacks import BestMetricCallback
        >>> translation_of(BestMetricCallback).renamed
        {'source_metric_key': 'metric_key'}
    """
    translation = Translation()
    for kind in reversed(target.__mro__ if isinstance(target, type) else ()):
        if kind.__module__.startswith("noether.core.callbacks."):
            translation |= TRANSLATIONS.get(kind.__name__, Translation())
    return translation


def translate_settings(target: Callable[..., Any], settings: Mapping[str, Any]) -> tuple[dict[str, Any], list[Problem]]:
    """Return the settings of a callback under their names here, and a problem for each setting that has no effect.

    Args:
        target: The callback class.
        settings: Settings as YAML has them. Null counts as left out for a list and for a setting of `TRANSLATIONS`.

    Raises:
        SettingsError: If a setting is given under both of its names, or is one that something else replaces.

    Example:
        >>> from noether.core.callbacks import BestMetricCallback
        >>> translate_settings(BestMetricCallback, {"source_metric_key": "val/accuracy", "target_metric_keys": None})
        ({'metric_key': 'val/accuracy'}, [])
    """
    parameters = inspect.signature(target).parameters
    lists = {each.name for each in parameters.values() if isinstance(each.default, tuple)}
    translation = translation_of(target)
    renamed = translation.renamed
    ignored = {name: reason for name, reason in translation.ignored.items() if name not in parameters}
    nullable = {*lists, *translation.replaced, *ignored, *renamed}
    given = {name: value for name, value in settings.items() if not (value is None and name in nullable)}
    raise_problems(_refusals(given, translation))
    translated = {renamed.get(name, name): value for name, value in given.items() if name not in ignored}
    for older, name in renamed.items():
        if older in given and name in lists:
            translated[name] = [given[older]]  # the older setting holds a single value
    prefix = f"has no meaning for {target.__name__} and is left out"
    return translated, [Problem(name, f"{prefix}: {reason}") for name, reason in ignored.items() if name in given]


def _refusals(given: Mapping[str, Any], translation: Translation) -> Iterator[Problem]:
    for name in given:
        if name in translation.replaced:
            yield Problem(name, f"is no setting here: {translation.replaced[name]}")
        new = translation.renamed.get(name)
        if new in given:
            yield Problem(name, f"is an older name of {new}, which is given too; leave it out")
