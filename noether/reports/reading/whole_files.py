"""Reads the files of a run other than its logs: configuration, summary and evaluations."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Any, Final

import yaml

from noether.config.errors import ConfigError, error_at
from noether.core.metric_keys import MODES
from noether.effects.disk.files import os_error_text
from noether.effects.disk.json_numbers import NUMBERS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from noether.core.metric_keys import Mode

_LOGGER: Final = logging.getLogger(__name__)


def read_config(path: Path) -> dict[str, Any]:
    """Return the settings in a resolved configuration; an empty mapping if the file does not exist.

    Raises:
        ConfigError: If the file cannot be read or is damaged.
    """
    if not path.is_file():
        return {}
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise error_at(str(path), f"cannot be read: {os_error_text(error)}") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise _damage_error(path, error) from error
    if not isinstance(content, dict):
        raise _damage_error(path, "it has no settings")
    return content


def find_mode(config: Mapping[str, Any], key: str) -> Mode | None:
    """Return the `mode` of the first callback of a configuration that has a metric as its `metric_key`, or None.

    Example:
        >>> find_mode({"callbacks": [{"metric_key": "val/dice", "mode": "higher"}]}, "val/dice")
        'higher'
    """
    modes = (each.get("mode") for each in _settings_in(config) if each.get("metric_key") == key)
    return next((mode for mode in modes if mode in MODES), None)


def _settings_in(value: Any) -> Iterator[Mapping[str, Any]]:
    """Yield each mapping in a configuration."""
    if isinstance(value, dict):
        yield value
    for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _settings_in(each)


def read_entries(path: Path) -> dict[str, Any]:
    """Return the entries of a summary; an empty mapping if the file does not exist.

    Raises:
        ConfigError: If the file cannot be read or is damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise error_at(str(path), f"cannot be read: {os_error_text(error)}") from error
    except (ValueError, RecursionError) as error:
        raise _damage_error(path, error) from error
    if not isinstance(content, dict):
        raise _damage_error(path, "it has no entries")
    return content


def read_evaluations(folder: Path) -> dict[str, Mapping[str, float]]:
    """Return the metrics in each file of a folder by its name; a warning is logged for damaged files."""
    found: dict[str, Mapping[str, float]] = {}
    for file in sorted(folder.glob("*.json")):
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            found[file.stem] = {key: NUMBERS.get(value, value) for key, value in content.items()}
        except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:  # not as it was written
            _LOGGER.warning("%s is damaged, and left out: %s", file, error)
    return found


def _damage_error(path: Path, reason: object) -> ConfigError:
    text = " ".join(str(reason).split())
    return error_at(str(path), f"is damaged: {text}; restore or remove it")
