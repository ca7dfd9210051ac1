"""Losses as a loop reports them: named, detached, and averaged over the micro-batches of an update."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch import Tensor

from noether.core.tensors.losses import loss_weights, separate_weights, with_total
from noether.core.tensors.means import Mean
from noether.core.tensors.tree import FrozenDict

if TYPE_CHECKING:
    from collections.abc import Sequence

Losses = Mapping[str, Tensor | float]
_NO_WEIGHTS: Final[Mapping[str, float]] = FrozenDict()
ReportedLosses = Tensor | float | Mean | Mapping[str, Tensor | float | Mean]
"""One loss, or several by name."""
EMPTY_UPDATE: Final = (
    "update %d has no samples: all its micro-batches are empty. It is skipped, and counts as an update of 0 samples; "
    "this is logged once"
)


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """One reported micro-batch.

    Args:
        samples: Samples in it; the session leaves out a micro-batch that has none.
        losses: Mean losses by name, with `total`; empty if its step was left out.
        outputs: What the model returned for it.
    """

    samples: int
    losses: Losses
    outputs: Any


def named_losses(losses: ReportedLosses) -> Losses:
    """Return detached losses by name, with their sum as `total`; a single loss is the total.

    Args:
        losses: One mean loss, or several by name; each a number or a tensor with one element, or a `Mean` of it with
            its weight. A loss of weight 0 is left out.

    Raises:
        TypeError: If a loss is neither, or a name is not text.
        ValueError: If one is called `total` beside others, or a weight is not one finite number >= 0.

    Example:
        >>> named_losses({"mse": 0.5, "l1": 0.25})
        FrozenDict({'mse': 0.5, 'l1': 0.25, 'total': 0.75})
        >>> named_losses(0.5)
        FrozenDict({'total': 0.5})
    """
    if isinstance(losses, Tensor):  # the common case needs no sum and no weights
        return FrozenDict(total=_detach("total", losses))
    if not isinstance(losses, Mapping):
        losses = {"total": losses}
    elif "total" in losses and len(losses) > 1:
        others = [name for name in losses if name != "total"]
        raise ValueError(
            f"'total' is reported beside {others}, whose sum the session adds as 'total': leave 'total' out in "
            "session.update(losses) and session.micro_batch(losses)"
        )
    if Mean not in map(type, losses.values()):
        return with_total({name: _detach(name, loss) for name, loss in losses.items()}, _NO_WEIGHTS)
    separated = separate_weights(losses)
    return with_total({name: _detach(name, loss) for name, loss in separated.items()}, separated.weights)


def _detach(name: Any, loss: Any) -> Any:
    if not isinstance(name, str):
        raise TypeError(f"the name of a loss is {name!r}, of type {type(name).__name__}: use text, {{'mse': loss}}")
    if isinstance(loss, Tensor):
        if loss.dtype is torch.bool or loss.is_complex():
            raise TypeError(f"loss {name!r} has dtype {loss.dtype}: report a real number")
        if loss.dim() == 0:
            return loss.detach().clone()  # a loop may write the next loss into the same tensor
        if loss.numel() == 1:
            return loss.detach().reshape(()).clone()
        raise TypeError(f"loss {name!r} has shape {tuple(loss.shape)}: report its mean over samples, loss.mean()")
    if isinstance(loss, (np.floating, np.integer)):
        return loss.item()
    if isinstance(loss, (int, float)) and not isinstance(loss, bool):
        return loss
    raise TypeError(
        f"loss {name!r} is of type {type(loss).__name__}: report a real number, a tensor with one element, or a "
        "dict of these"
    )


def is_finite(loss: Tensor | float) -> Tensor | bool:
    """Return whether a loss is finite, on its device."""
    return loss.isfinite() if isinstance(loss, Tensor) else math.isfinite(loss)


def mean_losses(micro_batches: Sequence[MicroBatch]) -> Losses:
    """Return the mean of each loss over the micro-batches that have it, weighted by samples or by its weights.

    With weights, `total` is the sum of the means of the other losses, as in noether's step.

    Example:
        >>> mean_losses([MicroBatch(samples=3, losses={"total": 1.0}, outputs=None),
        ...     MicroBatch(samples=1, losses={"total": 5.0}, outputs=None)])
        FrozenDict({'total': 2.0})
    """
    if len(micro_batches) == 1:
        return micro_batches[0].losses
    parts: dict[str, list[tuple[Any, float]]] = {}
    for each in micro_batches:
        weights = loss_weights(each.losses)
        for name, loss in each.losses.items():
            parts.setdefault(name, []).append((loss, weights.get(name, each.samples)))
    means = {name: _mean(weighted) for name, weighted in parts.items()}
    if not any(loss_weights(each.losses) for each in micro_batches):
        return FrozenDict(means)
    named = {name: mean for name, mean in means.items() if name != "total" or len(means) == 1}
    return with_total(named, {name: sum(weight for _, weight in parts[name]) for name in named})


def _mean(weighted: list[tuple[Any, float]]) -> Any:
    if len(weighted) == 1:  # unchanged: multiplication by one keeps a number, but not always its type
        return weighted[0][0]
    total = sum(weight for _, weight in weighted)
    first, *others = (loss * (weight / total) for loss, weight in weighted)
    return sum(others, start=first)
