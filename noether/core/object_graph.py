"""Walks the objects that an object holds: attributes, slots, containers, closures and classes."""

from __future__ import annotations

import functools
import itertools
import types
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

LINKS: Final = ("dataset", "datasets", "sampler", "batch_sampler", "transform")
"""Attributes by which loaders, samplers and datasets hold their parts."""

MAX_OBJECTS: Final = 2000
MAX_ITEMS: Final = 100  # of a container, in which objects are looked for
_MAX_OBJECTS_OF_MODEL: Final = 100_000
_MAX_DEPTH: Final = 8
_REGISTERED: Final = frozenset({"_parameters", "_buffers", "_modules"})
"""Attributes of a module whose content a state or the walk over all modules has."""

_HOOKS: Final = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_RNN_ATTRIBUTES: Final = frozenset({"_flat_weights", "_flat_weight_refs"})
"""Attributes that torch's recurrent modules set to their current parameters whenever these are exchanged."""

LEAVES: Final = (int, float, str, bytes)
_OPAQUE: Final = (type, types.ModuleType, nn.Parameter, torch.device, torch.dtype)
_FRAMEWORKS: Final = ("lightning", "pytorch_lightning", "lightning_fabric", "accelerate", "ignite")
"""Libraries whose trainers a model may refer to; a trainer holds the optimizer, and thus all parameters."""

_SEQUENCES: Final = (list, tuple, set, frozenset, deque)
_LIBRARIES: Final = (
    "_io", "io", "torch", "numpy", "multiprocessing", "threading", "builtins", "functools", "abc", "lightning",
    "pytorch_lightning", "lightning_fabric",
)  # fmt: skip
"""Libraries whose objects are known. A trainer of Lightning, which its modules hold, holds their parameters in turn."""


class _Search(NamedTuple):
    """What a walk looks for, and its bounds.

    Args:
        generators: Types of random generators, whose content is not searched; classes and global names are.
        max_objects: Largest number of objects.
        max_items: Largest number of items of a container.
        closed: Libraries whose objects are not searched.
    """

    generators: tuple[type, ...]
    max_objects: int
    max_items: int
    closed: tuple[str, ...] = ()


@dataclass(frozen=True)
class HeldObject:
    """An object that another one holds.

    Args:
        path: How it is reached, such as `Augmented.transform.rng`.
        value: The object.
        is_compared: Whether a change of it is hidden state.
    """

    path: str
    value: Any
    is_compared: bool


def walk(root: Any, generators: tuple[type, ...] = (), leave_out: Collection[int] = ()) -> Iterator[HeldObject]:
    """Yield what an object holds, nearest first, itself included; in a bounded number of objects.

    Args:
        root: A loader, or a function.
        generators: Types of random generators, which are found in classes and global names, too.
        leave_out: Ids of objects to leave out, with what they hold.
    """
    is_list = isinstance(root, (list, tuple))
    roots = [HeldObject(type(root).__name__, root, is_compared=not is_list)]
    return (found for _, found in _walk(roots, set(leave_out), _Search(generators, MAX_OBJECTS, MAX_ITEMS)))


def walk_model(model: nn.Module, generators: tuple[type, ...] = ()) -> Iterator[tuple[str, HeldObject]]:
    """Yield what the modules of a model hold beside their parameters, buffers and sub-modules.

    Of modules that wrap others, such as `DistributedDataParallel`, it yields only what their hooks hold. What a module
    with `get_extra_state` holds is saved, so it is no hidden state.

    Args:
        model: The model.
        generators: Types of random generators, which are found in classes and global names, too.

    Yields:
        The attribute by which an object is reached, such as `encoder.layers`, and the object.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 1))
        >>> handle = model[0].register_forward_hook(lambda module, inputs, outputs: outputs)
        >>> {attribute for attribute, held in walk_model(model) if callable(held.value)}
        {'0._forward_hooks'}
    """
    modules = dict(model.named_modules())
    search = _Search(generators, _MAX_OBJECTS_OF_MODEL, _MAX_OBJECTS_OF_MODEL, _FRAMEWORKS)
    roots = [root for name, module in modules.items() for root in _parts_of_module(name, module, search)]
    return _walk(roots, set(map(id, modules.values())), search)


def _parts_of_module(name: str, module: nn.Module, search: _Search) -> Iterator[HeldObject]:
    kind = type(module)
    is_adapter = kind.__module__.startswith("noether.integrations")  # reads its parameters from their places
    is_own = library_of(kind) is None and not is_adapter
    is_searched = is_own or kind.__module__.startswith("torch.nn.modules")  # not a wrapper, which lists parameters
    is_saved = kind.get_extra_state is not nn.Module.get_extra_state  # by the module's own method
    for attribute, value in list(vars(module).items()):
        if attribute in _HOOKS or (is_searched and attribute not in _REGISTERED | _RNN_ATTRIBUTES):
            path = f"{name}.{attribute}" if name else attribute
            yield HeldObject(path, value, is_compared=is_own and not is_saved)
    yield from _class_generators(kind, search) if is_own else ()


def _walk(roots: list[HeldObject], seen: set[int], search: _Search) -> Iterator[tuple[str, HeldObject]]:
    """Yield what the roots hold, themselves included, nearest first, each with the path of its root.

    Args:
        roots: Where to begin.
        seen: Ids of objects to leave out; it grows.
        search: What to look for.
    """
    leaves = (*LEAVES, *_OPAQUE, *search.generators, Tensor, np.ndarray)
    queue = [(root, 0, root.path) for root in roots]
    for found, depth, origin in queue:  # grows while it is read
        # Equal numbers and texts are one object, which several attributes may hold.
        if len(queue) > search.max_objects or (id(found.value) in seen and not isinstance(found.value, LEAVES)):
            continue
        seen.add(id(found.value))
        yield origin, found
        is_closed = type(found.value).__module__.split(".")[0] in search.closed
        if depth < _MAX_DEPTH and not is_closed and not isinstance(found.value, leaves):
            queue += [(inner, depth + 1, origin) for inner in _parts_of(found, search)]


def _parts_of(found: HeldObject, search: _Search) -> Iterator[HeldObject]:
    value, path, kind = found.value, found.path, type(found.value)
    if isinstance(value, dict):
        for key, item in list(itertools.islice(dict.items(value), search.max_items)):
            yield HeldObject(f"{path}[{key!r}]", item, found.is_compared)
    elif isinstance(value, _SEQUENCES):
        kind_of_items: Any = next(each for each in _SEQUENCES if isinstance(value, each))  # whose `__iter__` is known
        for index, item in enumerate(itertools.islice(kind_of_items.__iter__(value), search.max_items)):
            if not isinstance(item, LEAVES):  # numbers and texts are compared as one digest
                yield HeldObject(f"{path}[{index}]", item, found.is_compared)
    elif isinstance(value, (types.FunctionType, types.MethodType, types.BuiltinMethodType, functools.partial)):
        yield from _parts_of_function(found, search)
    library = library_of(kind)
    if library == "torch":
        yield from _parts_of_torch_object(found)
    elif library is None:
        yield from _class_generators(kind, search)
        has_epoch = hasattr(kind, "set_epoch")
        for name, attribute in _attributes(value):
            is_compared = name in LINKS or (found.is_compared and not has_epoch)
            yield HeldObject(f"{kind.__name__}.{name}", attribute, is_compared)


def _parts_of_torch_object(found: HeldObject) -> Iterator[HeldObject]:
    """Yield what an object of torch holds; its numbers and tensors do not depend on the epoch."""
    kind = type(found.value)
    for name, attribute in _attributes(found.value):
        if name != "_iterator":  # of a DataLoader that keeps its workers alive
            is_fixed = isinstance(attribute, (*LEAVES, Tensor, dict)) or name in {"indices", "tensors"}
            is_compared = found.is_compared and not is_fixed and not isinstance(found.value, nn.Module)
            yield HeldObject(f"{kind.__name__}.{name}", attribute, is_compared)


def library_of(kind: type) -> str | None:
    """Return the library that defines a type, if it is one whose objects are known."""
    library = kind.__module__.split(".")[0]
    return library if library in _LIBRARIES else None


def _attributes(value: Any) -> Iterator[tuple[str, Any]]:
    yield from list(getattr(value, "__dict__", {}).items())
    for kind in type(value).__mro__:
        for name, member in vars(kind).items() if "__slots__" in vars(kind) else ():
            if isinstance(member, types.MemberDescriptorType):
                try:
                    yield name, member.__get__(value)
                except AttributeError:  # a slot that is not set
                    continue


def _parts_of_function(found: HeldObject, search: _Search) -> Iterator[HeldObject]:
    function, path = found.value, found.path
    if isinstance(function, functools.partial):
        held = [function.func, *function.args, *function.keywords.values()]
        yield from (HeldObject(f"{path}.partial[{index}]", each, found.is_compared) for index, each in enumerate(held))
    elif isinstance(function, (types.MethodType, types.BuiltinMethodType)):
        yield HeldObject(f"{path}.__self__", function.__self__, found.is_compared)
    else:
        names = function.__code__.co_freevars
        for name, cell in zip(names, function.__closure__ or (), strict=True):
            try:
                yield HeldObject(f"{path}.{name}", cell.cell_contents, found.is_compared)
            except ValueError:  # a cell that is not filled
                continue
        defaults = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
        yield from (HeldObject(f"{path}.default[{i}]", each, found.is_compared) for i, each in enumerate(defaults))
        yield from _global_generators(function, search)


def _class_generators(kind: type, search: _Search) -> Iterator[HeldObject]:
    """Yield the generators that are attributes of a class, or global names that its methods use."""
    for base in kind.__mro__:
        if library_of(base) is not None:
            continue
        for name, value in list(vars(base).items()):
            if isinstance(value, search.generators):
                yield HeldObject(f"{base.__name__}.{name}", value, is_compared=False)
            elif isinstance(value, types.FunctionType):
                yield from _global_generators(value, search)


def _global_generators(function: types.FunctionType, search: _Search) -> Iterator[HeldObject]:
    for name in function.__code__.co_names:
        value = function.__globals__.get(name)
        if isinstance(value, search.generators):
            yield HeldObject(name, value, is_compared=False)


def parts_of_loader(loader: Any) -> list[Any]:
    """Return a loader, its datasets and its samplers, each once.

    Example:
        >>> [type(part).__name__ for part in parts_of_loader(torch.utils.data.DataLoader([1, 2]))]
        ['DataLoader', 'list', 'SequentialSampler', 'BatchSampler']
    """
    parts = [loader]
    for part in parts:  # grows while it is read
        inner = [getattr(part, name, None) for name in LINKS if name != "datasets"]
        if isinstance(members := getattr(part, "datasets", None), (list, tuple)):  # of a ConcatDataset
            inner += members
        parts += [each for each in inner if each is not None and all(each is not known for known in parts)]
    return parts
