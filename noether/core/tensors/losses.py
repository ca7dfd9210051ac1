"""Losses by name, as a loss function returns them: checked, with their weights and their total."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import reduce
from operator import add
from typing import TYPE_CHECKING, Any, Final, final

from torch import Tensor

from noether.core.callables import without_partial
from noether.core.tensors.means import Mean, read_weight
from noether.core.tensors.tree import FrozenDict

if TYPE_CHECKING:
    from typing import TypeAlias

Losses = Mapping[str, Tensor]
LossResult: TypeAlias = "Tensor | Mean | Mapping[str, Tensor | Mean]"
"""What a loss function returns: one loss, or several by name."""
_NO_WEIGHTS: Final = FrozenDict()


@final
class WeightedLosses(FrozenDict):
    """Losses of which some are means over something else than samples.

    Args:
        losses: 0-dimensional tensors by name, with their sum as `total`.
        weights: Weight of each loss that has one, > 0.

    Example:
        >>> import torch
        >>> losses = WeightedLosses({"ce": torch.tensor(2.0), "total": torch.tensor(2.0)}, {"ce": 12})
        >>> losses["ce"], losses.weights
        (tensor(2.), {'ce': 12})
    """

    __slots__ = ("weights",)

    def __init__(self, losses: Mapping[str, Any], weights: Mapping[str, float]) -> None:
        super().__init__(losses)
        self.weights = weights

    def __reduce__(self) -> Any:
        return WeightedLosses, (dict(self), dict(self.weights))


def loss_weights(losses: Mapping[str, Any]) -> Mapping[str, float]:
    """Return the weights of the losses that have one, by name; the others are means over samples."""
    return losses.weights if isinstance(losses, WeightedLosses) else _NO_WEIGHTS


def read_losses(result: Any, function: Callable[..., Any]) -> Losses:
    """Return the result of a loss function as losses by name, together with their sum, named `total`.

    Args:
        result: One real 0-dimensional tensor, which is named `loss`, or several by name. A `Mean` gives its weight; a
            loss of weight 0 is left out.
        function: The function that returned it, for messages.

    Raises:
        TypeError: If it is something else.
        ValueError: If there is no loss, one of several is named `total`, or a weight is not one finite number >= 0.

    Example:
        >>> import torch
        >>> read_losses(torch.tensor(0.5), torch.nn.functional.mse_loss)
        FrozenDict({'loss': tensor(0.5000), 'total': tensor(0.5000)})
        >>> loss_weights(read_losses({"ce": Mean(torch.tensor(2.0), weight=12)}, torch.nn.functional.cross_entropy))
        {'ce': 12}
    """
    if not isinstance(result, (dict, Mapping)):  # testing for a dict is faster
        if not isinstance(result, (Tensor, Mean)):
            raise TypeError(_describe_result(result, function))
        result = {"loss": result}
    losses: dict[str, Tensor] = {}
    weights: dict[str, float] = {}
    for name, loss in result.items():
        value = loss
        if isinstance(loss, Mean):
            value = loss.of_batch
            if loss.weight is not None:
                weights[name] = read_weight(name, loss.weight)
        if not isinstance(value, Tensor) or value.ndim or not value.is_floating_point() or type(name) is not str:
            raise TypeError(_describe_loss(name, value, function))
        if weights.get(name) != 0:
            losses[name] = value
    if not result or ("total" in result and len(result) > 1):
        raise ValueError(
            f"{name_of(function)} must return named losses, 'total' not among them, which is their sum; it returned "
            f"{list(result)}"
        )
    return with_total(losses, weights)


def separate_weights(losses: Mapping[str, Any]) -> WeightedLosses:
    """Return losses of which some are a `Mean` as values and weights, without those of weight 0.

    Raises:
        ValueError: If a weight is not one finite number >= 0.

    Example:
        >>> separate_weights({"ce": Mean(2.0, weight=12), "l1": 0.5, "absent": Mean(0.0, weight=0)}).weights
        {'ce': 12}
    """
    weights = {
        name: read_weight(name, loss.weight)
        for name, loss in losses.items()
        if isinstance(loss, Mean) and loss.weight is not None
    }
    values = {name: loss.of_batch if isinstance(loss, Mean) else loss for name, loss in losses.items()}
    present = {name: value for name, value in values.items() if weights.get(name) != 0}
    return WeightedLosses(present, {name: weight for name, weight in weights.items() if weight})


def with_total(losses: Mapping[str, Any], weights: Mapping[str, float]) -> Losses:
    """Return losses with their sum as `total`, and with the weights that are not 0.

    Example:
        >>> with_total({"mse": 0.5, "l1": 0.25}, {})
        FrozenDict({'mse': 0.5, 'l1': 0.25, 'total': 0.75})
    """
    named = {**losses, "total": reduce(add, losses.values())} if losses else losses
    return WeightedLosses(named, {name: w for name, w in weights.items() if w}) if weights else FrozenDict(named)


def sum_as_total(means: Mapping[str, Any]) -> dict[str, Any]:
    """Return means of losses over several batches, in which `total` is the sum of the others if there are others.

    Losses of different weights have no common mean. This sum does not depend on how the samples are cut into batches.

    Example:
        >>> sum_as_total({"ce": 2.0, "l1": 0.5, "total": 2.25})
        {'ce': 2.0, 'l1': 0.5, 'total': 2.5}
    """
    others = [mean for name, mean in means.items() if name != "total"]
    return {**means, "total": reduce(add, others)} if others and "total" in means else dict(means)


def detach_losses(losses: Losses) -> Losses:
    """Return losses without their graphs, with the same weights."""
    detached: dict[str, Tensor] = {}
    graph = value = None
    for name, loss in losses.items():
        if value is None or loss is not graph:  # the total of one loss is this loss
            graph, value = loss, loss.detach()
        detached[name] = value
    return WeightedLosses(detached, losses.weights) if isinstance(losses, WeightedLosses) else FrozenDict(detached)


def name_of(function: Any) -> str:
    """Return the name of a function, or of that inside of a `functools.partial`, for messages.

    Example:
        >>> name_of(read_losses)
        'noether.core.tensors.losses.read_losses'
    """
    function = function if hasattr(function, "__qualname__") else without_partial(function)
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}.{named.__qualname__}"


def _describe_result(result: object, function: Callable[..., Any]) -> str:
    found = "nothing" if result is None else f"a {type(result).__name__}"
    fix = "without .item()" if isinstance(result, (int, float)) else "such as {'mse': mse}"
    return f"{name_of(function)} returned {found}: return the loss, a 0-dimensional tensor, or several by name, {fix}"


def _describe_loss(name: object, value: object, function: Callable[..., Any]) -> str:
    where = f"{name_of(function)} returned the loss {name!r}"
    if type(name) is not str:
        return f"{where}, whose name is not text: return losses by name, such as {{'mse': mse}}"
    if not isinstance(value, Tensor):
        fix = ", without .item()" if isinstance(value, (int, float)) else ""
        kind = type(value).__name__
        found = "None" if value is None else f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"
        return f"{where} as {found}: return a 0-dimensional tensor{fix}"
    if value.ndim:
        return f"{where} of shape {tuple(value.shape)}, but it must be one real number: take the mean, {name}.mean()"
    return f"{where} of type {value.dtype}, but it must be one real number of floating point"
