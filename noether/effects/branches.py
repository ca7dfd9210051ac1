"""Branches of a run: a new run directory that holds a run as it was at one of its checkpoints."""

from __future__ import annotations

import errno
import json
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from noether.effects.checkpoints.listing import list_checkpoints, pointer_text, read_ended
from noether.effects.disk.calls import DISK
from noether.effects.disk.files import TEMPORARY_PREFIX, make_directories, read_file, remove_tree, write_new_file
from noether.effects.disk.lock import LOCK, RunLock
from noether.effects.disk.moves import copy_file
from noether.effects.logs.resumption import ResumePoint, lines_before_resume
from noether.effects.run_files import CHECKPOINTS, CONFIG_FILE, ENDED, EVENTS_FILE, METRICS_FILE, SUMMARY_FILE

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from noether.core.state import TrainState
    from noether.effects.checkpoints.manifest import Manifest
    from noether.effects.disk.calls import Disk

BRANCHED_FROM: Final = "branched_from"
"""Entry of the summary of a branch: the path of the checkpoint at which it starts."""
_LATEST: Final = "latest"


def branch_run(source: Path, target: Path, manifest: Manifest, state: TrainState, disk: Disk = DISK) -> list[str]:
    """Make a run directory from which a run resumes exactly at a checkpoint of another run, which is not changed.

    It holds the configuration, the checkpoint, the lines that were logged up to it with their artifacts, and the
    checkpoints that pointers of the run name if they are not later. `summary.json` names the checkpoint. Files of
    checkpoints get a second name in place of a copy where the file system allows. The directory is written under a
    temporary name and renamed when it is on the disk; the next branch to the same path removes what a killed process
    left.

    Args:
        source: The run directory; a process may be training the run.
        target: The new run directory; nothing exists there.
        manifest: The checkpoint; a run can resume from it.
        state: The state in it.
        disk: The disk.

    Returns:
        The pointers that the branch does not have, because they name later checkpoints now, or are damaged.

    Raises:
        OSError: If the directory could not be written; then nothing exists at `target`.
        CheckpointError: If the checkpoints cannot be read; likewise.
        LogError: If a log is damaged; likewise.
        LockedError: If another process makes a branch there.
    """
    target = target.parent.resolve() / target.name
    temporary = target.with_name(f"{TEMPORARY_PREFIX}{target.name}")
    make_directories(target.parent, disk)
    with suppress(FileExistsError):
        disk.make_directory(temporary)
    lock = RunLock(temporary, disk)
    try:
        for name in disk.names(temporary):
            if name != LOCK:
                remove_tree(temporary / name, disk)
        later = _write_branch(source, temporary, manifest, state, disk)
        _require_free(target, disk)
        disk.rename(temporary, target)
        disk.fsync_directory(target.parent)
        disk.remove(target / LOCK)
    except Exception:
        for path in (temporary, target):
            with suppress(OSError):  # otherwise the next branch removes it
                if path == temporary or disk.kind(target / LOCK) is not None:
                    remove_tree(path, disk)
        raise
    finally:
        lock.release()
    return later


def _require_free(target: Path, disk: Disk) -> None:
    if disk.kind(target) is not None:  # a rename would replace an empty directory
        raise FileExistsError(errno.EEXIST, "exists already", str(target))


def _write_branch(source: Path, target: Path, manifest: Manifest, state: TrainState, disk: Disk) -> list[str]:
    """Write and fsync the files of a branch; return the pointers that it lacks."""
    for name, saved in ((METRICS_FILE, manifest.log_lines or 0), (EVENTS_FILE, 0)):
        if disk.kind(source / name) is not None:
            lines = read_file(source / name, disk).splitlines(keepends=True)
            remaining, _ = lines_before_resume(lines, ResumePoint.of(state), saved, source / name)
            write_new_file(target / name, remaining, disk)
            if name == METRICS_FILE:
                _copy_artifacts(source, target, remaining, disk)
    checkpoint = source.resolve() / CHECKPOINTS / manifest.tag
    summary = json.dumps({BRANCHED_FROM: str(checkpoint)}, indent=1) + "\n"
    write_new_file(target / SUMMARY_FILE, [summary.encode()], disk)
    write_new_file(target / CONFIG_FILE, [read_file(source / CONFIG_FILE, disk)], disk)
    later = _write_checkpoints(source / CHECKPOINTS, target / CHECKPOINTS, manifest, disk)
    disk.fsync_directory(target)
    return later


def _copy_artifacts(source: Path, target: Path, lines: Sequence[bytes], disk: Disk) -> None:
    """Copy the files that lines of metrics name; one that is missing in the run is missing in the branch."""
    entries = [json.loads(line).get("artifacts", {}) for line in lines if b'"artifacts"' in line]
    for name in sorted({entry["file"] for each in entries for entry in each.values()}):
        if disk.kind(source / name) is not None:
            make_directories((target / name).parent, disk)
            copy_file(source / name, target / name, is_unchanging=True, disk=disk)
            disk.fsync_directory((target / name).parent)


def _write_checkpoints(source: Path, target: Path, manifest: Manifest, disk: Disk) -> list[str]:
    listing = list_checkpoints(source, disk)
    named = {pointer: each for each in listing.manifests for pointer, tag in listing.targets.items() if tag == each.tag}
    pointers = {name: each for name, each in named.items() if _is_before(each, manifest)} | {_LATEST: manifest}
    disk.make_directory(target)
    for tag in {each.tag for each in pointers.values()}:
        disk.make_directory(target / tag)
        for name in disk.names(source / tag):
            copy_file(source / tag / name, target / tag / name, is_unchanging=True, disk=disk)
        disk.fsync_directory(target / tag)
    texts = {name: pointer_text(each) for name, each in pointers.items()}
    if read_ended(source, disk) == pointer_text(manifest):
        texts[ENDED] = pointer_text(manifest)
    for name, text in texts.items():
        write_new_file(target / name, [text.encode()], disk)
    disk.fsync_directory(target)
    return sorted({*listing.targets, *listing.broken} - pointers.keys())


def _is_before(each: Manifest, manifest: Manifest) -> bool:
    """Return whether a checkpoint was saved before another one, so that no run resumes from it in place of that."""
    if each.tag == manifest.tag:
        return True
    at, end = each.iteration, manifest.iteration
    return end.reached(at) and (each.order < manifest.order or (at == end and not each.resumable))
