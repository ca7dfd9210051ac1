"""Whole-file operations: write under a temporary name, fsync, and rename in one step."""

from __future__ import annotations

import errno
import hashlib
import os
from contextlib import suppress
from typing import TYPE_CHECKING, Final, NamedTuple

from noether.effects.disk.calls import DISK

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from noether.effects.disk.calls import Disk

TEMPORARY_PREFIX: Final = ".tmp-"
"""Prefix of the names of files and directories that are not in place yet, or are being removed."""


class FileDigest(NamedTuple):
    """The size of a file and the SHA-256 of its content in hexadecimal."""

    size_bytes: int
    sha256: str


def write_new_file(path: Path, pieces: Iterable[bytes | memoryview], disk: Disk = DISK) -> FileDigest:
    """Create a file, write and fsync its content, and return its size and hash.

    Args:
        path: The file; it must not exist.
        pieces: Its content; each piece is hashed and written in one call, during which other threads run.
        disk: The disk.

    Raises:
        OSError: If it cannot be written; the file that remains must not be used.
    """
    digest, size = hashlib.sha256(), 0
    file = disk.create(path)
    try:
        for piece in pieces:
            rest = memoryview(piece)
            digest.update(rest)
            size += len(rest)
            while rest:
                rest = rest[disk.write(file, rest) :]
        disk.fsync(file)
    except OSError as error:
        # Errors of calls on open files do not name the file.
        raise OSError(error.errno, os_error_text(error), str(path)) from error
    finally:
        disk.close(file)
    return FileDigest(size, digest.hexdigest())


def replace_file(path: Path, pieces: Iterable[bytes | memoryview], disk: Disk = DISK) -> None:
    """Replace a file's content in one step: a reader sees all of the old content or all of the new.

    Raises:
        OSError: If it cannot be written; the old content stays.
    """
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{path.name}")
    with suppress(FileNotFoundError):
        disk.remove(temporary)
    write_new_file(temporary, pieces, disk)
    disk.rename(temporary, path)
    disk.fsync_directory(path.parent)


def replace_text(path: Path, text: str, disk: Disk = DISK) -> None:
    """Replace a file's content by a text, as `replace_file` does."""
    replace_file(path, [text.encode()], disk)


def read_file(path: Path, disk: Disk = DISK, *, limit: int | None = None) -> bytes:
    """Return the content of a regular file; links are not followed.

    Args:
        path: The file.
        disk: The disk.
        limit: Largest allowed size in bytes.

    Raises:
        OSError: If it cannot be read; with `EFBIG` if it is larger than `limit`.
    """
    file = disk.open_to_read(path)
    try:
        size = disk.size(file)
        if limit is not None and size > limit:
            raise OSError(errno.EFBIG, f"{size} bytes are more than the {limit} that it may have", str(path))
        pieces = []
        while size > 0 and (piece := disk.read(file, size)):  # usually one piece, which `join` does not copy
            pieces.append(piece)
            size -= len(piece)
    finally:
        disk.close(file)
    return b"".join(pieces)


def read_begin(path: Path, size: int, disk: Disk = DISK) -> bytes:
    """Return the first bytes of a regular file, at most `size`; links are not followed.

    Raises:
        OSError: If it cannot be read.
    """
    file = disk.open_to_read(path)
    try:
        return disk.read(file, min(size, disk.size(file)))
    finally:
        disk.close(file)


def make_directories(path: Path, disk: Disk = DISK, *, within: Path | None = None) -> None:
    """Create a directory and its missing parents, and return once their entries are on the disk.

    Args:
        path: The directory.
        disk: The disk.
        within: The directory above it that has to exist: a run that was just moved is not begun again at the old path.

    Raises:
        FileNotFoundError: If `within` does not exist.
        OSError: If a directory cannot be created.
    """
    missing = disk.kind(path) is None
    if missing:
        if path == within:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        make_directories(path.parent, disk, within=within)
        with suppress(FileExistsError):
            disk.make_directory(path)
    try:
        disk.fsync_directory(path.parent)
    except OSError:
        if missing:  # a second fsync would not report the failure again, so the next attempt needs a new entry
            with suppress(OSError):
                disk.remove_directory(path)
        raise


def remove_tree(path: Path, disk: Disk = DISK) -> None:
    """Remove a file, or a directory with everything in it; links are removed and not followed."""
    if disk.kind(path) != "directory":
        disk.remove(path)
        return
    for name in disk.names(path):
        remove_tree(path / name, disk)
    disk.remove_directory(path)


def os_error_text(error: OSError) -> str:
    """Return the operating system's message for an error, without its number and path.

    Example:
        >>> os_error_text(OSError(28, "No space left on device", "/run/x"))
        'No space left on device'
    """
    return error.strerror or (os.strerror(error.errno) if error.errno else str(error))
