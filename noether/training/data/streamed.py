"""Batches of datasets that can only be read in order: the position of the dataset is memory in the state."""

from __future__ import annotations

from itertools import count, islice
from typing import TYPE_CHECKING, Any, Final, final

import torch

from noether.core.tensors.batch import SizedBatches
from noether.core.tensors.containers import move_batch
from noether.core.tensors.tree import clone_tensors, pack, unpack
from noether.session.randomness import derive, seed_all
from noether.training.data.batches import Batching, SampleCounter, check_length, collate

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from noether.core.callback import Effects
    from noether.core.event import Event
    from noether.core.state import Memory, TrainState

MEMORY: Final = "data/train"


@final
class StreamedData:
    """An `IterableDataset` in batches; `TrainingData` does the same for datasets that are read by index.

    `dataset.state_dict()` returns its position; `load_state_dict()` and a new iterator continue from there. After the
    last sample of an epoch, the position is the start of the next one. The object is also a callback, so that the
    reducer fills in its memory before training and accepts that memory on resume.

    Args:
        dataset: It has `__len__` (samples of an epoch), `state_dict` and `load_state_dict`.
        seed: The run's seed; the random numbers of a sample are a function of its position in its epoch.
        effective_batch_size: Samples of an update, <= the length of the dataset.
        max_batch_size: Largest number of samples of a micro-batch, or None for no limit.
        drop_last: Whether to leave out the last update of an epoch if it is short.
        device: Device of the batches.
        name: Key of the dataset in the configuration, for messages.
        count_samples: Counts the samples of its batches; None to count those that were collated.

    Raises:
        TypeError: If the dataset has no length or no `state_dict`.
        ValueError: If it is shorter than a batch.
    """

    produces: tuple[str, ...] = ()

    def __init__(
        self,
        dataset: Any,
        *,
        seed: int,
        effective_batch_size: int,
        max_batch_size: int | None = None,
        drop_last: bool = False,
        device: torch.device | str = "cpu",
        name: str = "",
        count_samples: SampleCounter | None = None,
    ) -> None:
        self._count_samples = count_samples or SampleCounter(dataset)
        _check_stream(dataset)
        self.batching = Batching(len(dataset), effective_batch_size, max_batch_size, drop_last)
        self._dataset = dataset
        self._seed = seed
        self._device = torch.device(device)
        self._name = name
        self._start = _position(dataset)
        self._reading: Iterator[Any] = iter(())
        self._position: Memory = None

    def __call__(self, state: TrainState, event: Event) -> tuple[TrainState, Effects]:  # noqa: ARG002  # a callback takes both
        """Return the state as it is."""
        return state, ()

    def init(self, state: TrainState) -> Mapping[str, Memory]:  # noqa: ARG002  # the signature of a callback's init
        """Return the position at which the dataset starts."""
        return {MEMORY: self._start}

    def _listens(self, event_type: type[Event]) -> bool:  # noqa: ARG002  # see `listens_to`
        return False

    def next_batches(self, state: TrainState, *, last: int | None = None) -> tuple[TrainState, SizedBatches]:  # noqa: ARG002  # a stream is not prefetched
        """Return the state with the new position, and the micro-batches of its next update."""
        parts = self.batching.parts(state.iteration.update)
        if parts[0].start == 0:
            check_length(self._dataset, self.batching.length, state.iteration.epoch)
        self._move_to(state.memory(MEMORY), parts[0].start)
        samples = [[self._sample(state.iteration.epoch, i) for i in range(part.start, part.stop)] for part in parts]
        if parts[-1].stop == self.batching.samples_per_epoch:
            for index in range(parts[-1].stop, self.batching.length):  # samples that drop_last leaves out
                self._sample(state.iteration.epoch, index)
        state = state.remember(MEMORY, _position(self._dataset))
        self._position = state.memory(MEMORY)
        batches = [collate(self._dataset, part) for part in samples]
        sizes = [self._count_samples(batch, len(part)) for batch, part in zip(batches, samples, strict=True)]
        return state, SizedBatches([move_batch(batch, self._device) for batch in batches], sizes)

    def close(self) -> None:
        """Release the iterator."""
        self._reading, self._position = iter(()), None

    def _move_to(self, position: Memory, sample: int) -> None:
        """Move the dataset to a position, after `sample` samples of the epoch."""
        is_there = position is self._position  # the same object, unless the caller passed another state
        if not is_there:
            self._dataset.load_state_dict(unpack(position))
        if not is_there or sample == 0:
            self._reading = iter(self._dataset)

    def _sample(self, epoch: int, index: int) -> Any:
        seed_all(derive(self._seed, "sample", epoch, index))
        try:
            return next(self._reading)
        except StopIteration:
            name = type(self._dataset).__name__
            raise ValueError(
                f"{name} ended after {index} samples of epoch {epoch}, but its __len__ is {self.batching.length}: "
                "return from __len__ the number of samples that __iter__ yields in every epoch; after the last of them "
                "state_dict() has to be the start of the next epoch"
            ) from None
        except Exception as error:
            error.add_note(_describe_place(self._name, self._dataset, index))
            raise


@final
class StreamedEvaluationData:
    """An `IterableDataset` from its start, in batches; `EvaluationData` does the same for datasets read by index.

    Args:
        dataset: It has `__len__`.
        seed: The run's seed; the random numbers of a sample are a function of its position in epoch 0.
        batch_size: Samples of a batch, >= 1.
        device: Device of the batches.
        name: Key of the dataset in the configuration, for messages.
        count_samples: Counts the samples of its batches; None to count those that were collated.

    Raises:
        TypeError: If the dataset has no `__len__`.
        ValueError: If it has no samples.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        seed: int,
        batch_size: int,
        device: torch.device | str = "cpu",
        name: str = "",
        count_samples: SampleCounter | None = None,
    ) -> None:
        self._count_samples = count_samples or SampleCounter(dataset)
        if not hasattr(dataset, "__len__"):
            raise TypeError(f"{type(dataset).__name__} has no __len__, the number of its samples")
        if not len(dataset):
            raise ValueError("the dataset has no samples")
        self._dataset = dataset
        self._seed = seed
        self.batch_size = batch_size
        self._device = torch.device(device)
        self._name = name

    def __len__(self) -> int:
        return len(self._dataset)

    def __iter__(self) -> Iterator[Any]:
        return (move_batch(batch, self._device) for batch, _ in self._load())

    def with_sizes(self) -> Iterator[tuple[Any, int]]:
        """Yield the batches, each with its number of samples."""
        for batch, given in self._load():
            size = self._count_samples(batch, given)
            yield move_batch(batch, self._device), size

    def _load(self) -> Iterator[tuple[Any, int]]:
        """Yield the batches on the CPU, each with the number of samples that were collated."""
        reading = self._samples()
        for index in count():
            samples = list(islice(reading, self.batch_size))
            if not samples:
                return
            seed_all(derive(self._seed, "evaluation", index))
            yield collate(self._dataset, samples), len(samples)

    def batched(self, batch_size: int) -> StreamedEvaluationData:
        """Return the same data in batches of another size."""
        return StreamedEvaluationData(
            self._dataset,
            seed=self._seed,
            batch_size=batch_size,
            device=self._device,
            name=self._name,
            count_samples=self._count_samples,
        )

    def close(self) -> None:
        """Do nothing: this process reads the samples."""

    def _samples(self) -> Iterator[Any]:
        reading = iter(self._dataset)
        for index in count():
            seed_all(derive(self._seed, "sample", 0, index))
            try:
                sample = next(reading)
            except StopIteration:
                return
            except Exception as error:
                error.add_note(_describe_place(self._name, self._dataset, index))
                raise
            yield sample


def _describe_place(name: str, dataset: Any, samples: int) -> str:
    """Return a note that says which sample of an epoch could not be read."""
    key = f"data.{name} ({type(dataset).__name__})" if name else type(dataset).__name__
    return f"while loading the next sample of {key}, after {samples} samples of the epoch"


def _position(dataset: Any) -> Memory:
    """Return a copy of a dataset's position: the dataset may later write to the tensors that it returned."""
    return clone_tensors(pack("state_dict of the training set", dataset.state_dict()))


def _check_stream(dataset: Any) -> None:
    missing = [name for name in ("__len__", "state_dict", "load_state_dict") if not hasattr(dataset, name)]
    if missing:
        raise TypeError(
            f"{type(dataset).__name__} has no {', '.join(missing)}, so a resumed run could not find its position: an "
            "IterableDataset needs __len__ (samples of an epoch), state_dict and load_state_dict"
        )
