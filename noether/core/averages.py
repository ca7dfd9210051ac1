"""Weights that a callback keeps beside those in training, such as an average of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from noether.core.errors import WeightsError, nearest

if TYPE_CHECKING:
    from noether.core.state import TrainState

_PREFIX: Final = "weights/"


def memory_of(weights: str) -> str:
    """Return the name of the memory that holds `weights`; it is a tree of `params` and `buffers` by name.

    Example:
        >>> memory_of("ema=0.999")
        'weights/ema=0.999'
    """
    return f"{_PREFIX}{weights}"


def weights_in(state: TrainState) -> tuple[str, ...]:
    """Return the names of the weights that callbacks keep in `state`."""
    return tuple(name.removeprefix(_PREFIX) for name in state.callback_states if name.startswith(_PREFIX))


def averaged(state: TrainState, weights: str) -> TrainState:
    """Return the state with `weights` in place of those in training, as far as they go: they may be of a sub-module.

    Raises:
        WeightsError: If no callback keeps such weights, naming those that are kept.

    Example:
        >>> from noether import TrainState
        >>> kept = {"params": {"head": 1.5}, "buffers": {}}
        >>> state = TrainState(params={"body": 1.0, "head": 2.0}).remember("weights/ema=0.9", kept)
        >>> averaged(state, "ema=0.9").params
        FrozenDict({'body': 1.0, 'head': 1.5})
    """
    name = memory_of(weights)
    if name not in state.callback_states:
        known = weights_in(state)
        raise WeightsError(
            f"no weights {weights!r} are kept; there are: {', '.join(known) or 'none'}{nearest(weights, known)}"
        )
    kept = state.callback_states[name]
    both = {what: {**getattr(state, what), **kept[what]} for what in ("params", "buffers")}
    return state.replace(**both)
