"""The callbacks of a configuration that lists none: what they are, and where `default` stands for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from noether.config.errors import ConfigError, LocatedProblem
from noether.core.callbacks.registry import EXPORTS
from noether.core.schedules.schedule import INTERVALS

if TYPE_CHECKING:
    from noether.config.errors import Place, SettingPath
    from noether.config.source import Source

DEFAULT: Final = "default"
"""Stands for the default callbacks: as the value of `callbacks`, or as an element of that list."""
_VALIDATION: Final = "val"
_FIRINGS: Final = 10


def list_callbacks(source: Source) -> Source:
    """Return a source whose callbacks are all listed: an absent list, and `default`, become the default callbacks.

    Where the list has a callback of its own for the learning rate, the progress, or the best value of the same metric,
    it takes the place of the default one.

    Raises:
        ConfigError: If the value of `callbacks` is null, `default` is listed twice, or the list measures a loss that
            the default callbacks measure.

    Example:
        >>> from noether.config.source import parse
        >>> source = list_callbacks(parse("trainer: {max_updates: 1000}", "a.yaml"))
        >>> source.data["callbacks"][0]
        {'kind': 'noether.core.callbacks.OnlineLossCallback', 'every_n_updates': 100, 'at_end': True}
    """
    listed = source.data.get("callbacks", DEFAULT)
    if listed is None:
        message = f"is empty; write `[]` for no callbacks, or `{DEFAULT}`"
        raise ConfigError([LocatedProblem(source.place(("callbacks",)), ("callbacks",), message)])
    entries = [DEFAULT] if listed == DEFAULT else listed
    if not isinstance(entries, list) or DEFAULT not in entries:
        return source
    defaults, callbacks = _leave_out_listed(_default_entries(source), entries, source), list[Any]()
    places = {path: place for path, place in source.places.items() if path[:1] != ("callbacks",) or len(path) == 1}
    for index, entry in enumerate(entries):
        added = defaults if entry == DEFAULT else [entry]
        for number in range(len(callbacks), len(callbacks) + len(added)):
            places |= _move_places(source, ("callbacks", index), ("callbacks", number))
        callbacks += added
    return replace(source, data={**source.data, "callbacks": callbacks}, places=places)


def _leave_out_listed(defaults: list[dict[str, Any]], entries: list[Any], source: Source) -> list[dict[str, Any]]:
    """Return the default callbacks that the list does not have itself."""
    problems = {}
    if entries.count(DEFAULT) > 1:
        second = entries.index(DEFAULT, entries.index(DEFAULT) + 1)
        problems[second] = f"`{DEFAULT}` is listed twice; remove one"
    added = list(defaults)
    for default in defaults:
        like = [i for i, entry in enumerate(entries) if isinstance(entry, Mapping) and _does_same(entry, default)]
        name = _name_of(default)
        if like and name not in _MEASURES:
            added.remove(default)
        elif like:
            problems[like[0]] = (
                f"`{DEFAULT}` measures this too: remove this {name}, or list all callbacks in place of `{DEFAULT}`"
            )
    if problems:
        paths = {("callbacks", index): each for index, each in problems.items()}
        raise ConfigError([LocatedProblem(source.place(path), path, each) for path, each in paths.items()])
    return added


_MEASURES: Final = ("OnlineLossCallback", "OfflineLossCallback")
"""Default callbacks whose metrics others of them read."""
_SAME: Final[Mapping[str, tuple[str, ...]]] = {
    "OnlineLossCallback": tuple(INTERVALS),
    "LrCallback": (),
    "ProgressCallback": (),
    "OfflineLossCallback": ("dataset_key", "weights"),
    "BestCheckpointCallback": ("metric_key", "model_names"),
}
"""Settings in which a callback equals the default one of its kind where both would write the same."""


def _does_same(entry: Mapping[str, Any], default: Mapping[str, Any]) -> bool:
    name = _name_of(default)
    return _name_of(entry) == name and all(entry.get(each) == default.get(each) for each in _SAME.get(name, ("kind",)))


def _name_of(entry: Mapping[str, Any]) -> str:
    """Return the name of the shipped callback that an entry names by its path or an alias; empty for any other."""
    module, _, name = str(entry.get("kind")).rpartition(".")
    is_shipped = module.startswith("noether.") and name in EXPORTS
    return str(EXPORTS[name].load().__name__) if is_shipped else ""


def default_names(source: Source) -> list[str]:
    """Return the names of the default callbacks in the source of a file that `list_callbacks` returned.

    Example:
        >>> from noether.config.source import parse
        >>> default_names(list_callbacks(parse("data: {}", "a.yaml")))[-2:]
        ['BestCheckpointCallback', 'CheckpointCallback']
        >>> default_names(list_callbacks(parse("callbacks: []", "a.yaml")))
        []
    """
    written = source.places
    added = (each for i, each in enumerate(source.data["callbacks"]) if ("callbacks", i, "kind") not in written)
    return [each["kind"].rpartition(".")[2] for each in added]


def _move_places(source: Source, path: SettingPath, target: SettingPath) -> dict[SettingPath, Place]:
    """Return the places of a value and of all in it, as those of a value at `target`."""
    inner = {known[len(path) :]: place for known, place in source.places.items() if known[: len(path)] == path}
    return {(*target, *known): place for known, place in inner.items()}


def _default_entries(source: Source) -> list[dict[str, object]]:
    """Return the default callbacks.

    They fire at every epoch, or, in a run whose end is a number of updates or samples, ten times; and at the end. Of
    the datasets they evaluate `val`. If `trainer.evaluate` is given, they evaluate nothing themselves.
    """
    trainer, data = _section(source, "trainer"), _section(source, "data")
    interval = _interval(trainer)
    often = {**interval, "at_end": True}
    evaluate = trainer.get("evaluate")
    callbacks = [
        _entry("OnlineLossCallback", **often),
        _entry("LrCallback", **interval),
        _entry("ProgressCallback", **often),
    ]
    name, number = next(iter(interval.items()))
    watch = {**often, "metric_key": f"loss/online/total/{INTERVALS[name](number)}"}
    if isinstance(evaluate, Mapping):
        watch = _find_watched_metric(evaluate) or watch
    elif _VALIDATION in data:
        callbacks.append(_entry("OfflineLossCallback", **often, dataset_key=_VALIDATION))
        watch = {**often, "metric_key": f"loss/{_VALIDATION}/total"}
    return [
        *callbacks,
        _entry("BestCheckpointCallback", **watch),
        _entry("CheckpointCallback", **interval, save_weights=False),
    ]


def _section(source: Source, name: str) -> Mapping[str, Any]:
    section = source.data.get(name)
    return section if isinstance(section, Mapping) else {}


def _entry(name: str, **settings: object) -> dict[str, object]:
    return {"kind": f"noether.core.callbacks.{name}", **settings}


def _interval(trainer: Mapping[str, Any]) -> dict[str, int]:
    for end, interval in (("max_updates", "every_n_updates"), ("max_samples", "every_n_samples")):
        count = trainer.get(end)
        if type(count) is int and count > 0:
            return {interval: max(1, count // _FIRINGS)}
    return {"every_n_epochs": 1}


def _find_watched_metric(evaluate: Mapping[str, Any]) -> dict[str, Any]:
    """Return the interval of `trainer.evaluate`, and the key of a loss or metric there with a known direction, if any.

    The section may be wrong in any way, which is reported elsewhere.
    """
    from noether.core.metric_keys import direction_of  # it imports torch

    interval = {name: value for name, value in evaluate.items() if name in INTERVALS}
    datasets = sorted((name for name in evaluate if name not in INTERVALS), key=lambda name: name != _VALIDATION)
    for name in datasets:
        measures = evaluate[name] if isinstance(evaluate[name], list) else []
        for measure in sorted(measures, key=lambda each: each != "loss"):
            key = f"loss/{name}/total" if measure == "loss" else f"{name}/{_label_of(measure)}"
            if direction_of(key) is not None:
                return {**interval, "metric_key": key}
    return {}


def _label_of(measure: Any) -> str:
    """Return the name of a metric in its key, from what a configuration has written for it."""
    entry = measure if isinstance(measure, Mapping) else {"kind": measure}
    return str(entry.get("name", str(entry.get("kind")).rpartition(".")[2]))
