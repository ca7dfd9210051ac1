"""Results of one batch that say how they are combined over several batches: a mean with its weight, or a sum."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, final

import torch


@final
@dataclass(frozen=True)
class Mean:
    """A mean over a batch; over several batches it becomes their weighted mean.

    A loss function returns it for a loss that is not a mean over samples, such as the loss of a language model, which
    is a mean over tokens. `process_data` and metrics return it, too.

    Args:
        of_batch: 0-dimensional, the mean over the batch. From `process_data` and metrics also `(batch,)`, one value per
            sample, without a weight.
        weight: What the mean is taken over, such as the number of tokens: one finite number >= 0; None for the number
            of samples. With weight 0 the batch does not count, even if its mean is NaN. Reading a tensor on an
            accelerator waits for the device; a number does not.

    Example:
        >>> import torch
        >>> tokens = torch.tensor([[4, 7, -100], [5, -100, -100]])
        >>> scores = torch.zeros(2, 3, 8)
        >>> loss = torch.nn.functional.cross_entropy(scores.flatten(0, 1), tokens.flatten())
        >>> Mean(loss, weight=(tokens != -100).sum())
        Mean(of_batch=tensor(2.0794), weight=tensor(3))
    """

    of_batch: torch.Tensor
    weight: torch.Tensor | float | None = None


@final
@dataclass(frozen=True)
class Sum:
    """A sum over a batch, returned by `process_data`; it becomes the sum over the dataset.

    Args:
        of_batch: 0-dimensional. Floating point is summed in double precision.
    """

    of_batch: torch.Tensor


def read_weight(name: str, weight: Any) -> float:
    """Return the weight of a mean as a number.

    Args:
        name: Name of the mean, for messages.
        weight: As for `Mean`; on the meta device, where tensors have no values, it is 1.

    Raises:
        ValueError: If it is not one finite number >= 0.

    Example:
        >>> read_weight("ce", torch.tensor(12))
        12
    """
    value = weight
    if isinstance(weight, torch.Tensor):
        if weight.is_meta:
            return 1
        value = weight.item() if weight.ndim == 0 else None
    elif getattr(weight, "ndim", None) == 0:  # a number of numpy
        value = weight.item()
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        found = f"a tensor of shape {tuple(weight.shape)}" if getattr(weight, "ndim", 0) else repr(value)
        raise ValueError(
            f"the weight of {name!r} is {found}: pass Mean(..., weight=n), one finite number >= 0 such as a number of "
            "tokens"
        )
    return value
