"""The layout of YAML for a class-based framework: callbacks in the trainer, and numbers that count otherwise."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from noether.config.compatibility import ConfigWarning, is_module
from noether.config.errors import ConfigError, LocatedProblem
from noether.core.callbacks.registry import EXPORTS

if TYPE_CHECKING:
    from noether.config.errors import SettingPath
    from noether.config.source import Source

_TRAINER: Final[SettingPath] = ("trainer", "callbacks")
_CALLBACKS: Final[SettingPath] = ("callbacks",)
_OLDER_SETTINGS: Final = frozenset({"eval_callbacks", "model_name", "save_frozen_weights", "source_metric_key"})


def read_older_layout(source: Source) -> Source:
    r"""Return a source whose callbacks are at the top level; those in `trainer` are moved there.

    A warning names each setting `tolerances` in a list of callbacks that was written for the class-based framework,
    because there it counts one firing more.

    Raises:
        ConfigError: If `callbacks` is both at the top level and in `trainer`.

    Example:
        >>> from noether.config.source import parse
        >>> source = read_older_layout(parse("trainer:\n  callbacks: []", "a.yaml"))
        >>> source.data, str(source.place(("callbacks",)))
        ({'trainer': {}, 'callbacks': []}, 'a.yaml:2')
    """
    trainer = source.data.get("trainer")
    is_older = isinstance(trainer, Mapping) and "callbacks" in trainer
    if is_older:
        source = _move_callbacks(source)
    listed = source.data.get("callbacks")
    entries = listed if isinstance(listed, list) else []
    if is_older or any(map(_is_of_class_based_framework, entries)):
        _warn_of_tolerances(source, entries)
    return source


def _move_callbacks(source: Source) -> Source:
    callbacks = source.value(_TRAINER)
    if callbacks in (source.data.get("callbacks"), "${callbacks}"):
        return source.without(_TRAINER)
    if "callbacks" in source.data:
        message = f"callbacks are given at the top level too ({source.place(_CALLBACKS)}); leave them out here"
        raise ConfigError([LocatedProblem(source.place(_TRAINER), _TRAINER, message)])
    moved = {(*_CALLBACKS, *path[2:]): place for path, place in source.places.items() if path[:2] == _TRAINER}
    written = {(*_CALLBACKS, *path[2:]): text for path, text in source.references.items() if path[:2] == _TRAINER}
    source = source.without(_TRAINER)
    data = source.data if callbacks is None else {**source.data, "callbacks": callbacks}
    references = {**source.references, **written}
    return replace(source, data=data, places={**source.places, **moved}, references=references)


def _is_of_class_based_framework(entry: Any) -> bool:
    """Return whether an entry of the list has a path, a label or a setting that only the class-based framework has."""
    kind = entry.get("kind") if isinstance(entry, Mapping) else None
    if not isinstance(kind, str):
        return False
    module, _, name = kind.rpartition(".")
    if not module.startswith("noether.") or name not in EXPORTS:
        return False
    return entry.get("name") == name or not _OLDER_SETTINGS.isdisjoint(entry) or not is_module(module)


def _warn_of_tolerances(source: Source, entries: list[Any]) -> None:
    for index, entry in enumerate(entries):
        tolerances = entry.get("tolerances") if isinstance(entry, Mapping) else None
        if not isinstance(tolerances, list) or not all(type(each) is int for each in tolerances) or not tolerances:
            continue
        path: SettingPath = (*_CALLBACKS, index, "tolerances")
        message = (
            "k ends here at k firings in a row without improvement, as early stopping does, and at k + 1 in the "
            f"class-based framework: if {tolerances} was written for that, write {[each + 1 for each in tolerances]}"
        )
        warnings.warn(str(LocatedProblem(source.place(path), path, message)), ConfigWarning, stacklevel=2)
