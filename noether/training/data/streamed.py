"""Training data that can only be read in order: its place is in the state, as a memory like any other."""

from __future__ import annotations

from itertools import count, islice
from typing import TYPE_CHECKING, Any, Final, final

import torch
from torch.utils.data import default_collate

from noether.core.tensors.tree import clone_tensors, pack, unpack
from noether.session.randomness import derive, seed_all, seed_torch
from noether.training.data.batching import Batching
from noether.training.data.indexed import move_batch

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from noether.core.callback import Effects
    from noether.core.event import Event
    from noether.core.state import Memory, TrainState

MEMORY: Final = "data/train"


@final
class StreamedData:
    """An `IterableDataset` in batches; what `TrainingData` is for datasets that are read by index.

    The dataset says where it is with `state_dict()` and goes on from there with `load_state_dict()` and a new
    iterator; after the last sample of an epoch that is the beginning of the next. It is a member of the reducer, so
    that its memory is filled in before training and claimed on resume.

    Args:
        dataset: With `__len__` (samples of an epoch), `state_dict` and `load_state_dict`.
        seed: The run's seed; the random numbers of a sample are those of its place in its epoch.
        effective_batch_size: Samples of an update, <= the length of the dataset.
        max_batch_size: Samples of a micro-batch at most, or None for no limit.
        drop_last: Whether the last batch of an epoch is left out if it is short.
        device: Where batches are moved to.

    Raises:
        TypeError: If the dataset cannot say how long it is, or where.
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
    ) -> None:
        _check_stream(dataset)
        self.batching = Batching(len(dataset), effective_batch_size, max_batch_size, drop_last)
        self._dataset = dataset
        self._seed = seed
        self._device = torch.device(device)
        self._start = _place(dataset)
        self._reading: Iterator[Any] = iter(())
        self._left_at: Memory = None

    def __call__(self, state: TrainState, event: Event) -> tuple[TrainState, Effects]:  # noqa: ARG002  # a callback takes both
        """Return the state as it is."""
        return state, ()

    def init(self, state: TrainState) -> Mapping[str, Memory]:  # noqa: ARG002  # as every callback's
        """Return the place at which the dataset begins."""
        return {MEMORY: self._start}

    def _listens(self, event_type: type[Event]) -> bool:  # noqa: ARG002  # see `listens_to`
        return False

    def update(self, state: TrainState, *, last: int | None = None) -> tuple[TrainState, tuple[Any, ...]]:  # noqa: ARG002  # it never reads ahead
        """Return the state that knows the new place, and the micro-batches of its next update."""
        parts = self.batching.parts(state.iteration.update)
        self._go_to(state.memory(MEMORY), parts[0].start)
        samples = [[self._sample(state.iteration.epoch, i) for i in range(part.start, part.stop)] for part in parts]
        if parts[-1].stop == self.batching.samples_per_epoch:
            for index in range(parts[-1].stop, self.batching.length):  # what drop_last leaves out
                self._sample(state.iteration.epoch, index)
        state = state.remember(MEMORY, _place(self._dataset))
        self._left_at = state.memory(MEMORY)
        return state, tuple(move_batch(_collated(self._dataset, part), self._device) for part in samples)

    def close(self) -> None:
        """Let go of the iterator."""
        self._reading, self._left_at = iter(()), None

    def _go_to(self, place: Memory, position: int) -> None:
        # The memory that was left there last is the same object, as long as nobody took the state elsewhere.
        if place is not self._left_at:
            self._dataset.load_state_dict(unpack(place))
        if place is not self._left_at or position == 0:
            self._reading = iter(self._dataset)

    def _sample(self, epoch: int, index: int) -> Any:
        seed_all(derive(self._seed, "sample", epoch, index))
        try:
            return next(self._reading)
        except StopIteration:
            name = type(self._dataset).__name__
            raise ValueError(
                f"{name} ended after {index} samples of an epoch; its length says {self.batching.length}"
            ) from None


@final
class StreamedEvaluationData:
    """An `IterableDataset` from its beginning, in batches; what `EvaluationData` is for datasets read by index.

    Args:
        dataset: With `__len__`.
        seed: The run's seed; the random numbers of a sample are those of its place in epoch 0.
        batch_size: Samples of a batch, >= 1.
        device: Where batches are moved to.

    Raises:
        TypeError: If the dataset does not say how many samples it has.
    """

    def __init__(self, dataset: Any, *, seed: int, batch_size: int, device: torch.device | str = "cpu") -> None:
        if not hasattr(dataset, "__len__"):
            raise TypeError(f"{type(dataset).__name__} has no __len__, the number of its samples")
        self._dataset = dataset
        self._seed = seed
        self._batch_size = batch_size
        self._device = torch.device(device)

    def __len__(self) -> int:
        return len(self._dataset)

    def __iter__(self) -> Iterator[Any]:
        reading = self._samples()
        for index in count():
            samples = list(islice(reading, self._batch_size))
            if not samples:
                return
            seed_torch(derive(self._seed, "evaluation", index))
            yield move_batch(_collated(self._dataset, samples), self._device)

    def batched(self, batch_size: int) -> StreamedEvaluationData:
        """Return the same data in batches of another size."""
        return StreamedEvaluationData(self._dataset, seed=self._seed, batch_size=batch_size, device=self._device)

    def _samples(self) -> Iterator[Any]:
        reading = iter(self._dataset)
        for index in count():
            seed_all(derive(self._seed, "sample", 0, index))
            try:
                yield next(reading)
            except StopIteration:
                return


def _collated(dataset: Any, samples: list[Any]) -> Any:
    return getattr(dataset, "collate", default_collate)(samples)


def _place(dataset: Any) -> Memory:
    place = pack("state_dict of the training set", dataset.state_dict())
    # A dataset may go on writing to the tensors that it hands out.
    return clone_tensors(place)


def _check_stream(dataset: Any) -> None:
    missing = [name for name in ("__len__", "state_dict", "load_state_dict") if not hasattr(dataset, name)]
    if missing:
        raise TypeError(
            f"{type(dataset).__name__} has no {', '.join(missing)}, so a resume could not find its place: an "
            "IterableDataset needs __len__ (samples of an epoch), state_dict and load_state_dict"
        )
