"""The loader of a loop: the length of its epochs, and an order that a resumed process finds again."""

from __future__ import annotations

import logging
import warnings
from typing import TYPE_CHECKING, Any, Final

import torch
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, TensorDataset, default_collate

from noether.core.object_graph import parts_of_loader
from noether.core.tensors.batch import UnknownBatchSizeError
from noether.core.tensors.batch import batch_size as count_rows
from noether.core.tensors.tree import freeze, tensors
from noether.session.errors import ResumeWarning, SessionError
from noether.session.hidden_state import find_unseedable, generators_of
from noether.session.randomness import derive, seed_all, seed_generator, seed_torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from noether.core.state import TrainState

_LOGGER: Final = logging.getLogger(__name__)


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
    used = [sizes[index % len(sizes)] for index in range(batches)] if sizes else []
    first = sum(used[:steps])
    if not first:  # unknown, or the batches of the first update are empty, so that it tells nothing about the others
        return updates
    return {**updates, "samples_per_epoch": sum(used), "effective_batch_size": first}


def _batch_sizes(data: Any, batch_size: Callable[[Any], int]) -> list[int]:
    """Return the samples of each batch in one pass over `data`; empty if only reading it would tell."""
    if isinstance(data, (list, tuple)):
        try:
            return [batch_size(batch) for batch in data]
        except UnknownBatchSizeError:  # the loop may pass the samples of each batch
            return []
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
    return _length(loader)


def has_exact_length(loader: Any) -> bool:
    """Return whether `len(loader)` is certainly the number of batches of each epoch.

    Example:
        >>> has_exact_length([1, 2]), has_exact_length(DataLoader([1, 2])), has_exact_length(range(2))
        (True, True, False)
    """
    if type(loader) is not DataLoader:
        return type(loader) in {list, tuple}
    return not isinstance(loader.dataset, IterableDataset) and _has_samplers_of_torch(loader)


def _has_samplers_of_torch(loader: DataLoader[Any]) -> bool:
    samplers = [loader.sampler, loader.batch_sampler]
    for sampler in samplers:  # grows while it is read: a BatchSampler has a sampler
        if sampler is not None and not type(sampler).__module__.startswith("torch.utils.data."):
            return False
        samplers += [inner] if (inner := getattr(sampler, "sampler", None)) is not None else []
    return True


def check_not_empty(loader: Any) -> None:
    """Refuse a loader without batches.

    Raises:
        SessionError: If its length is 0.
    """
    if batches_per_epoch(loader) != 0:
        return
    samples, size = _length(getattr(loader, "sampler", None)), getattr(loader, "batch_size", None)
    if getattr(loader, "drop_last", False) and samples and size:
        raise SessionError(
            f"the loader yields no batch: drop_last=True drops its only one, of {samples} samples with "
            f"batch_size={size}: pass drop_last=False, or a smaller batch_size"
        )
    raise SessionError(f"the loader is empty (its len() is 0), a {type(loader).__name__}: pass one that yields batches")


def _length(value: Any) -> int | None:
    try:
        return len(value)
    except (TypeError, NotImplementedError):
        return None


def describe_share(dataset: Any) -> str:
    """Return how the workers of a stream read a share each."""
    return (
        f"yield the share of a worker from __iter__ of {type(dataset).__name__}, such as itertools.islice(samples, "
        "info.id, None, info.num_workers) with info = torch.utils.data.get_worker_info()"
    )


def compare_workers(loader: Any, batches: Iterator[Any]) -> Iterator[Any]:
    """Yield the batches of a loader; log a warning if two workers yield the same first batch of a stream."""
    is_shared = isinstance(loader, DataLoader) and isinstance(loader.dataset, IterableDataset)
    before: list[Tensor] = []
    for index, batch in enumerate(batches):
        if is_shared and index < min(loader.num_workers, 2):
            found = [tensor.clone() for _, tensor in tensors(freeze(batch))]
            if index == 1 and _are_equal(before, found):
                _LOGGER.warning(
                    "the first batches of two workers are equal: each of the %d workers of the DataLoader reads all of "
                    "the stream, so an epoch has every sample as many times: %s, or set num_workers=0",
                    loader.num_workers,
                    describe_share(loader.dataset),
                )
            before = found
        yield batch


def _are_equal(before: list[Tensor], found: list[Tensor]) -> bool:
    """Return whether two batches are equal, and their samples are not, which would tell nothing."""
    equal = len(before) == len(found) and all(map(torch.equal, before, found))
    return equal and any(tensor.dim() > 0 and bool((tensor != tensor[:1]).any()) for tensor in found)


def is_split_by_torch(loader: Any) -> bool:
    """Return whether `DistributedSampler` splits a loader, so that the global generators do not draw its order."""
    return isinstance(loader, DataLoader) and type(loader.sampler) is DistributedSampler


def has_equal_batches(loader: Any, batch_size: Callable[[Any], int]) -> bool:
    """Return whether the batches of all ranks certainly have equally many samples, so that one rank knows their sum.

    Args:
        loader: The loader of this rank.
        batch_size: `batch -> number of samples`.
    """
    is_plain = type(loader) is DataLoader and not isinstance(loader.dataset, IterableDataset)
    return is_plain and is_split_by_torch(loader) and loader.collate_fn is default_collate and batch_size is count_rows


def count_batches_of_rank(state: TrainState, loader: Any, accumulation: int, world_size: int, saved: int) -> int:
    """Return how many batches of the current epoch a rank has read, where another number of ranks has begun it.

    `DistributedSampler` deals out the samples of an order in turn: of n ranks that have read k batches of size b, all
    together have read the first n * k * b samples, whatever n is.

    Args:
        state: The state to resume, which counts the samples of the epoch.
        loader: The loader of this rank.
        accumulation: Micro-batches of an update.
        world_size: Number of ranks.
        saved: Number of ranks that made the state.

    Raises:
        SessionError: If the ranks cannot continue where the others ended.
    """
    at, read = state.iteration, state.iteration.sample - state.epoch_start.sample
    ranks = f"{saved} rank{'s'[: saved != 1]}"
    place = f"the saved run is at {at}, within an epoch that {ranks} began, and this run has {world_size}"
    instead = f"start it on {ranks}, or resume at the end of an epoch"
    sampler: Any = getattr(loader, "sampler", None)
    if not is_split_by_torch(loader) or sampler.num_replicas != world_size:
        raise SessionError(f"{place}, where only a loader with torch's DistributedSampler continues it: {instead}")
    updates, rest = divmod(read, world_size * loader.batch_size * accumulation)
    if rest:
        raise SessionError(
            f"{place} with batch_size={loader.batch_size}: the {read} samples that it counts are no whole number of "
            f"updates: {instead}, or pass a batch_size whose product with the number of ranks is as before"
        )
    return int(updates * accumulation)


def set_epoch(loader: Any, epoch: int) -> None:
    """Call `set_epoch(epoch)` on the loader, its samplers and its dataset where it exists."""
    for part in parts_of_loader(loader):
        if hasattr(part, "set_epoch"):
            part.set_epoch(epoch)


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


def batch_seeder(loader: Any) -> Callable[[int], None] | None:
    """Return the function that seeds what this process may draw from while it reads a batch; None if it draws nothing.

    Seeding Python's and numpy's generators takes most of the time of seeding, and torch's own loaders do not use them.

    Example:
        >>> batch_seeder([1, 2]), batch_seeder(DataLoader([1, 2], num_workers=1)).__name__
        (None, 'seed_torch')
        >>> batch_seeder(DataLoader([1, 2], collate_fn=list)).__name__
        'seed_all'
    """
    if type(loader) in {list, tuple}:
        return None
    if type(loader) is not DataLoader:
        return seed_all
    if not _has_samplers_of_torch(loader):
        return seed_all
    reads_tensors = type(loader.dataset) is TensorDataset and loader.collate_fn is default_collate
    return seed_torch if loader.num_workers > 0 or reads_tensors else seed_all


def warn_if_unrepeatable(loader: Any) -> None:
    """Warn if an epoch of `loader` cannot be read again from its first batch."""
    name = type(loader).__name__
    if hasattr(loader, "__next__"):
        warn(
            f"the loader is an iterator ({name}), which yields one epoch, once: a resumed run continues exactly only "
            "if its new iterator begins with the same batches; pass an iterable, such as a DataLoader or a list"
        )
    held = {} if hasattr(loader, "__next__") else find_unseedable(loader)
    for path, kind in held.items():
        warn(
            f"the loader holds {path}, a {kind}, which no checkpoint can take back to where it was: draw from "
            "torch.Generator(), numpy.random.default_rng() or random.Random(), which the session seeds before each "
            "epoch, and make iterators in __iter__"
        )
    if getattr(loader, "persistent_workers", False):
        warn(
            f"the workers of the {name} stay alive between epochs, and no checkpoint has their random numbers: if "
            "the dataset draws any, pass persistent_workers=False to resume exactly"
        )


def warn_about_changes(before: dict[str, Any], after: dict[str, Any]) -> bool:
    """Warn about hidden state of a loader that an epoch changed; return whether there is any."""
    changed = [name for name, value in after.items() if before.get(name, value) != value]
    if changed:
        warn(
            f"an epoch changed {', '.join(changed)}, which no checkpoint has, so a resumed run may see another order: "
            "let the order depend on set_epoch(epoch), which is called before each epoch, or on torch's global "
            "generator"
        )
    return bool(changed)


def warn(message: str) -> None:
    """Warn of what a resumed run cannot repeat."""
    warnings.warn(message, ResumeWarning, stacklevel=5)
