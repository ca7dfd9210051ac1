"""The status of a run: whether a process writes it now, or how it ended."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Literal

from noether.effects.disk.lock import find_lock_use
from noether.effects.run_files import CHECKPOINTS, ENDED

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

RunStatus = Literal["running", "finished", "stopped", "interrupted", "failed", "killed", "unknown"]

_ENDS: Final[dict[str, RunStatus]] = {
    "finished": "finished",
    "stopped": "stopped",
    "interrupted": "interrupted",
    "failed": "failed",
}


def find_status(path: Path, summary: Mapping[str, Any]) -> RunStatus:
    """Return whether a process writes a run now, or how the run ended.

    The entry `status` of its summary says how it ended. An entry `running` is true only while a process holds the lock
    of the directory, which the operating system releases when the process ends, even after `kill -9`. The function
    changes nothing in the directory.

    Args:
        path: The run directory.
        summary: The entries of its summary.

    Returns:
        `finished` (it reached its end), `stopped` (by a callback), `interrupted` (by a signal or the time limit),
        `failed` (by an exception), `running`, or `killed` if its process ended without writing a status. It is
        `unknown` if the lock cannot be checked, such as one of another host, or if an earlier version wrote the run.

    Example:
        >>> import noether, tempfile
        >>> with noether.open_run(tempfile.mkdtemp()) as directory:
        ...     find_status(directory.path, {"status": "running"})
        'running'
        >>> find_status(directory.path, {"status": "running"}), find_status(directory.path, {"status": "stopped"})
        ('killed', 'stopped')
    """
    recorded = summary.get("status")
    if isinstance(recorded, str) and recorded in _ENDS:
        return _ENDS[recorded]
    use = find_lock_use(path)
    if use == "held":
        return "running"
    if recorded == "running":
        return "unknown" if use == "unknown" else "killed"
    if (ended := _find_end(path, summary.get("ending"))) is not None:
        return ended
    return "killed" if use == "abandoned" else "unknown"


def _find_end(path: Path, ending: object) -> RunStatus | None:
    """Return how a run ended that an earlier version wrote, without a status; None if its files do not say so."""
    if isinstance(ending, str):
        what, _, reason = ending.partition(":")
        if what.startswith("ended at "):
            return "stopped" if reason else "finished"
        return _ENDS.get(what.partition(" ")[0])
    return "finished" if (path / CHECKPOINTS / ENDED).is_file() else None
