"""Gradients of a loss, past the Python that `torch.autograd.grad` goes through, to the same bits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from noether.core.tensors.torch_internals import run_backward

if TYPE_CHECKING:
    from collections.abc import Sequence


def gradients_of(loss: Tensor, leaves: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """Return the gradient of `loss` with respect to each of `leaves`, None where it does not depend on it.

    Most of what `torch.autograd.grad` does first is for other calls than this one; of a small network's update it takes
    a fifteenth. An accelerator has threads of its own, to which torch hands on more than the graph.

    Args:
        loss: One real number.
        leaves: They require gradients.

    Raises:
        ValueError: If `loss` is not one real number.

    Example:
        >>> weight, bias = torch.tensor(2.0, requires_grad=True), torch.tensor(1.0, requires_grad=True)
        >>> gradients_of(weight.square(), [weight, bias])
        (tensor(4.), None)
    """
    if loss.numel() != 1 or loss.is_complex():
        raise ValueError(
            f"the loss has shape {tuple(loss.shape)} and type {loss.dtype}; a gradient is that of one real number: "
            "take the mean over samples"
        )
    if type(loss) is Tensor and loss.is_cpu:
        found = run_backward(loss, leaves)
    else:
        found = torch.autograd.grad(loss, leaves, allow_unused=True)
    # The backward pass of a function of somebody's own may return what requires gradients itself.
    if True in [grad is not None and grad.requires_grad for grad in found]:
        return [None if grad is None else grad.detach() for grad in found]
    return found
