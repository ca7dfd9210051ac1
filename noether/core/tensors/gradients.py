"""Values and copies of gradients, whose memory an optimizer or a loop overwrites."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor


def dense_values(grad: Tensor) -> Tensor:
    """Return the stored values of a gradient as a dense tensor, because torch has no norms of sparse ones."""
    return grad.coalesce().values() if grad.is_sparse else grad


def copy_gradients(grads: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """Return dense copies of the gradients, as `AfterUpdate.gradients` has them, without those that are None.

    A loop overwrites its gradients in the next update (`zero_grad`, buckets of an all-reduce), and an optimizer may
    write to them; nothing writes to the copies.

    Args:
        grads: Gradients by name of parameter; shapes, dtypes and devices stay those of the gradients.

    Example:
        >>> import torch
        >>> grads = {"weight": torch.ones(2), "unused": None}
        >>> copies = copy_gradients(grads)
        >>> grads["weight"].zero_()
        tensor([0., 0.])
        >>> copies
        {'weight': tensor([1., 1.])}
    """
    return {
        name: grad.detach().to_dense() if grad.is_sparse else grad.detach().clone()
        for name, grad in grads.items()
        if grad is not None
    }
