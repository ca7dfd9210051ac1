"""Moves a directory to another place or disk, so that a crash at any moment leaves it whole and the move repeatable.

A rename of a directory into another one is two changes of names, of which a loss of power may keep one. So the move
copies the directory to a temporary name beside its target, flushes the copy to the disk, renames it into place, and
only then removes the source. A journal in the directory, which is copied with it, says that a move has begun: if the
copy is in place, `finish_move` removes the source, otherwise it removes the copy.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from noether.effects.disk.calls import DISK
from noether.effects.disk.files import (
    TEMPORARY_PREFIX,
    make_directories,
    read_file,
    remove_tree,
    replace_text,
    write_new_file,
)
from noether.effects.disk.lock import LOCK, RunLock

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    from noether.effects.disk.calls import Disk

JOURNAL: Final = ".move.json"
_PIECE_BYTES: Final = 1 << 22


@dataclass(frozen=True)
class _Journal:
    """A move that has begun: absolute paths, and the text that makes the temporary names unique."""

    source: str
    target: str
    token: str

    @property
    def copy(self) -> Path:
        """Where the copy is written before it is renamed to the target."""
        return self._temporary(Path(self.target))

    @property
    def discarded(self) -> Path:
        """What the source is called while it is removed, so that no reader sees part of it."""
        return self._temporary(Path(self.source))

    def _temporary(self, path: Path) -> Path:
        return path.with_name(f"{TEMPORARY_PREFIX}{path.name}-{self.token}")


def move_directory(
    source: Path,
    target: Path,
    texts: Mapping[str, str] | None = None,
    *,
    unchanging: Collection[str] = (),
    disk: Disk = DISK,
) -> None:
    """Move a directory; on return it is on the disk at `target` and nowhere else.

    Symbolic links in it lead to the same files as before. Both directories are locked while both exist.

    Args:
        source: The directory.
        target: Its new path, at which nothing exists.
        texts: New contents of files in it, by name.
        unchanging: Names of entries in it whose files are never written to again. Where the file system allows, these
            files get a second name in place of a copy.
        disk: The disk.

    Raises:
        OSError: If the directory could not be moved. Before its copy is in place, the source is whole and unchanged.
        LockedError: If another process opened one of them; `finish_move` completes the move.
    """
    target = target.parent.resolve() / target.name
    journal = _Journal(str(source.resolve()), str(target), secrets.token_hex(4))
    make_directories(target.parent, disk)
    locks = [RunLock(source, disk)]
    try:
        _copy_into_place(journal, unchanging, texts or {}, disk)
        locks.append(RunLock(target, disk))
        _remove_source(journal, disk)
    finally:
        for lock in locks:
            lock.release()


def _copy_into_place(journal: _Journal, unchanging: Collection[str], texts: Mapping[str, str], disk: Disk) -> None:
    source, target = Path(journal.source), Path(journal.target)
    with _undo_on_error(journal, disk):
        replace_text(source / JOURNAL, json.dumps(vars(journal)), disk)
        _copy_tree(source, journal, unchanging, texts, disk)
        if disk.kind(target) is not None:
            raise FileExistsError(errno.EEXIST, "exists already", str(target))
        disk.rename(journal.copy, target)
        disk.fsync_directory(target.parent)


def finish_move(directory: Path, disk: Disk = DISK) -> Path:
    """Finish a move of a directory that was interrupted, or undo it; return where the directory is.

    Args:
        directory: The source or the target of the move, or a directory that is not being moved.
        disk: The disk.

    Raises:
        LockedError: If another process is moving it, or writes to it.
        OSError: If the source could not be removed.
    """
    if disk.kind(directory / JOURNAL) is None:
        return directory
    locks = [RunLock(directory, disk)]
    try:
        journal = _read_journal(directory, disk)
        if journal is None or str(directory.resolve()) not in (journal.source, journal.target):
            disk.remove(directory / JOURNAL)  # the directory was copied by hand
            return directory
        if _read_journal(Path(journal.target), disk) != journal:
            _remove_copy(journal, disk)
            return directory
        places = (Path(journal.source), Path(journal.target))
        locks += [RunLock(path, disk) for path in places if path.is_dir() and path != directory.resolve()]
        _remove_source(journal, disk)
        return directory if str(directory.resolve()) == journal.target else Path(journal.target)
    finally:
        for lock in locks:
            lock.release()


def _read_journal(directory: Path, disk: Disk) -> _Journal | None:
    try:
        return _Journal(**json.loads(read_file(directory / JOURNAL, disk)))
    except (FileNotFoundError, NotADirectoryError, ValueError, TypeError):
        return None


@contextmanager
def _undo_on_error(journal: _Journal, disk: Disk) -> Iterator[None]:
    try:
        yield
    except OSError:
        with suppress(OSError):  # otherwise `finish_move` removes the copy
            if _read_journal(Path(journal.target), disk) == journal:
                disk.rename(Path(journal.target), journal.copy)
            _remove_copy(journal, disk)
        raise


def _remove_copy(journal: _Journal, disk: Disk) -> None:
    if disk.kind(journal.copy) is not None:
        remove_tree(journal.copy, disk)
    disk.remove(Path(journal.source) / JOURNAL)


def _remove_source(journal: _Journal, disk: Disk) -> None:
    source, target = Path(journal.source), Path(journal.target)
    disk.fsync_directory(target.parent)  # the process may have ended before it did
    for leftover in (journal.copy, journal.discarded):  # a loss of power may keep both names of a rename
        if disk.kind(leftover) is not None:
            remove_tree(leftover, disk)
            disk.fsync_directory(leftover.parent)
    if _read_journal(source, disk) == journal:
        disk.rename(source, journal.discarded)
        disk.fsync_directory(source.parent)
        remove_tree(journal.discarded, disk)
        disk.fsync_directory(source.parent)
    disk.remove(target / JOURNAL)
    disk.fsync_directory(target)


def _copy_tree(
    source: Path, journal: _Journal, unchanging: Collection[str], texts: Mapping[str, str], disk: Disk
) -> None:
    """Copy a directory below the source of a move to its place below the copy, and flush it to the disk."""
    root = Path(journal.source)
    target = journal.copy / source.relative_to(root)
    disk.make_directory(target)
    for name in disk.names(source):
        path, kind = source / name, disk.kind(source / name)
        inner = path.relative_to(root)
        if inner == Path(LOCK) or name.startswith(TEMPORARY_PREFIX):  # a killed process left temporary files behind
            continue
        if str(inner) in texts:
            write_new_file(target / name, [texts[str(inner)].encode()], disk)
        elif kind == "directory":
            _copy_tree(path, journal, unchanging, texts, disk)
        elif kind == "file":
            copy_file(path, target / name, is_unchanging=inner.parts[0] in unchanging, disk=disk)
        elif kind == "link":
            disk.symbolic_link(_link_text(path, root, disk), target / name)
        else:
            raise OSError(errno.EINVAL, "is neither a file nor a directory nor a link", str(path))
    with suppress(PermissionError):  # some file systems have no permissions
        disk.copy_status(source, target)
    disk.fsync_directory(target)


def copy_file(path: Path, target: Path, *, is_unchanging: bool, disk: Disk = DISK) -> None:
    """Copy a file and flush it to the disk.

    Args:
        path: The file.
        target: The copy; it must not exist.
        is_unchanging: Whether the file is never written to again, so that it may get a second name in place of a copy.
        disk: The disk.
    """
    if is_unchanging:
        with suppress(OSError):
            disk.hard_link(path, target)
            return
    file = disk.open_to_read(path)
    try:
        write_new_file(target, iter(lambda: disk.read(file, _PIECE_BYTES), b""), disk)
    finally:
        disk.close(file)
    with suppress(PermissionError):
        disk.copy_status(path, target)


def _link_text(path: Path, root: Path, disk: Disk) -> str:
    """Return what a copy of a link has to contain: relative within the directory that moves, else absolute."""
    text = disk.link_text(path)
    leads_to = Path(os.path.normpath(path.parent / text))
    return os.path.relpath(leads_to, path.parent) if leads_to.is_relative_to(root) else str(leads_to)
