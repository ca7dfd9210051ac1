"""Batches of datasets that are read by index.

The order is a function of `(seed, epoch)`, and the augmentation of a sample is one of `(seed, epoch, index)`.
"""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Any, Final, Protocol, cast, final

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from noether.session.randomness import derive, seed_all, seed_torch
from noether.training.data.batches import Batching, collate_of, move_batch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import FrameType

    from noether.core.iteration import TrainingIteration
    from noether.core.state import TrainState

_GENERATOR_SEED: Final = 0


class _Sized(Protocol):
    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Any: ...


def epoch_order(seed: int, epoch: int, samples: int) -> list[int]:
    """Return the indices of the samples in the order in which an epoch reads them.

    Args:
        seed: The run's seed.
        epoch: The epoch, counted from 0.
        samples: Number of samples.

    Example:
        >>> epoch_order(0, 0, 4) == epoch_order(0, 0, 4), sorted(epoch_order(0, 1, 4))
        (True, [0, 1, 2, 3])
    """
    generator = torch.Generator().manual_seed(derive(seed, "order", epoch))
    order: list[int] = torch.randperm(samples, generator=generator).tolist()
    return order


@final
class TrainingData:
    """The training set in batches. It keeps no position: the iteration says which batch comes next.

    Args:
        dataset: It has `__len__` and `__getitem__`; if it has `collate`, that makes a batch from a list of samples.
        seed: The run's seed.
        effective_batch_size: Samples of an update, <= the length of the dataset.
        max_batch_size: Largest number of samples of a micro-batch, or None for no limit.
        drop_last: Whether to leave out the last update of an epoch if it is short.
        num_workers: Processes that load samples; 0 loads in this process. The batches do not depend on it.
        device: Device of the batches.

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

    def __init__(
        self,
        dataset: Any,
        *,
        seed: int,
        effective_batch_size: int,
        max_batch_size: int | None = None,
        drop_last: bool = False,
        num_workers: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.batching = Batching(_length(dataset), effective_batch_size, max_batch_size, drop_last)
        self._dataset = dataset
        self._seed = seed
        self._num_workers = num_workers
        self._device = torch.device(device)
        self._expected: int | None = None
        self._prefetching: Iterator[Any] = iter(())

    def batch(self, iteration: TrainingIteration, *, last: int | None = None) -> tuple[Any, ...]:
        """Return the micro-batches of the update that comes after `iteration`.

        Sequential calls prefetch; a jump restarts prefetching at the new position.

        Args:
            iteration: Completed epochs, updates and samples.
            last: Number of the last update of the run; nothing beyond it is prefetched.
        """
        if iteration.update != self._expected or iteration.update == last:
            # A run that ends at a number of samples goes on if `collate` left some out.
            is_beyond = last is not None and iteration.update >= last
            sampler = _MicroBatchSampler(self, iteration.update, None if is_beyond else last)
            self._prefetching = iter(_make_loader(self._dataset, self._seed, sampler, self._num_workers, self._device))
        self._expected = None  # if a sample fails to load, the next call restarts prefetching
        parts = len(self.batching.parts(iteration.update))
        batches = tuple(move_batch(next(self._prefetching), self._device) for _ in range(parts))
        self._expected = iteration.update + 1
        return batches

    def next_batches(self, state: TrainState, *, last: int | None = None) -> tuple[TrainState, tuple[Any, ...]]:
        """Return the state as it is and the micro-batches of its next update; arguments as for `batch`."""
        return state, self.batch(state.iteration, last=last)

    def close(self) -> None:
        """Stop prefetching."""
        self._prefetching, self._expected = iter(()), None

    def micro_batches(self, start: int, last: int | None) -> Iterator[list[tuple[int, int]]]:
        """Yield `(epoch, index)` of the samples of each micro-batch, after `start` updates and up to `last`."""
        update, order, order_epoch = start, list[int](), -1
        while last is None or update < last:
            epoch = update // self.batching.updates_per_epoch
            if epoch != order_epoch:
                order, order_epoch = epoch_order(self._seed, epoch, self.batching.length), epoch
            for part in self.batching.parts(update):
                yield [(epoch, index) for index in order[part]]
            update += 1


@final
class EvaluationData:
    """A dataset in order, in batches; data-iterating callbacks iterate it.

    Args:
        dataset: It has `__len__` and `__getitem__`; if it has `collate`, that makes a batch from a list of samples.
        seed: The run's seed; a dataset that augments draws the random numbers of epoch 0.
        batch_size: Samples of a batch, >= 1.
        num_workers: Processes that load samples.
        device: Device of the batches.

    Raises:
        TypeError: If the dataset cannot be read by index.
        ValueError: If it has no samples.

    Example:
        >>> [len(batch) for batch in EvaluationData(torch.arange(5), seed=0, batch_size=2)]
        [2, 2, 1]
    """

    def __init__(
        self, dataset: Any, *, seed: int, batch_size: int, num_workers: int = 0, device: torch.device | str = "cpu"
    ) -> None:
        self._dataset = dataset
        self._length = _length(dataset)
        if not self._length:
            raise ValueError("the dataset has no samples")
        self._seed = seed
        self._batch_size = batch_size
        self._num_workers = num_workers
        self._device = torch.device(device)

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Any]:
        starts = range(0, self._length, self._batch_size)
        indices = [[(0, i) for i in range(at, min(at + self._batch_size, self._length))] for at in starts]
        for index, batch in enumerate(
            _make_loader(self._dataset, self._seed, indices, self._num_workers, self._device)
        ):
            # A model may draw random numbers in evaluation; they do not depend on which process loaded the batch.
            seed_torch(derive(self._seed, "evaluation", index))
            yield move_batch(batch, self._device)

    def batched(self, batch_size: int) -> EvaluationData:
        """Return the same data in batches of another size."""
        return EvaluationData(
            self._dataset,
            seed=self._seed,
            batch_size=batch_size,
            num_workers=self._num_workers,
            device=self._device,
        )


class _MicroBatchSampler(Sampler[list[tuple[int, int]]]):
    """A batch sampler for torch's loader: the micro-batches of an update and of all later ones."""

    def __init__(self, data: TrainingData, start: int, last: int | None) -> None:
        self._data, self._start, self._last = data, start, last

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return self._data.micro_batches(self._start, self._last)


class _SeededDataset(Dataset[Any]):
    """A dataset read by `(epoch, index)`; it seeds the random numbers before each sample."""

    def __init__(self, dataset: _Sized, seed: int) -> None:
        self._dataset, self._seed = dataset, seed

    def __getitem__(self, key: Any) -> Any:
        epoch, index = key
        seed_all(derive(self._seed, "sample", epoch, index))
        return self._dataset[index]


def _make_loader(
    dataset: Any, seed: int, batches: Sequence[Any] | Sampler[Any], num_workers: int, device: torch.device
) -> DataLoader[Any]:
    return DataLoader(
        _SeededDataset(dataset, seed),
        batch_sampler=cast("Sampler[list[Any]]", batches),
        num_workers=num_workers,
        collate_fn=collate_of(dataset),
        pin_memory=device.type == "cuda",
        worker_init_fn=_ignore_first_signal,
        # Without a generator, the loader would draw from the one that the step uses.
        generator=torch.Generator().manual_seed(_GENERATOR_SEED),
    )


def _ignore_first_signal(worker: int) -> None:  # noqa: ARG001  # torch passes its number
    """Ignore the first SIGINT or SIGTERM in a worker: a signal to the process group asks the run to save first."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _ignore_once)


def _ignore_once(number: int, frame: FrameType | None) -> None:  # noqa: ARG001  # the signature of a signal handler
    signal.signal(number, signal.SIG_DFL)


def _length(dataset: Any) -> int:
    """Return the length of a dataset, refusing one that cannot be read by index."""
    if isinstance(dataset, IterableDataset) or not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise TypeError(
            f"{type(dataset).__name__} cannot be read by index, so a resumed run could not find its position: "
            "give a dataset with __len__ and __getitem__, or an IterableDataset with state_dict and load_state_dict"
        )
    return len(dataset)
