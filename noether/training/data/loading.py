"""Loading of batches, in this process or in workers: an error names the sample, and `close` stops the workers."""

from __future__ import annotations

import copy
import multiprocessing
import multiprocessing.queues
import os
import signal
import sys
import threading
import traceback
from contextlib import contextmanager, nullcontext
from multiprocessing.connection import wait
from multiprocessing.reduction import ForkingPickler
from multiprocessing.util import Finalize
from typing import TYPE_CHECKING, Any, Final, Protocol, Self, cast, final

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from noether.core.errors import NoetherError
from noether.session.hidden_state import generators_of
from noether.session.randomness import derive, seed_all
from noether.training.data.batches import collate
from noether.training.data.interruptible import WAITING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from multiprocessing.process import BaseProcess
    from types import FrameType, TracebackType

    from torch.utils.data import Sampler

_GENERATOR_SEED: Final = 0
_SHUTDOWN_TIMEOUT_S: Final = 5.0
"""Seconds in which workers may finish the samples that they load, before they are killed."""
_PIPE_TIMEOUT_S: Final = 1.0
"""Seconds in which a process whose pipe is broken ends."""
_STOP_SIGNALS: Final = [each for each in signal.Signals if each.name in ("SIGINT", "SIGTERM", "SIGHUP")]
_BEFORE_JOIN: Final = 0
"""Priority of functions that multiprocessing calls at exit before it joins its processes."""


class SizedDataset(Protocol):
    """A dataset that is read by index."""

    def __len__(self) -> int:
        """Return the number of samples."""

    def __getitem__(self, index: int, /) -> Any:
        """Return a sample."""


class WorkerError(NoetherError, RuntimeError):
    """A process that loads samples ended unexpectedly; or, as the cause of another error, its traceback there."""


@final
class LoadedBatches:
    """Iterates batches of a dataset; call `close` when no more are needed.

    An error names the sample. With workers, it is the exception that the dataset raised, not one of the loader.

    Args:
        dataset: It has `__getitem__`; if it has `collate`, that makes a batch from a list of samples.
        name: Key of the dataset in the configuration, for messages; empty if it has none.
        seed: The run's seed.
        batches: `(epoch, index)` of the samples of each batch.
        num_workers: Processes that load samples; 0 loads in this process.
        device: Device to which the batches will be moved.
    """

    def __init__(
        self,
        dataset: SizedDataset,
        *,
        name: str,
        seed: int,
        batches: Sequence[Any] | Sampler[Any],
        num_workers: int,
        device: torch.device,
    ) -> None:
        self._name = f"data.{name}" if name else type(dataset).__name__
        loader: DataLoader[Any] = DataLoader(
            _SeededDataset(dataset, self._name, seed),
            batch_sampler=cast("Sampler[list[Any]]", batches),
            num_workers=num_workers,
            collate_fn=_return_batch,
            pin_memory=device.type == "cuda",
            worker_init_fn=_prepare_worker,
            # Without a generator, the loader would draw from the one that the step uses.
            generator=torch.Generator().manual_seed(_GENERATOR_SEED),
        )
        earlier = set(multiprocessing.active_children()) if num_workers else set()
        self._loading: Iterator[Any] | None = iter(loader)
        self._workers = [each for each in multiprocessing.active_children() if each not in earlier and num_workers]
        if self._workers:
            _CHILD_EXITS.postpone_reports()
            # An exception that reaches the end of the program keeps this object alive: multiprocessing would wait.
            self._at_exit = Finalize(None, _kill, [self._workers], exitpriority=_BEFORE_JOIN)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Any:
        if self._loading is None:
            raise StopIteration
        try:
            with _CHILD_EXITS.allow_reports(), WAITING.interruptible() if self._workers else nullcontext():
                batch = next(self._loading)
        except (RuntimeError, OSError, EOFError) as error:  # the last two if it died while it sent a batch
            # The pipe of a process that dies may break a moment before the process ends.
            if not self._workers or not wait([worker.sentinel for worker in self._workers], _PIPE_TIMEOUT_S):
                raise
            reason = str(error).strip(" .")
            raise WorkerError(
                f"a process that loads samples of {self._name} ended unexpectedly: {reason}; if the system killed it "
                "because memory ran out, lower trainer.num_workers"
            ) from error
        if isinstance(batch, _LoadError):
            batch.raise_error()
        return batch

    def close(self) -> None:
        """Stop the workers: wait until they have finished the samples that they load, then kill them."""
        if self._loading is None or not self._workers:
            self._loading = None
            return
        timer = threading.Timer(_SHUTDOWN_TIMEOUT_S, _kill, [self._workers])
        timer.start()
        self._loading = None  # without references, torch's iterator asks its workers to end, and waits
        timer.cancel()
        _kill(self._workers)
        self._at_exit.cancel()


@final
class _SeededDataset(Dataset[Any]):
    """A dataset read by `(epoch, index)` in whole batches; it seeds the random numbers before each sample."""

    def __init__(self, dataset: SizedDataset, name: str, seed: int) -> None:
        self._dataset, self._name, self._seed = dataset, name, seed
        self._generators: list[Any] | None = None  # found in the process that reads the dataset

    def __getitems__(self, keys: list[tuple[int, int]]) -> Any:
        """Return a batch; in a worker a `_LoadError` if it cannot be loaded."""
        samples: list[Any] = []
        if self._generators is None:
            self._generators = generators_of(self._dataset)
        try:
            for epoch, index in keys:
                seed_all(derive(self._seed, "sample", epoch, index), self._generators)
                samples.append(self._dataset[index])
            return collate(self._dataset, samples)
        except Exception as error:
            failed = [index for _, index in keys[len(samples) :][:1] or keys]
            what = f"sample{'s' if len(failed) > 1 else ''} {', '.join(map(str, failed))}"
            describe = getattr(self._dataset, "describe_place", None)  # of a share of a stream
            place = describe() if describe else f"while loading {what} of {self._name} ({type(self._dataset).__name__})"
            if get_worker_info() is not None:
                return _LoadError(error, place)
            if isinstance(error, StopIteration):
                raise _describe(error, place) from error
            error.add_note(place)
            raise


def _describe(error: Exception, place: str) -> RuntimeError:
    """Return an error that stands for one that cannot be raised as it is."""
    described = RuntimeError(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)
    described.add_note(place)
    return described


@final
class _LoadError:
    """An error in a worker, sent to the training process in place of a batch."""

    def __init__(self, error: Exception, place: str) -> None:
        self._text = "".join(traceback.format_exception(error))
        self._error, self._place = error, place
        try:
            ForkingPickler.dumps(copy.copy(error))
        except Exception:  # noqa: BLE001  # a user's exception may refuse both in any way
            self._error = RuntimeError(f"{type(error).__name__}: {error}")

    def raise_error(self) -> None:
        """Raise the error in the training process, with the worker's traceback as its cause."""
        error = self._error
        if isinstance(error, StopIteration):  # it would look like the end of the data
            error = _describe(error, self._place)
        else:
            error.add_note(self._place)
        raise error from WorkerError(f"in a worker:\n{self._text}")


@final
class _ChildExits:
    """Lets torch report the death of a worker only while a batch is awaited.

    Torch raises that error from a handler of SIGCHLD, so it would interrupt a step or a save at any line.
    """

    def __init__(self) -> None:
        self._report: Any = None
        self._is_awaiting = False

    def postpone_reports(self) -> None:
        """Replace torch's handler, which it installs in the main thread together with the first workers."""
        handler = signal.getsignal(signal.SIGCHLD)
        if getattr(handler, "__module__", "").startswith("torch.") and self._is_main_thread():
            self._report = handler
            signal.signal(signal.SIGCHLD, self._catch)

    @contextmanager
    def allow_reports(self) -> Iterator[None]:
        """Let workers that have ended, or end inside the block, raise an error."""
        if self._report is None or not self._is_main_thread():
            yield
            return
        self._report(signal.SIGCHLD, None)
        self._is_awaiting = True
        try:
            yield
        finally:
            self._is_awaiting = False

    def _catch(self, number: int, frame: FrameType | None) -> None:
        if self._is_awaiting:
            self._report(number, frame)

    @staticmethod
    def _is_main_thread() -> bool:
        return threading.current_thread() is threading.main_thread()


_CHILD_EXITS: Final = _ChildExits()


def _kill(workers: Sequence[BaseProcess]) -> None:
    for worker in workers:
        if worker.is_alive():
            worker.kill()
    if threading.current_thread() is threading.main_thread():
        for worker in workers:
            worker.join()


def _return_batch(batch: Any) -> Any:
    """Return the batch, which the dataset has collated."""
    return batch


def _prepare_worker(worker: int) -> None:  # noqa: ARG001  # torch passes its number
    """Ignore the first signal to stop: one to the process group asks the run to save first."""
    for number in _STOP_SIGNALS:
        signal.signal(number, _ignore_once)
    # A batch that cannot be sent would be dropped, and the training process would wait for it.
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(_end_worker)  # type: ignore[attr-defined]  # noqa: SLF001  # multiprocessing has no public hook
    sys.excepthook = _report_unless_disconnected


def _report_unless_disconnected(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print an exception of the thread that sends tensors, unless a signal interrupted the process that gets them."""
    if not isinstance(error, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, trace)


def _end_worker(error: Exception, batch: object) -> None:  # noqa: ARG001  # the signature of the queue's hook
    sys.stderr.write(f"a batch cannot be sent from a worker to the training process: {error!r}\n")
    sys.stderr.flush()
    os._exit(1)


def _ignore_once(number: int, frame: FrameType | None) -> None:  # noqa: ARG001  # the signature of a signal handler
    signal.signal(number, signal.SIG_DFL)
