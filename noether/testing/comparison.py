"""Equality of values that contain tensors, and the differences between two of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

_MOST_SHOWN: Final = 10


def same(a: Any, b: Any) -> bool:  # any two values
    """Return whether two states, effects or trees are equal, bit for bit: NaN equals NaN, and 0.0 is not -0.0.

    Tensors are equal in shape, dtype and values; mappings in keys and values, not in order; floats to the last bit.

    Example:
        >>> same({"loss": torch.tensor(float("nan"))}, {"loss": torch.tensor(float("nan"))})
        True
        >>> same(1.0, 1)
        False
    """
    return next(differences(a, b), None) is None


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
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        if not _same_tensor(a, b):
            yield path or "the value", *_describe_tensors(a, b)
    elif isinstance(a, Mapping) and isinstance(b, Mapping):
        yield from _part_differences(dict(a), dict(b), path)
    elif type(a) is not type(b):
        yield path or "the value", repr(a), repr(b)
    elif isinstance(a, (list, tuple)):
        yield from _part_differences(dict(enumerate(a)), dict(enumerate(b)), path)
    elif dataclasses.is_dataclass(a) and not isinstance(a, type):
        for each in dataclasses.fields(a):
            yield from differences(getattr(a, each.name), getattr(b, each.name), f"{path}.{each.name}")
    elif not (_same_float(a, b) if isinstance(a, float) else a == b):
        yield path or "the value", repr(a), repr(b)


def _part_differences(a: Mapping[Any, Any], b: Mapping[Any, Any], path: str) -> Iterator[tuple[str, str, str]]:
    for key in [*a, *(key for key in b if key not in a)]:
        part = f"{path}[{key!r}]"
        if key in a and key in b:
            yield from differences(a[key], b[key], part)
        else:
            one, other = (repr(values[key]) if key in values else "nothing" for values in (a, b))
            yield part, one, other


def _same_float(a: float, b: float) -> bool:
    return (math.isnan(a) and math.isnan(b)) or (a == b and math.copysign(1, a) == math.copysign(1, b))


def _same_tensor(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    equal = (a == b) & (torch.signbit(a) == torch.signbit(b))
    return bool((equal | (a.isnan() & b.isnan())).all())


def _describe_tensors(a: torch.Tensor, b: torch.Tensor) -> tuple[str, str]:
    if a.numel() <= _MOST_SHOWN and b.numel() <= _MOST_SHOWN:
        return repr(a), repr(b)
    one, other = (f"{each.dtype} of shape {tuple(each.shape)}" for each in (a, b))
    if one != other:
        return one, other
    unequal = (a != b).flatten()
    first = int(unequal.nonzero()[0]) if unequal.any() else 0
    values = (each.flatten()[first].item() for each in (a, b))
    return tuple(f"{one} with {value!r} at {first}" for value in values)  # type: ignore[return-value]  # two
