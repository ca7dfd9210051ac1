"""Loads a whole saved state into a live model and optimizer, or nothing of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from noether.core.tensors.live.extra_state import find_extra_state_problems, write_extra_state
from noether.core.tensors.live.optimizer import find_optimizer_problems, is_written, write_optimizer
from noether.core.tensors.live.views import ModuleView
from noether.core.tensors.live.weights import find_weight_problems, raise_mismatch, write_weights

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
    params, buffers, extra_state = saved.params, saved.buffers, saved.extra_state
    raise_mismatch(find_extra_state_problems(model, extra_state))
    write_weights(model, params, buffers)
    view = vars(saved)["extra_state"]
    if not isinstance(view, ModuleView) or view.model is not model:
        write_extra_state(model, extra_state)


def find_problems(model: nn.Module, optimizer: Optimizers | None, saved: TrainState) -> list[str]:
    """Return every part of a saved state that does not fit a live model and optimizer."""
    problems = find_weight_problems(model, saved.params, saved.buffers)
    problems += find_extra_state_problems(model, saved.extra_state)
    opt_state = vars(saved)["opt_state"]  # which may view this optimizer
    if optimizer is not None and is_written(opt_state, optimizer):
        problems += find_optimizer_problems(opt_state, model, optimizer)
    return problems
