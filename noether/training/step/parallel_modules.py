"""Refuses modules that reduce their gradients themselves, which a functional step cannot train."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from noether.core.errors import NoetherError

if TYPE_CHECKING:
    import torch


class ParallelModuleError(NoetherError, TypeError):
    """A module reduces gradients over ranks in a way in which it does not work."""


def refuse_parallel_modules(model: nn.Module) -> None:
    """Refuse a model that was prepared to reduce its gradients in `backward()`.

    Raises:
        ParallelModuleError: If it has a module in `DistributedDataParallel`, or one that FSDP shards.

    Example:
        >>> refuse_parallel_modules(nn.Linear(2, 1))
    """
    # It is loaded wherever a module was sharded.
    fsdp = sys.modules.get("torch.distributed.fsdp")
    sharded = () if fsdp is None else (fsdp.FullyShardedDataParallel, fsdp.FSDPModule)
    for path, module in model.named_modules():
        if isinstance(module, (DistributedDataParallel, *sharded)):
            kind = "fully_shard" if sharded and isinstance(module, sharded) else "DistributedDataParallel"
            raise ParallelModuleError(
                f"{path or 'the model'} ({type(module).__name__}) was prepared by {kind}, whose gradients are reduced "
                "in backward(), and the step computes them by torch.autograd.grad, where they are not reduced: pass "
                "the plain module, whose gradients noether reduces over all ranks, or train the prepared one with "
                "noether.training.step.prepared.PreparedStep"
            )


def refuse_cpu_sync_norms(model: nn.Module, device: torch.device) -> None:
    """Refuse modules that synchronize batch statistics in forward on a device on which they cannot.

    Raises:
        ParallelModuleError: If the model has a `SyncBatchNorm` and is on the CPU.
    """
    for path, module in model.named_modules():
        if isinstance(module, nn.SyncBatchNorm) and device.type == "cpu":
            raise ParallelModuleError(
                f"{path or 'the model'} is a SyncBatchNorm, which torch has for accelerators only, and the model is on "
                "the CPU: use BatchNorm, whose running statistics are averaged over ranks after each update"
            )
