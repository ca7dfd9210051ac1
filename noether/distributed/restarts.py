"""How a process that torchrun restarts finds the run that it had begun, and the time that it has taken."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from typing import TYPE_CHECKING, Final, final

from noether.distributed.startup import launcher_store

if TYPE_CHECKING:
    from collections.abc import Callable

_STARTS: Final[Counter[str]] = Counter()


@final
class Restart:
    """What a restarted process finds under the command that started a run: its directory, and when it began.

    It is in the store of torchrun, which lives as long as torchrun and which no other job has, so a process never
    finds the run of another. Without torchrun it stores and finds nothing. Only rank 0 uses it.

    Args:
        command: What started the run. A process that does so twice makes two runs.
        wall_s: Returns seconds since 1970.
    """

    def __init__(self, command: str, *, wall_s: Callable[[], float] = time.time) -> None:
        name = hashlib.sha256(command.encode()).hexdigest()
        self._key = f"{name}/{_STARTS[name]}"
        _STARTS[name] += 1
        self._wall_s = wall_s

    def find(self) -> str | None:
        """Return the directory that this process stored before a restart; None if there is none."""
        store = launcher_store()
        return store.get(self._key).decode() if store is not None and store.check([self._key]) else None

    def note(self, directory: str) -> None:
        """Store the directory of the run, which a restarted process resumes."""
        if (store := launcher_store()) is not None:
            store.set(self._key, directory)

    def elapsed_s(self) -> float:
        """Return the seconds since the command first called this, restarts included; 0 without torchrun."""
        store, now_s = launcher_store(), self._wall_s()
        if store is None:
            return 0.0
        return max(0.0, now_s - float(store.compare_set(f"{self._key}/began", "", str(now_s))))
