"""Checks that the memory of a callback has only types that a checkpoint returns unchanged."""

from __future__ import annotations

import enum
import numbers
from collections.abc import Mapping
from operator import is_
from typing import TYPE_CHECKING, Any, Final

import torch

from noether.core.tensors.dtensors import is_distributed
from noether.core.tensors.tree import LEAVES, MAX_LEVELS, FrozenDict

if TYPE_CHECKING:
    from collections.abc import Callable

GRAD_SCALER: Final = "grad_scaler"
"""Name of the memory of a gradient scaler: the entries of `torch.amp.GradScaler.state_dict()`."""
_LEVELS: Final = MAX_LEVELS - 1
"""How deep memory may be nested: one level less than a tree, as a state has it in a dict by name."""
_CONTAINERS: Final = frozenset({dict, FrozenDict, tuple, list})
_ALLOWED: Final = "memory is made of str, int, float, bool, None, tensors, tuples and dicts"


def freeze_memory(name: str, memory: Any) -> Any:
    """Return the memory of a callback, frozen; the same object if nothing changes.

    It runs at every update, so it checks types only; `check_memory` also checks the properties of tensors.

    Raises:
        TypeError: If a part has a type that a checkpoint would change, with its path and what to write instead.

    Example:
        >>> freeze_memory("seen", {"epochs": [1, 2]})
        FrozenDict({'epochs': (1, 2)})
    """
    try:
        return _freeze_exact(memory, 1)
    except TypeError:
        check_memory(name, memory)
        raise


def _freeze_exact(tree: Any, level: int) -> Any:
    """Return `tree` frozen; raise a TypeError without details if one of its types is not exactly allowed."""
    if level > _LEVELS:
        raise TypeError
    kind = type(tree)
    if kind is FrozenDict or kind is dict:
        changed: dict[str, Any] = {}
        for key, value in tree.items():  # a plain loop: most memories have two or three entries
            if type(key) is not str:
                raise TypeError
            if type(value) not in LEAVES and (new := _freeze_exact(value, level + 1)) is not value:
                changed[key] = new
        return tree if kind is FrozenDict and not changed else FrozenDict({**tree, **changed})
    if kind in LEAVES:
        return tree
    if kind is tuple or kind is list:
        items = tuple(value if type(value) in LEAVES else _freeze_exact(value, level + 1) for value in tree)
        return tree if kind is tuple and all(map(is_, items, tree)) else items
    if getattr(tree, "is_value", False) or is_distributed(tree):
        return tree
    raise TypeError


def check_memory(name: str, memory: Any) -> None:
    """Raise an error if a checkpoint would not return memory unchanged.

    Raises:
        TypeError: If a part is not a JSON scalar, a dense tensor without gradient, a tuple, or a dict with text as
            keys; the message has its path and says what to write instead.

    Example:
        >>> check_memory("ema", {"decay": {1, 2}})
        Traceback (most recent call last):
        TypeError: memory 'ema': decay is a set; memory is made of ... tuples and dicts: write tuple(sorted(value))
    """
    check_savable(f"memory {name!r}", memory)


def check_savable(owner: str, tree: Any) -> None:
    """Raise an error that begins with `owner` if a checkpoint would not return `tree` unchanged.

    Raises:
        TypeError: As `check_memory`.
    """
    problem = _find_problem("", tree, 1)
    if problem is not None:
        raise TypeError(f"{owner}: {problem}")


def _find_problem(path: str, value: Any, level: int) -> str | None:
    """Return why a checkpoint cannot hold `value`, or None."""
    kind = type(value)
    if kind is torch.Tensor or is_distributed(value):
        return _find_tensor_problem(path or "it", value)
    if kind in LEAVES:
        return None
    if kind not in _CONTAINERS and not getattr(value, "is_value", False):
        return f"{path or 'it'} is a {_type_name(kind)}; {_ALLOWED}{_remedy(value)}"
    if level > _LEVELS:
        return f"{path[:80]}... is nested deeper than {_LEVELS} levels; write a flat dict"
    for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
        if isinstance(value, Mapping) and type(key) is not str:
            fix = f"write str keys, or a tuple of (key, value) pairs, as {path or 'the memory'}"
            return f"the key {key!r:.80} is a {_type_name(type(key))}; keys are str: {fix}"
        if (problem := _find_problem(f"{path}.{key}".removeprefix("."), item, level + 1)) is not None:
            return problem
    return None


def _find_tensor_problem(path: str, tensor: torch.Tensor) -> str | None:
    if tensor.requires_grad:
        return f"{path} is a tensor that requires a gradient; write tensor.detach()"
    if tensor.layout is not torch.strided:
        return f"{path} is a tensor of layout {tensor.layout}; write tensor.to_dense()"
    if tensor.is_quantized:
        return f"{path} is a quantized tensor; write tensor.dequantize()"
    if tensor.is_nested:
        return f"{path} is a nested tensor; write tuple(tensor.unbind())"
    return None


_REMEDIES: Final[tuple[tuple[Callable[[Any], bool], str], ...]] = (
    (lambda value: isinstance(value, enum.Enum), "its .value"),
    (lambda value: isinstance(value, torch.Tensor), "value.detach().clone(), as a plain tensor"),
    (lambda value: hasattr(value, "_asdict"), "tuple(value), or value._asdict()"),
    (lambda value: isinstance(value, Mapping), "dict(value)"),
    (lambda value: isinstance(value, (tuple, list)), "tuple(value)"),
    (lambda value: isinstance(value, (set, frozenset)), "tuple(sorted(value))"),
    (lambda value: isinstance(value, (str, torch.dtype, torch.device)), "str(value)"),
    (lambda value: isinstance(value, numbers.Integral), "int(value)"),
    (lambda value: isinstance(value, numbers.Real), "float(value)"),
    (lambda value: isinstance(value, complex), "(value.real, value.imag)"),
    (lambda value: isinstance(value, (bytes, bytearray)), "value.hex()"),
    (lambda value: hasattr(value, "__array__") and hasattr(value, "ndim"), "torch.as_tensor(value), or value.item()"),
)


def _remedy(value: Any) -> str:
    found = next((text for fits, text in _REMEDIES if fits(value)), None)
    return "" if found is None else f": write {found}"


def _type_name(kind: type) -> str:
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
