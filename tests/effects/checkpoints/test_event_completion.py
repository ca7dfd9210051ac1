"""What the event of a checkpoint requested is done after a crash, too: a resumed run ends as the uncut run."""

import json
import os
import shutil

import pytest
import torch
from faults import Faults, Killed
from small_run import NO_FSYNC, open_small_run

from noether import AfterEpoch, AfterTraining, AfterUpdate, BeforeTraining, Run, TrainingIteration, TrainState
from noether.core.callbacks import (
    BestCheckpointCallback,
    BestMetricCallback,
    CheckpointCallback,
    EMACallback,
    MetricEarlyStopping,
)
from noether.core.combinators import every_n_epochs
from noether.core.effect import SaveCheckpoint
from noether.core.loop import Move, dispatch, next_move
from noether.core.metrics import log
from noether.core.reducer import compose
from noether.effects import CheckpointStore
from noether.effects.checkpoints.file_names import WEIGHTS
from noether.effects.disk.calls import Disk, fsync
from noether.effects.logs.buffers import discard_all_buffers
from noether.testing import same

CHANGES = {os.write, os.mkdir, os.rename, os.unlink, os.rmdir, os.ftruncate, fsync}
VALUES = (0.1, 0.9, 0.3, 0.2, 0.8)
RUN = Run(end=TrainingIteration(epoch=5), updates_per_epoch=1, samples_per_epoch=4, effective_batch_size=4)


@every_n_epochs(1)
def measure(state, event):
    return log(state, event, {"val/accuracy": VALUES[state.iteration.epoch - 1]})


@every_n_epochs(2)
def save_twice_more(state, event):
    """Request a second checkpoint to resume from, and one of a part of the model."""
    tag = f"mine.{state.iteration}"
    part = SaveCheckpoint(tag=f"{tag}.a", optimizer=False, models=("a",), pointers=("part",), retention={"part": 0})
    return state, (SaveCheckpoint(tag=tag, pointers=("mine",), retention={"mine": 1}), part)


def callbacks(**checkpoints):
    interval = {"every_n_epochs": 1, "metric_key": "val/accuracy"}
    return compose(
        measure,
        EMACallback(every_n_epochs=1, target_factors=(0.5,), save_weights=False, save_latest_weights=True),
        BestMetricCallback(**interval),
        BestCheckpointCallback(**interval, tolerances=(1,)),
        save_twice_more,
        CheckpointCallback(every_n_epochs=1, keep=1, **checkpoints),
        MetricEarlyStopping(**interval, tolerance=1),
    )


def run_to_end(directory, reducer):
    """Start the run or resume it, and train to its end."""
    state = directory.resume()
    resumed = state is not None
    if state is None:
        state = TrainState(params={"a.w": torch.zeros(2), "b.w": torch.ones(1)})
    state = dispatch(state, BeforeTraining(run=RUN, resumed=resumed), reducer, directory.interpreter)
    while (move := next_move(state, RUN)) is not Move.NOTHING:
        if move is Move.END_EPOCH:
            state = dispatch(state.next_epoch(), AfterEpoch(run=RUN), reducer, directory.interpreter)
        elif move is Move.END_TRAINING:
            state = dispatch(state.replace(ended=True), AfterTraining(run=RUN), reducer, directory.interpreter)
        else:
            params = {name: value + state.iteration.update for name, value in state.params.items()}
            opt_state = {"state": {"a.w": {"m": params["a.w"] / 2}}}
            state = state.replace(params=params, opt_state=opt_state).advance(samples=4)
            state = dispatch(state, AfterUpdate(run=RUN, samples=4), reducer, directory.interpreter)


def train(folder, reducer):
    with open_small_run(folder) as directory:
        run_to_end(directory, reducer)


def describe(folder):
    """Return what has to be equal at the end of a run: a checkpoint by its moment and weights, a pointer likewise."""
    store = CheckpointStore(folder / "checkpoints", "run", NO_FSYNC)
    contents = {}
    for each in store.manifests():
        store.load(each)  # verifies every file
        weights = each.parts[WEIGHTS].sha256 if WEIGHTS in each.parts else None
        contents[each.tag] = (*each.slot, each.models, tuple(sorted(each.parts)), weights)
    state, newest = store.recover()
    return {
        "state": state,
        "newest": newest.iteration,
        "pointers": {name: contents[tag] for name, tag in store.pointers().items()},
        "checkpoints": set(contents.values()),
        "summary": json.loads((folder / "summary.json").read_text()),
        "temporary": [path.name for path in folder.rglob(".tmp-*")],
    }


def check_equal(folder, uncut, where):
    found = describe(folder)
    assert same(found.pop("state"), uncut["state"]), where
    assert found == {name: value for name, value in uncut.items() if name != "state"}, where
    assert found["summary"]["val/accuracy/best"] == max(VALUES)


class FaultsInChanges(Faults):
    """Counts only the calls that change the disk: before another call, a kill leaves the same."""

    def __call__(self, function, *arguments):
        if function in CHANGES or (self.armed and self._dead):
            return super().__call__(function, *arguments)
        return self._call(function, *arguments)


def train_with_fault(folder, reducer, at, kind, **settings):
    """Train with a fault in one call after opening; return whether the run was killed, and how many calls it made."""
    faults = FaultsInChanges()
    with open_small_run(folder, Disk(faults), **settings) as directory:
        faults.arm(at, kind)
        try:
            run_to_end(directory, reducer)
        except Killed:
            discard_all_buffers()  # a process that ended has no memory
            return True, len(faults.names)
        finally:
            faults.armed = False
    return False, len(faults.names)


SETTINGS = [
    pytest.param(({}, 11), id="the newest is saved beside weights"),
    pytest.param(({}, 1), id="the newest is saved beside weights, each call", marks=pytest.mark.slow),
    pytest.param(({"save_optim": True}, 11), id="all are to resume from"),
    pytest.param(({"save_optim": True}, 3), id="all are to resume from, every third call", marks=pytest.mark.slow),
]


@pytest.fixture(scope="module", params=SETTINGS)
def uncut(request, tmp_path_factory):
    """The callbacks of a run, a description of it, its number of calls that change the disk, the step between cuts."""
    folder = tmp_path_factory.mktemp("uncut") / "run"
    settings, step = request.param
    reducer = callbacks(**settings)
    _, calls = train_with_fault(folder, reducer, None, "kill")
    description = describe(folder)
    assert description["state"].stop is not None
    assert {"best_model.val.accuracy", "latest", "last", "latest.ema=0.5", "last.ema=0.5", "mine", "part"} <= set(
        description["pointers"]
    )
    assert description["pointers"]["best_model.val.accuracy"][1].epoch == 1 + VALUES.index(max(VALUES))
    assert not list((folder / "checkpoints").glob("*.2"))
    return reducer, description, calls, step


def test_a_run_killed_at_any_call_ends_as_the_uncut_run(uncut, tmp_path):
    reducer, description, calls, step = uncut
    assert calls >= 150
    for at in {*range(0, calls, step), calls - 1}:
        folder = tmp_path / str(at) / "run"
        killed, _ = train_with_fault(folder, reducer, at, "kill")
        assert killed
        train(folder, reducer)
        check_equal(folder, description, at)
        shutil.rmtree(folder.parent)


def test_a_run_killed_again_while_it_resumes_ends_as_the_uncut_run(uncut, tmp_path):
    reducer, description, calls, step = uncut
    kills = 0
    for at in range(0, calls, 7 * step):
        folder = tmp_path / str(at) / "run"
        assert train_with_fault(folder, reducer, at, "torn")[0]
        for again in (at % 5, at % 31):
            kills += train_with_fault(folder, reducer, again, "kill")[0]
        train(folder, reducer)
        check_equal(folder, description, at)
        shutil.rmtree(folder.parent)
    assert kills >= calls // (7 * step)


@pytest.mark.parametrize("kind", ["EIO once", "ENOSPC once"])
def test_a_run_that_continues_after_an_error_ends_as_the_uncut_run(uncut, tmp_path, kind):
    reducer, description, calls, step = uncut
    for at in range(0, calls, 2 * step):
        folder = tmp_path / str(at) / "run"
        train_with_fault(folder, reducer, at, kind, on_error="warn")
        check_equal(folder, description, at)
        shutil.rmtree(folder.parent)
