"""What a launcher such as torchrun sets in the environment of this process, and where it reads an error."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

from noether.core.errors import NoetherError

if TYPE_CHECKING:
    from collections.abc import Mapping

_ERROR_FILE: Final = "TORCHELASTIC_ERROR_FILE"


class LaunchError(NoetherError, RuntimeError):
    """The processes of a run do not find each other."""


def launched_world_size(environment: Mapping[str, str] = os.environ) -> int:
    """Return the number of processes that a launcher such as torchrun started, as `WORLD_SIZE` says; else 1.

    Slurm and MPI set other variables, also for independent processes: alone these do not count.

    Example:
        >>> launched_world_size({"WORLD_SIZE": "4"}), launched_world_size({"SLURM_NTASKS": "4"})
        (4, 1)
    """
    value = environment.get("WORLD_SIZE", "").strip()
    return int(value) if value.isdecimal() and int(value) else 1


def launched_rank(environment: Mapping[str, str] = os.environ) -> int:
    """Return the rank of this process among those that a launcher started; 0 if it is the only one.

    Example:
        >>> launched_rank({"WORLD_SIZE": "4", "RANK": "3"}), launched_rank({"RANK": "3"})
        (3, 0)
    """
    value = environment.get("RANK", "").strip()
    return int(value) if value.isdecimal() and launched_world_size(environment) > 1 else 0


def check_launch(environment: Mapping[str, str] = os.environ) -> None:
    """Refuse an environment that says that there are several processes, but was not made by torchrun.

    Its agent starts all of them, keeps the store in which a rank leaves its error, and ends them together. A variable
    that another tool set, or a batch job of which only one process runs, would wait for processes that never come.

    Raises:
        LaunchError: With the variables that are missing.

    Example:
        >>> check_launch({"WORLD_SIZE": "2", "RANK": "0", "TORCHELASTIC_RUN_ID": "none"})
        Traceback (most recent call last):
        noether.distributed.launch.LaunchError: WORLD_SIZE is set to 2, but not MASTER_ADDR, MASTER_PORT: ...
    """
    names = ("RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID")
    missing = [name for name in names if not environment.get(name)]
    if missing:
        found = f"WORLD_SIZE is set to {launched_world_size(environment)}, but not {', '.join(missing)}"
        fix = "start the processes with torchrun, or unset WORLD_SIZE if this is the only process"
        raise LaunchError(f"{found}: {fix}")


def write_error_file(text: str, time_s: float) -> None:
    """Write an error where torchrun reads it for its summary, which calls the earliest error the root cause.

    Args:
        text: What the summary shows.
        time_s: When it happened, in seconds since the epoch; torchrun compares whole seconds.
    """
    path = os.environ.get(_ERROR_FILE)
    if path:
        facts = {"message": text, "extraInfo": {"py_callstack": text, "timestamp": str(int(time_s))}}
        with suppress(OSError):
            Path(path).write_text(json.dumps({"message": facts}), encoding="utf-8")
