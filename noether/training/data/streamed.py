"""Batches of datasets that can only be read in order: the position of the dataset is memory in the state."""

from __future__ import annotations

import logging
from itertools import count, islice
from typing import TYPE_CHECKING, Any, Final, final

import torch

from noether.core.tensors.batch import SizedBatches
from noether.core.tensors.containers import move_batch
from noether.session.randomness import derive, seed_all
from noether.training.data.batches import Batching, SampleCounter, check_length, collate
from noether.training.data.readers import StreamReader, WorkerStreamReader

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from noether.core.callback import Effects
    from noether.core.event import Event
    from noether.core.state import Memory, TrainState

MEMORY: Final = "data/train"
_LOGGER: Final = logging.getLogger(__name__)


@final
class StreamedData:
    """An `IterableDataset` in batches; `TrainingData` does the same for datasets that are read by index.

    `dataset.state_dict()` returns its position; `load_state_dict()` and a new iterator continue from there. After the
    last sample of an epoch, the position is the start of the next one, or the end: then a new iterator yields nothing,
    and the one after it begins the next epoch. The object is also a callback, so that the reducer fills in its memory
    before training and accepts that memory on resume.

    A dataset without `__len__` is read again whenever it ends, and the run is one epoch.

    Args:
        dataset: It has `state_dict` and `load_state_dict`, and `__len__` if the samples of an epoch are known.
        seed: The run's seed; the random numbers of a sample are a function of its position in its epoch.
        effective_batch_size: Samples of an update, <= the length of the dataset.
        max_batch_size: Largest number of samples of a micro-batch, or None for no limit.
        drop_last: Whether to leave out the last update of an epoch if it is short.
        device: Device of the batches.
        name: Key of the dataset in the configuration, for messages.
        count_samples: Counts the samples of its batches; None to count those that were collated.
        num_workers: Processes that each read a share of it, by `torch.utils.data.get_worker_info()`; 0 reads it in this
            process. The order depends on it, so a resumed run needs the same number.
        run_samples: Samples of the whole run, for a dataset without a length; None if it has no such end.

    Raises:
        TypeError: If the dataset has no `state_dict`, or neither it nor the run has a length.
        ValueError: If it is shorter than a batch.
    """

    produces: tuple[str, ...] = ()

    def __init__(  # noqa: PLR0913  # every setting, by name
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
        num_workers: int = 0,
        run_samples: int | None = None,
    ) -> None:
        self._count_samples = count_samples or SampleCounter(dataset)
        _check_stream(dataset)
        self._has_length = hasattr(dataset, "__len__")
        length = len(dataset) if self._has_length else _length_of_run(dataset, run_samples)
        self.batching = Batching(
            length,
            effective_batch_size,
            max_batch_size,
            drop_last,
            is_known=self._has_length,
            stream_workers=num_workers,
        )
        self._dataset = dataset
        self._device = torch.device(device)
        self._name = name
        self._reader: StreamReader | WorkerStreamReader = StreamReader(dataset, seed)
        if num_workers:
            size = effective_batch_size
            self._reader = WorkerStreamReader(dataset, seed, workers=num_workers, size=size, name=name)
        self._start = self._reader.position()
        self._position: Memory = None
        self._ended_at: int | None = (
            None  # the epoch or, without a length, the sample of the run at which the stream last ended
        )

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
        if parts[0].start == 0 and self._has_length:
            check_length(self._dataset, self.batching.length, state.iteration.epoch)
        self._move_to(state.memory(MEMORY), parts[0].start)
        epoch = state.iteration.epoch if self._has_length else 0  # a longer run is the same epoch
        samples = [[self._sample(epoch, i) for i in range(part.start, part.stop)] for part in parts]
        if parts[-1].stop == self.batching.samples_per_epoch and self._has_length:
            for index in range(parts[-1].stop, self.batching.length):  # samples that drop_last leaves out
                self._sample(state.iteration.epoch, index)
            self._reader.finish()
        state = state.remember(MEMORY, self._reader.position())
        self._position = state.memory(MEMORY)
        batches = [collate(self._dataset, part) for part in samples]
        sizes = [self._count_samples(batch, len(part)) for batch, part in zip(batches, samples, strict=True)]
        return state, SizedBatches([move_batch(batch, self._device) for batch in batches], sizes)

    def close(self) -> None:
        """Release the iterator, and stop the workers."""
        self._reader.close()
        self._position = None

    def _move_to(self, position: Memory, sample: int) -> None:
        """Move the dataset to a position, after `sample` samples of the epoch."""
        if position is not self._position:  # the same object, unless the caller passed another state
            self._reader.move_to(position)
        elif sample == 0:
            self._reader.begin()

    def _sample(self, epoch: int, index: int) -> Any:
        try:
            sample = self._reader.read(epoch, index)
        except StopIteration:
            self._refuse_end(epoch, index)
            if not self._has_length:
                name = type(self._dataset).__name__
                _LOGGER.info("%s ended after %d samples of the run: it is read again", name, index)
            self._reader.begin()
            return self._sample(epoch, index)
        except Exception as error:
            if isinstance(self._reader, StreamReader):  # an error in a worker says where it was raised
                error.add_note(_describe_place(self._name, self._dataset, index))
            raise
        return sample

    def _refuse_end(self, epoch: int, index: int) -> None:
        """Refuse an end before the length of the stream, and a stream that yields nothing.

        At the first sample of an epoch, the position may be the end of the epoch before: the stream is read again.
        """
        name = type(self._dataset).__name__
        if self._has_length and index == 0 and self._ended_at != epoch:
            self._ended_at = epoch
        elif self._has_length:
            raise ValueError(
                f"{name} ended after {index} samples of epoch {epoch}, but its __len__ is {self.batching.length}: "
                "return from __len__ the number of samples that __iter__ yields in every epoch; after the last of them "
                "state_dict() has to be the start of the next epoch"
            ) from None
        elif index == self._ended_at:
            raise ValueError(
                f"{name} yields no sample, after {index} samples of the run: after its last sample, state_dict() has "
                "to be the start of the next pass, in which __iter__ yields samples again"
            ) from None
        else:
            self._ended_at = index


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


def _check_stream(dataset: Any) -> None:
    missing = [name for name in ("state_dict", "load_state_dict") if not hasattr(dataset, name)]
    if missing:
        raise TypeError(
            f"{type(dataset).__name__} has no {', '.join(missing)}, so a resumed run could not find its position: an "
            "IterableDataset needs state_dict and load_state_dict, and __len__ (samples of an epoch) to count epochs"
        )


def _length_of_run(dataset: Any, samples: int | None) -> int:
    if samples is None:
        raise TypeError(
            f"{type(dataset).__name__} has no __len__, so its epochs have no known end: end the run by "
            "trainer.max_updates or trainer.max_samples, or return the samples of an epoch from __len__"
        )
    return samples
