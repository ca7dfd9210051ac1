"""Functions that check the weights of a loaded state against a model, and move them to its device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from noether.core.errors import suggest
from noether.core.tensors.module import device_of
from noether.core.tensors.step_counters import move_memory
from noether.core.tensors.tree import FrozenDict, move_to_device
from noether.effects import CheckpointError, CheckpointStore

if TYPE_CHECKING:
    from pathlib import Path

    from noether.core.state import TrainState
    from noether.training.step.optimizer import FunctionalOptimizer


def load_weights(state: TrainState, checkpoint: Path) -> TrainState:
    """Return `state` with the weights of a checkpoint, on the device of the state.

    Args:
        state: A state of the same model.
        checkpoint: Its path, such as `runs/NAME/RUN_ID/checkpoints/latest`.

    Raises:
        CheckpointError: If there is no such checkpoint, it is damaged, or it belongs to another model.
    """
    store = CheckpointStore(checkpoint.parent, run_id="")
    loaded = store.load(store.find(checkpoint.name))
    check_weights(state, loaded)
    device = device_of(state.params.values())
    params = {name: loaded.params[name].to(device) for name in state.params}
    return state.replace(params=params, buffers={name: loaded.buffers[name].to(device) for name in state.buffers})


def check_weights(ours: TrainState, theirs: TrainState) -> None:
    """Check that a loaded state belongs to this model.

    Args:
        ours: A state of this model.
        theirs: The loaded state.

    Raises:
        CheckpointError: If names, shapes or dtypes of params or buffers differ.
    """
    for what in ("params", "buffers"):
        expected, found = getattr(ours, what), getattr(theirs, what)
        for name in sorted(expected.keys() ^ found.keys()):
            where = "the checkpoint has no" if name in expected else "the model has no"
            like = suggest(name, {**expected, **found}.keys() - {name})
            raise CheckpointError(f"{where} {name!r} among its {what}{like}")
        for name, tensor in expected.items():
            if tensor.shape != found[name].shape:
                shapes = f"{tuple(found[name].shape)} in the checkpoint and {tuple(tensor.shape)} in the model"
                raise CheckpointError(f"{name!r} has shape {shapes}")
            if tensor.dtype != found[name].dtype:
                types = f"{found[name].dtype} in the checkpoint and {tensor.dtype} in the model"
                raise CheckpointError(f"{name!r} is {types}")


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
            expected = optimizer.add_first_memory({}, meta, memories)["state"]
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
    names = ("params", "buffers", "callback_states", "hyperparams", "pending")
    trees = {name: move_to_device(device, getattr(state, name)) for name in names}
    metrics = {
        key: metric._replace(value=move_to_device(device, metric.value)) for key, metric in state.metrics.items()
    }
    opt_state = state.opt_state
    if memories := opt_state.get("state", {}):
        moved = {n: move_memory(memory, device, on_device=counts_on_device) for n, memory in memories.items()}
        opt_state = FrozenDict({**opt_state, "state": moved})
    return state.replace(**trees, metrics=metrics, opt_state=opt_state)
