"""The access of a process to a run directory: open and locked, refused after `close`, a fork or a move."""

from __future__ import annotations

import os
import weakref
from contextlib import suppress
from typing import TYPE_CHECKING, Final, final

import torch.distributed as dist

from noether.core.errors import NoetherError
from noether.effects.disk.lock import RunLock
from noether.effects.disk.path_checks import HeldDirectory

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from noether.effects.disk.calls import Disk


class RunClosedError(NoetherError, RuntimeError):
    """A run was used after it was closed, or in a forked child of the process that opened it."""


def rank_of_process(environment: Mapping[str, str] = os.environ) -> int:
    """Return the rank of this process among those that train together, before or after they have a group.

    Example:
        >>> rank_of_process({"WORLD_SIZE": "4", "RANK": "3"}), rank_of_process({"RANK": "3"})
        (3, 0)
    """
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank()
    values = {name: environment.get(name, "").strip() for name in ("WORLD_SIZE", "RANK", "NODE_RANK", "LOCAL_RANK")}
    counts = {name: int(value) for name, value in values.items() if value.isdecimal()}
    if counts.get("WORLD_SIZE", 1) == 1:
        return 0
    # Lightning sets no RANK for the processes that it starts.
    return counts.get("RANK", counts.get("NODE_RANK", 0) + counts.get("LOCAL_RANK", 0))


@final
class RunAccess:
    """The run directory and its `checkpoints/`, held open, and the lock; all that writes to the run has this object.

    Args:
        path: The run directory; it exists.
        checkpoints: The directory of its checkpoints; the first save creates it.
        locks: Whether this process writes, and so locks the directory.
        disk: The disk.

    Raises:
        LockedError: If another process, or another open run of this process, writes there.
    """

    def __init__(self, path: Path, checkpoints: Path, disk: Disk, *, locks: bool) -> None:
        self.refusal: str | None = None
        """Why this process cannot write to the run any more; None while the run is open."""
        self.path = path
        self._checkpoints_path, self._disk = checkpoints, disk
        self._lock = RunLock(path, disk) if locks else None
        self._checkpoints: HeldDirectory | None = None
        self._hold_checkpoints()
        _INSTANCES.add(self)

    @property
    def writes(self) -> bool:
        """Whether this process writes to the directory."""
        return self._lock is not None

    def require_open(self) -> None:
        """Raise an error if the run is closed, or was opened by the parent of this forked process.

        Raises:
            RunClosedError: If it is.
        """
        if self.refusal is not None:
            raise RunClosedError(self.refusal)

    def check(self) -> None:
        """Raise an error if the directory, its lock or its checkpoints are not where they were.

        Raises:
            RunMovedError: If one was moved, removed or replaced.
        """
        if self._lock is None:
            return
        self._lock.check()
        if self._checkpoints is None:
            self._hold_checkpoints()
        else:
            self._checkpoints.check()

    def close(self) -> None:
        """Release the directory, and refuse to write from now on."""
        self.refusal = f"the run in {self.path} is closed: open it again with open_run({str(self.path)!r})"
        if self._lock is not None:
            self._lock.release()

    def _hold_checkpoints(self) -> None:
        with suppress(OSError):  # a save reports why the directory cannot be opened
            if self._lock is not None and self._disk.kind(self._checkpoints_path) is not None:
                self._checkpoints = HeldDirectory(self._checkpoints_path, self._disk)


_INSTANCES: Final[weakref.WeakSet[RunAccess]] = weakref.WeakSet()


def _refuse_after_fork() -> None:
    for access in _INSTANCES:
        access.refusal = (
            f"the run in {access.path} belongs to process {os.getppid()}, which forked this one: send results to that "
            "process, and let it log and save"
        )


os.register_at_fork(after_in_child=_refuse_after_fork)
