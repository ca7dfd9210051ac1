"""Converts trees to strict JSON beside tensors and back, bit for bit; NaN, infinities and tuples included."""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import torch

from noether.core.tensors.tree import MAX_LEVELS, SCALARS, FrozenDict
from noether.effects.disk.json_numbers import NUMBERS, json_number
from noether.effects.disk.tensor_files import METADATA

if TYPE_CHECKING:
    from collections.abc import Callable

_MAX_INTEGER_BITS: Final = 2000
"""Larger numbers are written in hexadecimal: Python parses at most 4300 decimal digits, and torch 255 bytes."""
_HALVES: Final = re.compile(r"[\ud800-\udbff][\udc00-\udfff]")
"""Two halves of a character, which JSON would join to one."""
_QUIET_NAN: Final = struct.pack(">d", math.nan)
_SCALAR_TYPES: Final = frozenset(SCALARS)


def encode_tree(tree: Any, tensors: dict[str, torch.Tensor], path: str = "", level: int = 0) -> Any:
    """Return the JSON value of `tree`, and add its tensors to `tensors` by their dotted path.

    A value that JSON cannot represent becomes an object with one key that begins with `$`.

    Raises:
        TypeError: If a part is of a type that the decoder would not return, or is nested too deep; the message has its
            path.

    Example:
        >>> encode_tree({"best": float("nan"), "at": (1, 2)}, {})
        {'best': {'$number': 'NaN'}, 'at': {'$tuple': [1, 2]}}
    """
    if level > MAX_LEVELS:
        raise TypeError(f"{path[:80]}... is nested deeper than {MAX_LEVELS} levels, which cannot be saved")
    if isinstance(tree, torch.Tensor):
        name = _tensor_name(path, tensors)
        tensors[name] = tree
        return {"$tensor": name}
    if isinstance(tree, Mapping):
        for key in tree:
            if type(key) is not str:
                where, kind = path or "the tree", type(key).__name__
                raise TypeError(f"{where} has the key {key!r:.80} of type {kind}, which cannot be saved; keys are str")
        items = {
            key: encode_tree(value, tensors, f"{path}.{key}".lstrip("."), level + 1) for key, value in tree.items()
        }
        if any(map(_HALVES.search, items)):
            return {"$items": [[_encode_scalar(key), value] for key, value in items.items()]}
        return {"$dict": items} if any(key.startswith("$") for key in items) else items
    if type(tree) is tuple:
        values = [encode_tree(value, tensors, f"{path}.{i}".lstrip("."), level + 1) for i, value in enumerate(tree)]
        return {"$tuple": values}
    if type(tree) not in _SCALAR_TYPES:
        raise TypeError(f"{path or 'the tree'} is a {type(tree).__name__}, which cannot be saved")
    return _encode_scalar(tree)


def _encode_scalar(value: Any) -> Any:
    if type(value) is float and not math.isfinite(value):
        bits = struct.pack(">d", value)
        return {"$number": json_number(value) if math.isinf(value) or bits == _QUIET_NAN else bits.hex()}
    if type(value) is int and value.bit_length() > _MAX_INTEGER_BITS:
        return {"$integer": hex(value)}
    if type(value) is str and _HALVES.search(value):
        return {"$text": value.encode(errors="surrogatepass").hex()}
    return value


def _tensor_name(path: str, tensors: Mapping[str, torch.Tensor]) -> str:
    """Return the name of the tensor at `path`: new in `tensors`, and one that a safetensors file can have."""
    name = path.encode(errors="backslashreplace").decode()
    while name in tensors or name == METADATA:  # two paths can have one text, as in {"a.b": x} and {"a": {"b": y}}
        name += "_"
    return name


def decode_tree(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """Return the tree from which `encode_tree` made `value`.

    It also accepts some values that `encode_tree` never makes; to detect those, encode the result again and compare.

    Raises:
        Exception: Of any type, if `encode_tree` did not make `value`.

    Example:
        >>> decode_tree({"at": {"$tuple": [1, 2]}}, {})
        FrozenDict({'at': (1, 2)})
    """
    if not isinstance(value, dict):
        return value
    key = next(iter(value), "")
    if not key.startswith("$"):
        return FrozenDict({name: decode_tree(item, tensors) for name, item in value.items()})
    if len(value) != 1 or key not in _DECODERS:
        raise ValueError(f"unknown entry {key!r}")
    return _DECODERS[key](value[key], tensors)


def _find_tensor(name: Any, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    if name not in tensors:
        raise ValueError(f"there is no tensor {name!r}")
    return tensors[name]


_DECODERS: Final[dict[str, Callable[[Any, Mapping[str, torch.Tensor]], Any]]] = {
    "$tensor": _find_tensor,
    "$tuple": lambda items, tensors: tuple(decode_tree(item, tensors) for item in items),
    "$dict": lambda items, tensors: FrozenDict({key: decode_tree(item, tensors) for key, item in items.items()}),
    "$number": lambda name, _: NUMBERS[name] if name in NUMBERS else struct.unpack(">d", bytes.fromhex(name))[0],
    "$integer": lambda text, _: int(text, 16),
    "$text": lambda text, _: bytes.fromhex(text).decode(errors="surrogatepass"),
    "$items": lambda items, tensors: FrozenDict({decode_tree(k, {}): decode_tree(item, tensors) for k, item in items}),
}
