"""How long an epoch is, as far as what yields its batches tells."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable


def lengths_of(data: Any, batches: int | None, steps: int, batch_size: Callable[[Any], int]) -> dict[str, int]:
    """Return those of `updates_per_epoch`, `samples_per_epoch` and `effective_batch_size` that can be known.

    Args:
        data: What yields the batches: a loader of torch, a list of batches, or anything else, which tells nothing.
        batches: Batches of one epoch, which may be fewer than `data` holds, or more; None if nobody knows.
        steps: Micro-batches of one update.
        batch_size: `batch -> number of samples`.

    Example:
        >>> import torch
        >>> loader = torch.utils.data.DataLoader(torch.arange(10), batch_size=4)
        >>> lengths_of(loader, batches=3, steps=2, batch_size=len)
        {'updates_per_epoch': 2, 'samples_per_epoch': 10, 'effective_batch_size': 8}
    """
    if batches is None:
        return {}
    sizes = _sizes(data, batch_size)
    updates = {"updates_per_epoch": -(-batches // steps)}
    if not sizes:
        return updates
    taken = [sizes[index % len(sizes)] for index in range(batches)]
    return {**updates, "samples_per_epoch": sum(taken), "effective_batch_size": sum(taken[:steps])}


def _sizes(data: Any, batch_size: Callable[[Any], int]) -> list[int]:
    """Return the samples of each batch in one pass over `data`; nothing if that cannot be told without reading it."""
    if isinstance(data, (list, tuple)):
        return [batch_size(batch) for batch in data]
    size, dataset = getattr(data, "batch_size", None), getattr(data, "dataset", None)
    if not isinstance(size, int) or not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        return []
    sampler = getattr(data, "sampler", None)
    samples = len(sampler) if hasattr(sampler, "__len__") else len(dataset)  # type: ignore[arg-type]  # it has a length
    rest = samples % size
    return [size] * (samples // size) + ([rest] if rest and not getattr(data, "drop_last", False) else [])
