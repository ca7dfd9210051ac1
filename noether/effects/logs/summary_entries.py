"""The entries of `summary.json`, and those that have one value for each process."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from noether.core.errors import SettingsError
from noether.core.iteration import TrainingIteration
from noether.effects.disk.calls import DISK
from noether.effects.disk.files import read_file

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from noether.effects.disk.calls import Disk


PRODUCES: Final = "produces"
"""The entry with the patterns of metric keys that each callback of a configuration logs, by the path of its section."""


def read_summary(path: Path, disk: Disk = DISK) -> dict[str, Any]:
    """Return the entries of a summary; none if the file does not exist or is damaged.

    Args:
        path: The file `summary.json`.
        disk: The disk.
    """
    with suppress(OSError, ValueError, RecursionError):
        entries = json.loads(read_file(path, disk))
        return entries if isinstance(entries, dict) else {}
    return {}


def set_process_entry(entries: Mapping[str, Any], name: str, begin: TrainingIteration, value: Any) -> dict[str, Any]:
    """Return an entry with one value for each process that trained the run, by the iteration at which it began.

    A process that resumes the run repeats what came after its first iteration, so it replaces the values of processes
    that began there or later.

    Args:
        entries: The entries of the summary before.
        name: Name of the entry.
        begin: Where this process begins.
        value: Its value.

    Example:
        >>> entries = {"phases": {"E0_U0_S0": 1, "E2_U8_S32": 2, "E3_U12_S48": 3}}
        >>> set_process_entry(entries, "phases", TrainingIteration(epoch=2, update=8, sample=32), 4)
        {'E0_U0_S0': 1, 'E2_U8_S32': 4}
    """
    before = entries.get(name, {})
    before = before if isinstance(before, dict) else {}  # a callback may have set an entry of this name
    return {**{at: each for at, each in before.items() if not _is_repeated(at, begin)}, str(begin): value}


def _is_repeated(at: str, begin: TrainingIteration) -> bool:
    try:
        return TrainingIteration.parse(at).reached(begin)
    except SettingsError:  # of an entry that a callback set
        return True
