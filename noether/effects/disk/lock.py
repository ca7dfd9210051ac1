"""The lock of a run directory: one process at a time writes there.

The package filelock (4.3.1 was tried) also survives forks and crashes, but cannot replace this module. It opens the
lock file itself, past `Disk`, where fault tests cannot reach it; it raises where a file system has no locks (`ENOLCK`),
and training has to continue there with a warning; it does not name the holder; and it leaves the file behind.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
import sys
import weakref
from contextlib import suppress
from typing import TYPE_CHECKING, Final, final

from noether.core.errors import NoetherError
from noether.effects.disk.calls import DISK
from noether.effects.disk.files import os_error_text, read_file

if TYPE_CHECKING:
    from pathlib import Path

    from noether.effects.disk.calls import Disk

LOCK: Final = ".lock"
_LOGGER: Final = logging.getLogger(__name__)
_MAX_HOLDER_BYTES: Final = 4096
_NOT_SUPPORTED: Final = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


class LockedError(NoetherError):
    """Another process writes to the directory of a run."""


@final
class RunLock:
    """The exclusive lock of a directory, held until `release` or until this object is garbage-collected.

    It is a lock of the operating system on the file `.lock`, which also names the holder. The operating system frees it
    when the process ends, even by a crash. Several objects in one process share it.

    Args:
        directory: The directory; it exists.
        disk: The disk.

    Raises:
        LockedError: If another process holds it; the message names that process.

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

    _shared: Final[weakref.WeakValueDictionary[str, _LockFile]] = weakref.WeakValueDictionary()

    def __init__(self, directory: Path, disk: Disk = DISK) -> None:
        key = str(directory.resolve())
        self._file: _LockFile | None = self._shared.get(key)
        if self._file is None or not self._file.is_ours():
            self._file = self._shared[key] = _LockFile(directory / LOCK, disk)

    def release(self) -> None:
        """Release the directory, unless another object in this process still holds it."""
        self._file = None


@final
class _LockFile:
    """An open and locked file, which is removed and closed when its last user drops it."""

    def __init__(self, path: Path, disk: Disk) -> None:
        self._pid = os.getpid()
        file = _open_locked(path, disk)
        holder = {"pid": self._pid, "host": socket.gethostname(), "command": " ".join(sys.argv)[:1000]}
        try:
            disk.truncate(file, 0)
            disk.write(file, json.dumps(holder).encode())
        except OSError:  # on a full disk, the lock holds all the same
            _LOGGER.warning("%s could not be written: it does not name the process that holds it", path)
        _OPEN_FILES.add(file)
        weakref.finalize(self, _remove_and_close, file, path, self._pid, disk)

    def is_ours(self) -> bool:
        """Return whether this process took the lock; a forked child only inherited the object."""
        return self._pid == os.getpid()


_OPEN_FILES: Final[set[int]] = set()


def _close_after_fork() -> None:
    """Close inherited lock files: a worker that outlives its parent must not hold the parent's lock."""
    for file in _OPEN_FILES:
        with suppress(OSError):
            os.close(file)
    _OPEN_FILES.clear()


os.register_at_fork(after_in_child=_close_after_fork)


def _open_locked(path: Path, disk: Disk) -> int:
    """Return the file at `path`, open and locked."""
    while True:
        file = disk.open_to_lock(path)
        try:
            disk.lock(file)
        except BlockingIOError:
            holder = _describe_holder(path, disk)
            disk.close(file)
            raise LockedError(f"{path.parent} is in use by {holder}; wait for it to end, or stop it") from None
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
    try:
        holder = json.loads(read_file(path, disk, limit=_MAX_HOLDER_BYTES))
        return f"process {holder['pid']} on {holder['host']} ({holder['command']})"
    except (OSError, ValueError, KeyError, TypeError):  # the holder may not have written its name yet
        return "another process"


def _remove_and_close(file: int, path: Path, pid: int, disk: Disk) -> None:
    if os.getpid() != pid:
        return
    with suppress(FileNotFoundError):  # the run directory was moved
        disk.remove(path)
    _OPEN_FILES.discard(file)
    disk.close(file)
