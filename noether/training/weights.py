"""Loaded states: whether they are of this model, and onto its device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from noether.core.errors import suggest
from noether.core.tensors.tree import FrozenDict, move_to_device
from noether.effects import CheckpointError, CheckpointStore

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from noether.core.state import TrainState


def with_weights(state: TrainState, checkpoint: Path) -> TrainState:
    """Return `state` with the weights in a checkpoint, in its own order and on its own device.

    Args:
        state: Of the model that is to have them.
        checkpoint: Like `runs/NAME/RUN_ID/checkpoints/latest`.

    Raises:
        CheckpointError: If there is no such checkpoint, it is damaged, or of another model.
    """
    store = CheckpointStore(checkpoint.parent, run_id="")
    loaded = store.load(store.find(checkpoint.name))
    check_weights(state, loaded)
    device = device_of(state)
    params = {name: loaded.params[name].to(device) for name in state.params}
    return state.replace(params=params, buffers={name: loaded.buffers[name].to(device) for name in state.buffers})


def check_weights(ours: TrainState, theirs: TrainState) -> None:
    """Refuse a state of another model.

    Raises:
        CheckpointError: If names or shapes of params or buffers differ.
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


def device_of(state: TrainState) -> torch.device:
    """Return the device of the params."""
    return next(iter(state.params.values())).device


def to_device(state: TrainState, device: torch.device, *, fused: bool = False) -> TrainState:
    """Return a loaded state with its tensors on `device`, as training left them there.

    Args:
        state: Loaded, so on the CPU.
        device: Where the run computes.
        fused: Whether the optimizer is fused or capturable, and so counts its steps on the device.
    """
    if device.type == "cpu":
        return state

    names = ("params", "buffers", "callback_states", "hyperparams")
    trees = {name: move_to_device(device, getattr(state, name)) for name in names}
    metrics = {
        key: metric._replace(value=move_to_device(device, metric.value)) for key, metric in state.metrics.items()
    }
    return state.replace(**trees, metrics=metrics, opt_state=_opt_state_on(device, state.opt_state, fused=fused))


def _opt_state_on(device: torch.device, opt_state: Mapping[str, Any], *, fused: bool) -> FrozenDict:
    """Return an optimizer's memory on `device`, but for the counters of steps that torch's classes keep on the CPU."""

    def placed(key: str, value: Any) -> Any:
        return value.to(device) if isinstance(value, torch.Tensor) and (fused or key != "step") else value

    memories = opt_state.get("state", {})
    moved = {name: {key: placed(key, value) for key, value in memory.items()} for name, memory in memories.items()}
    return FrozenDict({**opt_state, "state": moved} if memories else opt_state)
