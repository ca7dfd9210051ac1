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
        >>> [len(level) for level in choose_levels(np.arange(10.0), overview=12, finest=48)]
        [10]
    """
    if len(values) <= overview or finest <= overview:
        return [choose_points(values, overview)]
    middle = int((overview * min(finest, len(values))) ** 0.5)
    limits = [overview, middle, finest] if middle >= 2 * overview else [overview, finest]
    return [choose_points(values, limit) for limit in limits]
