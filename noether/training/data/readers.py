"""Readers of a stream: in this process, or in workers that each read a share of it. Both know their position."""

from __future__ import annotations

import io
import zlib
from itertools import count
from typing import TYPE_CHECKING, Any, Final, NamedTuple, final

import torch
from torch.utils.data import Sampler, get_worker_info

from noether.core.tensors.tree import FrozenDict, clone_tensors, pack, unpack
from noether.session.hidden_state import generators_of
from noether.session.loader import describe_share
from noether.session.randomness import derive, seed_all
from noether.training.data.loading import LoadedBatches

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from noether.core.state import Memory

_IN_ORDER: Final = torch.device("cpu")


@final
class StreamReader:
    """Reads a stream in this process.

    Args:
        dataset: It has `state_dict` and `load_state_dict`.
        seed: The run's seed; the random numbers of a sample are a function of its position in its epoch.
    """

    def __init__(self, dataset: Any, seed: int) -> None:
        self._dataset, self._seed = dataset, seed
        self._reading: Iterator[Any] = iter(())

    def position(self) -> Memory:
        """Return a copy of the dataset's position: the dataset may later write to the tensors that it returned."""
        return position_of(self._dataset)

    def move_to(self, position: Memory) -> None:
        """Move the dataset to a position."""
        self._dataset.load_state_dict(unpack(position))
        self.begin()

    def begin(self) -> None:
        """Begin an epoch, or continue one at the dataset's position."""
        self._reading = iter(self._dataset)

    def read(self, epoch: int, index: int) -> Any:
        """Return the next sample, the one at `index` of an epoch.

        Raises:
            StopIteration: If the stream has ended.
        """
        seed_all(derive(self._seed, "sample", epoch, index))
        return next(self._reading)

    def finish(self) -> None:
        """End an epoch all of whose samples were read; then the dataset is at the start of the next one."""

    def close(self) -> None:
        """Release the iterator."""
        self._reading = iter(())


class Chunk(NamedTuple):
    """What a worker reads of its share at once.

    Args:
        samples: Samples in order.
        share: Where the worker is after them; None if it has read nothing.
        digests: Of the first samples of a run, to find workers that read the same ones; else empty.
    """

    samples: list[Any]
    share: Mapping[str, Any] | None
    digests: tuple[int, ...] = ()


@final
class WorkerStreamReader:
    """Reads a stream in workers: chunks of samples of worker 0, 1, 2 and so on, in turns, as torch's loader does.

    Each worker has a copy of the dataset, which yields a share by `torch.utils.data.get_worker_info()`. The order
    depends on the number of workers and the size of chunks, and not on how fast each worker is.

    Args:
        dataset: It has `state_dict` and `load_state_dict`.
        seed: The run's seed; the random numbers of a sample are a function of its worker and its position there.
        workers: Number of processes, >= 1.
        size: Samples of a chunk.
        name: Key of the dataset in the configuration, for messages.
    """

    def __init__(self, dataset: Any, seed: int, *, workers: int, size: int, name: str) -> None:
        self._dataset, self._seed, self._workers, self._size, self._name = dataset, seed, workers, size, name
        start = FrozenDict(state=position_of(dataset), read=0, ended=False)
        self._pass, self._chunk, self._offset = 0, 0, 0
        self._shares: list[Mapping[str, Any]] = [start] * workers
        self._current: Chunk | None = None
        self._loading: LoadedBatches | None = None
        self._first: Chunk | None = None  # of worker 0, until it was compared with that of worker 1

    def position(self) -> Memory:
        """Return where each worker is, and the place in the current chunk."""
        self._leave_chunk_if_read()
        places = {"workers": self._workers, "pass": self._pass, "chunk": self._chunk, "offset": self._offset}
        return FrozenDict(shares=tuple(self._shares), **places)

    def move_to(self, position: Memory) -> None:
        """Move to a position, which another process may have saved.

        Raises:
            ValueError: If it is not one of this number of workers.
        """
        saved: Any = position
        workers = saved.get("workers", 0) if isinstance(saved, FrozenDict) and "shares" in saved else 0
        if workers != self._workers:
            raise ValueError(
                f"the position of data.{self._name} was saved with trainer.num_workers: {workers}, and now it is "
                f"{self._workers}: a stream is split over its workers, so set the saved number"
            )
        self._pass, self._chunk, self._offset = saved["pass"], saved["chunk"], saved["offset"]
        self._shares = list(saved["shares"])
        self.close()

    def begin(self) -> None:
        """Begin the next pass over the stream, if this one has ended."""
        self._leave_chunk_if_read()
        if all(share["ended"] for share in self._shares):
            self._pass, self._chunk, self._offset = self._pass + 1, 0, 0
            self._shares = [FrozenDict(state=share["state"], read=0, ended=False) for share in self._shares]
            self.close()

    def read(self, epoch: int, index: int) -> Any:  # noqa: ARG002  # as the other reader; the workers count by themselves
        """Return the next sample.

        Raises:
            StopIteration: If all workers have ended.
            ValueError: If each worker reads the whole stream.
        """
        while True:
            self._leave_chunk_if_read()
            if self._current is None:
                if all(share["ended"] for share in self._shares):
                    raise StopIteration
                self._current = self._load()
                self._compare_first(self._current)
            if self._offset < len(self._current.samples):
                self._offset += 1
                return self._current.samples[self._offset - 1]

    def finish(self) -> None:
        """End an epoch all of whose samples were read.

        Raises:
            ValueError: If a worker has more samples.
        """
        try:
            self.read(0, 0)
        except StopIteration:
            self.begin()
            return
        raise ValueError(
            f"the {self._workers} workers of data.{self._name} yield more samples in an epoch than its __len__ says: "
            f"{self._fix}, and return the samples of all workers from __len__"
        )

    def close(self) -> None:
        """Stop the workers; the position stays."""
        if self._loading is not None:
            self._loading.close()
        self._loading = self._current = self._first = None

    @property
    def _fix(self) -> str:
        return f"{describe_share(self._dataset)}, or set trainer.num_workers to 0"

    def _leave_chunk_if_read(self) -> None:
        if self._current is not None and self._offset == len(self._current.samples):
            self._shares[self._chunk % self._workers] = self._current.share or {}
            self._chunk, self._offset, self._current = self._chunk + 1, 0, None

    def _load(self) -> Chunk:
        """Return the next chunk; the first of a new process is that whose samples were read in part, or the next."""
        if self._loading is None:
            skip = self._chunk % self._workers
            share = _Share(self._dataset, self._name, self._seed, self._size, self._pass, tuple(self._shares), skip)
            self._loading = LoadedBatches(
                share,
                name=self._name,
                seed=self._seed,
                batches=_Endless(),
                num_workers=self._workers,
                device=_IN_ORDER,
            )
            for _ in range(skip):
                next(self._loading)
        chunk: Chunk = next(self._loading)
        return chunk

    def _compare_first(self, chunk: Chunk) -> None:
        """Refuse a second worker that reads what the first one has read; samples that are all equal tell nothing."""
        if self._pass or self._chunk > 1 or self._workers == 1:
            return
        if self._chunk == 0:
            self._first = chunk
        elif self._first is not None and chunk.digests == self._first.digests and len(set(chunk.digests)) > 1:
            raise ValueError(f"each of the {self._workers} workers reads all of data.{self._name}: {self._fix}")


class _Share:
    """The share of a stream that a worker reads; each index asks for the next chunk."""

    def __init__(
        self, dataset: Any, name: str, seed: int, size: int, number: int, shares: tuple[Any, ...], skip: int
    ) -> None:
        self._dataset, self._name, self._seed, self._size = dataset, name, seed, size
        self._pass, self._shares, self._skip = number, shares, skip
        self._reading: Iterator[Any] | None = None
        self._read = self._worker = 0
        self._has_ended = False
        self._following: list[Any] = []  # read already, and not yet part of a chunk
        self._generators: list[Any] = []

    def __len__(self) -> int:
        raise TypeError  # it is not known

    def __getitem__(self, index: int) -> Chunk:
        if index < self._skip:  # those of workers before the one whose turn it is
            return Chunk([], None)
        if self._reading is None:
            self._begin()
        samples, state = self._following, position_of(self._dataset)
        while len(samples) <= self._size and not self._has_ended:
            if len(samples) == self._size:
                state = position_of(self._dataset)
            seed_all(self._seed_of_sample(), self._generators)
            try:
                samples.append(next(self._reading))  # type: ignore[arg-type]  # `_begin` has set it
                self._read += 1
            except StopIteration:
                self._has_ended, state = True, position_of(self._dataset)
        # One sample more than asked for: a stream without more may already be at the start of the next pass.
        samples, self._following = samples[: self._size], samples[self._size :]
        read = self._read - len(self._following)
        share = FrozenDict(state=state, read=read, ended=self._has_ended and not self._following)
        is_first = self._pass == 0 and read == len(samples)
        return Chunk(samples, share, tuple(map(_digest, samples)) if is_first else ())

    def _seed_of_sample(self) -> int:
        # The same for the first samples of all workers, which are equal then if each worker reads the whole stream.
        worker = 0 if self._pass == 0 and self._read < self._size else self._worker
        return derive(self._seed, "sample", self._pass, worker, self._read)

    @staticmethod
    def collate(chunks: list[Chunk]) -> Chunk:
        """Return the one chunk of a request."""
        return chunks[0]

    def describe_place(self) -> str:
        """Return which sample could not be read."""
        kind = type(self._dataset).__name__
        return (
            f"while loading the next sample of data.{self._name} ({kind}), after {self._read} samples of worker "
            f"{self._worker} in this pass"
        )

    def _begin(self) -> None:
        info = get_worker_info()
        self._worker = 0 if info is None else info.id
        share = self._shares[self._worker]
        self._read, self._has_ended = share["read"], share["ended"]
        self._dataset.load_state_dict(unpack(share["state"]))
        self._generators = generators_of(self._dataset)
        self._reading = iter(()) if self._has_ended else iter(self._dataset)


def _digest(sample: Any) -> int:
    """Return a number that equal samples share."""
    written = io.BytesIO()
    torch.save(sample, written)  # a plain pickle of a tensor has its address
    return zlib.crc32(written.getvalue())


class _Endless(Sampler[list[tuple[int, int]]]):
    """Asks for one chunk after the other."""

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return ([(0, index)] for index in count())


def position_of(dataset: Any) -> Memory:
    """Return a copy of a dataset's position as memory."""
    return clone_tensors(pack("state_dict of the training set", dataset.state_dict()))
