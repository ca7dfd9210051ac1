"""The single values of a configuration or a summary by their dotted path, and names of callbacks in it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


def walk_settings(settings: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each value with its dotted path, as `--set` takes it; an empty mapping or list is a value, too.

    Args:
        settings: Nested mappings and lists.
        path: The path of `settings` itself.

    Example:
        >>> dict(walk_settings({"trainer": {"max_epochs": 3}, "callbacks": [{"kind": "a"}], "vars": {}}))
        {'trainer.max_epochs': 3, 'callbacks.0.kind': 'a', 'vars': {}}
    """
    if isinstance(settings, (dict, list)) and settings:
        for name, value in settings.items() if isinstance(settings, dict) else enumerate(settings):
            yield from walk_settings(value, f"{path}.{name}" if path else str(name))
    elif path:
        yield path, settings


def name_callback(entry: Mapping[str, Any]) -> str:
    """Return a short name of a callback: its kind, its dataset and its metric.

    Args:
        entry: Its settings in the configuration.

    Example:
        >>> name_callback({"kind": "noether.core.callbacks.MetricCallback", "dataset_key": "val", "metric": "accuracy"})
        'MetricCallback val accuracy'
    """
    kind = str(entry.get("kind")).rpartition("noether.core.callbacks.")[2]
    details = (str(entry[name]) for name in ("dataset_key", "metric", "metric_key") if entry.get(name) is not None)
    return " ".join((kind, *details))


def comparable_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a run by path, in which a callback has its name in place of its position.

    So an additional callback in one of two runs does not make all callbacks after it differ.

    Example:
        >>> comparable_settings({"run": {"seed": 0}, "callbacks": [{"kind": "my.Stop", "after": 3}]})
        {'run.seed': 0, 'callbacks[my.Stop].kind': 'my.Stop', 'callbacks[my.Stop].after': 3}
    """
    callbacks = config.get("callbacks")
    entries = [each for each in callbacks if isinstance(each, dict)] if isinstance(callbacks, list) else []
    others = {name: value for name, value in config.items() if name != "callbacks" or not entries}
    settings = dict(walk_settings(others))
    for number, entry in enumerate(entries):
        name = name_callback(entry)
        same = sum(name_callback(each) == name for each in entries[:number])
        settings |= walk_settings(entry, f"callbacks[{name}{f' {same + 1}' if same else ''}]")
    return settings
