"""Applies gradients to a state, in place where its tensors were donated."""

from __future__ import annotations

from typing import TYPE_CHECKING

from noether.core.tensors.donation import DonatedTree
from noether.training.step.model_tensors import ModelTensors

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

    from noether.core.state import TrainState
    from noether.core.tensors.tree import FrozenDict
    from noether.training.step.accumulation import Grads
    from noether.training.step.optimizer import FunctionalOptimizer


def apply_gradients(
    state: TrainState,
    grads: Grads,
    settings: Mapping[str, Mapping[str, float]],
    buffers: Mapping[str, FrozenDict],
    *,
    model: nn.Module,
    optimizer: FunctionalOptimizer,
    donate: bool,
) -> TrainState:
    """Return the state with new params and optimizer memory, written in place where `donate` allows it.

    Args:
        state: The state before the update.
        grads: Gradients by parameter, None where the loss does not depend on one.
        settings: Settings of the optimizer by group.
        buffers: The fields of the state that hold the new buffers.
        model: The architecture, whose parameters become the tensors of the state if `donate` is set.
        optimizer: Computes new params from gradients.
        donate: Whether to write to the tensors of a donated state, and to donate those of the new one.
    """
    present = {name: grad for name, grad in grads.items() if grad is not None}
    model_tensors = ModelTensors.of(state, model, optimizer) if donate else None
    if model_tensors is not None:
        if model_tensors.update(state, optimizer, present, settings):
            return model_tensors.donate_to(state, buffers)
    elif donate and (model_tensors := _take_tensors(state, present, model, optimizer)) is not None:
        model_tensors.write(optimizer, present, settings)
        return model_tensors.donate_to(state, buffers)
    params, opt_state = optimizer.update(present, state.opt_state, state.params, settings=settings)
    if donate and optimizer.can_write(present, opt_state, params):
        model_tensors = ModelTensors(model, optimizer.trainable(params), params, opt_state)
        return model_tensors.donate_to(state, buffers)
    return state.replace(params=params, opt_state=opt_state, **buffers)


def _take_tensors(
    state: TrainState, grads: Mapping[str, Tensor], model: nn.Module, optimizer: FunctionalOptimizer
) -> ModelTensors | None:
    """Take the tensors from a state that no update made, or return None if the update cannot write to them."""
    params, opt_state = state.params, state.opt_state
    if not isinstance(params, DonatedTree) or not isinstance(opt_state, DonatedTree) or params.owner is not None:
        return None
    # The optimizer's class would copy the params to create its memory.
    if not optimizer.can_write(grads, optimizer.add_first_memory(opt_state, params, grads), params):
        return None
    taken = params.take()
    memory = optimizer.add_first_memory(opt_state.take(), taken, grads)
    return ModelTensors(model, optimizer.trainable(taken), taken, memory)
