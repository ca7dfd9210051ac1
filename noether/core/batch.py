"""How a batch is read: its size, what of it the model takes, and what the outputs are compared with."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import torch

if TYPE_CHECKING:
    from torch import nn

TARGETS: Final = ("target", "targets", "label", "labels", "y")


def batch_size(batch: Any) -> int:
    """Return the number of samples in `batch`: the first dimension of its first tensor.

    Raises:
        ValueError: If there is no tensor with a dimension in it.

    Example:
        >>> import torch
        >>> batch_size((torch.zeros(8, 3), torch.zeros(8)))
        8
    """
    size = _first_dimension(batch)
    if size is None:
        raise ValueError(
            "the batch holds no tensor with a dimension: give Run(batch_size=...), a function of the batch"
        )
    return size


def _first_dimension(batch: Any) -> int | None:
    if isinstance(batch, torch.Tensor):
        return int(batch.shape[0]) if batch.dim() else None
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (list, tuple)) else ()
    return next((size for part in parts if (size := _first_dimension(part)) is not None), None)


def model_arguments(model: nn.Module, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the positional and keyword arguments that `model` takes of `batch`.

    A tuple or list is `(inputs, *targets)`: the model takes the first. Of a mapping the model takes the entries that
    its `forward` names. A tensor is taken as it is.

    Example:
        >>> import torch
        >>> model_arguments(torch.nn.Linear(3, 1), ("inputs", "targets"))
        (('inputs',), {})
    """
    if isinstance(batch, Mapping):
        parameters = inspect.signature(model.forward).parameters
        if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            return (), dict(batch)
        return (), {name: batch[name] for name in parameters if name in batch}
    if isinstance(batch, (tuple, list)):
        return (batch[0],), {}
    return (batch,), {}


def target_of(batch: Any) -> torch.Tensor:
    """Return what the outputs are compared with: the second entry of a tuple, or an entry with a usual name.

    Raises:
        ValueError: If `batch` holds no such entry.

    Example:
        >>> import torch
        >>> target_of({"image": torch.zeros(2, 3), "label": torch.tensor([0, 1])})
        tensor([0, 1])
    """
    found: Any = None
    if isinstance(batch, Mapping):
        found = next((batch[name] for name in TARGETS if name in batch), None)
    elif isinstance(batch, (tuple, list)) and len(batch) > 1:
        found = batch[1]
    if found is None:
        names = ", ".join(TARGETS)
        raise ValueError(f"the batch has no target: make it (inputs, target), or a dict with one of {names}")
    target: torch.Tensor = found
    return target
