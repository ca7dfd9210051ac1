"""Results of forward and backward passes, and their means over the micro-batches of an update."""

from __future__ import annotations

from functools import reduce
from operator import add
from typing import TYPE_CHECKING, Any, NamedTuple, final

from noether.core.errors import NoetherError
from noether.core.tensors.batch import count_samples
from noether.core.tensors.losses import WeightedLosses, loss_weights, with_total
from noether.core.tensors.tree import FrozenDict

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    Losses = Mapping[str, Tensor]
    Grads = dict[str, Tensor | None]
    Groups = list[tuple[str, ...]]


def drop_empty(batches: Sequence[Any], samples: Callable[[Any], int]) -> tuple[Sequence[Any], tuple[int, ...]]:
    """Return the micro-batches that have samples, and their sizes.

    The loss of a micro-batch without samples is NaN, and so would be the sum of its loss times a weight of 0.

    Args:
        batches: The micro-batches; their `sizes`, if they have this attribute, are their numbers of samples.
        samples: Returns the number of samples of any other batch.

    Example:
        >>> import torch
        >>> drop_empty([torch.ones(2), torch.ones(0)], len)
        ([tensor([1., 1.])], (2,))
    """
    sizes: tuple[int, ...] | None = getattr(batches, "sizes", None)
    if sizes is None:
        sizes = tuple([count_samples(batch, samples) for batch in batches])  # a list is faster than a generator
    if 0 not in sizes:
        return batches, sizes
    return [batch for batch, size in zip(batches, sizes, strict=True) if size], tuple(filter(None, sizes))


class BackwardResult(NamedTuple):
    """Result of the forward and backward pass of one micro-batch.

    Args:
        grads: For each objective its gradient by parameter, None where it does not depend on one.
        losses: Mean losses of the micro-batch by name.
        outputs: Outputs of the model.
        buffers: The model's buffers after the forward pass.
    """

    grads: Sequence[Grads]
    losses: Losses
    outputs: Any
    buffers: Mapping[str, Tensor]


class Gradients(NamedTuple):
    """Gradients of an update by parameter, its mean losses by name, the buffers after it, and its samples."""

    grads: Grads
    losses: Losses
    buffers: Mapping[str, Tensor]
    samples: int


class RegroupError(NoetherError):
    """The gradients of an update have to be computed again, with the losses in other groups.

    Args:
        groups: The groups.
    """

    def __init__(self, groups: Groups) -> None:
        super().__init__(groups)
        self.groups = groups


@final
class Accumulation:
    """Means of losses and of their gradients over the micro-batches of an update.

    Each loss is averaged over the micro-batches that have it, with its weights or with their samples, so the gradient
    of the sum of the means is that of one batch with all samples. If all losses are in every micro-batch and have no
    weights, one backward pass of their sum is enough. Otherwise each group of losses that have had equal weights gets
    one. A group whose weights come to differ is split, and its gradients have to be computed again.

    Args:
        samples: Samples of the update.
        groups: Groups of losses; None if they all have the same weights, the numbers of samples, as far as is known.

    Example:
        >>> import torch
        >>> accumulation = Accumulation(samples=4)
        >>> for loss, samples in ((1.0, 3), (5.0, 1)):
        ...     losses = {"total": torch.tensor(loss)}
        ...     objectives = accumulation.objectives(losses, samples)
        ...     accumulation.add(BackwardResult([{"bias": each} for each in objectives], losses, "outputs", {}))
        >>> accumulation.grads, accumulation.losses, accumulation.outputs
        ({'bias': tensor(2.)}, FrozenDict({'total': tensor(2.)}), ['outputs', 'outputs'])
    """

    def __init__(self, samples: int, groups: Groups | None = None) -> None:
        self.outputs: list[Any] = []
        self._samples = samples
        self._groups = groups
        self._shares: dict[tuple[str, ...], float] = {}
        self._weights: dict[tuple[str, ...], float] = {}
        self._grads: dict[tuple[str, ...], Grads] = {}
        self._losses: dict[str, Tensor] = {}

    @property
    def grads(self) -> Grads:
        """The gradient of the sum of the mean losses by parameter, None where it does not depend on one."""
        sums: Grads = {}
        for grads in self._grads.values():
            add_terms(sums, grads)
        return sums

    def weighted_grads(self, factors: Mapping[tuple[str, ...], float]) -> Grads:
        """Return the sum over the groups of losses of their gradients times factors.

        Args:
            factors: By group.
        """
        sums: Grads = {}
        for group, grads in self._grads.items():
            add_terms(sums, _scale_all(grads, factors[group]))
        return sums

    @property
    def losses(self) -> Losses:
        """The mean losses by name, with their sum as `total`; none if they all had weight 0."""
        if self._groups is None:
            return FrozenDict(self._losses)
        return with_total(self._losses, {name: self._weights.get(g, 0) for g in self._groups for name in g})

    def objectives(self, losses: Losses, samples: int) -> list[Tensor]:
        """Return what has to be differentiated for the next micro-batch.

        Args:
            losses: Its losses, with `total`.
            samples: Its samples.

        Raises:
            RegroupError: If its losses have other weights than those of the micro-batches before.
        """
        if self._groups is None and losses and not isinstance(losses, WeightedLosses):
            names = tuple(losses)
            if not self.outputs or self._losses.keys() == losses.keys():
                self._shares = {names: samples / self._samples}
                return [_scale(losses["total"], self._shares[names])]
        self._regroup({**dict.fromkeys(without_total(losses), samples), **loss_weights(losses)})
        return [_scale(reduce(add, [losses[name] for name in group]), share) for group, share in self._shares.items()]

    def add(self, result: BackwardResult) -> None:
        """Add the result of a micro-batch, whose gradients are those of `objectives`."""
        for (group, share), grads in zip(self._shares.items(), result.grads, strict=True):
            before = 1.0 if self._groups is None else 1 - share
            self._grads[group] = add_terms(_scale_all(self._grads.get(group, {}), before), grads)
            means = _scale_all({name: self._losses[name] for name in group if name in self._losses}, before)
            self._losses |= add_terms(means, _scale_all({name: result.losses[name] for name in group}, share))
        self.outputs.append(result.outputs)

    def _regroup(self, weights: Mapping[str, float]) -> None:
        """Set the groups of losses, and the share of the next micro-batch in the mean of each group that it has."""
        before = self._groups
        if before is None:
            before = [without_total(self._losses)] if self.outputs else []
        groups = _split(before, weights)
        if self.outputs and (self._groups is None or not set(before) <= set(groups)):
            raise RegroupError(groups)
        self._groups, self._shares = groups, {}
        for group in groups:
            weight = weights.get(group[0], 0)
            self._weights[group] = self._weights.get(group, 0) + weight
            if weight:
                self._shares[group] = weight / self._weights[group]


def without_total(losses: Losses) -> tuple[str, ...]:
    """Return the names of losses without that of their sum, which stays if it is the only one."""
    return tuple(name for name in losses if name != "total") or tuple(losses)


def _split(groups: Groups, weights: Mapping[str, float]) -> Groups:
    """Return groups of losses, with others that have weights, split so that all losses of a group have one weight.

    Example:
        >>> _split([("depth", "pose")], {"depth": 4, "size": 4})
        [('depth',), ('pose',), ('size',)]
    """
    known = {name for group in groups for name in group}
    parts: Groups = []
    for group in (*groups, tuple(name for name in weights if name not in known)):
        by_weight: dict[float, list[str]] = {}
        for name in group:
            by_weight.setdefault(weights.get(name, 0), []).append(name)
        parts += map(tuple, by_weight.values())
    return parts


def _scale(term: Tensor, factor: float) -> Tensor:
    return term if factor == 1 else term * factor  # a factor of 1 could change the type, but not the value


def _scale_all(terms: Mapping[str, Any], factor: float) -> dict[str, Any]:
    return {name: None if term is None else _scale(term, factor) for name, term in terms.items()}


def add_terms(sums: dict[str, Any], terms: Mapping[str, Any]) -> dict[str, Any]:
    """Add the terms that are not None to `sums` and return it; a first term keeps its bits."""
    for name, term in terms.items():
        before = sums.get(name)
        sums[name] = before if term is None else term if before is None else before + term
    return sums
