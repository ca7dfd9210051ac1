"""Losses of all ranks: which of them are averaged with equal weights, and their means."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self

import torch

from noether.core.tensors.losses import loss_weights
from noether.training.step.accumulation import without_total

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from noether.core.event import AfterAccumulationStep
    from noether.training.step.accumulation import Groups, Losses

DIGEST_BYTES: Final = 8


class LossNames(NamedTuple):
    """Names of losses in their order, with what a rank that has no losses needs to know of them.

    Args:
        names: The names.
        dtypes: Dtype of each, without `torch.`.
        weighted: Those that are means over something else than samples.
    """

    names: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    weighted: frozenset[str] = frozenset()


@lru_cache(maxsize=64)
def digest_of(known: LossNames) -> bytes:
    """Return a hash that differs for other names, dtypes or weights."""
    text = repr((known.names, known.dtypes, sorted(known.weighted)))
    return hashlib.sha256(text.encode()).digest()[:DIGEST_BYTES]


class RankLosses(NamedTuple):
    """Losses of one rank in an update.

    Args:
        known: Their names.
        weights: Weight of each loss in each micro-batch, by name.
        means: Mean of each over the micro-batches, by name.
    """

    known: LossNames
    weights: Mapping[str, tuple[float, ...]]
    means: Mapping[str, Tensor]

    @classmethod
    def of(cls, steps: Sequence[AfterAccumulationStep], means: Losses) -> Self:
        """Return the losses of the micro-batches of a rank.

        Args:
            steps: The micro-batches.
            means: Means over them; `total` is left out if it is the sum of others.
        """
        names = without_total(means) if means else ()
        columns: dict[str, list[float]] = {name: [] for name in names}
        weighted: set[str] = set()
        for step in steps:
            own: Mapping[str, float] = loss_weights(step.losses)
            weighted.update(own)
            for name, column in columns.items():
                column.append(own.get(name, step.samples) if name in step.losses else 0)
        dtypes = tuple(str(means[name].dtype).removeprefix("torch.") for name in names)
        known = LossNames(tuple(names), dtypes, frozenset(weighted & columns.keys()))
        return cls(known, {name: tuple(column) for name, column in columns.items()}, {n: means[n] for n in names})

    @property
    def have_one_weight(self) -> bool:
        """Whether all losses have equal weights in each micro-batch, so that one gradient is enough."""
        return len(set(self.weights.values())) <= 1

    @property
    def weight(self) -> float:
        """Weight of the losses, if all have the same; 0 if there are none."""
        return sum(next(iter(self.weights.values()), ()))

    def pack(self) -> Any:
        """Return what other ranks need, as a tree that can be gathered."""
        names, dtypes, weighted = self.known
        return tuple(
            (name, dtype, name in weighted, self.weights[name], self.means[name].double().cpu())
            for name, dtype in zip(names, dtypes, strict=True)
        )


class GatheredLosses(NamedTuple):
    """Losses of all ranks in an update, as each rank knows them after an exchange.

    Args:
        known: Their names, in the order in which ranks have them first.
        groups: Groups of losses that have equal weights in each micro-batch of each rank.
        weights: Weight of each loss on each rank, by name.
        means: Mean of each loss over all ranks by name, on the CPU.
    """

    known: LossNames
    groups: Groups
    weights: Mapping[str, Sequence[float]]
    means: Mapping[str, Tensor]

    @classmethod
    def of(cls, tables: Sequence[Any]) -> Self:
        """Return the losses from what each rank packed.

        Example:
            >>> one = torch.ones((), dtype=torch.float64)
            >>> rank_0 = (("ce", "float32", True, (12,), 2 * one), ("l1", "float32", False, (4,), one))
            >>> rank_1 = (("l1", "float32", False, (4,), 3 * one),)
            >>> gathered = GatheredLosses.of([rank_0, rank_1])
            >>> gathered.groups, gathered.weights, gathered.means
            ([('ce',), ('l1',)], {'ce': [12, 0], 'l1': [4, 4]}, {'ce': tensor(2.), 'l1': tensor(2.)})
        """
        dtypes: dict[str, str] = {}
        weighted: set[str] = set()
        by_rank = [{row[0]: row for row in table} for table in tables]
        for table in tables:
            for name, dtype, is_weighted, *_ in table:
                dtypes.setdefault(name, dtype)
                weighted |= {name} if is_weighted else set()
        groups: dict[Any, list[str]] = {}
        for name in dtypes:
            groups.setdefault(tuple(rows[name][3] if name in rows else () for rows in by_rank), []).append(name)
        weights = {name: [sum(rows[name][3]) if name in rows else 0 for rows in by_rank] for name in dtypes}
        means = {}
        for name, dtype in dtypes.items():
            total = sum(float(rows[name][4]) * sum(rows[name][3]) for rows in by_rank if name in rows)
            means[name] = torch.tensor(total / sum(weights[name]), dtype=getattr(torch, dtype))
        known = LossNames(tuple(dtypes), tuple(dtypes.values()), frozenset(weighted))
        return cls(known, [tuple(names) for names in groups.values()], weights, means)

    def shares(self, rank: int) -> dict[tuple[str, ...], float]:
        """Return the share of a rank in the mean of each group."""
        return {group: self.weights[group[0]][rank] / sum(self.weights[group[0]]) for group in self.groups}

    def to(self, device: torch.device) -> dict[str, Tensor]:
        """Return the means on a device."""
        return {name: mean.to(device) for name, mean in self.means.items()}

    @property
    def total_weights(self) -> dict[str, float]:
        """Weight of each loss over all ranks, by name."""
        return {name: sum(each) for name, each in self.weights.items()}
