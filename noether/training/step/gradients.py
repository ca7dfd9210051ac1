"""Gradients of a loss: computed, measured and clipped."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from noether.core.tensors.gradients import dense_values
from noether.core.tensors.losses import name_of
from noether.core.tensors.torch_internals import run_backward, write_counts

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from noether.training.step.accumulation import Grads, Losses

_SHOWN: Final = 3
"""Largest number of nonfinite losses and gradients that an error names."""


def compute_gradients(loss: Tensor, leaves: Sequence[Tensor], *, keep_graph: bool = False) -> Sequence[Tensor | None]:
    """Return the gradient of `loss` with respect to each of `leaves`, None where it does not depend on one.

    On the CPU it skips the Python code of `torch.autograd.grad`, which takes a fifteenth of a small network's update;
    the bits are the same. On an accelerator, torch has to pass more than the graph to its device threads.

    Args:
        loss: One real number.
        leaves: They require gradients.
        keep_graph: Whether another loss of the same graph will be differentiated.

    Raises:
        ValueError: If `loss` is not one real number.

    Example:
        >>> weight, bias = torch.tensor(2.0, requires_grad=True), torch.tensor(1.0, requires_grad=True)
        >>> compute_gradients(weight.square(), [weight, bias])
        (tensor(4.), None)
    """
    if loss.numel() != 1 or loss.is_complex():
        raise ValueError(
            f"the loss has shape {tuple(loss.shape)} and type {loss.dtype}, but it must be one real number: take "
            "the mean over samples"
        )
    if not loss.requires_grad:
        return [None] * len(leaves)
    if type(loss) is Tensor and loss.is_cpu:
        grads = run_backward(loss, leaves, keep_graph=keep_graph)
    else:
        grads = torch.autograd.grad(loss, leaves, allow_unused=True, retain_graph=keep_graph)
    # The backward pass of a custom autograd function may return a tensor that requires gradients.
    if True in [grad is not None and grad.requires_grad for grad in grads]:
        return [None if grad is None else grad.detach() for grad in grads]
    return grads


def total_norm(grads: Mapping[str, Tensor | None]) -> Tensor:
    """Return the 2-norm of all gradients together."""
    return get_total_norm([dense_values(grad) for grad in grads.values() if grad is not None])


def traceable_total_norm(grads: Mapping[str, Tensor | None]) -> Tensor:
    """Return `total_norm` up to the last bits; `torch.compile` of torch 2.10 can trace this function only."""
    norms = [torch.linalg.vector_norm(dense_values(grad)) for grad in grads.values() if grad is not None]
    total: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return total


def clip_values(grads: Grads, limit: float) -> Grads:
    """Return gradients with each entry clamped to `[-limit, limit]`."""
    return {name: None if grad is None else grad.clamp(-limit, limit) for name, grad in grads.items()}


def clip_norm(grads: Grads, norm: Tensor, limit: float) -> Grads:
    """Return gradients scaled down to the total 2-norm `limit`, as `torch.nn.utils.clip_grad_norm_` does.

    Args:
        grads: Gradients by name; not scaled in place, because two of them may be one tensor.
        norm: Their total 2-norm.
        limit: The largest norm.
    """
    factor = torch.clamp(limit / (norm + 1e-6), max=1.0)
    # `to`: a factor of higher precision would promote a gradient without dimensions to its dtype.
    return {name: None if grad is None else (grad * factor).to(grad.dtype) for name, grad in grads.items()}


def all_finite(grads: Mapping[str, Tensor | None]) -> Tensor | bool:
    """Return whether every entry of every gradient is finite."""
    values = [dense_values(grad) for grad in grads.values() if grad is not None]
    largest = [torch.linalg.vector_norm(each, torch.inf) for each in values if each.numel()]
    return torch.stack(largest).isfinite().all() if largest else True


def describe_nonfinite(losses: Losses, grads: Grads) -> str:
    """Return a list, for an error message, of the losses and gradients that are not finite."""
    nonfinite = [f"loss {name!r} is {loss.item()}" for name, loss in losses.items() if not loss.isfinite()]
    nonfinite += [
        f"the gradient of {name!r} is not finite"
        for name, grad in grads.items()
        if grad is not None and not dense_values(grad).isfinite().all()
    ]
    others = len(nonfinite) - _SHOWN
    return ", ".join(nonfinite[:_SHOWN]) + (f" (and {others} more)" if others > 0 else "")


def refuse_constants(losses: Losses, function: Callable[..., Any]) -> None:
    """Refuse losses of which none has a gradient.

    Args:
        losses: The losses by name.
        function: The loss function.

    Raises:
        ValueError: Always; the message names the losses.
    """
    names = ", ".join(repr(name) for name in losses if name != "total")
    raise ValueError(
        f"{name_of(function)} returned {names or 'its loss'} without a gradient: the model and the loss must not call "
        "detach(), item(), numpy() or torch.no_grad() on the way to it, or compute it from argmax or round alone"
    )


def refuse_writes(params: Mapping[str, Tensor], counts: Sequence[int]) -> None:
    """Refuse a model whose forward wrote to its parameters.

    Args:
        params: The parameters by name, after forward.
        counts: Their `write_counts` before it; at least one differs.

    Raises:
        ValueError: With the name of the first parameter that was written to.
    """
    now = write_counts(params.values())
    changed = (name for name, count, before in zip(params, now, counts, strict=True) if count != before)
    raise ValueError(
        f"the model writes to its parameter {next(changed)!r} in forward, but a model must not write to tensors of "
        "a state: compute with a clamped or renormalized copy, or make it a buffer"
    )
