"""Copies of what a callback can change: its arguments, and memory outside of the state."""

from __future__ import annotations

import functools
import itertools
import operator
import queue
import random
import threading
import types
from array import array
from collections import deque
from collections.abc import Mapping
from contextvars import ContextVar
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch.optim.lr_scheduler import LRScheduler

from noether.core.tensors.torch_internals import write_counts
from noether.testing.functions import closure_of, globals_of, is_library

if TYPE_CHECKING:
    from collections.abc import Callable

_LARGE: Final = 1 << 16
"""Elements from which on a tensor outside of the arguments is not copied; its count of writes is compared instead."""
_WALKED: Final = (
    torch.nn.Module,
    torch.optim.Optimizer,
    LRScheduler,
    types.SimpleNamespace,
    queue.Queue,
    threading.Event,
)
"""Classes of libraries whose objects are compared by their attributes."""
_MOST_OBJECTS: Final = 10_000


def copy_values(value: Any, memo: dict[int, Any] | None = None) -> Any:
    """Return `value` with its tensors, arrays and containers copied; other objects are shared.

    Example:
        >>> tree = {"w": torch.zeros(1), "sizes": [1, 2]}
        >>> copied = copy_values(tree)
        >>> copied["w"] is tree["w"], copied
        (False, {'w': tensor([0.]), 'sizes': [1, 2]})
    """
    memo = {} if memo is None else memo  # one copy of each object, so that tied tensors remain tied
    if id(value) not in memo:
        memo[id(value)] = _copy_value(value, memo)
    return memo[id(value)]


def _copy_value(value: Any, memo: dict[int, Any]) -> Any:
    if isinstance(value, torch.Tensor):
        copied = value.detach().clone()
        if isinstance(value, torch.nn.Parameter):
            return torch.nn.Parameter(copied, requires_grad=value.requires_grad)
        return copied.requires_grad_(value.requires_grad) if value.requires_grad else copied
    if isinstance(value, np.ndarray):
        return value.copy()
    if isinstance(value, dict) and type(value).__init__ is dict.__init__:
        return type(value)({key: copy_values(item, memo) for key, item in value.items()})
    if isinstance(value, tuple):
        items = [copy_values(item, memo) for item in value]
        return value._make(items) if hasattr(value, "_make") else type(value)(items)
    if type(value) in {list, set, deque}:
        return type(value)(copy_values(item, memo) for item in value)
    return value


def marks_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[Any, ...]]:
    """Return for each tensor how often it was written to, whether it requires a gradient, and its gradient's id."""
    return {
        name: (
            None if each.is_inference() else write_counts([each]),
            each.requires_grad,
            each.is_leaf and id(each.grad),
        )
        for name, each in tensors.items()
    }


def outside_memory(callback: Any) -> dict[str, Any]:
    """Return copies of what a callback holds or names, by path: attributes, closures, globals of its own modules.

    Objects of libraries are compared by identity, except modules of torch, generators and partial functions. The values
    of cached properties and of `functools.lru_cache` are left out.

    Example:
        >>> def counting():
        ...     calls = []
        ...     return lambda state, event: (state, ())
        >>> outside_memory(counting())
        {}
        >>> outside_memory({"limit": 3})
        {"['limit']": 3}
    """
    found: dict[str, Any] = {}
    seen: dict[int, Any] = {}
    pending: list[tuple[str, Any]] = [("", callback)]
    while pending and len(seen) < _MOST_OBJECTS:
        path, value = pending.pop()
        if id(value) in seen:
            continue
        parts = _parts(value)
        if parts is None:
            found[path] = _leaf(value)
        else:
            seen[id(value)] = value
            if not parts and isinstance(value, (Mapping, list, deque)):
                found[path] = "empty"
            pending += [(f"{path}{end}", part) for end, part in parts.items()]
    return found


class _Names:
    """Stands for the names that a module has, and for what they name."""

    __slots__ = ("ids",)

    def __init__(self, names: Mapping[str, Any]) -> None:
        self.ids = frozenset((name, id(value)) for name, value in names.items() if not name.startswith(("__", "@")))


def _parts(value: Any) -> dict[str, Any] | None:
    """Return the parts of an object by the end of their path; None for a value without parts."""
    if isinstance(value, Mapping):
        return {f"[{key!r}]": item for key, item in dict(value).items()}
    if isinstance(value, (list, tuple, deque)):
        return {f"[{index}]": item for index, item in enumerate(value)}
    if isinstance(value, types.FunctionType):
        return _function_parts(value)
    if isinstance(value, types.MethodType):
        return {"": value.__self__, f".{value.__name__}": value.__func__}
    if isinstance(value, functools.partial):
        return {".func": value.func, ".args": value.args, ".keywords": value.keywords}
    if isinstance(value, functools._lru_cache_wrapper):  # noqa: SLF001  # the class has no public name
        return {"": value.__wrapped__}
    if isinstance(value, type):
        return {} if is_library(value.__module__) else _class_parts(value)
    if isinstance(value, types.ModuleType) or not _is_walked(value):
        return None
    kind: Any = type(value)
    own = {name: each for name, each in getattr(value, "__dict__", {}).items() if name not in cached_names(kind)}
    slots = {name: getattr(value, name) for name in _slots(type(value)) if hasattr(value, name)}
    return {**_attributes({**own, **slots}), f" ({type(value).__name__})": type(value)}


def _function_parts(value: Any) -> dict[str, Any]:
    if is_library(value.__module__ or "") and not value.__closure__:
        return {}
    if hasattr(value, "registry") and hasattr(value, "_clear_cache"):  # of `functools.singledispatch`
        return {"": value.__wrapped__, **{f"[{kind.__name__}]": each for kind, each in value.registry.items()}}
    named = {f" (global {name})": item for name, item in globals_of(value).items()}
    defaults = {" (defaults)": value.__defaults__, " (keyword defaults)": value.__kwdefaults__}
    names = {" (names of its module)": _Names(value.__globals__)} if not is_library(value.__module__ or "") else {}
    return {**names, **_attributes(closure_of(value)), **defaults, **_attributes(vars(value)), **named}


def _class_parts(cls: type) -> dict[str, Any]:
    attributes = {name: each for name, each in vars(cls).items() if not name.startswith("__") or name == "__call__"}
    properties = {name: each.fget for name, each in attributes.items() if isinstance(each, property)}
    plain = {name: each for name, each in attributes.items() if not isinstance(each, (property, cached_property))}
    unwrapped = {name: getattr(each, "__func__", each) for name, each in plain.items()}  # of class and static methods
    bases = {f" ({base.__name__})": base for base in cls.__bases__}
    return {**_attributes({**unwrapped, **properties}), **bases}


@functools.lru_cache(maxsize=1024)
def cached_names(cls: type) -> frozenset[str]:
    """Return the names of the cached properties of a class: what they set on an instance is no memory."""
    attributes = (item for each in cls.__mro__ for item in vars(each).items())
    return frozenset(name for name, value in attributes if isinstance(value, cached_property))


def _attributes(values: Mapping[str, Any]) -> dict[str, Any]:
    return {f".{name}": value for name, value in values.items()}


def _is_walked(value: Any) -> bool:
    """Return whether the attributes of an object are compared, and not its identity."""
    if not hasattr(value, "__dict__") and not _slots(type(value)):
        return False
    module = type(value).__module__
    own = module.partition(".")[0] == "noether" or not is_library(module)
    return own or isinstance(value, _WALKED)


def _slots(cls: type) -> list[str]:
    slots = [vars(each).get("__slots__", ()) for each in cls.__mro__ if not is_library(each.__module__)]
    return [
        name for names in slots for name in ((names,) if isinstance(names, str) else names) if name != "__weakref__"
    ]


_COPIES: Final[tuple[tuple[type | tuple[type, ...], Callable[[Any], Any]], ...]] = (
    ((set, bytearray), lambda value: value.copy()),
    (array, lambda value: value[:]),
    (_Names, lambda value: hash(value.ids)),
    (torch.Generator, lambda value: value.get_state()),
    (random.Random, lambda value: value.getstate()),
    (np.random.Generator, lambda value: value.bit_generator.state),
    (np.random.RandomState, lambda value: copy_values(value.get_state(legacy=False))),
    (itertools.count, repr),
    (types.GeneratorType, lambda value: value.gi_frame and (value.gi_frame.f_lasti, repr(value.gi_frame.f_locals))),
    (ContextVar, lambda value: value.get(None)),
)
"""How to copy what changes in an object of a library."""


def _leaf(value: Any) -> Any:
    """Return what changes if a value without parts changes."""
    if isinstance(value, (str, int, float, complex, bytes, bool, type(None), frozenset)):
        return value
    if isinstance(value, torch.Tensor) and value.numel() > _LARGE:
        return id(value), *marks_of({"": value}).values()
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return copy_values(value)
    for kind, copy in _COPIES:
        if isinstance(value, kind):
            return copy(value)
    if hasattr(value, "getvalue"):  # of StringIO and BytesIO
        return value.getvalue()
    return type(value), id(value), operator.length_hint(value, 0)  # the length of an iterator is what it has left
