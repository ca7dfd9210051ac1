"""Weights that a callback stores beside those in training, such as an average."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from noether.core.errors import Problem, WeightsError, raise_problems, suggest
from noether.core.file_names import escape_name
from noether.core.tensors.live.buffers import changed_forms
from noether.core.tensors.live.weights import match_names
from noether.core.tensors.tied_names import list_modules, names_below
from noether.core.tensors.tree import FrozenDict

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from torch import Tensor

    from noether.core.state import TrainState

_PREFIX: Final = "weights/"


def memory_of(weights: str) -> str:
    """Return the name of the memory that stores `weights`: a tree of `params` and `buffers` by name.

    Example:
        >>> memory_of("ema=0.999")
        'weights/ema=0.999'
    """
    return f"{_PREFIX}{weights}"


def names_weights(key: str) -> bool:
    """Return whether a key in `produces` or `consumes` names stored weights rather than a metric."""
    return key.startswith(_PREFIX)


def find_weights(state: TrainState) -> tuple[str, ...]:
    """Return the names of the weights that callbacks store in `state`."""
    return tuple(name.removeprefix(_PREFIX) for name in state.callback_states if name.startswith(_PREFIX))


def name_in_tags(weights: str) -> str:
    """Return the name of stored weights as tags and pointers of checkpoints contain it.

    Example:
        >>> name_in_tags("slow/ema=0.999")
        'slow.ema=0.999'
    """
    return escape_name(weights)


def measured_weights(state: TrainState, metric_key: str) -> str | None:
    """Return the name of the stored weights with which a metric was measured; None for those in training.

    A callback that evaluates stored weights appends their name to its keys.

    Example:
        >>> from noether import TrainState
        >>> state = TrainState().remember("weights/ema=0.9", {"params": {}, "buffers": {}})
        >>> measured_weights(state, "val/accuracy/ema=0.9"), measured_weights(state, "val/accuracy")
        ('ema=0.9', None)
    """
    found = [name for name in find_weights(state) if f"/{metric_key}".endswith(f"/{name}")]
    return max(found, key=len, default=None)  # the longest: `slow/ema=0.9` ends in `ema=0.9`, too


def use_weights(state: TrainState, weights: str) -> TrainState:
    """Return the state with its params and buffers replaced by `weights`, which may cover a sub-module only.

    Raises:
        WeightsError: If no callback stores these weights, or they are not those of this model; the message lists those
            that are stored, or what differs.

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
            f"no weights {weights!r} are stored; stored: {', '.join(known) or 'none'}{suggest(weights, known)}"
        )
    stored, tied = state.callback_states[name], state.tied_names
    reshaped = {"params": frozenset[str](), "buffers": frozenset(changed_forms(state))}
    return state.replace(
        **{
            field: _overwrite(f"{weights}: {field}", getattr(state, field), new, tied, reshaped[field])
            for field, new in stored.items()
        }
    )


def weights_by_name(state: TrainState, models: Collection[str] = ()) -> dict[str, Tensor]:
    """Return params and buffers of a state under all names that the model has for them, in the order of the state.

    Args:
        state: The state.
        models: Paths of sub-modules; names outside of all of these are left out. Empty for the whole model.

    Example:
        >>> from noether import TrainState
        >>> import torch
        >>> params = {"emb.weight": torch.tensor(1.0), "head.bias": torch.tensor(2.0)}
        >>> weights_by_name(TrainState(params=params, tied_names={"head.weight": "emb.weight"}), ["head"])
        {'head.bias': tensor(2.), 'head.weight': tensor(1.)}
    """
    weights = {**state.params, **state.buffers}
    return {name: weights[own] for name, own in names_below(weights, models, state.tied_names).items()}


def check_model_names(state: TrainState, models: Collection[str]) -> None:
    """Refuse paths of sub-modules below which a model has no weights; a state without weights has no such paths.

    Args:
        state: A state of the model.
        models: Paths of sub-modules, or names of tensors, as in the setting `model_names`.

    Raises:
        SettingsError: If there are no weights below one of them; the message lists the modules that have some.

    Example:
        >>> from noether import TrainState
        >>> import torch
        >>> state = TrainState(params={"head.bias": torch.tensor(2.0)})
        >>> check_model_names(state, ["tail"])
        Traceback (most recent call last):
        noether.core.errors.SettingsError: model_names.0: no weights below 'tail'; the model has head
    """
    names = weights_by_name(state) if models else {}
    raise_problems(
        Problem(f"model_names.{index}", f"no weights below {path!r}; {list_modules(path, names)}")
        for index, path in enumerate(models)
        if names and not names_below(names, [path], {})
    )


def _overwrite(
    owner: str,
    tensors: Mapping[str, Any],
    new: Mapping[str, Any],
    tied: Mapping[str, str],
    reshaped: Collection[str],
) -> FrozenDict:
    """Return `tensors` with those in `new` replaced, in the dtype that they had; those in `reshaped` have any shape."""
    stored = {tied.get(name, name): tensor for name, tensor in match_names(new, [*tensors, *tied]).items()}
    for name, tensor in stored.items():
        if name in reshaped:
            continue
        if name not in tensors:
            raise WeightsError(f"{owner} have {name!r}, and the model does not")
        if tensor.shape != tensors[name].shape:
            shapes = f"{tuple(tensor.shape)}, and {tuple(tensors[name].shape)} in the model"
            raise WeightsError(f"{owner}: {name!r} has shape {shapes}")
    return FrozenDict({**tensors, **{name: tensor.to(tensors[name].dtype) for name, tensor in stored.items()}})
