"""The one way to the disk: whatever the effects layer asks of files is one of these calls."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import sys
from typing import TYPE_CHECKING, Any, Final, Literal, final

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Kind = Literal["file", "directory", "link", "other"]
    Call = Callable[..., Any]

_NEW: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
_APPEND: Final = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
# Not blocking, so that a pipe that somebody put in the place of a file is refused and not waited for.
_READ: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_LOCK: Final = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
_MODE: Final = 0o666  # as every program asks for it; the umask takes away
_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


def _plainly(function: Callable[..., Any], *arguments: object) -> Any:
    return function(*arguments)


@final
class Disk:
    """Calls of the operating system on files, one each; files are named by descriptors, as it does.

    Args:
        call: Makes each call, as `call(function, *arguments)`. What is given instead can count the calls, let them
            fail, or end the process between two of them: so the tests show what a crash leaves.
    """

    def __init__(self, call: Call = _plainly) -> None:
        self._call = call

    def create(self, path: Path) -> int:
        """Open a file that does not exist yet for writing."""
        return int(self._call(os.open, path, _NEW, _MODE))

    def open_to_append(self, path: Path) -> int:
        """Open a file, made if it does not exist, of which every write goes to the end."""
        return int(self._call(os.open, path, _APPEND, _MODE))

    def open_to_read(self, path: Path) -> int:
        """Open a regular file for reading.

        Raises:
            OSError: With `ELOOP` for a symbolic link, `EINVAL` for anything else that is no file.
        """
        file = int(self._call(os.open, path, _READ))
        if not stat.S_ISREG(os.fstat(file).st_mode):
            self.close(file)
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        return file

    def open_to_lock(self, path: Path) -> int:
        """Open a file, made if it does not exist, for `lock`."""
        return int(self._call(os.open, path, _LOCK, _MODE))

    def lock(self, file: int) -> None:
        """Take the exclusive lock of a file, at once or not at all.

        Raises:
            BlockingIOError: If another open file has it.
        """
        self._call(fcntl.flock, file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def write(self, file: int, content: memoryview | bytes) -> int:
        """Write to a file and return how many bytes it took, which may be fewer."""
        return int(self._call(os.write, file, content))

    def read(self, file: int, size: int) -> bytes:
        """Return the next bytes of a file, `size` at most; none at its end."""
        content: bytes = self._call(os.read, file, size)
        return content

    def truncate(self, file: int, size: int) -> None:
        """Cut a file to `size` bytes."""
        self._call(os.ftruncate, file, size)

    def flush(self, file: int) -> None:
        """Return once what was written to a file is on the disk."""
        self._call(fsync, file)

    def close(self, file: int) -> None:
        """Close a file."""
        self._call(os.close, file)

    def flush_directory(self, path: Path) -> None:
        """Return once the entries of a directory are on the disk."""
        directory = int(self._call(os.open, path, _DIRECTORY))
        try:
            self.flush(directory)
        finally:
            self.close(directory)

    def make_directory(self, path: Path) -> None:
        """Make a directory."""
        self._call(os.mkdir, path)

    def rename(self, path: Path, target: Path) -> None:
        """Rename in one step; a file at `target` is replaced, a directory that holds anything is not."""
        self._call(os.rename, path, target)

    def remove(self, path: Path) -> None:
        """Remove a file, or a link."""
        self._call(os.unlink, path)

    def remove_directory(self, path: Path) -> None:
        """Remove an empty directory."""
        self._call(os.rmdir, path)

    def names(self, path: Path) -> list[str]:
        """Return the names in a directory, sorted."""
        return sorted(self._call(os.listdir, path))

    def kind(self, path: Path) -> Kind | None:
        """Return what is at `path`, links not followed; None for nothing."""
        try:
            mode = self._call(os.lstat, path).st_mode
        except (FileNotFoundError, NotADirectoryError):
            return None
        kinds: tuple[tuple[Callable[[int], bool], Kind], ...] = (
            (stat.S_ISREG, "file"),
            (stat.S_ISDIR, "directory"),
            (stat.S_ISLNK, "link"),
        )
        return next((kind for judge, kind in kinds if judge(mode)), "other")

    def is_at(self, file: int, path: Path) -> bool:
        """Return whether an open file is the one at `path`."""
        try:
            return os.path.samestat(self._call(os.fstat, file), self._call(os.lstat, path))
        except FileNotFoundError:
            return False

    def size(self, file: int) -> int:
        """Return the size of an open file in bytes."""
        return int(self._call(os.fstat, file).st_size)


def fsync(file: int) -> None:
    """Return once what was written to a file is on the disk, and not only in the memory of the drive."""
    if sys.platform == "darwin":
        fcntl.fcntl(file, fcntl.F_FULLFSYNC)  # there fsync itself does not wait for the drive
    else:
        os.fsync(file)


DISK: Final = Disk()
"""The disk as it is."""
