"""Batches of datasets that can only be read in order: the position of the dataset is memory in the state."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Final, final

import torch

from noether.core.event import AfterEpoch, AfterTraining, AfterUpdate, kind_of
from noether.core.tensors.batch import SizedBatches
from noether.core.tensors.containers import move_batch
from noether.training.data.batches import Batching, SampleCounter, check_length, collate
from noether.training.data.readers import StreamReader, WorkerStreamReader
from noether.training.data.stream_shards import StreamShardError, check_positions_agree, shard_stream

if TYPE_CHECKING:
    from collections.abc import Mapping

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
        rank: Index of this process, which reads every `world_size`-th sample from `dataset.shard(rank, world_size)`;
            see `shard_stream`.
        world_size: Number of processes. With several the memory is the position in the whole stream, so a run may
            resume on another number of ranks.

    Raises:
        TypeError: If the dataset has no `state_dict`, neither it nor the run has a length, or it cannot be sharded.
        ValueError: If it is shorter than a batch, or a batch is no multiple of the number of ranks.
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
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._count_samples = count_samples or SampleCounter(dataset)
        self._rank, self._world_size = rank, world_size
        _check_stream(dataset)
        reading = shard_stream(dataset, rank, world_size, num_workers=num_workers) if world_size > 1 else dataset
        if effective_batch_size % world_size:
            raise ValueError(
                f"{effective_batch_size} is not a multiple of the number of ranks, {world_size}: each rank reads every "
                f"{world_size}th sample of a stream, and all have to be at one position after an update"
            )
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
        self._reader: StreamReader | WorkerStreamReader = StreamReader(reading, seed)
        if num_workers:
            size = effective_batch_size
            self._reader = WorkerStreamReader(dataset, seed, workers=num_workers, size=size, name=name)
        self._start = self._reader.position()
        self._position: Memory = None
        self._ended_at: int | None = (
            None  # the epoch or, without a length, the sample of the run at which the stream last ended
        )
        self._is_agreed = world_size == 1

    def __call__(self, state: TrainState, event: Event) -> tuple[TrainState, Effects]:
        """Return the state as it is, once all ranks agree on the position: after the first update and each epoch.

        Raises:
            StreamShardError: If they do not.
        """
        if self._listens(kind_of(type(event))) and not (self._is_agreed and isinstance(event, AfterUpdate)):
            check_positions_agree(event.run, state.memory(MEMORY), self._name)
            self._is_agreed = True
        return state, ()

    def init(self, state: TrainState) -> Mapping[str, Memory]:  # noqa: ARG002  # the signature of a callback's init
        """Return the position at which the dataset starts."""
        return {MEMORY: self._start}

    def _listens(self, event_type: type[Event]) -> bool:  # see `listens_to`
        return self._world_size > 1 and event_type in {AfterUpdate, AfterEpoch, AfterTraining}

    def next_batches(self, state: TrainState, *, last: int | None = None) -> tuple[TrainState, SizedBatches]:  # noqa: ARG002  # a stream is not prefetched
        """Return the state with the new position, and the micro-batches of its next update."""
        places = self.batching.places(state.iteration.update)
        if places.start == 0 and self._has_length:
            check_length(self._dataset, self.batching.length, state.iteration.epoch)
        self._move_to(state.memory(MEMORY), places.start)
        epoch = state.iteration.epoch if self._has_length else 0  # a longer run is the same epoch
        samples = [[self._sample(epoch, i) for i in part] for part in self.batching.cut(self._share(places))]
        if places.stop == self.batching.samples_per_epoch and self._has_length:
            for index in self._share(range(places.stop, self.batching.length)):  # those that drop_last leaves out
                self._sample(epoch, index)
            self._finish_epoch(epoch)
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

    def _share(self, places: range) -> range:
        """Return the places of this rank; the first of `places` is that of rank 0."""
        return places[self._rank :: self._world_size]

    def _finish_epoch(self, epoch: int) -> None:
        """Move to the start of the next epoch, which a shard without a sample in the last update has not reached."""
        if self._world_size == 1:
            self._reader.finish()
            return
        try:
            self._reader.read(epoch, self.batching.length)
        except StopIteration:
            return
        raise StreamShardError(
            f"{type(self._dataset).__name__}.shard({self._rank}, {self._world_size}) yields more than every "
            f"{self._world_size}th of the {self.batching.length} samples of epoch {epoch}: end __iter__ after these"
        )

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
                error.add_note(describe_place(self._name, self._dataset, index))
            raise
        return sample

    def _refuse_end(self, epoch: int, index: int) -> None:
        """Refuse an end before the length of the stream, and a stream that yields nothing.

        At the first sample of an epoch, the position may be the end of the epoch before: the stream is read again.
        """
        name = type(self._dataset).__name__
        if self._has_length and index < self._world_size and self._ended_at != epoch:
            self._ended_at = epoch
        elif self._has_length:
            raise ValueError(
                f"{name} ended after {index} samples of epoch {epoch}, but its __len__ is {self.batching.length}: "
                "return from __len__ the number of samples that __iter__ yields in every epoch; after the last of them "
                "state_dict() has to be the start of the next epoch"
            ) from None
        elif self._world_size > 1:
            raise StreamShardError(
                f"{name} ended after {index} samples of the run: without __len__, the stream of several ranks must not "
                "end; begin again in __iter__, or return the samples of an epoch from __len__"
            ) from None
        elif index == self._ended_at:
            raise ValueError(
                f"{name} yields no sample, after {index} samples of the run: after its last sample, state_dict() has "
                "to be the start of the next pass, in which __iter__ yields samples again"
            ) from None
        else:
            self._ended_at = index


def describe_place(name: str, dataset: Any, samples: int) -> str:
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
