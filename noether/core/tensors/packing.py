"""What other code remembers by writing to it, as a value, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from torch import Tensor

from noether.core.tensors.tree import SCALARS

_LIST: Final = "__list__"


def pack(where: str, value: Any) -> Any:
    """Return `value` as a tree that can be in a state; a list becomes `{"__list__": (...)}`, for states hold tuples.

    Args:
        where: Whose memory it is, for the message.
        value: Nested dicts, lists and tuples of JSON scalars and tensors; tensors are not copied.

    Raises:
        TypeError: If something in it cannot be written to a checkpoint.

    Example:
        >>> pack("the sampler", {"order": [2, 0, 1]})
        {'order': {'__list__': (2, 0, 1)}}
    """
    if isinstance(value, (Tensor, *SCALARS)):
        return value
    if isinstance(value, list):
        return {_LIST: pack(where, tuple(value))}
    if isinstance(value, tuple):
        return tuple(pack(f"{where}.{index}", item) for index, item in enumerate(value))
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: pack(f"{where}.{key}", item) for key, item in value.items()}
    kind = "dict with keys that are not text" if isinstance(value, Mapping) else type(value).__name__
    raise TypeError(f"{where} is a {kind}, which no checkpoint can hold")


def unpack(value: Any) -> Any:
    """Return a copy of a packed `value` that may be written to: tensors cloned, dicts and lists new.

    Example:
        >>> unpack({"order": {"__list__": (2, 0, 1)}})
        {'order': [2, 0, 1]}
    """
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, tuple):
        return tuple(unpack(item) for item in value)
    if isinstance(value, Mapping):
        return list(unpack(value[_LIST])) if _LIST in value else {key: unpack(item) for key, item in value.items()}
    return value
