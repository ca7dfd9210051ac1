"""Numbers of double precision as parts that a sum over ranks in single precision keeps exactly."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

PARTS: Final = 3
"""Parts of one number of `split_numbers`."""
AMOUNT_PARTS: Final = 4
"""Parts of one number of `split_amount`."""
_BITS: Final = 22
_MASK: Final = 2**_BITS - 1
_AMOUNT_BITS: Final = 12


def split_numbers(numbers: Tensor) -> Tensor:
    """Return whole numbers of at most 22 bits that together have all bits of the given numbers.

    Each is exact in float32, and so is its sum with zeros: one rank sends a number, and all others send 0. NaN,
    infinities, -0.0 and subnormal numbers arrive as they are, also where a device flushes subnormal numbers to zero.

    Args:
        numbers: `(count,)` of dtype int64 or float64.

    Returns:
        `(3 * count,)` of dtype int64.

    Example:
        >>> join_numbers(split_numbers(torch.tensor([0.1, -0.0], dtype=torch.float64)).float(), torch.float64)
        tensor([0.1000, -0.0000], dtype=torch.float64)
    """
    bits = numbers.view(torch.int64)
    return torch.stack([bits >> 2 * _BITS, (bits >> _BITS) & _MASK, bits & _MASK], dim=1).flatten()


def join_numbers(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the numbers that `split_numbers` split, of dtype int64 or float64."""
    high, middle, low = parts.to(torch.int64).view(-1, PARTS).unbind(dim=1)
    return ((high << 2 * _BITS) | (middle << _BITS) | low).contiguous().view(dtype)


def split_amount(amount: float) -> list[float]:
    """Return four parts of a number >= 0, of which sums over ranks are sums of the numbers.

    In float32 the sums are exact for whole numbers below 2**36 of up to 4,096 ranks.

    Example:
        >>> split_amount(70001.5), join_amount(split_amount(70001.5))
        ([0.0, 17.0, 369.0, 0.5], 70001.5)
    """
    whole = int(amount)
    low, middle = whole % 2**_AMOUNT_BITS, (whole >> _AMOUNT_BITS) % 2**_AMOUNT_BITS
    return [float(whole >> 2 * _AMOUNT_BITS), float(middle), float(low), float(amount - whole)]


def join_amount(parts: Sequence[float]) -> float:
    """Return the number whose parts, or sums of parts, these are."""
    high, middle, low, fraction = parts
    return (high * 2**_AMOUNT_BITS + middle) * 2**_AMOUNT_BITS + low + fraction
