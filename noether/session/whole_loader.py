"""A `DataLoader` as all batches of its dataset, of which a rank reads a share, also if a library has split it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, final

from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from noether.core.shares import share_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_COPIED: Final = (
    "collate_fn", "num_workers", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context",
    "prefetch_factor", "generator",
)  # fmt: skip
"""Attributes of a `DataLoader` that are arguments of its constructor."""
_ACCELERATE: Final = ("DataLoaderShard", "DataLoaderDispatcher")
_UNPADDED: Final = "UnrepeatedDistributedSampler"  # of Lightning


def find_whole_loader(data: Any) -> WholeLoader | None:
    """Return all batches of a loader, or None if only reading it would tell what they are.

    It knows a `DataLoader` of torch whose sampler is torch's sequential or random one, which are whole, or
    `DistributedSampler` or that of Lightning for predictions, and the loaders of Accelerate. What is split is put
    together in the order of the dataset.

    Example:
        >>> data = list(range(5))
        >>> shares = DistributedSampler(data, num_replicas=2, rank=1)
        >>> loader = find_whole_loader(DataLoader(data, batch_size=2, sampler=shares))
        >>> [[batch.tolist() for batch in loader.share(rank, 2)] for rank in range(2)]
        [[[0, 1]], [[2, 3], [4]]]
    """
    if not isinstance(data, DataLoader) or isinstance(data.dataset, IterableDataset):
        return None
    if type(data).__module__.startswith("accelerate.") and type(data).__name__ in _ACCELERATE:
        sampler: Any = getattr(data.batch_sampler, "batch_sampler", data.batch_sampler)  # inside of BatchSamplerShard
        return WholeLoader(data, _in_order(data.dataset, sampler)) if type(sampler) is BatchSampler else None
    if type(data) is not DataLoader or type(data.batch_sampler) is not BatchSampler:
        return None
    if type(data.sampler) in {SequentialSampler, RandomSampler}:
        return WholeLoader(data, data.batch_sampler)
    is_split = type(data.sampler) is DistributedSampler or type(data.sampler).__name__ == _UNPADDED
    if is_split and getattr(data.sampler, "dataset", None) is data.dataset:
        return WholeLoader(data, _in_order(data.dataset, data.batch_sampler))
    return None


def _in_order(dataset: Any, sampler: BatchSampler) -> BatchSampler:
    return BatchSampler(SequentialSampler(dataset), sampler.batch_size, sampler.drop_last)


@final
class WholeLoader:
    """All batches of a `DataLoader`.

    Args:
        loader: The loader, of a dataset that is read by index.
        batch_sampler: The indices of all batches; each rank draws the same.
    """

    def __init__(self, loader: Any, batch_sampler: BatchSampler) -> None:
        self._loader, self.batch_sampler = loader, batch_sampler
        self.dataset = loader.dataset

    def share(self, rank: int, world_size: int) -> Iterable[Any]:
        """Return the batches of one rank; those of all ranks, in their order, are all batches."""
        batches = list(self._draw_indices())
        share = share_of(rank, world_size, len(batches))
        return self._load([batches[index] for index in share])

    def __iter__(self) -> Iterator[Any]:
        return iter(self._load(self.batch_sampler))

    def load_ends(self) -> Iterator[Any]:
        """Return the first and the last sample of the dataset, each as a batch, without starting workers."""
        ends = [[0], [len(self.dataset) - 1]] if len(self.dataset) else []
        return iter(DataLoader(self.dataset, batch_sampler=ends, collate_fn=self._loader.collate_fn))

    def _draw_indices(self) -> Iterator[list[int]]:
        # As the loader draws: a number for its workers, and then the order.
        generator = self._loader.generator
        return iter(DataLoader(_Indices(), batch_sampler=self.batch_sampler, collate_fn=list, generator=generator))

    def _load(self, batches: Any) -> DataLoader[Any]:
        copied = {name: getattr(self._loader, name) for name in _COPIED}
        return DataLoader(self.dataset, batch_sampler=batches, **copied)


class _Indices(Dataset[int]):
    """A dataset whose samples are their indices."""

    def __getitem__(self, index: int) -> int:
        return index
