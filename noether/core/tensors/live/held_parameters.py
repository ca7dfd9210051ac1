"""Checks that optimizers hold the parameters of their model: refuses others, and warns of parameters in none."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from noether.core.errors import StateWarning
from noether.core.tensors.live.groups import MEMBERS, join_names
from noether.core.tensors.live.optimizer import OPT_STATE_PARTS, by_name
from noether.core.tensors.live.weights import MismatchError
from noether.core.tensors.module import named_parameters

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from noether.core.tensors.live.optimizer import Optimizers

_CHECKED_OPTIMIZERS: WeakSet[Any] = WeakSet()
"""Optimizers that were checked at the start of a run: each is checked, and warned about, once."""


def refuse_foreign_parameters(model: nn.Module, optimizer: Optimizers, error: type[Exception] = MismatchError) -> None:
    """Refuse optimizers with parameters that the model does not have, at the start of their run.

    Args:
        model: The model.
        optimizer: Its optimizer, or several by name.
        error: The exception to raise.

    Raises:
        MismatchError: If one has such a parameter, or if a name or an optimizer cannot be used; or `error` instead.
    """
    optimizers = by_name(optimizer)
    if problem := _find_name_problem(optimizer):
        raise error(problem)
    if all(each in _CHECKED_OPTIMIZERS for each in optimizers.values()):
        return
    if foreign := _find_foreign(optimizers, set(named_parameters(model).values())):
        raise error(
            f"{len(foreign)} parameters of the optimizer are not parameters of the model ({join_names(foreign)}): pass "
            "model= the module that holds them all, and make the optimizer once that module is complete"
        )


def warn_of_unassigned_parameters(model: nn.Module, optimizer: Optimizers) -> None:
    """Warn of parameters that require a gradient and that no optimizer holds, or more than one; once per optimizer.

    Args:
        model: The model.
        optimizer: Its optimizer, or several by name.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1)
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     warn_of_unassigned_parameters(model, torch.optim.SGD([model.weight], lr=0.1))
        >>> print(caught[0].message)
        no optimizer holds 1 of the parameters that require a gradient (bias), so they stay as they are: ...
    """
    optimizers = by_name(optimizer)
    if all(each in _CHECKED_OPTIMIZERS for each in optimizers.values()):
        return
    _CHECKED_OPTIMIZERS.update(optimizers.values())
    names = {parameter: name for name, parameter in named_parameters(model).items()}
    holders: dict[Any, set[str]] = {}
    for name, each in optimizers.items():
        for parameter in (parameter for group in each.param_groups for parameter in group[MEMBERS]):
            holders.setdefault(parameter, set()).add(name)
    if lost := [name for parameter, name in names.items() if parameter.requires_grad and parameter not in holders]:
        _warn(
            f"no optimizer holds {len(lost)} of the parameters that require a gradient ({join_names(lost)}), so they "
            "stay as they are: pass them to an optimizer, or freeze them with requires_grad_(False)"
        )
    if shared := [name for parameter, name in names.items() if len(holders.get(parameter, ())) > 1]:
        _warn(
            f"{len(shared)} parameters are in more than one optimizer ({join_names(shared)}), and the steps of each "
            "change them"
        )


def _find_name_problem(optimizer: Optimizers) -> str | None:
    """Return the problem of an optimizer, or of several by name, or None."""
    optimizers: Mapping[Any, Any] = by_name(optimizer)
    if not optimizers:
        return "optimizer= is an empty mapping: pass None for a run without optimizer"
    for name, each in optimizers.items():
        is_empty = not name and isinstance(optimizer, Mapping)  # a single optimizer has an empty name
        if not isinstance(name, str) or name in OPT_STATE_PARTS or "/" in name or is_empty:
            return f"{name!r} cannot name an optimizer: take another text, without slash, such as 'generator'"
        if not hasattr(each, "param_groups"):
            return f"optimizer= takes an optimizer of torch.optim as {name!r}, got {type(each).__name__}"
    if len(set(map(id, optimizers.values()))) < len(optimizers):
        return "optimizer= has one optimizer under two names: pass each once"
    return None


def _find_foreign(optimizers: Mapping[str, Optimizer], known: set[Any]) -> list[str]:
    """Return a description of each parameter of the optimizers that is not the model's."""
    return [
        (f"{name!r}: " if name else "") + _describe(group, index, position)
        for name, each in optimizers.items()
        for index, group in enumerate(each.param_groups)
        for position, parameter in enumerate(group[MEMBERS])
        if parameter not in known
    ]


def _describe(group: Mapping[str, Any], index: int, position: int) -> str:
    shape = tuple(group[MEMBERS][position].shape)
    if "param_names" in group:
        return f"{group['param_names'][position]} of shape {shape}"
    return f"number {position} of group {group.get('name', index)}, of shape {shape}"


def _warn(message: str) -> None:
    warnings.warn(message, StateWarning, stacklevel=4)
