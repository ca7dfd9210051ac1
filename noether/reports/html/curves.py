"""Reduces long curves so that a page can hold them: every spike and every gap stays visible."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_POINTS_PER_BUCKET: Final = 3  # its minimum, its maximum, and a value that is not finite


def choose_points(values: NDArray[np.float64], limit: int) -> NDArray[np.int64]:
    """Return the indices of at most `limit` values from which the curve can be drawn.

    The values are split into buckets of equal length. Of each bucket the smallest and the largest finite value are
    chosen, and the first one that is not finite, where the drawn line has a gap. The first and the last value are
    always chosen.

    Args:
        values: The curve, shape `(n,)`.
        limit: Largest number of points, at least 5.

    Returns:
        Indices in increasing order; all of them if `n <= limit`.

    Raises:
        ValueError: If `limit` is less than 5.

    Example:
        >>> curve = np.zeros(1_000_000)
        >>> curve[123_456] = 1.0
        >>> chosen = choose_points(curve, 2000)
        >>> len(chosen) <= 2000, curve[chosen].max()
        (True, np.float64(1.0))
    """
    if limit < _POINTS_PER_BUCKET + 2:
        raise ValueError(f"limit is {limit}; expected at least {_POINTS_PER_BUCKET + 2}")
    count = len(values)
    if count <= limit:
        return np.arange(count)
    is_finite = np.isfinite(values)
    per_bucket = 2 if is_finite.all() else _POINTS_PER_BUCKET
    length = -(-count // ((limit - 2) // per_bucket))
    whole = count // length * length
    parts = [_choose_from_buckets(values[:whole].reshape(-1, length), is_finite[:whole].reshape(-1, length))]
    if whole < count:
        rest = _choose_from_buckets(values[None, whole:], is_finite[None, whole:])
        parts.append(rest + whole)
    return np.unique(np.concatenate([*parts, [0, count - 1]]))


def _choose_from_buckets(values: NDArray[np.float64], is_finite: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return the indices of the chosen values, counted over all buckets; one row is one bucket."""
    starts = np.arange(len(values)) * values.shape[1]
    if is_finite.all():
        return np.concatenate([starts + values.argmin(axis=1), starts + values.argmax(axis=1)])
    smallest = np.where(is_finite, values, np.inf).argmin(axis=1)
    largest = np.where(is_finite, values, -np.inf).argmax(axis=1)
    has_gap = ~is_finite.all(axis=1)
    gaps = (starts + is_finite.argmin(axis=1))[has_gap]
    return np.concatenate([starts + smallest, starts + largest, gaps])


def choose_levels(values: NDArray[np.float64], overview: int, finest: int) -> list[NDArray[np.int64]]:
    """Return the points of each zoom level, from the overview of the whole curve to the finest level.

    Args:
        values: The curve, shape `(n,)`.
        overview: Largest number of points of the overview.
        finest: Largest number of points of the finest level.

    Returns:
        One to three levels; the last holds all values if there are at most `finest`.

    Example:
        >>> [len(level) for level in choose_levels(np.arange(100.0), overview=12, finest=48)]
        [10, 20, 40]
        >>> [len(level) for level in choose_levels(np.arange(20.0), overview=12, finest=48)]
        [20]
    """
    if len(values) <= min(2 * overview, finest):
        return [np.arange(len(values))]
    if len(values) <= overview or finest <= overview:
        return [choose_points(values, overview)]
    middle = int((overview * min(finest, len(values))) ** 0.5)
    limits = [overview, middle, finest] if middle >= 2 * overview else [overview, finest]
    return [choose_points(values, limit) for limit in limits]


def average_parts(values: NDArray[np.float64], limit: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the averages of at most `limit` parts of a curve, from which a smooth curve is drawn.

    The points that `choose_points` returns are extreme values, so their average is not that of the curve.

    Args:
        values: The curve, shape `(n,)`.
        limit: Largest number of parts, at least 1.

    Returns:
        The index of the last value of each part, and the average of its finite values; NaN where there are none.

    Example:
        >>> average_parts(np.array([1.0, 3.0, np.nan, 5.0, 7.0]), limit=3)
        (array([1, 3, 4]), array([2., 5., 7.]))
    """
    count = len(values)
    length = max(1, -(-count // limit))
    starts = np.arange(0, count, length)
    is_finite = np.isfinite(values)
    if not count:
        return starts, values
    finite = np.add.reduceat(is_finite, starts, dtype=np.int64)
    shares = np.where(is_finite, values, 0.0) / np.repeat(np.maximum(finite, 1), length)[:count]
    with np.errstate(over="ignore"):  # the shares of the largest floats may round to more than these
        sums = np.add.reduceat(shares, starts)
    largest = np.finfo(np.float64).max
    averages = np.where(finite > 0, sums.clip(-largest, largest), np.nan)
    return np.minimum(starts + length, count) - 1, averages
