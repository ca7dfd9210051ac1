"""Functions that check the weights of a loaded state against a model, and move them to its device."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import torch

from noether.core.tensors.live.buffers import (
    find_none_buffers,
    find_reshaped_buffers,
    move_non_persistent,
    register_forward_buffers,
)
from noether.core.tensors.live.weights import find_differences, join_problems, match_names
from noether.core.tensors.step_counters import move_memory
from noether.core.tensors.tree import FrozenDict, move_to_device
from noether.effects.checkpoints.listing import CheckpointError

if TYPE_CHECKING:
    from torch import nn

    from noether.core.state import TrainState
    from noether.training.step.optimizer import FunctionalOptimizer

_LOGGER: Final = logging.getLogger(__name__)


def fit_weights(ours: TrainState, theirs: TrainState, model: nn.Module) -> TrainState:
    """Return a loaded state with its weights under the names of this model.

    A buffer has the shape and dtype with which it was saved if the constructor of the model made what that of the saved
    one did. A non-persistent buffer that was not saved is as the constructor made it. A checkpoint of an earlier
    version has no extra state; the state then has that of the model, with a warning.

    Args:
        ours: A state of this model.
        theirs: The loaded state.
        model: The model, in which places of buffers that its forward registers are prepared.

    Raises:
        CheckpointError: If names, shapes or dtypes of params or buffers differ; the message lists them.
    """
    theirs, tied = move_non_persistent(theirs, ours.non_persistent), ours.tied_names
    reshaped, late = find_reshaped_buffers(model, theirs), find_none_buffers(ours.constructed or {})
    buffers = {name: buffer for name, buffer in theirs.buffers.items() if name not in reshaped}
    expected = {name: buffer for name, buffer in ours.buffers.items() if name not in reshaped}
    problems = [
        *find_differences("parameter", ours.params, theirs.params, tied=tied, source="checkpoint"),
        *find_differences("buffer", expected, buffers, optional=late, tied=tied, source="checkpoint"),
    ]
    fitted: dict[str, Mapping[str, Any]] = {
        "params": match_names(theirs.params, ours.params, tied),
        "buffers": match_names(theirs.buffers, [*ours.buffers, *reshaped], tied),
        "non_persistent": {**ours.non_persistent, **theirs.non_persistent},
        "tied_names": tied,
    }
    extra = match_names(theirs.extra_state, ours.extra_state)
    problems += [f"extra state of {path!r} is not in the model" for path in extra.keys() - ours.extra_state.keys()]
    if problems:
        raise CheckpointError(join_problems(problems))
    if missing := [path or "the model" for path in ours.extra_state if path not in extra]:
        _LOGGER.warning("the checkpoint has no extra state of %s, which starts as in a new model", ", ".join(missing))
    opt_state = _rename_memories(theirs.opt_state, ours)
    register_forward_buffers(model, theirs)
    extra_state = {**ours.extra_state, **extra}
    return theirs.replace(**fitted, constructed=ours.constructed, extra_state=extra_state, opt_state=opt_state)


def _rename_memories(opt_state: Mapping[str, Any], ours: TrainState) -> Mapping[str, Any]:
    memories = opt_state.get("state", {})
    if memories.keys() <= ours.params.keys():
        return opt_state
    return FrozenDict({**opt_state, "state": FrozenDict(match_names(memories, ours.params, ours.tied_names))})


def check_opt_state(optimizer: FunctionalOptimizer, state: TrainState) -> None:
    """Check that the optimizer's memory in a loaded state belongs to the optimizer of this run.

    The memory of a class that has a kernel is compared in full with what the class keeps; of another class, only the
    names of the parameters are known.

    Args:
        optimizer: The optimizer.
        state: The loaded state, whose params fit the model.

    Raises:
        CheckpointError: If a name, a type, a shape or a dtype differs.
    """
    memories = state.opt_state.get("state", {})
    expected: Mapping[str, Any] = {}
    try:
        optimizer.check_names(state.opt_state, state.params)
        if memories:
            meta = move_to_device(torch.device("meta"), state.params)
            expected = optimizer.add_first_memory({}, meta, memories).get("state", {})
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"opt_state: it does not belong to this optimizer: {error}") from error
    for name, memory in expected.items():
        saved = memories[name]
        if not isinstance(saved, Mapping):
            raise CheckpointError(f"opt_state: the memory of {name!r} is not what this optimizer keeps")
        for key, first in memory.items():
            found = saved.get(key, first)
            if isinstance(first, torch.Tensor) and _facts(found) != _facts(first):
                raise CheckpointError(f"opt_state: {key} of {name!r} is not what this optimizer keeps")


def _facts(value: Any) -> tuple[Any, ...] | None:
    return (value.shape, value.dtype) if isinstance(value, torch.Tensor) else None


def to_device(state: TrainState, device: torch.device, *, counts_on_device: bool = False) -> TrainState:
    """Return a loaded state with its tensors on `device`, where training keeps them.

    Args:
        state: A state on the CPU.
        device: Where the run computes.
        counts_on_device: Whether the optimizer counts its steps on the device.
    """
    if device.type == "cpu":
        return state
    names = ("params", "buffers", "non_persistent", "extra_state", "callback_states", "hyperparams", "pending")
    trees = {name: move_to_device(device, getattr(state, name)) for name in names}
    metrics = {
        key: metric._replace(value=move_to_device(device, metric.value)) for key, metric in state.metrics.items()
    }
    opt_state = state.opt_state
    if memories := opt_state.get("state", {}):
        moved = {n: move_memory(memory, device, on_device=counts_on_device) for n, memory in memories.items()}
        opt_state = FrozenDict({**opt_state, "state": moved})
    return state.replace(**trees, metrics=metrics, opt_state=opt_state)
