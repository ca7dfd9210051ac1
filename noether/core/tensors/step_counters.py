"""Step counters of torch's optimizers, the one part of their memory that may stay on the CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

STEP_COUNTER: Final = "step"
"""Key of the counter in an optimizer's memory of a parameter."""


def counts_on_device(settings: Mapping[str, Any]) -> bool:
    """Return whether an optimizer with these settings keeps its counters beside the parameter, not on the CPU.

    Args:
        settings: Settings of a parameter group.

    Example:
        >>> counts_on_device({"lr": 0.1, "fused": True}), counts_on_device({"lr": 0.1})
        (True, False)
    """
    return bool(settings.get("fused") or settings.get("capturable"))


def move_memory(memory: Mapping[str, Any], device: torch.device, *, on_device: bool) -> dict[str, Any]:
    """Return an optimizer's memory of one parameter with its tensors where torch keeps them.

    Args:
        memory: The memory of a parameter; leaves that are no tensors stay.
        device: Device of the parameter.
        on_device: What `counts_on_device` returns; if it is False, the counter stays where it is.

    Example:
        >>> memory = {"step": torch.tensor(3.0), "exp_avg": torch.zeros(2)}
        >>> moved = move_memory(memory, torch.device("meta"), on_device=False)
        >>> moved["step"].device.type, moved["exp_avg"].device.type
        ('cpu', 'meta')
    """
    return {
        key: value.to(device) if isinstance(value, torch.Tensor) and (on_device or key != STEP_COUNTER) else value
        for key, value in memory.items()
    }
