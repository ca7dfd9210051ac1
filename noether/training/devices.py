"""The device on which this process trains."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from noether.config.schema import Config


def choose_device(
    config: Config, *, are_several: bool = False, environment: Mapping[str, str] = os.environ
) -> torch.device:
    """Return the device that `trainer.device` means in this process.

    Of several processes on one machine each has a GPU of its own: that with the number `LOCAL_RANK`, which torchrun
    sets. Without that variable it is the current device of torch.

    Args:
        config: The configuration.
        are_several: Whether several processes train the run.
        environment: Environment variables.

    Raises:
        ConfigError: If the device cannot be used here, or is one GPU for several processes.
    """
    name = config.trainer.device
    if are_several and ":" in name:
        message = f"{name!r} is one device, and each process needs its own; write {name.partition(':')[0]!r}"
        raise config.error(("trainer", "device"), message)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    local_rank = environment.get("LOCAL_RANK", "")
    if are_several and name == "cuda" and local_rank:
        name = f"cuda:{local_rank}"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        message = f"{name!r} cannot be used here: {reason}; write 'auto' to take a GPU if there is one"
        raise config.error(("trainer", "device"), message) from error
    return torch.device(name)
