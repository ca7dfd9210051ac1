"""The loader of a loop: the length of its epochs, and an order that a resumed process finds again."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, Final

from torch.utils.data import DataLoader, IterableDataset

from noether.session.errors import ResumeWarning
from noether.session.randomness import GENERATORS, derive, seed_all, seed_generator

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_PARTS: Final = ("dataset", "sampler", "batch_sampler")


def epoch_lengths(data: Any, batches: int | None, steps: int, batch_size: Callable[[Any], int]) -> dict[str, int]:
    """Return `updates_per_epoch`, `samples_per_epoch` and `effective_batch_size`, as far as `data` tells them.

    Args:
        data: A loader of torch, a list of batches, or anything else that yields batches, which does not tell samples.
        batches: Batches of one epoch, which may be fewer or more than `data` holds; None if unknown.
        steps: Micro-batches of one update.
        batch_size: `batch -> number of samples`.

    Example:
        >>> import torch
        >>> loader = DataLoader(torch.arange(10), batch_size=4)
        >>> epoch_lengths(loader, batches=3, steps=2, batch_size=len)
        {'updates_per_epoch': 2, 'samples_per_epoch': 10, 'effective_batch_size': 8}
    """
    if batches is None:
        return {}
    updates = {"updates_per_epoch": -(-batches // steps)}
    sizes = _batch_sizes(data, batch_size)
    if not sizes:
        return updates
    used = [sizes[index % len(sizes)] for index in range(batches)]
    return {**updates, "samples_per_epoch": sum(used), "effective_batch_size": sum(used[:steps])}


def _batch_sizes(data: Any, batch_size: Callable[[Any], int]) -> list[int]:
    """Return the samples of each batch in one pass over `data`; empty if only reading it would tell."""
    if isinstance(data, (list, tuple)):
        return [batch_size(batch) for batch in data]
    size, dataset = getattr(data, "batch_size", None), getattr(data, "dataset", None)
    if not isinstance(size, int) or not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        return []
    sampler = getattr(data, "sampler", None)
    samples = len(sampler) if hasattr(sampler, "__len__") else len(dataset)  # type: ignore[arg-type]  # it has a length
    rest = samples % size
    return [size] * (samples // size) + ([rest] if rest and not getattr(data, "drop_last", False) else [])


def batches_per_epoch(loader: Any) -> int | None:
    """Return the number of batches that `loader` yields in an epoch, or None if only reading it would tell.

    Example:
        >>> batches_per_epoch([1, 2, 3]), batches_per_epoch(iter([1, 2, 3]))
        (3, None)
    """
    # With several workers each reads a share of an iterable dataset, which rounds up by itself.
    if isinstance(loader, DataLoader) and isinstance(loader.dataset, IterableDataset) and loader.num_workers > 1:
        return None
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return None


def epoch_iterator(loader: Any, seed: int, epoch: int) -> Iterator[Any]:
    """Return an iterator over an epoch of `loader`, whose order is a function of `(seed, epoch)`.

    Calls `set_epoch(epoch)` on the loader, its samplers and its dataset where it exists.
    """
    for part in _parts(loader):
        if hasattr(part, "set_epoch"):
            part.set_epoch(epoch)
    seed_pass(loader, seed, epoch)
    return iter(loader)


def seed_pass(loader: Any, seed: int, number: int) -> None:
    """Seed the global generators, and those that the loader, its samplers and its dataset hold, for one pass.

    Args:
        loader: Yields batches.
        seed: The seed of all passes.
        number: Which pass, such as the epoch.
    """
    for index, generator in enumerate(generators_of(loader)):
        seed_generator(generator, derive(seed, "generator of the loader", number, index))
    seed_all(derive(seed, "epoch", number))


def generators_of(loader: Any) -> list[Any]:
    """Return the generator objects that a loader, its samplers and its dataset hold, each once."""
    values = [value for part in _parts(loader) for value in getattr(part, "__dict__", {}).values()]
    return list({id(value): value for value in values if isinstance(value, GENERATORS)}.values())


def warn_if_unrepeatable(loader: Any) -> None:
    """Warn if an epoch of `loader` cannot be read again from its first batch."""
    name = type(loader).__name__
    if hasattr(loader, "__next__"):
        _warn(
            f"the loader is an iterator ({name}), which yields one epoch, once: a resumed run continues exactly only "
            "if its new iterator begins with the same batches; pass an iterable, such as a DataLoader or a list"
        )
    dataset = getattr(loader, "dataset", None)
    if hasattr(dataset, "__next__"):
        _warn(
            f"the dataset {type(dataset).__name__} is an iterator, which no checkpoint can take back to the start of "
            "an epoch: let its __iter__ return a new iterator"
        )
    if getattr(loader, "persistent_workers", False):
        _warn(
            f"the workers of the {name} stay alive between epochs, and no checkpoint has their random numbers: if "
            "the dataset draws any, pass persistent_workers=False to resume exactly"
        )


def hidden_state(loader: Any) -> dict[str, Any]:
    """Return the counters that the samplers and the dataset of `loader` hold, by name.

    If they differ after an epoch, the order depends on state that no checkpoint has. Objects with `set_epoch` are left
    out, since the loop sets their epoch.
    """
    return {
        f"{type(part).__name__}.{name}": value
        for part in _parts(loader)
        if not type(part).__module__.startswith("torch.") and not hasattr(part, "set_epoch")
        for name, value in getattr(part, "__dict__", {}).items()
        if isinstance(value, (int, float, str))
    }


def warn_about_changes(before: dict[str, Any], after: dict[str, Any]) -> bool:
    """Warn about hidden state of a loader that an epoch changed; return whether there is any."""
    changed = [name for name, value in after.items() if before.get(name, value) != value]
    if changed:
        _warn(
            f"an epoch changed {', '.join(changed)}, which no checkpoint has, so a resumed run may see another order: "
            "let the order depend on set_epoch(epoch), which is called before each epoch, or on torch's global "
            "generator"
        )
    return bool(changed)


def _warn(message: str) -> None:
    warnings.warn(message, ResumeWarning, stacklevel=5)


def _parts(loader: Any) -> list[Any]:
    """Return the loader, its dataset and its samplers, each once."""
    parts = [loader]
    for part in parts:  # grows while it is read
        inner = [getattr(part, name, None) for name in _PARTS]
        parts += [each for each in inner if each is not None and all(each is not known for known in parts)]
    return parts
