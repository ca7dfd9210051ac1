"""All calls of the operating system on files that the effects layer makes."""

from __future__ import annotations

import errno
import fcntl
import operator
import os
import shutil
import stat
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, final

if TYPE_CHECKING:
    from collections.abc import Callable

    Kind = Literal["file", "directory", "link", "other"]
    Call = Callable[..., Any]

_NEW: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
_APPEND: Final = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
# Non-blocking, so that a pipe in the place of a file is refused and the open does not wait for a writer.
_READ: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_LOCK: Final = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
_MODE: Final = 0o666  # the default mode; the umask applies
_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_MAX_PATH_BYTES: Final = 1024  # the buffer that F_GETPATH needs
_GONE: Final = {errno.ENOENT, errno.ENOTDIR, errno.ESTALE}


@final
class Disk:
    """The operating system's calls on files, one method each; open files are file descriptors.

    Args:
        call: Makes each call, as `call(function, *arguments)`. A test can replace it to count the calls, fail one, or
            end the process between two of them, and so show what a crash leaves.
    """

    def __init__(self, call: Call = operator.call) -> None:
        self._call = call

    def create(self, path: Path) -> int:
        """Create a file and open it for writing.

        Raises:
            FileExistsError: If it exists.
        """
        return int(self._call(os.open, path, _NEW, _MODE))

    def open_to_append(self, path: Path) -> int:
        """Open a file for appending; create it if it does not exist."""
        return int(self._call(os.open, path, _APPEND, _MODE))

    def open_to_read(self, path: Path) -> int:
        """Open a regular file for reading.

        Raises:
            OSError: With `ELOOP` for a symbolic link, `EINVAL` for anything else that is not a regular file.
        """
        file = int(self._call(os.open, path, _READ))
        if not stat.S_ISREG(os.fstat(file).st_mode):
            self.close(file)
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        return file

    def open_to_lock(self, path: Path) -> int:
        """Open a file for `lock`; create it if it does not exist."""
        return int(self._call(os.open, path, _LOCK, _MODE))

    def open_directory(self, path: Path) -> int:
        """Open a directory; its inode number is not used again while it is open, even if it is removed."""
        return int(self._call(os.open, path, _DIRECTORY))

    def lock(self, file: int) -> None:
        """Take the exclusive lock of a file without waiting.

        Raises:
            BlockingIOError: If another open file holds it.
        """
        self._call(fcntl.flock, file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def lock_shared(self, file: int) -> None:
        """Take a shared lock of a file without waiting; it fails only while another open file has an exclusive lock.

        Raises:
            BlockingIOError: If another open file holds the exclusive lock.
        """
        self._call(fcntl.flock, file, fcntl.LOCK_SH | fcntl.LOCK_NB)

    def write(self, file: int, content: memoryview | bytes) -> int:
        """Write to a file and return how many bytes were written, which may be fewer than given."""
        return int(self._call(os.write, file, content))

    def read(self, file: int, size: int) -> bytes:
        """Return the next bytes of a file, at most `size`; empty at its end."""
        content: bytes = self._call(os.read, file, size)
        return content

    def truncate(self, file: int, size: int) -> None:
        """Truncate a file to `size` bytes."""
        self._call(os.ftruncate, file, size)

    def fsync(self, file: int) -> None:
        """Return once all writes to a file are on the disk."""
        self._call(fsync, file)

    def close(self, file: int) -> None:
        """Close a file."""
        self._call(os.close, file)

    def fsync_directory(self, path: Path) -> None:
        """Return once the entries of a directory are on the disk."""
        directory = self.open_directory(path)
        try:
            self.fsync(directory)
        finally:
            self.close(directory)

    def make_directory(self, path: Path) -> None:
        """Create a directory."""
        self._call(os.mkdir, path)

    def rename(self, path: Path, target: Path) -> None:
        """Rename in one step; a file or an empty directory at `target` is replaced, any other directory is not."""
        self._call(os.rename, path, target)

    def hard_link(self, path: Path, target: Path) -> None:
        """Give a file a second name; its content exists once.

        Raises:
            OSError: If the file system has no hard links, or `target` lies in another one.
        """
        self._call(os.link, path, target)

    def symbolic_link(self, text: str, path: Path) -> None:
        """Create a symbolic link at `path` that leads to `text`."""
        self._call(os.symlink, text, path)

    def link_text(self, path: Path) -> str:
        """Return where a symbolic link leads, as it was written."""
        return str(self._call(os.readlink, path))

    def copy_status(self, path: Path, target: Path) -> None:
        """Copy permissions and times of a file or directory."""
        self._call(shutil.copystat, path, target)

    def remove(self, path: Path) -> None:
        """Remove a file or a link."""
        self._call(os.unlink, path)

    def remove_directory(self, path: Path) -> None:
        """Remove an empty directory."""
        self._call(os.rmdir, path)

    def names(self, path: Path) -> list[str]:
        """Return the names in a directory, sorted."""
        return sorted(self._call(os.listdir, path))

    def kind(self, path: Path) -> Kind | None:
        """Return what kind of file is at `path`, without following links; None if there is no file."""
        try:
            mode = self._call(os.lstat, path).st_mode
        except (FileNotFoundError, NotADirectoryError):
            return None
        kinds: tuple[tuple[Callable[[int], bool], Kind], ...] = (
            (stat.S_ISREG, "file"),
            (stat.S_ISDIR, "directory"),
            (stat.S_ISLNK, "link"),
        )
        return next((kind for matches, kind in kinds if matches(mode)), "other")

    def identity(self, file: int) -> tuple[int, int]:
        """Return the device and the inode number of an open file."""
        found = self._call(os.fstat, file)
        return found.st_dev, found.st_ino

    def is_at(self, file: int, path: Path) -> bool:
        """Return whether an open file or directory is still the one at `path`, by device and inode number.

        Raises:
            OSError: If this cannot be determined, for example because a parent directory cannot be searched.
        """
        try:
            return os.path.samestat(self._call(os.fstat, file), self._call(os.stat, path))
        except OSError as error:
            if error.errno in _GONE:
                return False
            raise

    def path_of(self, file: int) -> Path | None:
        """Return where an open file or directory is now; None if it was removed or the system does not tell."""
        try:
            if sys.platform == "darwin":
                name = self._call(fcntl.fcntl, file, fcntl.F_GETPATH, bytes(_MAX_PATH_BYTES)).rstrip(b"\0").decode()
            else:
                name = self._call(os.readlink, f"/proc/self/fd/{file}")
            return Path(name) if self.is_at(file, Path(name)) else None
        except OSError:
            return None

    def size(self, file: int) -> int:
        """Return the size of an open file in bytes."""
        return int(self._call(os.fstat, file).st_size)


def fsync(file: int) -> None:
    """Return once all writes to a file are on the disk, and not only in the cache of the drive."""
    if sys.platform == "darwin":
        fcntl.fcntl(file, fcntl.F_FULLFSYNC)  # on macOS, fsync does not wait for the drive
    else:
        os.fsync(file)


DISK: Final = Disk()
"""The real disk."""
