"""Refuses several processes where only one can work."""

from __future__ import annotations

import os
from typing import Final

import torch.distributed as dist

from noether.session.errors import SessionError

_VARIABLE: Final = "WORLD_SIZE"
"""Set by torchrun, `accelerate launch` and deepspeed. Slurm and MPI set others, also for independent processes."""


class ProcessesError(SessionError):
    """This process is one of several, and they cannot train together."""


_INSTEAD: Final = "start it without torchrun, or unset WORLD_SIZE if this is the only process"


def refuse_several_processes(instead: str = _INSTEAD, *, count: int | None = None, launched: bool = True) -> None:
    """Refuse to train as one of several processes, which would all write the same run and decide by other losses.

    Args:
        instead: What to write instead.
        count: Number of processes, if a framework knows it; by default that of `torch.distributed`.
        launched: Whether a launcher such as torchrun counts, which has not set up `torch.distributed` yet.

    Raises:
        ProcessesError: If there are several, with how that was found.

    Example:
        >>> refuse_several_processes("use one", count=1)
        >>> refuse_several_processes("use devices=1", count=2)
        Traceback (most recent call last):
        noether.session.processes.ProcessesError: this is one of 2 processes, and ... in one process: use devices=1
    """
    found, reason = count, ""
    if found is None and dist.is_available() and dist.is_initialized():
        found, reason = dist.get_world_size(), " of torch.distributed"
    if (found is None or found <= 1) and launched and count is None:
        value = os.environ.get(_VARIABLE, "")
        found, reason = int(value) if value.strip().isdecimal() else 1, f" ({_VARIABLE}={value}, as torchrun sets it)"
    if found is not None and found > 1:
        raise ProcessesError(
            f"this is one of {found} processes{reason}, and noether does not gather losses over them: it trains and "
            f"evaluates in one process: {instead}"
        )
