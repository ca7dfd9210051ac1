"""A sample that cannot be loaded is named, with and without workers; workers never outlive their use."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from multiprocessing import resource_sharer

import pytest
import torch
from torch.utils.data import Dataset, IterableDataset

from noether import TrainingIteration, TrainState
from noether.training.data import loading
from noether.training.data.indexed import EvaluationData, TrainingData
from noether.training.data.interruptible import DataInterrupt
from noether.training.data.loading import WorkerError
from noether.training.data.streamed import StreamedData
from noether.training.data.streamed_evaluation import StreamedEvaluationData
from noether.training.runs.interruption import Interruption

START = TrainingIteration()


class Unpicklable(Exception):  # noqa: N818  # a user's name
    def __init__(self, first, second):
        super().__init__(f"{first} {second}")


class Bad(Dataset):
    """Sample 5 cannot be loaded."""

    def __init__(self, make_error=ValueError):
        self._make_error = make_error

    def __len__(self):
        return 8

    def __getitem__(self, index):
        if index == 5:
            raise self._make_error()
        return index


class Ragged(Bad):
    def __getitem__(self, index):
        return torch.zeros(1 + (index == 5))


class Dying(Bad):
    def __getitem__(self, index):
        if index == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return index


class Unsendable(Bad):
    def __getitem__(self, index):
        return index

    def collate(self, samples):
        return lambda: samples


class Stuck(Bad):
    def __getitem__(self, index):
        while index == 5:
            time.sleep(0.01)
        return index


class Signalling(Stuck):
    def __getitem__(self, index):
        if index == 5:
            os.kill(os.getppid(), signal.SIGTERM)
        return super().__getitem__(index)

    def collate(self, samples):
        # A tensor comes through a socket. A signal before the socket is connected would leave it to the garbage
        # collector, which warns: the training process may still receive sample 4 when the worker reads sample 5.
        return samples


class Stream(IterableDataset):
    def __init__(self, error):
        self._error, self._read = error, 0

    def __len__(self):
        return 8

    def state_dict(self):
        return {"read": self._read}

    def load_state_dict(self, state):
        self._read = state["read"]

    def __iter__(self):
        while self._read < len(self):
            if self._read == 5:
                raise self._error
            self._read += 1
            yield self._read


def training(dataset, workers):
    return TrainingData(dataset, seed=0, effective_batch_size=8, num_workers=workers, name="train")


def evaluation(dataset, workers):
    return EvaluationData(dataset, seed=0, batch_size=3, num_workers=workers, name="val")


def load_all(data):
    try:
        return list(data) if isinstance(data, EvaluationData) else data.batch(START, last=1)
    finally:
        data.close()


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(("make", "key"), [(training, "train"), (evaluation, "val")])
@pytest.mark.parametrize(
    ("make_error", "kind", "text"),
    [
        (lambda: FileNotFoundError(2, "no such file", "5.png"), FileNotFoundError, "[Errno 2] no such file: '5.png'"),
        (lambda: KeyError("height"), KeyError, "'height'"),
        (lambda: Unpicklable("a", "b"), (Unpicklable, RuntimeError), "a b"),
        (StopIteration, RuntimeError, "StopIteration"),
        (MemoryError, MemoryError, ""),
    ],
    ids=["OSError", "KeyError", "Unpicklable", "StopIteration", "MemoryError"],
)
def test_an_error_keeps_its_type_and_names_the_sample(make, key, workers, make_error, kind, text):
    with pytest.raises(kind) as raised:
        load_all(make(Bad(make_error), workers))
    assert str(raised.value).endswith(text)
    assert raised.value.__notes__ == [f"while loading sample 5 of data.{key} (Bad)"]
    if workers:
        assert "in __getitem__" in str(raised.value.__cause__)
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("workers", [0, 1])
def test_samples_that_make_no_batch_are_named(workers):
    with pytest.raises(RuntimeError) as raised:
        load_all(evaluation(Ragged(), workers))
    assert "while loading samples 3, 4, 5 of data.val (Ragged)" in raised.value.__notes__


def test_an_error_of_a_stream_says_how_many_samples_were_read():
    data = StreamedData(Stream(OSError("broken")), seed=0, effective_batch_size=8, name="train")
    state = TrainState(callback_states=data.init(TrainState()))
    with pytest.raises(OSError, match="broken") as raised:
        data.next_batches(state)
    assert raised.value.__notes__ == [
        "while loading the next sample of data.train (Stream), after 5 samples of the epoch"
    ]
    data = StreamedEvaluationData(Stream(OSError("broken")), seed=0, batch_size=2, name="val")
    with pytest.raises(OSError, match="broken") as raised:
        list(data)
    assert raised.value.__notes__ == [
        "while loading the next sample of data.val (Stream), after 5 samples of the epoch"
    ]


@pytest.mark.parametrize("make", [training, evaluation])
def test_the_death_of_a_worker_is_an_error_that_says_so(make):
    with pytest.raises(WorkerError, match=r"loads samples of data\.\w+ ended unexpectedly: .*[Kk]illed"):
        load_all(make(Dying(), 1))
    assert multiprocessing.active_children() == []


def test_a_worker_that_dies_while_it_sends_is_named_once_it_is_dead():
    """The pipe may report it before the system does."""
    data = TrainingData(torch.arange(40), seed=0, effective_batch_size=4, num_workers=1, name="train")
    data.batch(START)
    (worker,) = multiprocessing.active_children()

    def broken():
        worker.kill()  # it takes a moment
        raise ConnectionResetError(104, "reset")
        yield

    data._loading._loading = broken()  # noqa: SLF001  # the moment between the two cannot be forced
    with pytest.raises(WorkerError, match=r"loads samples of data\.train ended unexpectedly: .*reset"):
        data.batch(TrainingIteration(update=1, sample=4))
    data.close()


@pytest.mark.parametrize("make", [training, evaluation])
def test_a_batch_that_cannot_be_sent_ends_its_worker(make):
    with pytest.raises(WorkerError, match="ended unexpectedly"):
        load_all(make(Unsendable(), 1))


def test_without_workers_an_error_waits_for_none(monkeypatch):
    monkeypatch.setattr(loading, "wait", lambda *_: pytest.fail("there is no process to wait for"))
    with pytest.raises(FileNotFoundError):
        load_all(training(Bad(lambda: FileNotFoundError(2, "no such file", "5.png")), 0))


def test_the_death_of_a_worker_interrupts_nothing_but_the_wait_for_a_batch():
    data = TrainingData(torch.arange(40), seed=0, effective_batch_size=4, num_workers=1, name="train")
    data.batch(START)
    (worker,) = multiprocessing.active_children()
    worker.kill()
    worker.join()  # torch's handler of SIGCHLD would raise here
    with pytest.raises(WorkerError):
        [data.batch(TrainingIteration(update=update)) for update in range(1, 10)]
    data.close()


def test_workers_that_do_not_end_are_killed(monkeypatch):
    monkeypatch.setattr(loading, "_SHUTDOWN_TIMEOUT_S", 0.05)
    data = EvaluationData(Stuck(), seed=0, batch_size=1, num_workers=1)
    assert next(iter(data)).tolist() == [0]
    data.close()
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("is_early", [True, False])
def test_a_signal_ends_the_wait_for_a_worker_that_hangs(monkeypatch, is_early):
    """Whether it arrives before the wait or in it; without it the wait would have no end."""
    monkeypatch.setattr(loading, "_SHUTDOWN_TIMEOUT_S", 0.05)
    with Interruption() as interruption:
        if is_early:
            signal.raise_signal(signal.SIGTERM)
        with pytest.raises(DataInterrupt):
            list(EvaluationData(Stuck() if is_early else Signalling(), seed=0, batch_size=1, num_workers=1))
        assert interruption()
    assert multiprocessing.active_children() == []


class Silent(Bad):
    def __getitem__(self, index):
        return int(sys.excepthook is loading._report_unless_disconnected)  # noqa: SLF001  # the hook of workers


def test_a_worker_prints_no_traceback_where_a_signal_interrupts_the_receipt_of_its_tensor(monkeypatch, capsys):
    """A tensor is sent by a thread of the worker, when the training process asks for it."""
    assert [int(batch.sum()) for batch in EvaluationData(Silent(), seed=0, batch_size=8, num_workers=1)] == [8]
    reported = []

    def report(kind, error, trace):
        reported.append(kind)
        loading._report_unless_disconnected(kind, error, trace)  # noqa: SLF001  # as in a worker

    monkeypatch.setattr(sys, "excepthook", report)
    with open(os.devnull) as file:  # noqa: PTH123  # a device
        while not reported:  # the thread may send before the other end is closed
            ident = resource_sharer.DupFd(file.fileno())._id  # noqa: SLF001  # the address that a tensor is sent with
            resource_sharer._resource_sharer.get_connection(ident).close()  # noqa: SLF001
    resource_sharer.stop()
    assert issubclass(reported[0], ConnectionError)
    assert capsys.readouterr().err == ""


def test_closing_a_dataset_stops_the_workers_of_its_unfinished_passes():
    data = evaluation(torch.arange(40), 2)
    unfinished = iter(data.batched(2))
    next(unfinished)
    assert len(multiprocessing.active_children()) == 2
    data.close()
    assert multiprocessing.active_children() == []


PROGRAM = """
import torch
from noether.training.data.indexed import TrainingData
from noether import TrainingIteration
data = TrainingData(torch.arange(40), seed=0, effective_batch_size=4, num_workers=2)
data.batch(TrainingIteration())
raise SystemExit(7)
"""


def test_a_program_that_forgets_to_close_the_data_ends():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False, timeout=100)
    assert (done.returncode, done.stdout) == (7, "")
