"""Modules of `torch.distributed.fsdp.fully_shard`: their own parameters as DTensors, and calls with other weights."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from noether.core.tensors.dtensors import copy_into

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor, nn


def is_fully_sharded(module: nn.Module) -> bool:
    """Return whether `fully_shard` was called on a module.

    Example:
        >>> import torch
        >>> is_fully_sharded(torch.nn.Linear(2, 1))
        False
    """
    kind = type(module)  # its class takes long to import
    return hasattr(kind, "reshard") and hasattr(kind, "unshard")


def reshard(model: nn.Module) -> None:
    """Reshard the modules of `fully_shard`: after a forward pass some hold whole parameters in place of DTensors."""
    for module in model.modules():
        if is_fully_sharded(module):
            sharded: Any = module
            sharded.reshard()


@contextmanager
def use_other_weights(
    model: nn.Module, own: Mapping[str, Tensor], weights: Mapping[str, Tensor] | None
) -> Iterator[None]:
    """Let a model with modules of `fully_shard` compute with other weights inside the block.

    `torch.func.functional_call` cannot exchange the parameters of such a module, because it gathers its own.

    Args:
        model: The model. Its forward pass is a collective: every rank has to call it equally often.
        own: Its parameters by name.
        weights: The other values by name; None to leave its own.
    """
    own_values = {name: own[name].detach().clone() for name in weights or {}}
    try:
        for name, value in (weights or {}).items():
            copy_into(own[name], value)
        yield
    finally:
        reshard(model)
        for name, value in own_values.items():
            copy_into(own[name], value)
