"""The single values of a configuration or a summary by their dotted path."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator


def walk_settings(settings: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each single value by its dotted path, as `--set` takes it; an empty mapping or list is one, too.

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
