"""Reads a batch: its size, the inputs of the model, and the target."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final, Self, final

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import nn

TARGETS: Final = ("target", "targets", "label", "labels", "y")


def batch_size(batch: Any) -> int:
    """Return the number of samples in `batch`: the first dimension of its first tensor.

    None and an empty container have none; a `collate` that finds no usable sample may return them.

    Raises:
        ValueError: If `batch` contains no tensor with a dimension.

    Example:
        >>> import torch
        >>> batch_size((torch.zeros(8, 3), torch.zeros(8)))
        8
    """
    size = _first_dimension(batch)
    if size is None and (batch is None or (isinstance(batch, (tuple, list, Mapping)) and not batch)):
        return 0
    if size is None:
        raise ValueError(
            f"no tensor with a dimension is found in the batch, a {type(batch).__name__}: pass "
            "run=noether.Run(batch_size=...), a function of the batch that returns its number of samples"
        )
    return size


def _first_dimension(batch: Any) -> int | None:
    if isinstance(batch, torch.Tensor):
        return batch.shape[0] if batch.ndim else None
    # Tuples first: testing for a Mapping takes longer, and this runs at every update.
    parts = batch if isinstance(batch, (tuple, list)) else batch.values() if isinstance(batch, Mapping) else ()
    for part in parts:
        size = _first_dimension(part)
        if size is not None:
            return size
    return None


@final
class SizedBatches(tuple[Any, ...]):  # noqa: SLOT001  # a tuple cannot have slots
    """The micro-batches of an update, whose numbers of samples are known.

    Args:
        batches: The micro-batches.
        sizes: Samples of each.

    Example:
        >>> SizedBatches(["packed"], [3]).sizes
        (3,)
    """

    sizes: tuple[int, ...]

    def __new__(cls, batches: Iterable[Any], sizes: Iterable[int]) -> Self:
        """Return the tuple of `batches` with its `sizes`."""
        self = super().__new__(cls, batches)
        self.sizes = tuple(sizes)
        return self


def model_arguments(model: nn.Module, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the positional and keyword arguments for calling `model` on `batch`.

    A tuple or list is `(inputs, *targets)`: the model gets the first entry. From a mapping the model gets the entries
    that its `forward` names. A tensor is passed unchanged.

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
    names = _parameter_names(model.forward) if function is None else _method_parameters(function)
    return (), dict(batch) if names is None else {name: batch[name] for name in names if name in batch}


@lru_cache  # reading a signature is as slow as a small model; the key is a function, which keeps no model alive
def _method_parameters(function: Callable[..., Any]) -> tuple[str, ...] | None:
    names = _parameter_names(function)
    return None if names is None else names[1:]


def _parameter_names(function: Callable[..., Any]) -> tuple[str, ...] | None:
    """Return the names of a function's parameters, or None if it accepts any keyword."""
    parameters = inspect.signature(function).parameters.values()
    return None if any(p.kind is p.VAR_KEYWORD for p in parameters) else tuple(p.name for p in parameters)


def target_of(batch: Any) -> torch.Tensor:
    """Return the target of a batch: the second entry of a tuple, or an entry with a usual name.

    Raises:
        ValueError: If `batch` has no such entry.

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
