"""Functions that check a class of torch.optim, construct it, step it on copies, and read its memory."""

from __future__ import annotations

import inspect
from collections import defaultdict
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from noether.core.errors import Problem, SettingsError, suggest
from noether.core.tensors.torch_internals import optimizer_attributes
from noether.core.tensors.tree import SCALARS, leaves, pack, unpack
from noether.training.step import kernels

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from collections.abc import Set as AbstractSet

    from noether.training.step.layout import Layout, UpdateCopies

OptState = dict[str, Any]
"""An optimizer's memory: a tree of dicts, tuples, tensors and JSON scalars, keyed by names of parameters."""

_ABSENT: Final = object()
_VARIADIC: Final = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def class_problem(cls: object) -> Problem | None:
    """Return why `cls` cannot be the optimizer, or None."""
    if not (isinstance(cls, type) and issubclass(cls, Optimizer)):
        return Problem("optimizer", f"{cls!r} is not a class of torch.optim.Optimizer")
    arguments = list(inspect.signature(cls.step).parameters.values())[1:]
    if any(argument.default is argument.empty and argument.kind not in _VARIADIC for argument in arguments):
        return Problem("optimizer", f"{cls.__name__} calls the loss itself (a closure); take one whose step needs none")
    return None


def accepted_settings(cls: type[Optimizer]) -> AbstractSet[str] | None:
    """Return the names of the settings of `cls`, in its order, or None if it takes any."""
    parameters = list(inspect.signature(cls).parameters.values())[1:]
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return dict.fromkeys(parameter.name for parameter in parameters).keys()


def unknown_settings(
    cls: type[Optimizer], settings: Iterable[str], accepted: AbstractSet[str], prefix: str = ""
) -> Iterator[Problem]:
    """Yield a problem for each setting that `cls` does not have.

    Args:
        cls: The class of the optimizer.
        settings: Names of the settings.
        accepted: Names that the class accepts.
        prefix: Where the settings were written, such as `groups.head.`.
    """
    for name in settings:
        if name not in accepted:
            known = f"it has {', '.join(accepted)}{suggest(name, accepted)}"
            yield Problem(f"{prefix}{name}", f"{cls.__name__} has no such setting; {known}")


def construct(
    cls: type[Optimizer],
    members: Mapping[str, Sequence[Tensor]],
    overrides: Mapping[str, Mapping[str, Any]],
    settings: Mapping[str, Any],
    where: str = "",
) -> Optimizer:
    """Return an instance of the class.

    Args:
        cls: The class of the optimizer.
        members: Parameters by group.
        overrides: Settings of single groups, by group.
        settings: Settings of all groups; a list counts as a tuple.
        where: The setting that an error names.

    Raises:
        SettingsError: If the class refuses its arguments.
    """
    groups = [{"params": list(params), **_as_tuples(overrides.get(group, {}))} for group, params in members.items()]
    build: Callable[..., Optimizer] = cls
    try:
        return build(groups, **_as_tuples(settings))
    except (ValueError, TypeError, RuntimeError, AssertionError) as error:
        raise SettingsError([Problem(where, f"{cls.__name__} refuses: {error}")]) from error


def stored_params_problem(optimizer: Optimizer, members: Mapping[str, Sequence[Tensor]]) -> Problem | None:
    """Return a problem if the class keeps its constructor's parameters, on which it would step; or None."""
    param_ids = {id(param) for params in members.values() for param in params}
    attributes = {key: value for key, value in vars(optimizer).items() if key not in optimizer_attributes()}
    for path, leaf in leaves(attributes):
        if id(leaf) in param_ids or isinstance(leaf, Optimizer):
            message = f"{type(optimizer).__name__} keeps parameters in self.{'.'.join(path)}; read self.param_groups"
            return Problem("optimizer", message)
    return None


def step_class(cls: type[Optimizer], copies: UpdateCopies, opt_state: Mapping[str, Any]) -> OptState:
    """Let the class itself step on the copies, and return its memory."""
    optimizer = object.__new__(cls)  # with the attributes that the constructor set once: this runs at every update
    attributes = copies.layout.attributes | unpack(opt_state.get("attributes", {}))
    vars(optimizer).update({key: v.clone() if isinstance(v, Tensor) else v for key, v in attributes.items()})
    changed = opt_state.get("groups", {})
    optimizer.param_groups = [
        {"params": [copies.params[name] for name in names], **settings, **unpack(changed.get(group, {}))}
        for (group, names), settings in zip(copies.layout.members.items(), copies.settings.values(), strict=True)
    ]
    optimizer.state = defaultdict(dict, unpack(opt_state.get("shared", {})))
    optimizer.state.update({copies.params[name]: memory for name, memory in copies.memory.items()})
    for name, param in copies.params.items():
        param.requires_grad = True
        grad = copies.grads.get(name)
        param.grad = grad if grad is None or kernels.preserves_gradients(cls) else grad.clone()
    optimizer.step()
    for param in copies.params.values():
        param.grad = None
        param.requires_grad = False
    return read_memory(optimizer, copies.layout, copies.params, copies.settings)


def read_memory(
    optimizer: Optimizer, layout: Layout, params: Mapping[str, Tensor], settings: Mapping[str, Mapping[str, Any]]
) -> OptState:
    """Return the memory of `optimizer`, with names for parameters.

    Args:
        optimizer: The instance.
        layout: Its groups; an attribute that differs from `layout.attributes` is memory.
        params: Its parameters by name.
        settings: Settings by group; an entry of a parameter group that differs from them is memory.
    """
    names = {id(param): name for name, param in params.items()}
    by_key = {names.get(id(key), key): value for key, value in optimizer.state.items()}
    groups = zip(layout.members, optimizer.param_groups, strict=True)
    attributes = {
        key: value
        for key, value in vars(optimizer).items()
        if key not in optimizer_attributes()
        and (isinstance(value, Tensor) or value is not layout.attributes.get(key, _ABSENT))
    }
    memory: OptState = {
        "state": pack("optimizer.state", {key: value for key, value in by_key.items() if key in params}),
        "groups": {group: _changes("param_groups", entries, settings[group]) for group, entries in groups},
        "shared": pack("optimizer.state", {key: value for key, value in by_key.items() if key not in params}),
        "attributes": _changes("self", attributes, layout.attributes),
    }
    return {key: value for key, value in memory.items() if value or key in {"state", "groups"}}


def _changes(where: str, after: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries in which `after` differs from `before`, and all that the class may have changed in place."""
    return {
        key: pack(f"optimizer.{where}.{key}", value)
        for key, value in after.items()
        if key != "params" and not _is_unchanged(value, before.get(key, _ABSENT))
    }


def _is_unchanged(value: object, before: object) -> bool:
    if isinstance(value, (Tensor, dict, list)):
        return False
    return value is before or (
        isinstance(value, (tuple, *SCALARS)) and type(value) is type(before) and bool(value == before)
    )


def placeholders(groups: Iterable[str]) -> dict[str, list[Tensor]]:
    """Return a parameter for each group, to construct an instance without a model; Muon needs two dimensions."""
    return {group: [torch.nn.Parameter(torch.zeros(1, 1))] for group in groups}


def _as_tuples(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
