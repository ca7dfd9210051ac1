"""Parameters and buffers of a live module by name, without the names that wrappers of torch add."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from noether.core.tensors.fully_sharded import is_fully_sharded, reshard
from noether.core.tensors.torch_internals import buffers_in, children_in, non_persistent_in, parameters_in, select_view
from noether.core.tensors.tree import FrozenDict, move_to_device, tensors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from torch import Tensor

    Modules = list[tuple[str, nn.Module]]
    """Each module of a model with its path, as `named_modules` returns them."""

_WRAPPER_NAMES: Final = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""Names below which wrappers of torch keep the module: `torch.compile`, FSDP and activation checkpointing."""
_PARALLEL_NAME: Final = "module"
"""The name in `DataParallel` and `DistributedDataParallel`; in any other module it is a name of the user's."""


def named_modules(model: nn.Module) -> Modules:
    """Return each module once with its path, without the names of wrappers, in the order of `model.named_modules()`.

    Example:
        >>> model = torch.nn.Sequential(torch.compile(torch.nn.Linear(2, 1)))
        >>> [path for path, _ in model.named_modules()]
        ['', '0', '0._orig_mod']
        >>> [path for path, _ in named_modules(model)]
        ['', '0', '0']
    """
    found: Modules = []
    stack: list[tuple[str, nn.Module]] = [("", model)]
    seen: set[int] = set()
    while stack:
        path, module = pair = stack.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        found.append(pair)
        if children := children_in(module):  # most modules have none
            stack += reversed(_named_children(path, module, children))
    return found


def all_paths(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield each module with its path, without the names of wrappers, and a shared module once for each of its paths.

    Example:
        >>> layer = torch.nn.Linear(2, 2)
        >>> [path for path, _ in all_paths(torch.nn.Sequential(layer, layer))]
        ['', '0', '1']
    """
    stack: list[tuple[str, nn.Module, frozenset[int]]] = [("", model, frozenset())]
    while stack:
        path, module, parents = stack.pop()
        yield path, module
        if children := children_in(module):
            parents |= {id(module)}
            named = _named_children(path, module, children)
            stack += [(name, child, parents) for name, child in reversed(named) if id(child) not in parents]


def named_parameters(model: nn.Module, modules: Modules | None = None) -> dict[str, nn.Parameter]:
    """Return the parameters by name, as `model.named_parameters()` does, without the names of wrappers.

    Args:
        model: The model.
        modules: What `named_modules` returns of it, where that is known.

    Example:
        >>> list(named_parameters(torch.compile(torch.nn.Linear(2, 1))))
        ['weight', 'bias']
    """
    return _members_by_name(modules or named_modules(model), parameters_in)


def named_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers by name, as `model.named_buffers()` does, without the names of wrappers."""
    return _members_by_name(named_modules(model), buffers_in)


def has_buffers(model: nn.Module) -> bool:
    """Return whether a module of the model has a buffer, or a place for one; it takes less time than their names.

    Example:
        >>> has_buffers(torch.nn.Linear(2, 1)), has_buffers(torch.nn.Sequential(torch.nn.BatchNorm1d(2)))
        (False, True)
    """
    modules, seen = [model], {id(model)}
    for module in modules:  # grows while it is read
        if buffers_in(module):
            return True
        for child in children_in(module).values():
            if child is not None and id(child) not in seen:
                seen.add(id(child))
                modules.append(child)
    return False


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers that `model.state_dict()` has, by name, without the names of wrappers."""
    return _members_by_name(named_modules(model), _persistent_in)


def frozen_names(model: nn.Module) -> frozenset[str]:
    """Return the names of the parameters that require no gradient, so that no optimizer updates them."""
    return frozenset(name for name, parameter in named_parameters(model).items() if not parameter.requires_grad)


def wrapped_module(module: nn.Module) -> nn.Module | None:
    """Return the module that a wrapper of torch wraps, such as `torch.compile` or DDP; None if it is no wrapper.

    Example:
        >>> wrapped_module(torch.nn.DataParallel(torch.nn.Linear(2, 1)))
        Linear(in_features=2, out_features=1, bias=True)
    """
    children = children_in(module)
    name = _wrapped_name(module, children) if children else None
    return None if name is None else children[name]


def names_in_model(model: nn.Module) -> dict[str, str]:
    """Return the name in the model of each tensor whose name has a wrapper in it; empty for most models.

    `torch.func.functional_call` needs the names in the model.

    Example:
        >>> names_in_model(torch.compile(torch.nn.Linear(2, 1)))
        {'weight': '_orig_mod.weight', 'bias': '_orig_mod.bias'}
    """
    if not any(_wrapped_name(module, children_in(module)) for module in model.modules()):
        return {}
    names = {id(tensor): name for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    ours = {**named_parameters(model), **named_buffers(model)}
    return {name: names[id(tensor)] for name, tensor in ours.items() if names[id(tensor)] != name}


def rename_for_model(model: nn.Module, weights: Mapping[str, Any]) -> dict[str, Any]:
    """Return weights under the names that the model has for them."""
    names = names_in_model(model)
    return {names.get(name, name): value for name, value in weights.items()}


def without_wrappers(name: str) -> str:
    """Return a name without every part that could be a wrapper's, for names that are not of a live model.

    Example:
        >>> without_wrappers("module.body._orig_mod.weight")
        'body.weight'
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPER_NAMES and part != _PARALLEL_NAME)


def params_of(model: nn.Module) -> FrozenDict:
    """Return the parameters of `model` by name; the tensors share its memory."""
    if is_fully_sharded(model):
        reshard(model)
    view = select_view()
    return FrozenDict({name: view(parameter) for name, parameter in named_parameters(model).items()})


def buffers_of(model: nn.Module) -> FrozenDict:
    """Return the buffers of `model` that its `state_dict` has, by name; the tensors share its memory."""
    view = select_view()
    return FrozenDict({name: view(buffer) for name, buffer in persistent_buffers(model).items()})


def non_persistent_of(model: nn.Module) -> FrozenDict:
    """Return the buffers of `model` that its `state_dict` leaves out, by name; the tensors share its memory."""
    names = non_persistent_names(model)
    if not names:
        return FrozenDict()
    view = select_view()
    return FrozenDict({name: view(buffer) for name, buffer in named_buffers(model).items() if name in names})


def non_persistent_names(model: nn.Module) -> frozenset[str]:
    """Return the names of the buffers with `persistent=False`, those that are None included.

    Example:
        >>> model = nn.Module()
        >>> model.register_buffer("table", torch.ones(2), persistent=False)
        >>> model.register_buffer("scale", torch.ones(2))
        >>> sorted(non_persistent_names(model)), list(persistent_buffers(model))
        (['table'], ['scale'])
    """
    return frozenset(
        f"{path}.{key}" if path else key
        for path, module in named_modules(model)
        for key in non_persistent_in(module)
        if key in buffers_in(module)
    )


def device_of(tensors: Iterable[Tensor]) -> torch.device:
    """Return the device of the first of `tensors`; the CPU if it is empty.

    Example:
        >>> device_of(torch.nn.Linear(2, 1).parameters())
        device(type='cpu')
    """
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def move_to_model(model: nn.Module, tree: Any) -> Any:
    """Return `tree` with its tensors on the device of `model`; the same object if they already are."""
    device = device_of(model.parameters())
    if all(tensor.device == device for _, tensor in tensors(tree)):
        return tree
    return move_to_device(device, tree)


def _named_children(path: str, module: nn.Module, children: Mapping[str, Any]) -> list[tuple[str, nn.Module]]:
    """Return the children of the module at `path` with their paths, without the names of wrappers."""
    wrapped = _wrapped_name(module, children)
    prefix = f"{path}." if path else ""
    return [
        (path if name == wrapped else prefix + name, child) for name, child in children.items() if child is not None
    ]


def _wrapped_name(module: nn.Module, children: Mapping[str, Any]) -> str | None:
    """Return the name below which a wrapper keeps its module; None if it is no wrapper."""
    if _PARALLEL_NAME in children and isinstance(module, (DataParallel, DistributedDataParallel)):
        return _PARALLEL_NAME
    names = children.keys()  # the modules of a scripted module can be read by name only, not iterated
    return None if _WRAPPER_NAMES.isdisjoint(names) else next(filter(_WRAPPER_NAMES.__contains__, names))


def _persistent_in(module: nn.Module) -> Mapping[str, Any]:
    others, buffers = non_persistent_in(module), buffers_in(module)
    return {key: buffer for key, buffer in buffers.items() if key not in others} if others else buffers


def _members_by_name(modules: Modules, members_of: Callable[[nn.Module], Mapping[str, Any]]) -> dict[str, Any]:
    """Return members of all modules by name, each tensor once."""
    named: dict[str, Any] = {}
    seen: set[int] = set()
    for path, module in modules:
        for key, tensor in members_of(module).items():
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                named[f"{path}.{key}" if path else key] = tensor
    return named
