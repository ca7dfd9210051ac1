"""Results of forward and backward passes, and their sums over the micro-batches of an update."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, final

from noether.core.tensors.batch import batch_size

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    Losses = Mapping[str, Tensor]
    Grads = dict[str, Tensor | None]


def drop_empty(batches: Sequence[Any]) -> tuple[Sequence[Any], tuple[int, ...]]:
    """Return the micro-batches that have samples, and their sizes.

    The loss of a micro-batch without samples is NaN, and so would be the sum of its loss times a weight of 0.

    Example:
        >>> import torch
        >>> drop_empty([torch.ones(2), torch.ones(0), None])
        ([tensor([1., 1.])], (2,))
    """
    sizes = tuple(map(batch_size, batches))
    if 0 not in sizes:
        return batches, sizes
    return [batch for batch, size in zip(batches, sizes, strict=True) if size], tuple(filter(None, sizes))


class BackwardResult(NamedTuple):
    """Result of the forward and backward pass of one micro-batch.

    Args:
        grads: Gradient of the weighted total loss by parameter, None where the loss does not depend on it.
        losses: Mean loss of the micro-batch by name, not weighted.
        outputs: Outputs of the model.
        buffers: The model's buffers after the forward pass.
    """

    grads: Grads
    losses: Losses
    outputs: Any
    buffers: Mapping[str, Tensor]


@final
class Accumulation:
    """Sums gradients and losses over micro-batches; a single micro-batch keeps its bits.

    Example:
        >>> import torch
        >>> accumulation = Accumulation()
        >>> for loss, weight in ((1.0, 0.75), (5.0, 0.25)):
        ...     losses = {"total": torch.tensor(loss)}
        ...     accumulation.add(BackwardResult({"bias": None}, losses, f"outputs {loss}", {}), weight)
        >>> accumulation.grads, accumulation.losses, accumulation.outputs
        ({'bias': None}, {'total': tensor(2.)}, ['outputs 1.0', 'outputs 5.0'])
    """

    def __init__(self) -> None:
        self.grads: Grads = {}
        self.losses: dict[str, Tensor] = {}
        self.outputs: list[Any] = []

    def add(self, result: BackwardResult, weight: float) -> None:
        """Add a micro-batch.

        Args:
            result: Its result; the gradients are weighted already.
            weight: Its share of the samples of the update.
        """
        losses = result.losses if weight == 1 else {name: loss * weight for name, loss in result.losses.items()}
        self.grads = _add(self.grads, result.grads)
        self.losses = _add(self.losses, losses)
        self.outputs.append(result.outputs)


def _add(sums: dict[str, Any], terms: Mapping[str, Any]) -> dict[str, Any]:
    """Add the terms that are not None to `sums` and return it; a first term keeps its bits."""
    for name, term in terms.items():
        before = sums.get(name)
        sums[name] = before if term is None else term if before is None else before + term
    return sums
