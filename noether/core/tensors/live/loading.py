"""Loads a whole saved state into a live model and optimizer, or nothing of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from noether.core.tensors.live.buffers import find_reshaped_buffers, move_non_persistent, register_forward_buffers
from noether.core.tensors.live.extra_state import find_extra_state_problems, write_extra_state
from noether.core.tensors.live.optimizer import find_optimizer_problems, is_written, write_optimizer
from noether.core.tensors.live.views import ModuleView
from noether.core.tensors.live.weights import find_weight_problems, raise_mismatch, write_weights
from noether.core.tensors.module import device_of, named_modules, non_persistent_of
from noether.core.tensors.torch_internals import buffers_in

if TYPE_CHECKING:
    from torch import nn

    from noether.core.state import TrainState
    from noether.core.tensors.live.optimizer import Optimizers


def load_into(model: nn.Module, optimizer: Optimizers | None, saved: TrainState) -> None:
    """Write a saved state into a live model and optimizer, after checking all of it.

    Raises:
        MismatchError: If a part of it does not fit; nothing is written then.
    """
    raise_mismatch(find_problems(model, optimizer, saved))
    write_model(model, saved)
    if optimizer is not None:
        lr_scale = float(saved.hyperparams.get("lr_scale", 1.0))
        write_optimizer(vars(saved)["opt_state"], model, optimizer, lr_scale=lr_scale)


def write_model(model: nn.Module, saved: TrainState) -> None:
    """Write params, buffers and extra state into a live model.

    Raises:
        MismatchError: If one of them does not fit; nothing is written then.
    """
    saved = move_non_persistent(saved, non_persistent_of(model))
    buffers, extra_state = {**saved.buffers, **saved.non_persistent}, saved.extra_state
    reshaped = find_reshaped_buffers(model, saved)
    problems = find_weight_problems(model, saved.params, buffers, reshaped)
    raise_mismatch([*problems, *find_extra_state_problems(model, extra_state)])
    register_forward_buffers(model, saved)
    write_weights(model, saved.params, buffers, reshaped)
    view = vars(saved)["extra_state"]
    if not isinstance(view, ModuleView) or view.model is not model:
        write_extra_state(model, extra_state)


@torch.no_grad()
def write_non_persistent(model: nn.Module, saved: TrainState) -> None:
    """Write the non-persistent buffers of a saved state into a live model whose weights a framework loaded."""
    register_forward_buffers(model, saved)
    device = device_of(model.parameters())
    for name, buffer in saved.non_persistent.items():
        path, _, key = name.rpartition(".")
        buffers_in(dict(named_modules(model))[path])[key] = buffer.to(device, copy=True)


def find_problems(model: nn.Module, optimizer: Optimizers | None, saved: TrainState) -> list[str]:
    """Return every part of a saved state that does not fit a live model and optimizer."""
    saved = move_non_persistent(saved, non_persistent_of(model))
    buffers = {**saved.buffers, **saved.non_persistent}
    problems = find_weight_problems(model, saved.params, buffers, find_reshaped_buffers(model, saved))
    problems += find_extra_state_problems(model, saved.extra_state)
    opt_state = vars(saved)["opt_state"]  # which may view this optimizer
    if optimizer is not None and is_written(opt_state, optimizer):
        problems += find_optimizer_problems(opt_state, model, optimizer)
    return problems
