"""The lock of a run directory: one process at a time writes there.

The package filelock (4.3.1 was tried) also survives forks and crashes, but cannot replace this module. It opens the
lock file itself, past `Disk`, where fault tests cannot reach it; it raises where a file system has no locks (`ENOLCK`),
and training has to continue there with a warning; it does not name the holder; and it leaves the file behind.
"""

from __future__ import annotations

import errno
import inspect
import json
import logging
import os
import socket
import sys
import traceback
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any, Final, Literal, final

from noether.core.errors import NoetherError
from noether.core.text import escape_controls
from noether.effects.disk.calls import DISK
from noether.effects.disk.files import os_error_text, read_file
from noether.effects.disk.finalizers import finalize
from noether.effects.disk.path_checks import HeldDirectory, require_in_place

if TYPE_CHECKING:
    from pathlib import Path

    from noether.effects.disk.calls import Disk

LockUse = Literal["free", "held", "abandoned", "unknown"]
LOCK: Final = ".lock"
_LOGGER: Final = logging.getLogger(__name__)
_MAX_HOLDER_BYTES: Final = 4096
_NOT_SUPPORTED: Final = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


class LockedError(NoetherError):
    """Another process, or another open run of this process, writes to the directory of a run."""


@final
class RunLock:
    """The exclusive lock of a directory, held until `release` or until this object is garbage-collected.

    It is a lock of the operating system on the file `.lock`, which also names the holder. The operating system frees it
    when the process ends, even by a crash. It belongs to the directory and not to its path: a directory that was moved
    stays locked, and a new one at the old path is free.

    Args:
        directory: The directory; it exists.
        disk: The disk.

    Raises:
        LockedError: If it is held, by another process or in this one; the message says where.

    Example:
        >>> import tempfile, pathlib
        >>> directory = pathlib.Path(tempfile.mkdtemp())
        >>> lock = RunLock(directory)
        >>> (directory / ".lock").exists()
        True
        >>> lock.release()
        >>> (directory / ".lock").exists()
        False
    """

    def __init__(self, directory: Path, disk: Disk = DISK) -> None:
        self._path, self._disk = directory / LOCK, disk
        with ExitStack() as stack:  # undoes everything if a step fails
            self._directory = HeldDirectory(directory, disk)
            stack.callback(self._directory.close)
            # The operating system may lock for a whole process, and so not separate two runs of one process.
            key, holder = self._directory.identity, (_calling_line(),)
            if (other := _HOLDERS.setdefault(key, holder)) is not holder:
                place = escape_controls(f"{directory} is already open in this process, at {other[0]}")
                raise LockedError(f"{place}; use that run, or close it first")
            stack.callback(_HOLDERS.pop, key)
            self._file = _open_locked(self._path, disk)
            stack.callback(_remove_and_close, self._file, self._path, disk)
            _OPEN_FILES.add(self._file)
            _write_holder(self._file, self._path, disk)
            self._release = finalize(self, stack.pop_all().close)

    def check(self) -> None:
        """Raise an error if the directory or its lock file is not at its path any more.

        Raises:
            RunMovedError: If it was moved, removed or replaced.
        """
        self._directory.check()
        fix = "Make sure that no other process writes to the directory, and resume the run."
        require_in_place(self._file, self._path, fix, self._disk)

    def release(self) -> None:
        """Release the directory; a second call is a no-op."""
        self._release()


def find_lock_use(directory: Path, disk: Disk = DISK) -> LockUse:
    """Return whether a process writes to a run directory, without creating or changing a file.

    For a moment it has a shared lock, which does not refuse a process that starts to write. It needs no permission to
    write.

    Args:
        directory: The directory.
        disk: The disk.

    Returns:
        `held` while a process has the lock, `free` if there is none, and `abandoned` if its process ended without
        releasing it, as after `kill -9`. It is `unknown` if the file system has no locks, or if the lock file names a
        process on another host: the directory is a copy, or the locks of that host do not reach this one.

    Example:
        >>> import tempfile, pathlib
        >>> directory = pathlib.Path(tempfile.mkdtemp())
        >>> lock = RunLock(directory)
        >>> find_lock_use(directory)
        'held'
        >>> lock.release()
        >>> find_lock_use(directory)
        'free'
    """
    path = directory / LOCK
    try:
        file = disk.open_to_read(path)
    except FileNotFoundError:
        return "free"
    except OSError:
        return "unknown"
    try:
        if _is_held(file, disk):
            return "held"
        if not disk.is_at(file, path):  # released meanwhile
            return "free"
    except OSError:
        return "unknown"
    finally:
        disk.close(file)
    holder = _read_holder(path, disk)
    return "abandoned" if holder is None or holder["host"] == socket.gethostname() else "unknown"


def _is_held(file: int, disk: Disk) -> bool:
    """Return whether another open file holds the exclusive lock."""
    try:
        disk.lock_shared(file)
    except BlockingIOError:
        return True
    return False


_HOLDERS: Final[dict[tuple[int, int], tuple[str]]] = {}
"""Where this process opened the directories that it holds, by device and inode number."""

_OPEN_FILES: Final[set[int]] = set()


def _close_after_fork() -> None:
    """Close inherited lock files: a worker that outlives its parent must not hold the parent's lock."""
    for file in _OPEN_FILES:
        with suppress(OSError):
            os.close(file)
    _OPEN_FILES.clear()
    _HOLDERS.clear()


os.register_at_fork(after_in_child=_close_after_fork)


def _open_locked(path: Path, disk: Disk) -> int:
    """Return the file at `path`, open and locked."""
    while True:
        file = disk.open_to_lock(path)
        try:
            disk.lock(file)
        except BlockingIOError:
            if not _is_held(file, disk):  # only readers have it, for a moment: see `find_lock_use`
                disk.close(file)
                continue
            holder = _describe_holder(path, disk)
            disk.close(file)
            place = escape_controls(f"{path.parent} is in use by {holder}")
            raise LockedError(f"{place}; wait for it to end, or stop it") from None
        except OSError as error:
            if error.errno not in _NOT_SUPPORTED:
                disk.close(file)
                raise
            _LOGGER.warning(
                "%s cannot be locked (%s): make sure that no other process writes there", path, os_error_text(error)
            )
            return file
        # The previous holder may have removed the file between the two calls; then this lock protects nothing.
        if disk.is_at(file, path):
            return file
        disk.close(file)


def _describe_holder(path: Path, disk: Disk) -> str:
    holder = _read_holder(path, disk)
    return "another process" if holder is None else "process {pid} on {host} ({command})".format_map(holder)


def _read_holder(path: Path, disk: Disk) -> dict[str, Any] | None:
    """Return process, host and command of the holder; None if it has not written them yet."""
    try:
        holder = json.loads(read_file(path, disk, limit=_MAX_HOLDER_BYTES))
        return {name: holder[name] for name in ("pid", "host", "command")}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write_holder(file: int, path: Path, disk: Disk) -> None:
    holder = {"pid": os.getpid(), "host": socket.gethostname(), "command": " ".join(sys.argv)[:1000]}
    try:
        disk.truncate(file, 0)
        disk.write(file, json.dumps(holder).encode())
    except OSError:  # on a full disk, the lock holds all the same
        _LOGGER.warning("%s could not be written: it does not name the process that holds it", path)


def _calling_line() -> str:
    """Return file and line of the innermost call from outside of this package."""
    package = __name__.partition(".")[0]
    for frame, line in traceback.walk_stack(inspect.currentframe()):
        if str(frame.f_globals.get("__name__")).partition(".")[0] != package:
            return f"{frame.f_code.co_filename}:{line}"
    return "an unknown place"


def _remove_and_close(file: int, path: Path, disk: Disk) -> None:
    with suppress(OSError):  # a file that stays locks nothing
        if disk.is_at(file, path):  # not if the directory was moved: another process may hold a new one at its path
            disk.remove(path)
    _OPEN_FILES.discard(file)
    disk.close(file)
