"""Equality of values that hold tensors, and in what two of them differ."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

_SHOWN: Final = 10


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
        AssertionError: With a line for each of the first differences.

    Example:
        >>> from noether import LogScalars, LogText
        >>> assert_same([LogText("a"), LogScalars({"x": 1.0})], [LogText("a"), LogScalars({"x": 2.0})])
        Traceback (most recent call last):
        AssertionError: what was found is not what was expected:
          [1].values['x']: found 1.0, expected 2.0
    """
    told = [f"  {path}: found {one}, expected {other}" for path, one, other in differences(found, expected)]
    if told:
        more = [f"  and {len(told) - _SHOWN} more"] if len(told) > _SHOWN else []
        raise AssertionError("\n".join(["what was found is not what was expected:", *told[:_SHOWN], *more]))


def differences(a: Any, b: Any, path: str = "") -> Iterator[tuple[str, str, str]]:
    """Yield where two values differ: the path there, and what each of them has, as text.

    Example:
        >>> from noether import TrainState
        >>> list(differences(TrainState(), TrainState(seed=1)))
        [('.seed', '0', '1')]
    """
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        if not _same_tensor(a, b):
            yield path or "the value", *_tensors_shown(a, b)
    elif isinstance(a, Mapping) and isinstance(b, Mapping):
        yield from _in_parts(dict(a), dict(b), path)
    elif type(a) is not type(b):
        yield path or "the value", repr(a), repr(b)
    elif isinstance(a, (list, tuple)):
        yield from _in_parts(dict(enumerate(a)), dict(enumerate(b)), path)
    elif dataclasses.is_dataclass(a) and not isinstance(a, type):
        for each in dataclasses.fields(a):
            yield from differences(getattr(a, each.name), getattr(b, each.name), f"{path}.{each.name}")
    elif not _same_leaf(a, b):
        yield path or "the value", repr(a), repr(b)


def _in_parts(a: Mapping[Any, Any], b: Mapping[Any, Any], path: str) -> Iterator[tuple[str, str, str]]:
    for key in [*a, *(key for key in b if key not in a)]:
        inside = f"{path}[{key!r}]"
        if key in a and key in b:
            yield from differences(a[key], b[key], inside)
        else:
            yield inside, _shown(a, key), _shown(b, key)


def _shown(values: Mapping[Any, Any], key: Any) -> str:
    return repr(values[key]) if key in values else "nothing"


def _same_leaf(a: Any, b: Any) -> bool:
    if isinstance(a, float):
        return (math.isnan(a) and math.isnan(b)) or (a == b and math.copysign(1, a) == math.copysign(1, b))
    return bool(a == b)


def _same_tensor(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    equal = (a == b) & (torch.signbit(a) == torch.signbit(b))
    return bool((equal | (a.isnan() & b.isnan())).all())


def _tensors_shown(a: torch.Tensor, b: torch.Tensor) -> tuple[str, str]:
    if a.numel() <= _SHOWN and b.numel() <= _SHOWN:
        return repr(a), repr(b)
    one, other = (f"{each.dtype} of shape {tuple(each.shape)}" for each in (a, b))
    if one != other:
        return one, other
    apart = (a != b).flatten()
    first = int(apart.nonzero()[0]) if apart.any() else 0
    values = (each.flatten()[first].item() for each in (a, b))
    return tuple(f"{one} with {value!r} at {first}" for value in values)  # type: ignore[return-value]  # two
