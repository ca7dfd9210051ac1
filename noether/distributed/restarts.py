"""How a process that torchrun restarts finds the run that it had begun."""

from __future__ import annotations

import hashlib
from collections import Counter
from typing import Final, final

from noether.distributed.starting import launcher_store

_STARTS: Final[Counter[str]] = Counter()


@final
class Restart:
    """The directory of a run, which a restarted process finds under the command that made it.

    It is in the store of torchrun, which lives as long as torchrun and which no other job has, so a process never
    finds the run of another. Without torchrun it stores and finds nothing. Only rank 0 uses it.

    Args:
        command: What started the run. A process that does so twice makes two runs.
    """

    def __init__(self, command: str) -> None:
        name = hashlib.sha256(command.encode()).hexdigest()
        self._key = f"{name}/{_STARTS[name]}"
        _STARTS[name] += 1

    def find(self) -> str | None:
        """Return the directory that this process stored before a restart; None if there is none."""
        store = launcher_store()
        return store.get(self._key).decode() if store is not None and store.check([self._key]) else None

    def note(self, directory: str) -> None:
        """Store the directory of the run, which a restarted process resumes."""
        if (store := launcher_store()) is not None:
            store.set(self._key, directory)
