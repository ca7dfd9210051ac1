"""What the processes that torchrun starts know of each other before they join."""

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
def start_failures() -> Failures:
    """Return where a process reports a failure before it has joined the others; nowhere if it is the only one."""
    try:
        store = launcher_store() if launched_world_size() > 1 else None
    except RuntimeError:  # torchrun has ended
        store = None
    if store is None:
        return Failures()
    from torch.distributed.distributed_c10d import PrefixStore

    store = PrefixStore(f"start/{restart_count()}", store)
    return Failures(store, rank=launched_rank(), world_size=launched_world_size())


def start_failure() -> RankFailure | None:
    """Return the failure of a process before it joined, if this process has met it."""
    return start_failures().first() if start_failures.cache_info().currsize else None


def await_start(number: int, timeout_s: float) -> None:
    """Return once all processes are here.

    A collective would wait for a process that has failed, and no signal ends it before.

    Args:
        number: How many times the processes have joined before.
        timeout_s: Seconds to wait.

    Raises:
        RankError: If a process has failed.
        LaunchError: If some are not here in time.
    """
    if absent := start_failures().await_ranks(f"join {number}", timeout_s):
        ranks = f"rank{'s' if len(absent) > 1 else ''} {', '.join(map(str, absent))} did not"
        raise LaunchError(f"rank {launched_rank()} waited {timeout_s:g} s for the others to join: {ranks}")
