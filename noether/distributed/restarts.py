"""How a process that torchrun restarts finds the run that it had begun."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from datetime import timedelta
from typing import TYPE_CHECKING, Final, final

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

_STARTS: Final[Counter[str]] = Counter()
_TIMEOUT: Final = timedelta(seconds=30)


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
        store = _launcher_store()
        return store.get(self._key).decode() if store is not None and store.check([self._key]) else None

    def note(self, directory: str) -> None:
        """Store the directory of the run, which a restarted process resumes."""
        if (store := _launcher_store()) is not None:
            store.set(self._key, directory)


def _launcher_store() -> Store | None:
    """Return the store of the torchrun that started this process; None if there is none."""
    names = ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT")
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or not all(map(os.environ.get, names)):
        return None
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # exported without being listed
    from torch.distributed.distributed_c10d import PrefixStore

    run_id, host, port = (os.environ[name] for name in names)
    store = TCPStore(host, int(port), is_master=False, wait_for_workers=False, timeout=_TIMEOUT)
    return PrefixStore(f"noether/runs/{run_id}", store)
