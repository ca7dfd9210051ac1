"""Saves in the background: training goes on, nothing is copied that need not be, and no failure goes unheard."""

import os
import subprocess
import sys
import threading

import pytest
import torch
from faults import Faults, call_without_fsync
from small_run import open_small_run, state_after
from torch import nn

from noether import AfterTraining, AfterUpdate, SaveCheckpoint, TrainState
from noether.effects import CheckpointError, CheckpointStore
from noether.effects.disk.calls import Disk
from noether.testing import same

SAVE = SaveCheckpoint(pointers=("latest",))
UPDATE = AfterUpdate(samples=4)


@pytest.fixture
def gate():
    """What every new file waits for in the thread of a save."""
    gate = threading.Event()
    yield gate
    gate.set()


@pytest.fixture
def gated(gate):
    main = threading.current_thread()

    def call(function, *arguments):
        if function is os.open and arguments[1] & os.O_EXCL and threading.current_thread() is not main:
            gate.wait()
        return call_without_fsync(function, *arguments)

    return Disk(call)


def stored(directory):
    return CheckpointStore(directory / "run/checkpoints", "run")


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, gate, gated):
    with open_small_run(tmp_path / "run", gated, asynchronous=True, borrowed=False) as run:
        run.interpreter([SAVE], state_after(1), UPDATE)
        for update in (2, 3):
            run.interpreter([], state_after(update), UPDATE)
        assert stored(tmp_path).manifests() == []
        gate.set()
        run.wait()
        assert same(stored(tmp_path).load(stored(tmp_path).find("latest")), state_after(1))


def test_a_save_that_asks_for_its_turn_waits_for_the_one_before(tmp_path):
    with open_small_run(tmp_path / "run", asynchronous=True, borrowed=False) as run:
        for update in (1, 2, 3):
            run.interpreter([SAVE], state_after(update), UPDATE)
            saved = [manifest.iteration.update for manifest in stored(tmp_path).manifests()]
            assert saved[: update - 1] == [*range(1, update)]


def test_what_is_borrowed_is_saved_as_it_was(tmp_path, gate, gated):
    model = nn.Linear(2, 1)
    kept = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    with open_small_run(tmp_path / "run", gated, asynchronous=True) as run:
        run.interpreter([SAVE], TrainState.from_module(model).advance(samples=4), UPDATE)
        with torch.no_grad():
            model.weight.zero_()
        gate.set()
    assert same(dict(stored(tmp_path).load(stored(tmp_path).find("latest")).params), kept)


def test_what_is_never_written_to_is_not_copied(tmp_path, gate, gated):
    state = state_after(1).replace(params={"w": torch.ones(4)})
    with open_small_run(tmp_path / "run", gated, asynchronous=True, borrowed=False) as run:
        run.interpreter([SAVE], state, UPDATE)
        state.params["w"].zero_()  # what nobody does: had it been copied, this would not be seen
        gate.set()
    assert same(dict(stored(tmp_path).load(stored(tmp_path).find("latest")).params), {"w": torch.zeros(4)})


def failing(directory, **settings):
    """Return a run in which the first save, at update 1, fails in the background."""
    faults = Faults()
    run = open_small_run(directory, Disk(faults), asynchronous=True, borrowed=False, **settings)
    faults.arm(0, "ENOSPC from then on")
    run.interpreter([SAVE], state_after(1), UPDATE)
    settle(run)
    faults.armed = False
    return run


def settle(run):
    """Wait for a save as nobody else does: without hearing how it went."""
    for future in run._saver._running:  # noqa: SLF001  # nobody else may wait and not hear
        future.exception()


@pytest.mark.parametrize("effects", [[], [SAVE]])
def test_a_failure_is_raised_at_the_next_event(tmp_path, effects):
    run = failing(tmp_path / "run")
    with pytest.raises(CheckpointError, match="No space left on device"):
        run.interpreter(effects, state_after(2), UPDATE)
    run.interpreter([SAVE], state_after(3), UPDATE)  # said once
    run.close()
    assert [manifest.iteration.update for manifest in stored(tmp_path).manifests()] == [3]


@pytest.mark.parametrize("end", ["wait", "close"])
def test_a_failure_is_raised_at_the_end(tmp_path, end):
    run = failing(tmp_path / "run")
    with pytest.raises(CheckpointError, match="No space left on device"):
        getattr(run, end)()
    run.close()


def test_a_failure_beside_another_error_is_told_and_hides_it_not(tmp_path, caplog):
    with pytest.raises(ZeroDivisionError), failing(tmp_path / "run"):
        raise ZeroDivisionError
    assert "No space left on device" in caplog.text


@pytest.mark.parametrize("asynchronous", [False, True])
def test_where_failures_warn_the_run_goes_on(tmp_path, caplog, asynchronous):
    faults = Faults()
    settings = {"asynchronous": asynchronous, "borrowed": False, "on_error": "warn"}
    with open_small_run(tmp_path / "run", Disk(faults), **settings) as run:
        faults.arm(0, "EIO from then on")
        run.interpreter([SAVE], state_after(1), UPDATE)
        settle(run)
        faults.armed = False
        run.interpreter([SAVE], state_after(2), UPDATE)
    assert caplog.text.count("; training continues without it") == 1
    assert stored(tmp_path).pointers() == {"latest": str(state_after(2).iteration)}


def test_what_cannot_be_saved_is_no_failure_of_the_disk(tmp_path):
    """It is a mistake in a callback, and ends the run though failures only warn."""
    with (
        pytest.raises(TypeError, match="seen is a set, which cannot be saved"),
        open_small_run(tmp_path / "run", asynchronous=True, borrowed=False, on_error="warn") as run,
    ):
        run.interpreter([SAVE], state_after(1).remember("seen", {1}), UPDATE)
    assert stored(tmp_path).manifests() == []


ABANDONED = """\
import sys, torch
from noether import AfterUpdate, SaveCheckpoint, TrainState
from noether.effects import open_run

run = open_run(sys.argv[1], asynchronous=True, borrowed=False)
state = TrainState(params={"w": torch.ones(8_000_000)}).advance(samples=4)
run.interpreter([SaveCheckpoint(tag=sys.argv[2], pointers=("latest",))], state, AfterUpdate(samples=4))
"""


def abandoned(directory, tag):
    return subprocess.run(
        [sys.executable, "-c", ABANDONED, directory, tag], capture_output=True, text=True, check=False, timeout=240
    )


def test_no_process_ends_before_its_last_save(tmp_path):
    done = abandoned(tmp_path / "run", "whole")
    assert (done.returncode, done.stderr) == (0, "")
    store = stored(tmp_path)
    assert store.load(store.find("latest")).params["w"].sum() == 8_000_000


def test_a_failure_that_nobody_waits_for_is_written_to_the_standard_error(tmp_path):
    done = abandoned(tmp_path / "run", "no/name")
    assert "tag 'no/name': a name is made of up to 200 letters, digits and '_.=-'" in done.stderr


def test_the_saves_of_one_event_do_not_wait_for_each_other(tmp_path, gate, gated):
    effects = [SaveCheckpoint(tag="a"), SaveCheckpoint(tag="b")]
    with open_small_run(tmp_path / "run", gated, asynchronous=True, borrowed=False) as run:
        run.interpreter(effects, state_after(1), AfterTraining())
        gate.set()
    assert [manifest.tag for manifest in stored(tmp_path).manifests()] == ["a", "b"]
