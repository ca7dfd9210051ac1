"""Background saves: training continues, nothing is copied needlessly, and every failure is reported."""

import os
import subprocess
import sys
import threading
from collections.abc import Mapping

import pytest
import torch
from faults import Faults, call_without_fsync
from small_run import open_small_run, state_after
from torch import nn

from noether import AfterTraining, AfterUpdate, SaveCheckpoint, TrainingIteration, TrainState
from noether.core.state import Measured
from noether.core.tensors.tree import FrozenDict
from noether.effects import CheckpointError, CheckpointStore
from noether.effects.disk.calls import Disk
from noether.testing import same

SAVE = SaveCheckpoint(pointers=("latest",))
UPDATE = AfterUpdate(samples=4)


@pytest.fixture
def gate():
    """The event for which a background save waits before it creates a file."""
    gate = threading.Event()
    yield gate
    gate.set()


@pytest.fixture
def gated_disk(gate):
    main = threading.current_thread()

    def call(function, *arguments):
        if function is os.open and arguments[1] & os.O_EXCL and threading.current_thread() is not main:
            gate.wait()
        return call_without_fsync(function, *arguments)

    return Disk(call)


def open_store(folder):
    return CheckpointStore(folder / "run/checkpoints", "run")


def test_training_continues_during_a_background_save(tmp_path, gate, gated_disk):
    with open_small_run(tmp_path / "run", gated_disk, asynchronous=True, borrowed=False) as directory:
        directory.interpreter([SAVE], state_after(1), UPDATE)
        for update in (2, 3):
            directory.interpreter([], state_after(update), UPDATE)
        assert open_store(tmp_path).manifests() == []
        gate.set()
        directory.wait()
        assert same(open_store(tmp_path).load(open_store(tmp_path).find("latest")), state_after(1))


def test_a_save_waits_for_the_save_of_the_event_before(tmp_path):
    with open_small_run(tmp_path / "run", asynchronous=True, borrowed=False) as directory:
        for update in (1, 2, 3):
            directory.interpreter([SAVE], state_after(update), UPDATE)
            saved = [manifest.iteration.update for manifest in open_store(tmp_path).manifests()]
            assert saved[: update - 1] == [*range(1, update)]


def test_borrowed_state_is_saved_as_it_was_at_the_request(tmp_path, gate, gated_disk):
    model = nn.Linear(2, 1)
    before = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    with open_small_run(tmp_path / "run", gated_disk, asynchronous=True) as directory:
        directory.interpreter([SAVE], TrainState.from_module(model).advance(samples=4), UPDATE)
        with torch.no_grad():
            model.weight.zero_()
        gate.set()
    assert same(dict(open_store(tmp_path).load(open_store(tmp_path).find("latest")).params), before)


def test_immutable_state_is_not_copied(tmp_path, gate, gated_disk):
    state = state_after(1).replace(params={"w": torch.ones(4)})
    with open_small_run(tmp_path / "run", gated_disk, asynchronous=True, borrowed=False) as directory:
        directory.interpreter([SAVE], state, UPDATE)
        state.params["w"].zero_()  # breaks the rule that states are immutable, to show that the save made no copy
        gate.set()
    assert same(dict(open_store(tmp_path).load(open_store(tmp_path).find("latest")).params), {"w": torch.zeros(4)})


def run_with_failed_save(folder, **settings):
    """Return a run whose first save, at update 1, failed in the background."""
    faults = Faults()
    directory = open_small_run(folder, Disk(faults), asynchronous=True, borrowed=False, **settings)
    faults.arm(0, "ENOSPC from then on")
    directory.interpreter([SAVE], state_after(1), UPDATE)
    wait_quietly(directory)
    faults.armed = False
    return directory


def wait_quietly(directory):
    """Wait for background saves without raising their errors."""
    for future in directory._saver.running:  # noqa: SLF001  # the public way to wait raises
        future.exception()


@pytest.mark.parametrize("effects", [[], [SAVE]])
def test_failure_is_raised_at_the_next_event(tmp_path, effects):
    directory = run_with_failed_save(tmp_path / "run")
    with pytest.raises(CheckpointError, match="No space left on device"):
        directory.interpreter(effects, state_after(2), UPDATE)
    directory.interpreter([SAVE], state_after(3), UPDATE)  # raised only once
    directory.close()
    assert [manifest.iteration.update for manifest in open_store(tmp_path).manifests()] == [3]


@pytest.mark.parametrize("end", ["wait", "close"])
def test_failure_is_raised_at_the_end(tmp_path, end):
    directory = run_with_failed_save(tmp_path / "run")
    with pytest.raises(CheckpointError, match="No space left on device"):
        getattr(directory, end)()
    directory.close()


def test_failure_is_logged_if_another_error_is_raised(tmp_path, caplog):
    with pytest.raises(ZeroDivisionError), run_with_failed_save(tmp_path / "run"):
        raise ZeroDivisionError
    assert "No space left on device" in caplog.text


def test_saves_of_one_event_that_fail_for_one_reason_raise_once(tmp_path, caplog):
    faults = Faults()
    directory = open_small_run(tmp_path / "run", Disk(faults), asynchronous=True, borrowed=False)
    faults.arm(0, "ENOSPC from then on")
    directory.interpreter([SaveCheckpoint(), SaveCheckpoint(tag="other")], state_after(1), UPDATE)
    wait_quietly(directory)
    faults.armed = False
    with pytest.raises(CheckpointError, match="No space left on device"):
        directory.wait()
    directory.wait()
    directory.close()
    assert caplog.records == []


@pytest.mark.parametrize("asynchronous", [False, True])
def test_run_continues_if_failures_only_warn(tmp_path, caplog, asynchronous):
    faults = Faults()
    settings = {"asynchronous": asynchronous, "borrowed": False, "on_error": "warn"}
    with open_small_run(tmp_path / "run", Disk(faults), **settings) as directory:
        faults.arm(0, "EIO from then on")
        directory.interpreter([SAVE], state_after(1), UPDATE)
        wait_quietly(directory)
        faults.armed = False
        directory.interpreter([SAVE], state_after(2), UPDATE)
    assert caplog.text.count("; training continues without it") == 1
    assert open_store(tmp_path).pointers() == {"latest": str(state_after(2).iteration)}


class PanicException(BaseException):  # as Rust code raises it, whose class cannot be imported
    """Not an `Exception`."""


class Unreadable(Mapping):
    """The memory of an optimizer that raises when it is read."""

    def __getitem__(self, key):
        raise ArithmeticError("the optimizer cannot be read")

    def __iter__(self):
        return iter(["state"])

    def __len__(self):
        return 1


def raise_instead(error):
    def fail(*_arguments, **_settings):
        raise error

    return fail


def with_memory(value):
    return lambda: state_after(1).replace(callback_states=FrozenDict(seen=FrozenDict(a=value)))


UNSAVABLE = {
    "a set in the optimizer's memory": (
        lambda: state_after(1).replace(opt_state={"state": {"w": {"seen": {1}}}}),
        "opt_state: state.w.seen is a set, which cannot be saved",
    ),
    "a key in the optimizer's memory": (
        lambda: state_after(1).replace(opt_state={"state": {"w": {1: 2}}}),
        "opt_state: state.w has the key 1 of type int, which cannot be saved; keys are str",
    ),
    "a sparse tensor in the optimizer's memory": (
        lambda: state_after(1).replace(opt_state={"state": {"w": torch.ones(2).to_sparse()}}),
        "opt_state: state.w is of type torch.float32, torch.sparse_coo on cpu, which cannot be saved",
    ),
    "an optimizer's memory that raises": (
        lambda: state_after(1).replace(opt_state=Unreadable()),
        "ArithmeticError: the optimizer cannot be read",
    ),
    "a param without values": (
        lambda: state_after(1).replace(params={"w": torch.ones(2, device="meta")}),
        "weights: w is of type torch.float32, torch.strided on meta, which cannot be saved",
    ),
    "a set in memory": (with_memory({1}), "memory 'seen': a is a set; "),
    "a sparse tensor in memory": (with_memory(torch.ones(2).to_sparse()), "memory 'seen': a is a tensor of layout"),
    "a tensor without values in memory": (
        with_memory(torch.ones(2, device="meta")),
        "callback_states.seen.a is of type torch.float32, torch.strided on meta",
    ),
    "a metric that is a set": (
        lambda: state_after(1).replace(metrics={"loss": Measured({1}, TrainingIteration())}),
        "metrics.loss.0 is a set, which cannot be saved",
    ),
}
ERRORS = {
    "no memory": (MemoryError(), "MemoryError"),
    "a panic": (PanicException("no memory"), "PanicException: no memory"),
    "a lost device": (RuntimeError("CUDA error: unknown"), "CUDA error: unknown"),
}


def save_twice(folder, state, caplog, *, asynchronous, on_error, repair=lambda: None):
    """Save a state that cannot be saved, and then another one; return what was reported."""
    settings = {"asynchronous": asynchronous, "borrowed": asynchronous, "on_error": on_error}
    with open_small_run(folder / "run", **settings) as directory:
        if on_error == "stop":
            with pytest.raises(CheckpointError) as failure:
                save_and_wait(directory, state)
            message = str(failure.value)
        else:
            save_and_wait(directory, state)
            message = caplog.text
            assert caplog.text.count("; training continues without it") == 1
        repair()
        directory.interpreter([SAVE], state_after(2), UPDATE)
    assert open_store(folder).pointers() == {"latest": str(state_after(2).iteration)}
    return message


def save_and_wait(directory, state):
    directory.interpreter([SAVE], state, UPDATE)
    directory.wait()


@pytest.mark.parametrize("what", UNSAVABLE)
@pytest.mark.parametrize("on_error", ["stop", "warn"])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_state_that_cannot_be_saved_is_a_failed_save(tmp_path, caplog, what, on_error, asynchronous):
    make, reason = UNSAVABLE[what]
    assert reason in save_twice(tmp_path, make(), caplog, asynchronous=asynchronous, on_error=on_error)


@pytest.mark.parametrize("what", ERRORS)
@pytest.mark.parametrize("on_error", ["stop", "warn"])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_any_error_while_tensors_are_read_is_a_failed_save(tmp_path, monkeypatch, caplog, what, on_error, asynchronous):
    error, reason = ERRORS[what]
    state = state_after(1).replace(params={"w": torch.ones(2)})
    monkeypatch.setattr(torch.Tensor, "cpu", raise_instead(error))
    assert reason in save_twice(
        tmp_path, state, caplog, asynchronous=asynchronous, on_error=on_error, repair=monkeypatch.undo
    )


@pytest.mark.parametrize("asynchronous", [False, True])
def test_ctrl_c_in_a_save_is_no_failed_save(tmp_path, monkeypatch, asynchronous):
    monkeypatch.setattr(torch.Tensor, "cpu", raise_instead(KeyboardInterrupt()))
    state = state_after(1).replace(params={"w": torch.ones(2)})
    with (
        open_small_run(tmp_path / "run", asynchronous=asynchronous, on_error="warn") as directory,
        pytest.raises(KeyboardInterrupt),
    ):
        save_and_wait(directory, state)


NEVER_CLOSED = """\
import sys, torch
from noether import AfterUpdate, SaveCheckpoint, TrainState
from noether.effects import open_run

directory = open_run(sys.argv[1], asynchronous=True, borrowed=False)
state = TrainState(params={"w": torch.ones(8_000_000)}).advance(samples=4)
directory.interpreter([SaveCheckpoint(tag=sys.argv[2], pointers=("latest",))], state, AfterUpdate(samples=4))
"""


def train_without_close(folder, tag):
    return subprocess.run(
        [sys.executable, "-c", NEVER_CLOSED, folder, tag], capture_output=True, text=True, check=False, timeout=240
    )


def test_process_waits_for_its_last_save_at_exit(tmp_path):
    process = train_without_close(tmp_path / "run", "whole")
    assert (process.returncode, process.stderr) == (0, "")
    store = open_store(tmp_path)
    assert store.load(store.find("latest")).params["w"].sum() == 8_000_000


def test_failure_at_exit_is_written_to_standard_error(tmp_path):
    process = train_without_close(tmp_path / "run", "no/name")
    assert "tag 'no/name' is not a valid name: use up to 200 letters, digits and '_.=%-'" in process.stderr


def test_saves_of_one_event_do_not_wait_for_each_other(tmp_path, gate, gated_disk):
    effects = [SaveCheckpoint(tag="a"), SaveCheckpoint(tag="b")]
    with open_small_run(tmp_path / "run", gated_disk, asynchronous=True, borrowed=False) as directory:
        directory.interpreter(effects, state_after(1), AfterTraining())
        gate.set()
    assert [manifest.tag for manifest in open_store(tmp_path).manifests()] == ["a", "b"]
