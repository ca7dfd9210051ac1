"""Batches for evaluation of datasets that can only be read in order."""

from __future__ import annotations

from itertools import count, islice
from typing import TYPE_CHECKING, Any, final

import torch

from noether.core.shares import share_of
from noether.core.tensors.containers import move_batch
from noether.session.randomness import derive, seed_all
from noether.training.data.batches import SampleCounter, collate
from noether.training.data.streamed import describe_place

if TYPE_CHECKING:
    from collections.abc import Iterator


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

    def with_sizes(self, rank: int = 0, world_size: int = 1) -> Iterator[tuple[Any, int]]:
        """Yield the batches, each with its number of samples: all, or the share of one rank of several.

        Each rank reads the whole stream, so that the next pass begins at its start, and collates its share only.

        Args:
            rank: Index of the process; the batches of all ranks, in their order, are those of one process.
            world_size: Number of processes.

        Raises:
            ValueError: If there are several, and the stream yields another number of samples than its `__len__`.
        """
        for batch, given in self._load(rank, world_size):
            size = self._count_samples(batch, given)
            yield move_batch(batch, self._device), size

    def _load(self, rank: int = 0, world_size: int = 1) -> Iterator[tuple[Any, int]]:
        """Yield the batches of a rank on the CPU, each with the number of samples that were collated."""
        length, read = len(self._dataset), 0
        share = share_of(rank, world_size, -(-length // self.batch_size))
        reading = self._samples()
        for index in count():
            samples = list(islice(reading, self.batch_size))
            if not samples:
                break
            read += len(samples)
            if world_size == 1 or index in share:
                seed_all(derive(self._seed, "evaluation", index))
                yield collate(self._dataset, samples), len(samples)
        if world_size > 1 and read != length:
            raise ValueError(
                f"{type(self._dataset).__name__} yields {read} samples, and its __len__ is {length}: yield all samples "
                "on each rank, as many as __len__ says, because noether splits the batches over the ranks"
            )

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
                error.add_note(describe_place(self._name, self._dataset, index))
                raise
            yield sample
