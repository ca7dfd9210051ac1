"""Refuses several processes where only one can work."""

from __future__ import annotations

import os
from typing import Final

import torch.distributed as dist

from noether.session.errors import SessionError

_VARIABLE: Final = "WORLD_SIZE"
"""Set by torchrun, `accelerate launch` and deepspeed. Slurm and MPI set others, also for independent processes."""


class ProcessesError(SessionError):
    """This process is one of several, and they cannot work together."""


def refuse_several_processes(command: str) -> None:
    """Refuse a command that writes its results in one process.

    Args:
        command: The command, such as `noether export`.

    Raises:
        ProcessesError: If this is one of several processes of `torch.distributed`, or that a launcher such as torchrun
            started.

    Example:
        >>> refuse_several_processes("noether export")
    """
    found, reason = 1, ""
    if dist.is_available() and dist.is_initialized():
        found, reason = dist.get_world_size(), " of torch.distributed"
    if found <= 1:
        value = os.environ.get(_VARIABLE, "")
        found, reason = int(value) if value.strip().isdecimal() else 1, f" ({_VARIABLE}={value}, as torchrun sets it)"
    if found > 1:
        raise ProcessesError(
            f"this is one of {found} processes{reason}, and {command} works in one: start it without torchrun, or "
            f"unset {_VARIABLE} if this is the only process"
        )
