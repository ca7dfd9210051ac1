"""Tensors that a model has under several names, of which a state has the first only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from torch import nn

from noether.core.errors import suggest
from noether.core.tensors.module import all_paths
from noether.core.tensors.torch_internals import buffers_in, non_persistent_in, parameters_in
from noether.core.tensors.tree import FrozenDict

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

EXTRA_STATE: Final = "_extra_state"
"""The last part of the name of extra state, beside params and buffers; torch has the same name for it."""


def extra_state_name(path: str) -> str:
    """Return the name that a state dict has for the extra state of the module at a path.

    Example:
        >>> extra_state_name("body.norm"), extra_state_name("")
        ('body.norm._extra_state', '_extra_state')
    """
    return f"{path}.{EXTRA_STATE}" if path else EXTRA_STATE


def find_tied_names(model: nn.Module) -> FrozenDict:
    """Return the name in a state of each tensor that a model has under another name, too, by the other name.

    Such are tied parameters, shared buffers, and the params, buffers and extra state of shared modules.

    Example:
        >>> import torch
        >>> model = torch.nn.ModuleDict({"emb": torch.nn.Embedding(3, 2), "head": torch.nn.Linear(2, 3)})
        >>> model["head"].weight = model["emb"].weight
        >>> find_tied_names(model)
        FrozenDict({'head.weight': 'emb.weight'})
    """
    first: dict[int, tuple[str, Any]] = {}  # with the member itself, so that no other one gets its id
    tied: dict[str, str] = {}
    for path, module in all_paths(model):
        members: list[tuple[str, Any]] = [*parameters_in(module).items(), *buffers_in(module).items()]
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            members.append((EXTRA_STATE, module))
        for key, member in members:
            name = f"{path}.{key}" if path else key
            if member is None:
                continue
            own, _ = first.setdefault(id(member), (name, member))
            if own != name and key not in non_persistent_in(module):
                tied[name] = own
    return FrozenDict(tied)


def add_tied(values: Mapping[str, Any], tied: Mapping[str, str]) -> dict[str, Any]:
    """Return values under all names that they have.

    Args:
        values: Values by their name in a state.
        tied: The name in the state, by each other name.

    Example:
        >>> add_tied({"emb.weight": 1, "head.bias": 2}, {"head.weight": "emb.weight"})
        {'emb.weight': 1, 'head.bias': 2, 'head.weight': 1}
    """
    return {**values, **{other: values[name] for other, name in tied.items() if name in values}}


def names_below(names: Collection[str], paths: Collection[str], tied: Mapping[str, str]) -> dict[str, str]:
    """Return all names at or below one of `paths`, each with its name in the state; all names if there is no path.

    Args:
        names: Names in a state.
        paths: Paths of sub-modules.
        tied: As for `add_tied`.

    Example:
        >>> names_below(["emb.weight", "head.bias"], ["head"], {"head.weight": "emb.weight"})
        {'head.bias': 'head.bias', 'head.weight': 'emb.weight'}
    """
    starts = tuple(f"{path}." for path in paths) or ("",)
    below = {name: name for name in names if f"{name}.".startswith(starts)}
    below.update({other: name for other, name in tied.items() if name in names and f"{other}.".startswith(starts)})
    return below


def list_modules(path: str, names: Collection[str]) -> str:
    """Return a text with all modules that have one of `names`, and the nearest one to an unknown path.

    Example:
        >>> list_modules("heads", ["body.0.weight", "head.bias"])
        "the model has body, body.0, head; did you mean 'head'?"
    """
    modules = dict.fromkeys(
        ".".join(name.split(".")[:depth]) for name in names for depth in range(1, name.count(".") + 1)
    )
    return f"the model has {', '.join(modules) or 'none'}{suggest(path, modules)}"
