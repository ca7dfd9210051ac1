"""Finds the directories of runs."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Final

from noether.config.errors import error_at
from noether.core.text import count_of
from noether.effects.disk.files import os_error_text
from noether.effects.run_files import (
    CHECKPOINTS,
    CONFIG_FILE,
    EVENTS_FILE,
    MANIFEST,
    METRICS_FILE,
    NEVER_SAVED,
    SUMMARY_FILE,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_LOGGER: Final = logging.getLogger(__name__)
_LOGS: Final = (METRICS_FILE, SUMMARY_FILE, EVENTS_FILE, NEVER_SAVED)
_LEVELS: Final = 2  # below OUTPUT, there are NAME and RUN_ID


def find_runs(folder: Path) -> list[Path]:
    """Return the directories of runs in a folder, at most two folders down, or the folder itself if it is a run.

    A run that links lead to as well is there once. A warning is logged for folders that cannot be read.

    Raises:
        ConfigError: If the folder has no run; the message says what to give instead.
    """
    runs = _drop_links(folder, list(_runs_below(folder, _LEVELS)))
    if not runs and (folder / CONFIG_FILE).is_file():
        return [folder]
    if not runs:
        _refuse_inside_of_run(folder)
        what = "has no run in it" if folder.is_dir() else "is not a folder" if folder.exists() else "does not exist"
        raise error_at(str(folder), f"{what}; give a run such as runs/NAME/RUN_ID, or a folder of runs")
    return runs


def require_readable(path: Path) -> None:
    """Check that `path` is the directory of a run.

    Raises:
        ConfigError: If it is not; the message says what to give instead.
    """
    if _has_logs(path):
        return
    _refuse_inside_of_run(path)
    runs = list(_runs_below(path, _LEVELS))
    if not runs and (path / CONFIG_FILE).is_file():
        return
    fix = "give one like runs/NAME/RUN_ID"
    if runs:
        newest = max(runs, key=lambda run: run.stat().st_mtime)
        count = count_of(len(runs), "run")
        fix = f"the newest of the {count} in it is {newest}" if len(runs) > 1 else f"the run in it is {newest}"
    what = "is not the directory of a run" if path.exists() else "does not exist"
    raise error_at(str(path), f"{what}; {fix}")


def is_run(path: Path) -> bool:
    """Return whether a path is the directory of one run, and not a folder of runs."""
    return find_runs(path) == [path] if (path / CONFIG_FILE).is_file() else _has_logs(path)


def _drop_links(folder: Path, runs: list[Path]) -> list[Path]:
    """Return each run once: by its own path in the folder, if it has one, and else by the shortest path to it."""
    places: dict[Path, list[Path]] = {}
    for run in runs:
        places.setdefault(run.resolve(), []).append(run)
    root = folder.resolve()
    chosen = {
        min(paths, key=lambda path: (root / path.relative_to(folder) != place, len(path.parts)))
        for place, paths in places.items()
    }
    return [run for run in runs if run in chosen]


def _refuse_inside_of_run(path: Path) -> None:
    for parent in path.absolute().parents:
        if _has_logs(parent):
            raise error_at(str(path), f"lies in the directory of a run; give {parent}")


def _runs_below(path: Path, levels: int) -> Iterator[Path]:
    if _has_logs(path):
        yield path
    elif path.is_dir():
        below: list[Path] = []
        if levels:
            folders = sorted(each.path for each in os.scandir(path) if each.is_dir() and not each.name.startswith("."))
            for folder in folders:
                try:
                    below += _runs_below(path.__class__(folder), levels - 1)
                except OSError as error:  # such as the run of another user
                    _LOGGER.warning("left out %s: it cannot be read: %s", folder, os_error_text(error))
        # A folder of runs may contain a configuration, too; a run that has logged nothing has only that.
        is_new = not below and levels < _LEVELS and (path / CONFIG_FILE).is_file()
        yield from [path] if is_new else below


def _has_logs(path: Path) -> bool:
    """Return whether a directory has a file that only a run writes."""
    if any((path / name).is_file() for name in _LOGS):
        return True
    return any((path / CHECKPOINTS).glob(f"*/{MANIFEST}"))
