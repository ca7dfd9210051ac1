"""The one codec for states: everything but weights and optimizer as JSON values beside tensors, and back.

The checkpoint store and the checkpoints of other frameworks both use it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from noether.core.iteration import TrainingIteration
from noether.core.state import Measured, TrainState
from noether.core.tensors.live.buffers import changed_buffers
from noether.core.tensors.memory import check_memory, check_savable
from noether.core.tensors.tree import FrozenDict
from noether.effects.checkpoints.converter import CONVERTER
from noether.effects.disk.encoding import decode_tree, encode_tree

if TYPE_CHECKING:
    import torch

_PARTS: Final = ("state", "tensors")
_START: Final = TrainingIteration()
_MAX_SEED: Final = 2**63 - 1


@dataclass(frozen=True, kw_only=True)
class _Values:
    """The JSON values of a state; the encoded trees name tensors that lie beside them."""

    iteration: TrainingIteration
    previous: TrainingIteration
    stop: str | None
    ended: bool
    seed: int
    hyperparams: Any
    metrics: Any
    callback_states: Any
    non_persistent: Any = None
    pending: Any = None
    stopped_by: str | None = None
    epoch_start: TrainingIteration = _START
    epoch_batches: int = 0
    lengths: dict[str, int] = field(default_factory=dict)


def encode_state(state: TrainState) -> dict[str, Any]:
    """Return all of `state` but params, buffers and opt_state as plain values.

    Of the buffers with `persistent=False`, it contains those that training changed.

    Returns:
        JSON values under `state` and tensors by dotted path under `tensors`. torch reads both back from a framework's
        checkpoint with `weights_only=True`.

    Raises:
        TypeError: If the state holds an object that `decode_state` would not return unchanged; the message has the name
            of the memory, the path in it, and what to write instead.

    Example:
        >>> encode_state(TrainState().advance(samples=4))["state"]["iteration"]
        'E0_U1_S4'
    """
    check_savable("hyperparams", state.hyperparams)
    for name, memory in state.callback_states.items():
        check_memory(name, memory)
    tensors: dict[str, torch.Tensor] = {}
    trees = {
        "hyperparams": state.hyperparams,
        "metrics": {key: (value, str(at)) for key, (value, at) in state.metrics.items()},
        "callback_states": state.callback_states,
    }
    values = {
        "iteration": str(state.iteration),
        "previous": str(state.previous),
        "stop": state.stop,
        "ended": state.ended,
        "seed": state.seed,
        **{name: encode_tree(tree, tensors, name) for name, tree in trees.items()},
    }
    # Left out by default, as earlier versions wrote no such entries.
    if state.stopped_by is not None:
        values["stopped_by"] = state.stopped_by
    if state.epoch_start != _START:
        values["epoch_start"] = str(state.epoch_start)
    if state.epoch_batches:
        values["epoch_batches"] = state.epoch_batches
    if state.lengths:
        values["lengths"] = dict(state.lengths)
    if changed := changed_buffers(state):
        values["non_persistent"] = encode_tree(changed, tensors, "non_persistent")
    if state.pending is not None:
        values["pending"] = encode_tree(state.pending, tensors, "pending")
    return {"state": values, "tensors": tensors}


def decode_state(saved: Mapping[str, Any]) -> TrainState:
    """Return the state from which `encode_state` made `saved`, without params, buffers and opt_state.

    Raises:
        ValueError: If `saved` does not have the parts that `encode_state` returns, or a value does not fit.
        Exception: Of other types, if a value was not written by `encode_state`.

    Example:
        >>> str(decode_state(encode_state(TrainState().advance(samples=4))).iteration)
        'E0_U1_S4'
    """
    if set(saved) != set(_PARTS):
        raise ValueError(f"not a saved state: expected a mapping with {' and '.join(_PARTS)}, got {saved!r:.200}")
    values = CONVERTER.structure(saved["state"], _Values)
    if abs(values.seed) > _MAX_SEED:
        raise ValueError(f"seed has to lie between -{_MAX_SEED} and {_MAX_SEED}")
    if values.epoch_start.epoch == values.iteration.epoch and not values.iteration.reached(values.epoch_start):
        raise ValueError(f"epoch_start {values.epoch_start} lies after iteration {values.iteration}")
    names = ("hyperparams", "metrics", "callback_states")
    trees = {name: decode_mapping(name, getattr(values, name), saved["tensors"]) for name in names}
    metrics = {key: Measured(value, TrainingIteration.parse(at)) for key, (value, at) in trees["metrics"].items()}
    optional = {
        name: decode_mapping(name, getattr(values, name), saved["tensors"])
        for name in ("non_persistent", "pending")
        if getattr(values, name) is not None
    }
    return TrainState(
        iteration=values.iteration,
        previous=values.previous,
        stop=values.stop,
        stopped_by=values.stopped_by,
        ended=values.ended,
        seed=values.seed,
        epoch_start=values.epoch_start,
        epoch_batches=values.epoch_batches,
        lengths=FrozenDict(values.lengths),
        **{**trees, "metrics": metrics, **optional},
    )


def decode_mapping(name: str, value: Any, tensors: Mapping[str, torch.Tensor]) -> Mapping[str, Any]:
    """Return the mapping from which `encode_tree` made `value`.

    Raises:
        TypeError: If `value` is another kind of tree; the message holds `name`.
        Exception: Of other types, if `encode_tree` did not make `value`.
    """
    tree = decode_tree(value, tensors)
    if not isinstance(tree, Mapping):
        raise TypeError(f"{name} has to be a mapping")
    return tree
