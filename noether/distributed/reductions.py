"""Numbers that ranks reduce together: how each rank writes its own, and what the numbers of all ranks give."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, final

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    Array = np.ndarray[Any, np.dtype[np.float64]]


@final
@dataclass(frozen=True, kw_only=True)
class Numbers:
    """The numbers of one rank, by name and by how they are reduced.

    Args:
        sums: Numbers to add up.
        means: Value and weight by name; the mean of the values of weight above 0, NaN if there is none.
        largest: Numbers of which the largest is wanted; NaN if one is NaN.
        smallest: Numbers of which the smallest is wanted; NaN if one is NaN.
        of_rank_0: Numbers of which that of rank 0 is wanted.

    Raises:
        ValueError: If two numbers have one name, or a weight is below 0 or NaN.

    Example:
        >>> ranks = [Numbers(sums={"samples": 4}, means={"mse": (mse, 4)}) for mse in (0.5, 1.5)]
        >>> ranks[0].reduce(np.stack([numbers.pack() for numbers in ranks]))
        {'samples': 8.0, 'mse': 1.0}
    """

    sums: Mapping[str, float] = field(default_factory=dict)
    means: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    largest: Mapping[str, float] = field(default_factory=dict)
    smallest: Mapping[str, float] = field(default_factory=dict)
    of_rank_0: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        kinds = (self.sums, self.largest, self.smallest, self.of_rank_0, self.means)
        names = {name for kind in kinds for name in kind}
        if len(names) < sum(map(len, kinds)):
            twice = ", ".join(sorted(name for name in names if sum(name in kind for kind in kinds) > 1))
            raise ValueError(f"give each number one name; twice: {twice}")
        for name, (_, weight) in self.means.items():
            if not weight >= 0:  # also true of NaN
                raise ValueError(f"the weight of {name} is {weight}; give 0 or more")

    def describe(self) -> str:
        """Return the names of all numbers; ranks can reduce them if these are the same.

        Example:
            >>> Numbers(sums={"samples": 4, "batches": 1}, largest={"signal": 0}).describe()
            'sums batches, samples; largest signal'
        """
        kinds = {
            "sums": self.sums,
            "largest": self.largest,
            "smallest": self.smallest,
            "of rank 0": self.of_rank_0,
            "means": self.means,
        }
        parts = [f"{kind} {', '.join(sorted(each))}" for kind, each in kinds.items() if each]
        return "; ".join(parts) or "nothing"

    def pack(self) -> Array:
        """Return the numbers as one float64 array, in an order that depends on their names alone."""
        numbers = [float(kind[name]) for kind, _ in self._plain() for name in sorted(kind)]
        numbers += [float(number) for name in sorted(self.means) for number in self.means[name]]
        return np.asarray(numbers, dtype=np.float64)

    def reduce(self, table: Array) -> dict[str, float]:
        """Return the reduced numbers by name.

        Args:
            table: What `pack` returned on each rank, in the order of ranks: float64, shape `(ranks, numbers)`.
        """
        results: dict[str, float] = {}
        start = 0
        for kind, reduction in self._plain():
            for name in sorted(kind):
                results[name] = float(reduction(table[:, start]))
                start += 1
        for name in sorted(self.means):
            results[name] = _weighted_mean(table[:, start], table[:, start + 1])
            start += 2
        return results

    def _plain(self) -> tuple[tuple[Mapping[str, float], Callable[[Array], Any]], ...]:
        """Return all kinds but the means, each with its reduction."""
        return (self.sums, _sum_in_order), (self.largest, np.max), (self.smallest, np.min), (self.of_rank_0, _first)


def _sum_in_order(column: Array) -> float:
    total = 0.0
    for number in column.tolist():  # not `sum`, which may compensate rounding errors
        total += number
    return total


def _first(column: Array) -> Any:
    return column[0]


def _weighted_mean(values: Array, weights: Array) -> float:
    """Return the mean of the values that have a weight; a value without one may be anything."""
    present = weights > 0
    total = _sum_in_order(weights[present])
    return _sum_in_order(values[present] * weights[present]) / total if total else float("nan")
