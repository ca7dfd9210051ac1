"""Batches of datasets that are read by index.

The order is a function of `(seed, epoch)`, and the augmentation of a sample is one of `(seed, epoch, index)`. Of the
samples of an update each rank takes its share, so neither depends on the number of ranks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

import torch
from torch.utils.data import IterableDataset, Sampler

from noether.core.shares import share_of
from noether.core.tensors.batch import SizedBatches
from noether.core.tensors.containers import move_batch
from noether.session.randomness import derive, seed_all
from noether.training.data.batches import Batching, SampleCounter, check_length
from noether.training.data.loading import LoadedBatches
from noether.training.data.orders import epoch_order

if TYPE_CHECKING:
    from collections.abc import Iterator

    from noether.core.iteration import TrainingIteration
    from noether.core.state import TrainState
    from noether.training.data.orders import SamplerOrder


@final
class TrainingData:
    """The training set in batches. It keeps no position: the iteration says which batch comes next.

    Args:
        dataset: It has `__len__` and `__getitem__`; if it has `collate`, that makes a batch from a list of samples.
        seed: The run's seed.
        effective_batch_size: Samples of an update, over all ranks, <= the length of the dataset.
        max_batch_size: Largest number of samples of a micro-batch of one rank, or None for no limit.
        drop_last: Whether to leave out the last update of an epoch if it is short.
        shuffle: Whether the order of each epoch is drawn from `(seed, epoch)`; otherwise samples come in order.
        sampler: The order of each epoch, in place of that.
        num_workers: Processes that load samples; 0 loads in this process. The batches do not depend on it.
        device: Device of the batches.
        name: Key of the dataset in the configuration, for messages.
        count_samples: Counts the samples of its batches; None to count those that were collated.
        rank: Index of this process, which reads its share of each update only, see `Batching.parts`.
        world_size: Number of processes.

    Raises:
        TypeError: If the dataset cannot be read by index.
        ValueError: If it is shorter than a batch.

    Example:
        >>> data = TrainingData(torch.arange(10), seed=0, effective_batch_size=4)
        >>> data.batching.updates_per_epoch
        3
        >>> from noether import TrainingIteration
        >>> (batch,) = data.batch(TrainingIteration(update=2, sample=8))
        >>> len(batch)
        2
    """

    def __init__(  # noqa: PLR0913  # every setting, by name
        self,
        dataset: Any,
        *,
        seed: int,
        effective_batch_size: int,
        max_batch_size: int | None = None,
        drop_last: bool = False,
        shuffle: bool = True,
        sampler: SamplerOrder | None = None,
        num_workers: int = 0,
        device: torch.device | str = "cpu",
        name: str = "",
        count_samples: SampleCounter | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._count_samples = count_samples or SampleCounter(dataset)
        self._rank, self._world_size = rank, world_size
        self._length, self._shuffle, self._sampler = _length(dataset), shuffle, sampler
        length = self._length if sampler is None else sampler.length
        self.batching = Batching(length, effective_batch_size, max_batch_size, drop_last)
        self._dataset = dataset
        self._seed = seed
        self._num_workers = num_workers
        self._device = torch.device(device)
        self._name = name
        self._expected: int | None = None
        self._loading: LoadedBatches | None = None

    @property
    def order_digest(self) -> str:
        """A hash of the order that a sampler gives the first epoch; empty without a sampler."""
        return "" if self._sampler is None else self._sampler.digest

    def batch(self, iteration: TrainingIteration, *, last: int | None = None) -> SizedBatches:
        """Return the micro-batches of this rank in the update that comes after `iteration`; there may be none.

        Sequential calls prefetch; a jump restarts prefetching at the new position.

        Args:
            iteration: Completed epochs, updates and samples.
            last: Number of the last update of the run; nothing beyond it is prefetched.

        Raises:
            ValueError: If an epoch begins, and the dataset has another length than when training began.
        """
        if iteration.update % self.batching.updates_per_epoch == 0:
            check_length(self._dataset, self._length, iteration.epoch)
        parts = self._parts(iteration.update)
        if not parts:  # the batch that is prefetched next is that of a later update
            is_in_order = iteration.update == self._expected and iteration.update != last
            self._expected = iteration.update + 1 if is_in_order else None
            return SizedBatches((), ())
        if self._loading is None or iteration.update != self._expected or iteration.update == last:
            self.close()
            # A run that ends at a number of samples goes on if `collate` left some out.
            is_beyond = last is not None and iteration.update >= last
            self._loading = LoadedBatches(
                self._dataset,
                name=self._name,
                seed=self._seed,
                batches=_MicroBatchSampler(self, iteration.update, None if is_beyond else last),
                num_workers=self._num_workers,
                device=self._device,
            )
        self._expected = None  # if a sample fails to load, the next call restarts prefetching
        batches: list[Any] = []
        sizes: list[int] = []
        for part in parts:
            batch = next(self._loading)
            sizes.append(self._count_samples(batch, part.stop - part.start))  # on the CPU: a function may read values
            batches.append(move_batch(batch, self._device))
        self._expected = iteration.update + 1
        return SizedBatches(batches, sizes)

    def next_batches(self, state: TrainState, *, last: int | None = None) -> tuple[TrainState, SizedBatches]:
        """Return the state as it is and the micro-batches of its next update; arguments as for `batch`."""
        return state, self.batch(state.iteration, last=last)

    def close(self) -> None:
        """Stop prefetching, and the workers."""
        if self._loading is not None:
            self._loading.close()
        self._loading, self._expected = None, None

    def micro_batches(self, start: int, last: int | None) -> Iterator[list[tuple[int, int]]]:
        """Yield `(epoch, index)` of the samples of this rank's micro-batches, after `start` updates up to `last`."""
        update, order, order_epoch = start, list[int](), -1
        while last is None or update < last:
            epoch = update // self.batching.updates_per_epoch
            if epoch != order_epoch:
                order, order_epoch = self._order(epoch), epoch
            for part in self._parts(update):
                yield [(epoch, index) for index in order[part]]
            update += 1

    def _parts(self, update: int) -> list[slice]:
        return self.batching.parts(update, self._rank, self._world_size)

    def _order(self, epoch: int) -> list[int]:
        if self._sampler is not None:
            return self._sampler(epoch)
        return epoch_order(self._seed, epoch, self._length) if self._shuffle else list(range(self._length))


@final
class EvaluationData:
    """A dataset in order, in batches; data-iterating callbacks iterate it.

    Args:
        dataset: It has `__len__` and `__getitem__`; if it has `collate`, that makes a batch from a list of samples.
        seed: The run's seed; a dataset that augments draws the random numbers of epoch 0.
        batch_size: Samples of a batch, >= 1.
        num_workers: Processes that load samples.
        device: Device of the batches.
        name: Key of the dataset in the configuration, for messages.
        count_samples: Counts the samples of its batches; None to count those that were collated.

    Raises:
        TypeError: If the dataset cannot be read by index.
        ValueError: If it has no samples.

    Example:
        >>> [len(batch) for batch in EvaluationData(torch.arange(5), seed=0, batch_size=2)]
        [2, 2, 1]
    """

    def __init__(
        self,
        dataset: Any,
        *,
        seed: int,
        batch_size: int,
        num_workers: int = 0,
        device: torch.device | str = "cpu",
        name: str = "",
        count_samples: SampleCounter | None = None,
    ) -> None:
        self._count_samples = count_samples or SampleCounter(dataset)
        self._dataset = dataset
        self._length = _length(dataset)
        if not self._length:
            raise ValueError("the dataset has no samples")
        self._seed = seed
        self.batch_size = batch_size
        self._num_workers = num_workers
        self._device = torch.device(device)
        self._name = name
        self._open: list[LoadedBatches] = []

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Any]:
        return (move_batch(batch, self._device) for batch, _ in self._load())

    def with_sizes(self, rank: int = 0, world_size: int = 1) -> Iterator[tuple[Any, int]]:
        """Yield the batches, each with its number of samples: all, or the share of one rank of several.

        Args:
            rank: Index of the process; the batches of all ranks, in their order, are those of one process.
            world_size: Number of processes; a rank has no batch if there are fewer batches than ranks.

        Example:
            >>> data = EvaluationData(torch.arange(5), seed=0, batch_size=2)
            >>> [[size for _, size in data.with_sizes(rank, 2)] for rank in range(2)]
            [[2], [2, 1]]
        """
        for batch, given in self._load(rank, world_size):
            size = self._count_samples(batch, given)
            yield move_batch(batch, self._device), size

    def _load(self, rank: int = 0, world_size: int = 1) -> Iterator[tuple[Any, int]]:
        """Yield the batches of a rank on the CPU, each with the number of samples that were collated."""
        starts = range(0, self._length, self.batch_size)
        share = share_of(rank, world_size, len(starts))
        if not share:
            return
        own = starts[share.start : share.stop]
        indices = [[(0, i) for i in range(at, min(at + self.batch_size, self._length))] for at in own]
        batches = LoadedBatches(
            self._dataset,
            name=self._name,
            seed=self._seed,
            batches=indices,
            num_workers=self._num_workers,
            device=self._device,
        )
        self._open.append(batches)
        try:
            for index, batch, members in zip(share, batches, indices, strict=True):
                # A model may draw random numbers in evaluation; they do not depend on which process loaded the batch.
                seed_all(derive(self._seed, "evaluation", index))
                yield batch, len(members)
        finally:
            batches.close()
            self._open.remove(batches)

    def close(self) -> None:
        """Stop the workers of passes that were left early: the traceback of an error keeps such a pass alive."""
        for batches in self._open:
            batches.close()

    def batched(self, batch_size: int) -> EvaluationData:
        """Return the same data in batches of another size."""
        data = EvaluationData(
            self._dataset,
            seed=self._seed,
            batch_size=batch_size,
            num_workers=self._num_workers,
            device=self._device,
            name=self._name,
            count_samples=self._count_samples,
        )
        data._open = self._open  # closing this object stops the workers of both
        return data


class _MicroBatchSampler(Sampler[list[tuple[int, int]]]):
    """A batch sampler for torch's loader: the micro-batches of an update and of all later ones."""

    def __init__(self, data: TrainingData, start: int, last: int | None) -> None:
        self._data, self._start, self._last = data, start, last

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return self._data.micro_batches(self._start, self._last)


def _length(dataset: Any) -> int:
    """Return the length of a dataset, refusing one that cannot be read by index."""
    if isinstance(dataset, IterableDataset) or not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise TypeError(
            f"{type(dataset).__name__} cannot be read by index, so a resumed run could not find its position: "
            "give a dataset with __len__ and __getitem__, or an IterableDataset with state_dict and load_state_dict"
        )
    return len(dataset)
