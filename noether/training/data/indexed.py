"""Batches as a function of where the run is: order of `(seed, epoch)`, augmentation of `(seed, epoch, index)`."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Any, Final, Protocol, cast, final

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from noether.core.tensors.tree import map_tensors
from noether.session.randomness import derive, seed_all, seed_torch
from noether.training.data.batching import Batching

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
    """Return the order in which epoch `epoch`, counted from 0, reads its samples.

    Example:
        >>> epoch_order(0, 0, 4) == epoch_order(0, 0, 4), sorted(epoch_order(0, 1, 4))
        (True, [0, 1, 2, 3])
    """
    generator = torch.Generator().manual_seed(derive(seed, "order", epoch))
    order: list[int] = torch.randperm(samples, generator=generator).tolist()
    return order


@final
class TrainingData:
    """The training set in batches. It keeps no position: `batches` is asked for the batch at an iteration.

    Args:
        dataset: With `__len__` and `__getitem__`; if it has `collate`, that makes batches of lists of samples.
        seed: The run's seed.
        effective_batch_size: Samples of an update, <= the length of the dataset.
        max_batch_size: Samples of a micro-batch at most, or None for no limit.
        drop_last: Whether the last batch of an epoch is left out if it is short.
        num_workers: Processes that load; 0 loads in this one. What is loaded does not depend on it.
        device: Where batches are moved to.

    Raises:
        TypeError: If the dataset has no length.
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
        self._loading: Iterator[Any] = iter(())

    def batch(self, iteration: TrainingIteration, *, last: int | None = None) -> tuple[Any, ...]:
        """Return the micro-batches of the update that comes after `iteration`.

        Asked in order it loads ahead; asked for another place it begins loading there.

        Args:
            iteration: What is completed.
            last: Number of the last update that will be asked for; nothing is loaded ahead of it.
        """
        if iteration.update != self._expected:
            self._loading = iter(self._loader(iteration.update, last))
        self._expected = None  # should a sample fail to load, the next call begins anew
        parts = len(self.batching.parts(iteration.update))
        batches = tuple(move_batch(next(self._loading), self._device) for _ in range(parts))
        self._expected = iteration.update + 1
        return batches

    def update(self, state: TrainState, *, last: int | None = None) -> tuple[TrainState, tuple[Any, ...]]:
        """Return the state as it is, and the micro-batches of its next update."""
        return state, self.batch(state.iteration, last=last)

    def close(self) -> None:
        """Stop loading ahead."""
        self._loading, self._expected = iter(()), None

    def _loader(self, start: int, last: int | None) -> DataLoader[Any]:
        return _loader(self._dataset, self._seed, _Batches(self, start, last), self._num_workers, self._device)

    def micro_batches(self, start: int, last: int | None) -> Iterator[list[tuple[int, int]]]:
        """Yield `(epoch, index)` of the samples of each micro-batch after `start` updates, and up to `last`."""
        update, order, ordered = start, list[int](), -1
        while last is None or update < last:
            epoch = update // self.batching.updates_per_epoch
            if epoch != ordered:
                order, ordered = epoch_order(self._seed, epoch, self.batching.length), epoch
            for part in self.batching.parts(update):
                yield [(epoch, index) for index in order[part]]
            update += 1


@final
class EvaluationData:
    """A dataset in order, in batches; what data-iterating callbacks iterate.

    Args:
        dataset: With `__len__` and `__getitem__`; if it has `collate`, that makes batches of lists of samples.
        seed: The run's seed; a sample is augmented, if the dataset does that, as in epoch 0.
        batch_size: Samples of a batch, >= 1.
        num_workers: Processes that load.
        device: Where batches are moved to.

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
        for index, batch in enumerate(_loader(self._dataset, self._seed, indices, self._num_workers, self._device)):
            # A model may draw in evaluation too; what it draws does not depend on who loaded the batch.
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


class _Batches(Sampler[list[tuple[int, int]]]):
    """The micro-batches from one update on, as torch's loader wants them."""

    def __init__(self, data: TrainingData, start: int, last: int | None) -> None:
        self._data, self._start, self._last = data, start, last

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return self._data.micro_batches(self._start, self._last)


class _Seeded(Dataset[Any]):
    """A dataset read by `(epoch, index)`, its random numbers seeded before each sample."""

    def __init__(self, dataset: _Sized, seed: int) -> None:
        self._dataset, self._seed = dataset, seed

    def __getitem__(self, key: Any) -> Any:
        epoch, index = key
        seed_all(derive(self._seed, "sample", epoch, index))
        return self._dataset[index]


def _loader(
    dataset: Any, seed: int, batches: Sequence[Any] | Sampler[Any], num_workers: int, device: torch.device
) -> DataLoader[Any]:
    return DataLoader(
        _Seeded(dataset, seed),
        batch_sampler=cast("Sampler[list[Any]]", batches),
        num_workers=num_workers,
        collate_fn=getattr(dataset, "collate", None),
        pin_memory=device.type == "cuda",
        worker_init_fn=_outlive_one_signal,
        # One of its own: the loader would otherwise draw from the generator that the step uses.
        generator=torch.Generator().manual_seed(_GENERATOR_SEED),
    )


def _outlive_one_signal(worker: int) -> None:  # noqa: ARG001  # torch gives each its number
    """Let a worker live on when a signal to the whole process group asks the run to save and leave."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _ignore_once)


def _ignore_once(number: int, frame: FrameType | None) -> None:  # noqa: ARG001  # a signal handler takes both
    signal.signal(number, signal.SIG_DFL)


def _length(dataset: Any) -> int:
    if isinstance(dataset, IterableDataset) or not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise TypeError(
            f"{type(dataset).__name__} cannot be read by index, so a resume could not find its place: "
            "give a dataset with __len__ and __getitem__, or an IterableDataset with state_dict and load_state_dict"
        )
    return len(dataset)


def move_batch(batch: Any, device: torch.device) -> Any:
    """Return a batch on `device`."""
    if device.type == "cpu":
        return batch
    return map_tensors(lambda tensor: tensor.to(device, non_blocking=True), batch)
