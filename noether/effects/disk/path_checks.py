"""Checks that the open files and directories of a run are still at their paths."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, final

from noether.core.errors import NoetherError
from noether.core.text import escape_controls
from noether.effects.disk.calls import DISK
from noether.effects.disk.finalizers import finalize

if TYPE_CHECKING:
    from pathlib import Path

    from noether.effects.disk.calls import Disk


class RunMovedError(NoetherError):
    """The directory of a run, or a file in it, was moved, removed or replaced while the run wrote to it.

    It stops training even where errors of logs or checkpoints only warn: nothing that the run writes from now on would
    be found. Nothing is created at the old path.
    """


def require_in_place(file: int, path: Path, fix: str, disk: Disk = DISK) -> None:
    """Raise an error if an open file or directory is not the one at its path any more.

    Files are compared by device and inode number. This assumes that a file keeps its inode number while it is open, as
    it does on local file systems and on NFS, Lustre and GPFS. A file system that invents inode numbers, such as SMB
    mounted with `noserverino`, may report a file that was not moved.

    Args:
        file: The open file or directory.
        path: Where it was opened.
        fix: What to do; completes the message.
        disk: The disk.

    Raises:
        RunMovedError: If it was moved, removed or replaced. If the comparison fails, nothing is raised: the write that
            follows reports the reason.
    """
    try:
        if disk.is_at(file, path):
            return
        present = disk.kind(path)
    except OSError:
        return
    place = disk.path_of(file)
    if present == "link":
        found = "it is now a link that leads elsewhere"
    else:
        found = "it was removed, or moved to another file system" if place is None else f"it was moved to {place}"
        found += ", and something else is in its place" if present else ""
    message = f"{path} is no longer what this run opened: {found}. The run stops, and creates nothing at the old path."
    raise RunMovedError(escape_controls(f"{message} {fix}"))


@final
class HeldDirectory:
    """A directory that is open until `close`, so that `check` can compare it with the one at its path.

    Args:
        path: The directory; links are followed.
        disk: The disk.

    Raises:
        OSError: If it cannot be opened.

    Example:
        >>> import tempfile, pathlib
        >>> path = pathlib.Path(tempfile.mkdtemp())
        >>> held = HeldDirectory(path)
        >>> held.check()
        >>> path.rmdir()
        >>> held.check()
        Traceback (most recent call last):
        noether.effects.disk.path_checks.RunMovedError: ... is no longer what this run opened: it was removed, ...
    """

    def __init__(self, path: Path, disk: Disk = DISK) -> None:
        self._path, self._disk = path, disk
        self._file = disk.open_directory(path)
        try:
            self.identity = disk.identity(self._file)
        except BaseException:
            disk.close(self._file)
            raise
        self.close = finalize(self, _close, self._file, disk)

    def check(self) -> None:
        """Raise an error if another directory or none is at the path.

        Raises:
            RunMovedError: If the directory was moved, removed or replaced.
        """
        fix = "Move it back and resume the run, or resume the run at its new path."
        require_in_place(self._file, self._path, fix, self._disk)


def _close(file: int, disk: Disk) -> None:
    with suppress(OSError):  # nothing was written to it
        disk.close(file)
