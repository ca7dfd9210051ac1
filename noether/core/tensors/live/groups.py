"""Reads and writes the parameter groups of a live optimizer, also those that a saved run added while it trained."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from noether.core.errors import StateWarning
from noether.core.tensors.live.weights import match_names
from noether.core.tensors.tree import FrozenDict, freeze, map_leaves, plain_number, unpack

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from torch import Tensor
    from torch.optim import Optimizer

MEMBERS: Final = "params"
FROZEN: Final = "frozen_params"
"""The entry of a saved group for the names of its members that require no gradient."""
_NOT_SETTINGS: Final = frozenset({MEMBERS, FROZEN})
_SHOWN: Final = 3


def join_names(names: Iterable[str]) -> str:
    """Return the first names of parameters, for a message.

    Example:
        >>> join_names(["a", "b", "c", "d"])
        'a, b, c, ...'
    """
    names = list(names)
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def read_groups(groups: Sequence[Mapping[str, Any]], names: Mapping[Any, str]) -> tuple[FrozenDict, ...]:
    """Return the groups of a live optimizer with names of parameters, as a checkpoint has them.

    Args:
        groups: The groups.
        names: Names of the parameters of the model.
    """
    return tuple(
        freeze(
            {
                **map_leaves(plain_number, {key: value for key, value in group.items() if key != MEMBERS}),
                MEMBERS: tuple(names[p] for p in group[MEMBERS] if p in names),
                FROZEN: tuple(names[p] for p in group[MEMBERS] if p in names and not p.requires_grad),
            }
        )
        for group in groups
    )


def saved_groups(opt_state: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the groups of a saved memory; a functional optimizer stores them by name, in the same order."""
    groups = opt_state.get("groups", ())
    return list(groups.values() if isinstance(groups, Mapping) else groups)


def find_group_problems(
    saved: Sequence[Mapping[str, Any]], live: Sequence[Mapping[str, Any]], names: Mapping[Any, str]
) -> Iterator[str]:
    """Yield each reason why saved groups cannot be written into those of a live optimizer.

    A saved run may have added groups while it trained; `write_groups` adds those that the optimizer does not have yet.

    Args:
        saved: The saved groups.
        live: The groups of the optimizer.
        names: Names of the parameters of the model.
    """
    if len(saved) < len(live) or (len(saved) > len(live) and not all(MEMBERS in each for each in saved)):
        yield (
            f"the state has {len(saved)} parameter groups, and the optimizer {len(live)}: make it with those of the "
            f"state ({_describe(saved)}), not with {_describe(read_groups(live, names))}"
        )
        return
    for index, (theirs, ours) in enumerate(zip(saved, live, strict=False)):  # further saved groups are added
        members = [names[parameter] for parameter in ours[MEMBERS] if parameter in names]
        expected = list(match_names(dict.fromkeys(theirs.get(MEMBERS, members)), members))
        if expected != members:
            yield (
                f"parameter group {index} has {len(expected)} parameters in the state ({join_names(expected)}), and "
                f"{len(members)} in the optimizer ({join_names(members)})"
            )
    yield from _find_problems_of_new(saved[len(live) :], len(live), names, live)


def _find_problems_of_new(
    new: Sequence[Mapping[str, Any]], first: int, names: Mapping[Any, str], live: Sequence[Mapping[str, Any]]
) -> Iterator[str]:
    held = {names.get(parameter) for group in live for parameter in group[MEMBERS]}
    for index, group in enumerate(new, first):
        members = match_names(dict.fromkeys(group[MEMBERS]), names.values())
        if missing := [name for name in members if name not in set(names.values())]:
            yield f"parameter group {index} of the state has {join_names(missing)}, which the model does not have"
        if twice := [name for name in members if name in held]:
            yield (
                f"parameter group {index} of the state has {join_names(twice)}, which the optimizer holds in another "
                "group: make the optimizer with the groups of the state"
            )


def _describe(groups: Sequence[Mapping[str, Any]]) -> str:
    return "; ".join(
        f"{each.get('name', index)}: {join_names(each.get(MEMBERS, ())) or 'no names'}"
        for index, each in enumerate(groups)
    )


def write_groups(saved: Sequence[Mapping[str, Any]], optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> None:
    """Write saved groups into a live optimizer: add those that it does not have, and set `requires_grad` as saved.

    Args:
        saved: Groups in which `find_group_problems` finds no problem.
        optimizer: The live optimizer.
        parameters: The parameters of the model by name.
    """
    live, known = optimizer.param_groups, len(optimizer.param_groups)
    changed: list[str] = []
    for index, group in enumerate(saved):
        settings = unpack({key: value for key, value in group.items() if key not in _NOT_SETTINGS})
        names = match_names(dict.fromkeys(group.get(MEMBERS, ())), parameters)
        if index >= known:
            optimizer.add_param_group({**settings, MEMBERS: [parameters[name] for name in names]})
            if "param_names" in live[index]:
                live[index]["param_names"] = list(live[index]["param_names"])
        live[index].pop("lr_scale", None)  # the saved group says how its learning rate is scaled
        lists = [key for key, value in live[index].items() if isinstance(value, list)]  # a state has tuples for them
        live[index].update({k: list(v) if k in lists and isinstance(v, tuple) else v for k, v in settings.items()})
        if FROZEN in group:  # earlier versions did not save it
            frozen = match_names(dict.fromkeys(group[FROZEN]), parameters)
            differ = [name for name in names if parameters[name].requires_grad == (name in frozen)]
            for name in differ:
                parameters[name].requires_grad_(name not in frozen)
            changed += differ if index < known else ()
    if changed:
        warnings.warn(
            f"requires_grad of {join_names(changed)} differs from that of the saved run, and is now as saved: freeze "
            "and unfreeze parameters after the state is loaded",
            StateWarning,
            stacklevel=5,
        )
