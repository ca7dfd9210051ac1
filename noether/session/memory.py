"""What a run remembers beside model and optimizer, as plain values that a framework's own checkpoint can hold."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from noether.core.iteration import TrainingIteration
from noether.core.state import Measured, TrainState
from noether.effects.disk.encoding import decode, encode

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

_PARTS: Final = ("state", "tensors")


def encode_state(state: TrainState) -> dict[str, Any]:
    """Return all of `state` but params, buffers and opt_state, which the framework saves itself.

    Returns:
        Dicts, lists, text, numbers and tensors only, which torch reads back with `weights_only=True`.

    Example:
        >>> encode_state(TrainState().advance(samples=4))["state"]["iteration"]
        'E0_U1_S4'
    """
    tree = {
        "iteration": str(state.iteration),
        "previous": str(state.previous),
        "hyperparams": state.hyperparams,
        "metrics": {key: (value, str(at)) for key, (value, at) in state.metrics.items()},
        "callback_states": state.callback_states,
        "stop": state.stop,
        "ended": state.ended,
        "seed": state.seed,
    }
    tensors: dict[str, torch.Tensor] = {}
    return {"state": encode(tree, tensors), "tensors": tensors}


def decode_state(saved: Mapping[str, Any]) -> TrainState:
    """Return the state that `encode_state` made `saved` of, without params, buffers and opt_state.

    Raises:
        ValueError: If `saved` is nothing that `encode_state` returns.

    Example:
        >>> str(decode_state(encode_state(TrainState().advance(samples=4))).iteration)
        'E0_U1_S4'
    """
    if set(saved) != set(_PARTS):
        raise ValueError(f"this is not what a run remembered: expected {_PARTS}, got {saved!r:.200}")
    tree = dict(decode(saved["state"], saved["tensors"]))
    metrics = {key: Measured(value, TrainingIteration.parse(at)) for key, (value, at) in tree["metrics"].items()}
    iterations = {name: TrainingIteration.parse(tree[name]) for name in ("iteration", "previous")}
    return TrainState(**{**tree, **iterations, "metrics": metrics})
