"""How a batch is read: its size, what of it the model takes, and what the outputs are compared with."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

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
        return batch.shape[0] if batch.ndim else None
    # Tuples first: to ask whether something is a Mapping takes longer, and this is asked at every update.
    parts = batch if isinstance(batch, (tuple, list)) else batch.values() if isinstance(batch, Mapping) else ()
    for part in parts:
        size = _first_dimension(part)
        if size is not None:
            return size
    return None


def model_arguments(model: nn.Module, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the positional and keyword arguments that `model` takes of `batch`.

    A tuple or list is `(inputs, *targets)`: the model takes the first. Of a mapping the model takes the entries that
    its `forward` names. A tensor is taken as it is.

    Example:
        >>> import torch
        >>> model_arguments(torch.nn.Linear(3, 1), ("inputs", "targets"))
        (('inputs',), {})
    """
    if isinstance(batch, (tuple, list)):
        return (batch[0],), {}
    if isinstance(batch, torch.Tensor) or not isinstance(batch, Mapping):
        return (batch,), {}
    function = getattr(model.forward, "__func__", None)
    names = _named_by(model.forward) if function is None else _named_by_method(function)
    return (), dict(batch) if names is None else {name: batch[name] for name in names if name in batch}


@lru_cache  # to read a signature takes as long as to call a small model; a method's function keeps no model alive
def _named_by_method(function: Callable[..., Any]) -> tuple[str, ...] | None:
    names = _named_by(function)
    return None if names is None else names[1:]


def _named_by(function: Callable[..., Any]) -> tuple[str, ...] | None:
    """Return the names of the parameters of a function, or None if it takes any."""
    parameters = inspect.signature(function).parameters.values()
    return None if any(p.kind is p.VAR_KEYWORD for p in parameters) else tuple(p.name for p in parameters)


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
