"""One process at a time writes into the directory of a run."""

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
_HOLDER_BYTES: Final = 4096
_CANNOT_LOCK: Final = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


class LockedError(NoetherError):
    """Another process writes into the directory of a run."""


@final
class RunLock:
    """The exclusive lock of a directory, for as long as this object lives or until it is released.

    It is a lock of the operating system on the file `.lock`, which also says who holds it: a process that dies, however
    it dies, holds it no more. Several objects of one process share it.

    Args:
        directory: The directory; it exists.
        disk: The disk.

    Raises:
        LockedError: If another process holds it; the message names that one.

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

    _shared: Final[weakref.WeakValueDictionary[str, _Held]] = weakref.WeakValueDictionary()

    def __init__(self, directory: Path, disk: Disk = DISK) -> None:
        where = str(directory.resolve())
        self._held: _Held | None = self._shared.get(where)
        if self._held is None or not self._held.is_ours():
            self._held = self._shared[where] = _Held(directory / LOCK, disk)

    def release(self) -> None:
        """Let go of the directory, unless another object of this process still holds it."""
        self._held = None


@final
class _Held:
    """An open and locked file; the last one who lets go of it removes and closes it."""

    def __init__(self, path: Path, disk: Disk) -> None:
        self._pid = os.getpid()
        file = _locked(path, disk)
        try:
            disk.truncate(file, 0)
            disk.write(file, json.dumps(_myself()).encode())
        except OSError:  # a full disk: the lock holds, and is anonymous
            _LOGGER.warning("%s could not be written: it does not say who holds it", path)
        _DESCRIPTORS.add(file)
        self._let_go = weakref.finalize(self, _release, file, path, self._pid, disk)

    def is_ours(self) -> bool:
        """Return whether this process took the lock: one that was forked has none."""
        return self._pid == os.getpid()


_DESCRIPTORS: Final[set[int]] = set()


def _let_go_after_fork() -> None:
    """Close what a forked process inherited: a worker that outlives its parent must not hold the parent's lock."""
    for file in _DESCRIPTORS:
        with suppress(OSError):
            os.close(file)
    _DESCRIPTORS.clear()


os.register_at_fork(after_in_child=_let_go_after_fork)


def _locked(path: Path, disk: Disk) -> int:
    """Return the open file at `path`, locked."""
    while True:
        file = disk.open_to_lock(path)
        try:
            disk.lock(file)
        except BlockingIOError:
            holder = _holder(path, disk)
            disk.close(file)
            raise LockedError(f"{path.parent} is in use by {holder}; wait for it to end, or stop it") from None
        except OSError as error:
            if error.errno not in _CANNOT_LOCK:
                disk.close(file)
                raise
            _LOGGER.warning(
                "%s cannot be locked (%s): see that no other process writes there", path, os_error_text(error)
            )
            return file
        # Whoever held it before may have removed the file between the two calls: then the lock is of nothing.
        if disk.is_at(file, path):
            return file
        disk.close(file)


def _holder(path: Path, disk: Disk) -> str:
    try:
        holder = json.loads(read_file(path, disk, limit=_HOLDER_BYTES))
        return f"process {holder['pid']} on {holder['host']} ({holder['command']})"
    except (OSError, ValueError, KeyError, TypeError):  # it may be writing this very moment
        return "another process"


def _myself() -> dict[str, object]:
    return {"pid": os.getpid(), "host": socket.gethostname(), "command": " ".join(sys.argv)[:1000]}


def _release(file: int, path: Path, pid: int, disk: Disk) -> None:
    if os.getpid() != pid:
        return
    with suppress(FileNotFoundError):  # the run was moved away
        disk.remove(path)
    _DESCRIPTORS.discard(file)
    disk.close(file)
