"""Copies of live tensors that a callback remembers or requests, so that the next update does not change them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final

import torch

from noether.core.iteration import TrainingIteration
from noether.core.tensors.containers import map_tensors
from noether.core.tensors.dtensors import local_part
from noether.core.tensors.live.views import LiveView, ModuleView
from noether.core.tensors.module import named_buffers, named_parameters
from noether.core.tensors.torch_internals import has_other_users
from noether.core.tensors.tree import LEAVES, FrozenDict, storages

if TYPE_CHECKING:
    from torch import Tensor

_WITHOUT_TENSORS: Final = LEAVES - {torch.Tensor} | {TrainingIteration, frozenset}


def views_live_tensors(fields: Mapping[str, Any]) -> bool:
    """Return whether a state with these fields views a live module."""
    return ModuleView in (type(fields["params"]), type(fields["buffers"]))


def copy_aliases(fields: Mapping[str, Any], tree: Any) -> Any:
    """Return `tree` with copies of the tensors that share memory with a live model or its optimizer.

    It is the same object if there are none. A tensor that alone uses its storage, as most that a callback computes do,
    is no view, so live tensors are read only if `tree` has others.

    Args:
        fields: Fields of a state that views live tensors.
        tree: Nested containers and dataclasses, such as memory or effects.

    Example:
        >>> from noether import TrainState
        >>> model = torch.nn.Linear(2, 1)
        >>> state = TrainState.from_module(model)
        >>> remembered = state.remember("first", state.params).memory("first")
        >>> _ = model.weight.data.zero_()
        >>> bool(remembered["weight"].any()), bool(state.params["weight"].any())
        (True, False)
    """
    shared: list[Tensor] = []
    _find_shared(tree, shared)
    if not shared:
        return tree
    live = storages(_live_tensors(fields))
    if live.isdisjoint(storages(shared)):
        return tree
    return map_tensors(lambda tensor: tensor.clone() if storages(tensor) & live else tensor, tree)


def _find_shared(tree: Any, found: list[Tensor]) -> None:
    """Append the tensors whose storage has other users to `found`; it runs at every update."""
    kind = type(tree)
    if kind is torch.Tensor or isinstance(tree, torch.Tensor):
        if _shares_storage(tree):
            found.append(tree)
        return
    if kind is FrozenDict or kind is dict:
        values: Iterable[Any] = tree.values()
    elif kind is tuple or isinstance(tree, (list, tuple)):
        values = tree
    elif (fields := getattr(kind, "__dataclass_fields__", None)) is not None:
        values = [getattr(tree, name) for name in fields]
    elif isinstance(tree, Mapping):
        values = tree.values()
    else:
        return
    for value in values:
        if type(value) not in _WITHOUT_TENSORS:  # lists of numbers may be long
            _find_shared(value, found)


def _shares_storage(tensor: Tensor) -> bool:
    try:
        return has_other_users(local_part(tensor).untyped_storage())
    except NotImplementedError:  # a sparse tensor has no storage of its own
        return False


def _live_tensors(fields: Mapping[str, Any]) -> list[Any]:
    """Return the params, buffers and optimizer memory of the model that a state with these fields views."""
    model = next(value.model for value in fields.values() if type(value) is ModuleView)
    opt_state = fields["opt_state"]
    return [
        named_parameters(model),
        named_buffers(model),
        opt_state.read() if isinstance(opt_state, LiveView) else opt_state,
    ]
