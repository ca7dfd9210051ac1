"""Histograms of tensors of any size, counted on the device of the tensor."""

from __future__ import annotations

import math
from typing import Final, NamedTuple

import torch

_CHUNK: Final = 2**22
"""Elements that are counted at once: it bounds the memory of a histogram to some 100 MB, whatever the tensor's size."""


class Histogram(NamedTuple):
    """A histogram.

    Args:
        counts: Number of finite values in each bin, of shape `(bins,)`, dtype int64, on the CPU.
        edges: Edges of the bins, of shape `(bins + 1,)`, dtype float64, on the CPU.
        nan: Number of values that are NaN.
        infinite: Number of values that are infinite.
    """

    counts: torch.Tensor
    edges: torch.Tensor
    nan: int
    infinite: int


def count_values(values: torch.Tensor, bins: int) -> Histogram:
    """Return the histogram of the values of a tensor, in bins of one width from its least to its largest finite value.

    It reads the tensor twice, in chunks. If all values are equal, they are in the middle of bins of total width 1 or
    more; without a finite value, the bins are those from 0 to 1.

    Args:
        values: Real numbers of any shape and dtype; it may be empty. A tensor of the meta device counts as empty, as a
            plan calls callbacks on such tensors.
        bins: Number of bins.

    Example:
        >>> histogram = count_values(torch.tensor([0.0, 1.0, 1.0, float("nan")]), bins=2)
        >>> histogram.counts, histogram.edges, histogram.nan
        (tensor([1, 2]), tensor([0.0000, 0.5000, 1.0000], dtype=torch.float64), 1)
    """
    if values.is_meta:
        values = torch.empty(0)
    chunks = torch.split(values.detach().reshape(-1), _CHUNK)
    parts = [_summarize(chunk) for chunk in chunks]
    low, high = min(part[0] for part in parts), max(part[1] for part in parts)
    if low > high:  # no finite value
        low, high = 0.0, 1.0
    if low == high:
        half = max(0.5, abs(low) * 2.0**-20)
        low, high = low - half, high + half
    edges = _edges(low, high, bins)
    inner = edges[1:-1].to(values.device)
    counts = sum(_count(chunk, inner, bins) for chunk in chunks)
    assert isinstance(counts, torch.Tensor)  # noqa: S101  # for mypy: `split` returns at least one chunk
    return Histogram(counts.cpu(), edges, sum(int(part[2]) for part in parts), sum(int(part[3]) for part in parts))


def _summarize(chunk: torch.Tensor) -> list[float]:
    """Return the least and the largest finite value, and the numbers of NaN and of infinite values; in one transfer."""
    numbers = chunk.double()
    finite = numbers.isfinite()
    low = numbers.where(finite, math.inf).amin() if len(numbers) else numbers.new_tensor(math.inf)
    high = numbers.where(finite, -math.inf).amax() if len(numbers) else numbers.new_tensor(-math.inf)
    summary: list[float] = torch.stack([low, high, numbers.isnan().sum(), numbers.isinf().sum()]).tolist()
    return summary


def _edges(low: float, high: float, bins: int) -> torch.Tensor:
    fractions = torch.arange(bins + 1, dtype=torch.float64) / bins
    return low * (1 - fractions) + high * fractions  # not `high - low`, which may overflow


def _count(chunk: torch.Tensor, inner: torch.Tensor, bins: int) -> torch.Tensor:
    numbers = chunk.double()
    places = torch.bucketize(numbers[numbers.isfinite()], inner, right=True)
    return torch.bincount(places, minlength=bins)
