"""Equality of any two values, and the differences between them."""

from __future__ import annotations

import dataclasses
import io
import math
import sys
from collections import deque
from collections.abc import Mapping
from types import FunctionType
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

from noether.core.tensors.tree import SCALARS
from noether.testing.array_bits import same_arrays, same_tensors
from noether.testing.functions import closure_of

if TYPE_CHECKING:
    from collections.abc import Iterator

_MOST_SHOWN: Final = 10
_NOTHING: Final = object()
"""Stands for a part that one of two values does not have."""
_COMPARES_IDENTITY: Final[Any] = object.__eq__


def same(a: Any, b: Any) -> bool:
    """Return whether two values are equal, bit for bit: NaN equals NaN, and 0.0 is not -0.0. It never raises.

    Tensors and arrays are equal in shape, dtype, device, layout and values; mappings in keys and values, not in order;
    numbers in type and to the last bit. Figures of matplotlib are equal in their pixels. Other objects are compared by
    their `==`; those that have none, by their attributes.

    Example:
        >>> same({"loss": torch.tensor(float("nan"))}, {"loss": torch.tensor(float("nan"))})
        True
        >>> same(1.0, 1)
        False
    """
    try:
        return next(differences(a, b), None) is None
    except Exception:  # noqa: BLE001  # the values are of any type, and so are the errors of comparing them
        return False


def assert_same(found: Any, expected: Any) -> None:
    """Raise unless two values are the `same`.

    Raises:
        AssertionError: With the path, the found and the expected value of each of the first ten differences.

    Example:
        >>> from noether import LogScalars, LogText
        >>> assert_same([LogText("a"), LogScalars({"x": 1.0})], [LogText("a"), LogScalars({"x": 2.0})])
        Traceback (most recent call last):
        AssertionError: the values differ:
          [1].values['x']: found 1.0, expected 2.0
    """
    lines = [f"  {path}: found {one}, expected {other}" for path, one, other in differences(found, expected)]
    if lines:
        more = [f"  and {len(lines) - _MOST_SHOWN} more"] if len(lines) > _MOST_SHOWN else []
        raise AssertionError("\n".join(["the values differ:", *lines[:_MOST_SHOWN], *more]))


def differences(a: Any, b: Any, path: str = "") -> Iterator[tuple[str, str, str]]:
    """Yield the path of each difference between two values, and the text of both values there.

    Example:
        >>> from noether import TrainState
        >>> list(differences(TrainState(), TrainState(seed=1)))
        [('.seed', '0', '1')]
    """
    return _differences(a, b, path, frozenset())


def _differences(a: Any, b: Any, path: str, outer: frozenset[tuple[int, int]]) -> Iterator[tuple[str, str, str]]:
    """Yield the differences; `outer` are the ids of the pairs that contain this one, as a value may contain itself."""
    if a is b or (id(a), id(b)) in outer:
        return
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        if not same_tensors(a, b):
            yield path or "the value", *_describe_tensors(a, b)
        return
    parts, others = (None, None) if type(a) in SCALARS else (_parts(a), _parts(b))
    alike = type(a) is type(b) or (isinstance(a, Mapping) and isinstance(b, Mapping))
    if alike and parts is not None and others is not None:
        outer |= {(id(a), id(b))}
        for key in [*parts, *(key for key in others if key not in parts)]:
            name, _ = parts.get(key) or others[key]
            (_, one), (_, other) = (each.get(key, ("", _NOTHING)) for each in (parts, others))
            yield from _differences(one, other, f"{path}{name}", outer)
    elif not _same_leaves(a, b):
        yield path or "the value", _text(a), _text(b)


def _parts(value: Any) -> dict[Any, tuple[str, Any]] | None:
    """Return the parts of a value by key, each with the end of its path; None if it is compared as a whole."""
    if isinstance(value, Mapping):
        return {_key(key): (f"[{key!r}]", item) for key, item in value.items()}
    if isinstance(value, (list, tuple, deque)):
        return {index: (f"[{index}]", item) for index, item in enumerate(value)}
    if isinstance(value, type):
        return None
    if dataclasses.is_dataclass(value):
        attributes = {
            each.name: getattr(value, each.name, _NOTHING) for each in dataclasses.fields(value) if each.compare
        }
    elif isinstance(value, FunctionType):
        attributes = {"__code__": value.__code__, "__defaults__": value.__defaults__, **closure_of(value)}
    elif type(value).__eq__ is _COMPARES_IDENTITY and hasattr(value, "__dict__") and not _is_figure(value):
        attributes = {"args": getattr(value, "args", ()), **vars(value)}  # those of an exception are no attribute
    else:
        return None
    return {name: (f".{name}", item) for name, item in attributes.items()}


def _key(key: Any) -> Any:
    """Return what distinguishes keys of a mapping or elements of a set: 1, 1.0 and True are three."""
    if isinstance(key, float):
        return type(key), "nan" if math.isnan(key) else key.hex()
    if isinstance(key, (tuple, frozenset)):
        return type(key), type(key)(map(_key, key)) if type(key) in {tuple, frozenset} else key
    return type(key), key


def _same_leaves(a: Any, b: Any) -> bool:
    """Return whether two values that have no parts are equal."""
    if type(a) is not type(b):
        return False
    if isinstance(a, (np.ndarray, np.generic)):
        return same_arrays(a, b) if a.dtype.kind not in "OT" else same(a.tolist(), b.tolist()) and a.shape == b.shape
    if isinstance(a, float):
        return (math.isnan(a) and math.isnan(b)) or (a == b and math.copysign(1, a) == math.copysign(1, b))
    if isinstance(a, complex):
        return _same_leaves(a.real, b.real) and _same_leaves(a.imag, b.imag)
    if isinstance(a, (set, frozenset)):
        return set(map(_key, a)) == set(map(_key, b))
    if isinstance(a, torch.Generator):
        return torch.equal(a.get_state(), b.get_state())
    if _is_figure(a):
        return _pixels(a) == _pixels(b)
    try:
        return bool(a == b) or bool(a != a and b != b and repr(a) == repr(b))  # noqa: PLR0124  # as NaN of decimal
    except Exception:  # noqa: BLE001  # arrays of other libraries, and whatever `==` raises
        return False


def _is_figure(value: Any) -> bool:
    figure = sys.modules.get("matplotlib.figure")
    return figure is not None and isinstance(value, figure.Figure)


def _pixels(figure: Any) -> bytes:
    """Return the pixels of a figure of matplotlib."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="raw")
    return buffer.getvalue()


def _text(value: Any) -> str:
    if value is _NOTHING:
        return "nothing"
    try:
        return repr(value)
    except Exception:  # noqa: BLE001  # a difference is reported even if one of the values has no text
        return f"a {type(value).__name__}"


def _describe_tensors(a: torch.Tensor, b: torch.Tensor) -> tuple[str, str]:
    plain = all(each.layout is torch.strided and not each.is_nested and not each.is_meta for each in (a, b))
    if not plain or (a.numel() <= _MOST_SHOWN and b.numel() <= _MOST_SHOWN):
        return _text(a), _text(b)
    one, other = (f"{each.dtype} of shape {tuple(each.shape)}" for each in (a, b))
    if one != other or a.is_quantized:
        return one, other
    places = zip(a.flatten(), b.flatten(), strict=True)
    first = next((i for i, (x, y) in enumerate(places) if not same_tensors(x, y)), 0)
    values = (each.flatten()[first].item() for each in (a, b))
    return tuple(f"{one} with {value!r} at {first}" for value in values)  # type: ignore[return-value]  # two
