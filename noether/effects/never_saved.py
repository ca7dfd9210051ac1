"""The marker `.never-saved`, and the evidence in logs that a run without checkpoints had saved some.

A run that was killed before its first checkpoint has logs and no checkpoints, and starts again. A run whose folder of
checkpoints is not mounted looks the same, and must not start again, which would erase its logs. So the run directory of
a new run contains a marker file from before the first log line until the first checkpoint is saved.
"""

from __future__ import annotations

import json
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from noether.core.text import count_of
from noether.effects.disk.files import read_file, write_new_file
from noether.effects.run_files import EVENTS_FILE, METRICS_FILE, NEVER_SAVED, SUMMARY_FILE

if TYPE_CHECKING:
    from pathlib import Path

    from noether.effects.disk.calls import Disk

_TEXT: Final = b"This run has not saved a checkpoint yet.\n"


def mark_new_run(run: Path, disk: Disk) -> None:
    """Write the marker if the directory holds neither logs nor checkpoints.

    A marker that cannot be written is left out: without it, a run that has no checkpoint does not start again.
    """
    with suppress(OSError):
        checkpoints = run / "checkpoints"
        saved = disk.kind(checkpoints) is not None and disk.names(checkpoints)
        if not saved and not _logs_found(run, disk) and disk.kind(run / NEVER_SAVED) is None:
            write_new_file(run / NEVER_SAVED, [_TEXT], disk)
            disk.fsync_directory(run)


def mark_saved_run(run: Path, disk: Disk) -> bool:
    """Remove the marker; return whether it is removed from the disk."""
    try:
        if disk.kind(run / NEVER_SAVED) is not None:
            disk.remove(run / NEVER_SAVED)
            disk.fsync_directory(run)
    except OSError:
        return False
    return True


def find_progress(run: Path, disk: Disk) -> str | None:
    """Return the logs that prove that a run without checkpoints had saved some, or had ended; None if none do."""
    found = _logs_found(run, disk)
    ended = any("ended at" in evidence for evidence in found)
    is_new = disk.kind(run / NEVER_SAVED) is not None and not ended
    return None if is_new or not found else ", ".join(found)


def _logs_found(run: Path, disk: Disk) -> list[str]:
    """Return a description of each log file that is not empty."""
    found = []
    for name in (METRICS_FILE, EVENTS_FILE, SUMMARY_FILE):
        if disk.kind(run / name) is None:
            continue
        content = read_file(run / name, disk)
        if content:
            describe = _describe_summary if name == SUMMARY_FILE else _describe_lines
            found.append(f"{name} {describe(content)}")
    return found


def _describe_lines(content: bytes) -> str:
    lines = content.splitlines()
    with suppress(ValueError, KeyError, TypeError, RecursionError):
        last = json.loads(lines[-1])
        return f"has {count_of(len(lines), 'line')} up to E{last['epoch']}_U{last['update']}_S{last['sample']}"
    return f"has {count_of(len(lines), 'line')}"


def _describe_summary(content: bytes) -> str:
    with suppress(ValueError, KeyError, TypeError, RecursionError):
        ending = json.loads(content)["ending"]
        return "exists" if ending is None else f"says {ending!r}"
    return "exists"
