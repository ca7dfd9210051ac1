"""Step counters of torch's optimizers, the one part of their memory that may stay on the CPU."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any, Final

import torch

from noether.core.tensors.torch_internals import foreach_add_

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

_C_TYPES: Final = {torch.float32: ctypes.c_float, torch.float64: ctypes.c_double}

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


def make_increment(counters: Sequence[torch.Tensor]) -> Callable[[], None]:
    """Return a function that adds 1 to each counter in place, to the bits of torch.

    It writes to the memory of counters on the CPU itself: an operation of torch on a tensor without dimensions takes
    more than a microsecond, and there is a counter for each parameter.

    Args:
        counters: Usually 0-dimensional; the function holds them.

    Example:
        >>> counter = torch.tensor(2.0)
        >>> make_increment([counter])()
        >>> counter
        tensor(3.)
    """
    plain = [each for each in counters if type(each) is torch.Tensor and each.is_cpu and not each.ndim]
    if len(plain) < len(counters) or not _C_TYPES.keys() >= {each.dtype for each in counters}:
        return lambda: foreach_add_(counters, 1)
    # A view by numpy would be one more user of the storage, and updates copy what has other users.
    types = [_C_TYPES[each.dtype] for each in counters]
    addresses: list[int] = []
    numbers: list[Any] = []

    def increment() -> None:
        nonlocal addresses, numbers
        current = list(map(torch.Tensor.data_ptr, counters))
        if current != addresses:  # sharing a tensor with another process moves it
            addresses, numbers = current, [kind.from_address(each) for kind, each in zip(types, current, strict=True)]
        for number in numbers:
            number.value += 1

    return increment
