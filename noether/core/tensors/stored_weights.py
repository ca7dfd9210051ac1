"""Weights that a callback keeps beside those in training, such as an average of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from noether.core.errors import WeightsError, suggest
from noether.core.tensors.tree import FrozenDict

if TYPE_CHECKING:
    from collections.abc import Mapping

    from noether.core.state import TrainState

_PREFIX: Final = "weights/"


def memory_of(weights: str) -> str:
    """Return the name of the memory that holds `weights`; it is a tree of `params` and `buffers` by name.

    Example:
        >>> memory_of("ema=0.999")
        'weights/ema=0.999'
    """
    return f"{_PREFIX}{weights}"


def names_weights(key: str) -> bool:
    """Return whether a key in `produces` or `consumes` names stored weights rather than a metric."""
    return key.startswith(_PREFIX)


def find_weights(state: TrainState) -> tuple[str, ...]:
    """Return the names of the weights that callbacks keep in `state`."""
    return tuple(name.removeprefix(_PREFIX) for name in state.callback_states if name.startswith(_PREFIX))


def use_weights(state: TrainState, weights: str) -> TrainState:
    """Return the state with `weights` in place of those in training, as far as they go: they may be of a sub-module.

    Raises:
        WeightsError: If no callback keeps such weights, naming those that are kept.

    Example:
        >>> from noether import TrainState
        >>> import torch
        >>> state = TrainState(params={"body": torch.tensor(1.0), "head": torch.tensor(2.0)})
        >>> state = state.remember("weights/ema=0.9", {"params": {"head": torch.tensor(1.5)}, "buffers": {}})
        >>> use_weights(state, "ema=0.9").params
        FrozenDict({'body': tensor(1.), 'head': tensor(1.5000)})
    """
    name = memory_of(weights)
    if name not in state.callback_states:
        known = find_weights(state)
        raise WeightsError(
            f"no weights {weights!r} are kept; there are: {', '.join(known) or 'none'}{suggest(weights, known)}"
        )
    both = {what: _filled(getattr(state, what), kept) for what, kept in state.callback_states[name].items()}
    return state.replace(**both)


def _filled(tensors: Mapping[str, Any], kept: Mapping[str, Any]) -> FrozenDict:
    """Return `tensors` with those that are kept in their place, in the type that the model computes with."""
    return FrozenDict({**tensors, **{name: tensor.to(tensors[name].dtype) for name, tensor in kept.items()}})
