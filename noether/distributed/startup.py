"""The startup of several processes: each waits for the others, and learns if one has failed."""

from __future__ import annotations

import os
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Final

from noether.distributed.failures import Failures, RankFailure
from noether.distributed.launch import LaunchError, launched_rank, launched_world_size

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

_TIMEOUT: Final = timedelta(seconds=30)
_RESTARTS: Final = "TORCHELASTIC_RESTART_COUNT"


def restart_count() -> int:
    """Return how often torchrun has restarted the processes."""
    return int(os.environ.get(_RESTARTS, "0"))


def launcher_store() -> Store | None:
    """Return the store of the torchrun that started this process; None if there is none."""
    names = ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT")
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or not all(map(os.environ.get, names)):
        return None
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # exported without being listed
    from torch.distributed.distributed_c10d import PrefixStore

    run_id, host, port = (os.environ[name] for name in names)
    store = TCPStore(host, int(port), is_master=False, wait_for_workers=False, timeout=_TIMEOUT)
    return PrefixStore(f"noether/runs/{run_id}", store)


@cache
def startup_failures() -> Failures:
    """Return the failures of processes that have not joined yet; those of one process if there is no other."""
    try:
        store = launcher_store() if launched_world_size() > 1 else None
    except RuntimeError:  # torchrun has ended
        store = None
    if store is None:
        return Failures()
    from torch.distributed.distributed_c10d import PrefixStore

    store = PrefixStore(f"start/{restart_count()}", store)
    return Failures(store, rank=launched_rank(), world_size=launched_world_size())


def find_startup_failure() -> RankFailure | None:
    """Return the first failure of a process that had not joined yet; None if this process waits for no others."""
    return startup_failures().first() if startup_failures.cache_info().currsize else None


def wait_for_startup(number: int, timeout_s: float) -> None:
    """Wait until all processes have started, or raise the error of one that has failed.

    A collective would wait for a failed process until its timeout, and no signal would end it.

    Args:
        number: How many times the processes have joined before.
        timeout_s: Seconds to wait.

    Raises:
        RankError: If a process has failed.
        LaunchError: If some have not started in time.
    """
    if absent := startup_failures().await_ranks(f"join {number}", timeout_s):
        ranks = f"rank{'s' if len(absent) > 1 else ''} {', '.join(map(str, absent))} did not"
        raise LaunchError(f"rank {launched_rank()} waited {timeout_s:g} s for the others to join: {ranks}")
