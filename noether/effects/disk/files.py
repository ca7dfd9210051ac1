"""Files that stay whole: written under another name, flushed, and put in place in one step."""

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
"""What the names of files and directories begin with that are not in place yet, or no more."""


class Content(NamedTuple):
    """What is in a file, by its size and SHA-256 in hexadecimal."""

    size_bytes: int
    sha256: str


def write_new_file(path: Path, pieces: Iterable[bytes | memoryview], disk: Disk = DISK) -> Content:
    """Write a file that does not exist yet, return once it is on the disk, and say what is in it.

    Args:
        path: The file.
        pieces: What it will hold; each is hashed and written in one call, in which other threads run.
        disk: The disk.

    Raises:
        OSError: If it cannot be written; what is there then is not to be used.
    """
    digest, size = hashlib.sha256(), 0
    file = disk.create(path)
    try:
        for piece in pieces:
            left = memoryview(piece)
            digest.update(left)
            size += len(left)
            while left:
                left = left[disk.write(file, left) :]
        disk.flush(file)
    except OSError as error:
        raise OSError(
            error.errno, os_error_text(error), str(path)
        ) from error  # which file, the calls on open ones do not say
    finally:
        disk.close(file)
    return Content(size, digest.hexdigest())


def replace_file(path: Path, pieces: Iterable[bytes | memoryview], disk: Disk = DISK) -> None:
    """Replace a file's content in one step: a reader sees the old or the new, whole.

    Raises:
        OSError: If it cannot be written; the old stays.
    """
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{path.name}")
    with suppress(FileNotFoundError):
        disk.remove(temporary)
    write_new_file(temporary, pieces, disk)
    disk.rename(temporary, path)
    disk.flush_directory(path.parent)


def replace_text(path: Path, text: str, disk: Disk = DISK) -> None:
    """Replace a file's content by a text; otherwise as `replace_file`."""
    replace_file(path, [text.encode()], disk)


def read_file(path: Path, disk: Disk = DISK, *, limit: int | None = None) -> bytes:
    """Return what is in a file; links are not followed.

    Args:
        path: The file.
        disk: The disk.
        limit: Bytes that it may hold at most.

    Raises:
        OSError: If it cannot be read; with `EFBIG` if it is larger than `limit`.
    """
    file = disk.open_to_read(path)
    try:
        size = disk.size(file)
        if limit is not None and size > limit:
            raise OSError(errno.EFBIG, f"{size} bytes are more than the {limit} that it may have", str(path))
        pieces = []
        while size > 0 and (piece := disk.read(file, size)):  # most often one piece, so that nothing is copied
            pieces.append(piece)
            size -= len(piece)
    finally:
        disk.close(file)
    return b"".join(pieces)


def make_directories(path: Path, disk: Disk = DISK) -> None:
    """Make a directory where there is none, with those above it, and return once its entry is on the disk."""
    made = disk.kind(path) is None
    if made:
        make_directories(path.parent, disk)
        with suppress(FileExistsError):
            disk.make_directory(path)
    try:
        disk.flush_directory(path.parent)
    except OSError:
        if made:  # a second flush would not tell of the first: the next one is of another entry
            with suppress(OSError):
                disk.remove_directory(path)
        raise


def remove_tree(path: Path, disk: Disk = DISK) -> None:
    """Remove a file, or a directory with all that is in it; links are removed and not followed."""
    if disk.kind(path) != "directory":
        disk.remove(path)
        return
    for name in disk.names(path):
        remove_tree(path / name, disk)
    disk.remove_directory(path)


def no_space(error: OSError) -> bool:
    """Return whether an error says that there is no room."""
    return error.errno in {errno.ENOSPC, errno.EDQUOT}


def os_error_text(error: OSError) -> str:
    """Return what the operating system says, without the number and the path.

    Example:
        >>> os_error_text(OSError(28, "No space left on device", "/run/x"))
        'No space left on device'
    """
    return error.strerror or (os.strerror(error.errno) if error.errno else str(error))
