"""Losses in the output of a framework's step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from noether.core.tensors.means import Mean


def losses_of(outputs: Any) -> Mapping[str, Any]:
    """Return the losses in the output of a step: a number, a 0-dimensional tensor, or the entry `loss` of a mapping.

    A `Mean` of one of these gives the loss its weight.

    Raises:
        TypeError: If the output is something else.

    Example:
        >>> losses_of(0.5), losses_of({"loss": 0.5, "accuracy": 1.0})
        ({'total': 0.5}, {'total': 0.5})
    """
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
    if isinstance(loss, Mean):
        return {"total": loss}
    if isinstance(loss, (int, float)) or (isinstance(loss, torch.Tensor) and loss.numel() == 1):
        return {"total": loss.reshape(()) if isinstance(loss, torch.Tensor) else float(loss)}
    if outputs is None:
        raise TypeError(
            "the step returned nothing, and callbacks need its loss: return the loss, alone or as 'loss' of a dict"
        )
    kind = f"a mapping with {list(outputs)}" if isinstance(outputs, Mapping) else f"a {type(outputs).__name__}"
    raise TypeError(
        f"the step returned {kind}, in which no loss was found: return the loss or a mapping with 'loss', or pass "
        "losses=, a function of the output such as lambda outputs: {'mse': outputs[0]}"
    )
