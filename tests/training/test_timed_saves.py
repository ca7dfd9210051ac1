"""`trainer.checkpoints.every_n_minutes`: a run is saved by time, and is the run that it is without."""

import json
import shutil
import sys
from functools import partial
from itertools import count
from pathlib import Path

import pytest
from tiny_runs import LOSS, SAVE, make_config

from noether.config import load
from noether.config.trainer_settings import CheckpointSettings
from noether.core.effect import LogText, SaveCheckpoint
from noether.core.errors import SettingsError
from noether.core.event import AfterEpoch, AfterUpdate
from noether.core.state import TrainState
from noether.effects.checkpoints.reader import CheckpointReader
from noether.planning.plan import make_plan
from noether.session.timing import Clock
from noether.testing import same
from noether.training.runs.execution import TimedSaves
from noether.training.runs.train import train

COPY = """
import shutil
from pathlib import Path

from noether import AfterUpdate, on

@on(AfterUpdate)
def copy(state, event):
    (run,) = Path("out/tiny").iterdir()
    shutil.copytree(run, f"copies/{state.iteration.update}")
    return state, ()
"""


@pytest.fixture(autouse=True)
def clock(tiny_module, tmp_path, monkeypatch):
    """Let a minute pass from each event to the next; write a module that copies the run directory at each update."""
    seconds = count(0, 60)
    clock = Clock(elapsed_s=lambda: next(seconds))
    monkeypatch.setattr("noether.training.runs.execution.TimedSaves", partial(TimedSaves, clock=clock))
    (tmp_path / "copying.py").write_text(COPY)
    yield
    sys.modules.pop("copying", None)


def logged(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in ("run", "time_s")} for line in lines]


def make_timed_config(minutes):
    config = make_config({"kind": "copying.copy"}, checkpoints={"every_n_minutes": minutes, "async": False})
    return {**config, "callbacks": config["callbacks"][1:]}  # no callback saves


def resumable(run):
    return [manifest.iteration.update for manifest in CheckpointReader(run / "checkpoints").manifests()]


def test_a_run_that_loses_power_resumes_from_what_was_saved_by_time(tmp_path):
    uncut = train(make_timed_config(minutes=3))  # of three events: two updates and the end of an epoch
    copies = {update: Path(f"copies/{update}") for update in range(1, 9)}
    saved = {update: resumable(copy) for update, copy in copies.items()}
    assert saved == {1: [], 2: [], 3: [2], 4: [2], 5: [4], 6: [4], 7: [6], 8: [6]}  # one is kept
    assert resumable(uncut.directory) == [8]
    shutil.rmtree("out")
    shutil.move(copies[7], "out/tiny/run")
    shutil.rmtree("copies")
    run = train(resume="out/tiny/run")
    assert sorted(path.name for path in Path("copies").iterdir()) == ["7", "8"]  # the updates after the save
    for name in ("iteration", "params", "opt_state", "callback_states"):
        assert same(getattr(run.state, name), getattr(uncut.state, name)), name


def test_a_plan_says_that_it_does_not_count_them(tmp_path):
    config = make_timed_config(minutes=3)
    Path("timed.yaml").write_text(json.dumps(config))
    plan = make_plan(load("timed.yaml"))
    assert [
        note for note in plan.notes if note.startswith("checkpoints of trainer.checkpoints.every_n_minutes are not")
    ]
    assert not [each for each in plan.warnings if "no callback saves checkpoints" in str(each)]


@pytest.mark.parametrize("callbacks", [[LOSS], [SAVE, LOSS]], ids=["by time only", "beside a callback"])
def test_saves_by_time_change_nothing_else(callbacks):
    runs = []
    for name, checkpoints in (("timed", {"every_n_minutes": 1}), ("untimed", {})):
        config = {**make_config(checkpoints=checkpoints), "callbacks": callbacks}
        runs.append(train({**config, "run": {"name": name, "output": "out"}}))
    timed, untimed = runs
    assert same(timed.state.params, untimed.state.params)
    assert same(timed.state.callback_states, untimed.state.callback_states)
    assert logged(timed.directory) == logged(untimed.directory)
    assert resumable(timed.directory) == resumable(untimed.directory)


def test_a_checkpoint_to_resume_from_restarts_the_interval():
    saves, seconds = [], count(0, 60)
    interpret = TimedSaves(lambda effects, *_: saves.append(len(effects)), 3, Clock(elapsed_s=lambda: next(seconds)))
    for event, effects in (
        (AfterUpdate, ()),
        (AfterUpdate, (SaveCheckpoint(),)),  # at minute 2
        (AfterUpdate, (SaveCheckpoint(optimizer=False),)),  # none to resume from
        (AfterUpdate, (LogText("three minutes"),)),
        (AfterEpoch, ()),  # at minute 5, between two updates
        (AfterUpdate, ()),
        (AfterUpdate, ()),
    ):
        interpret(effects, TrainState(), event())
    assert saves == [0, 1, 1, 1, 0, 1, 0]


@pytest.mark.parametrize("minutes", [0, -1, float("nan"), float("inf"), "soon"])
def test_an_interval_that_is_no_time_is_refused(minutes):
    with pytest.raises(SettingsError, match=r"every_n_minutes: .* is not a number above 0"):
        CheckpointSettings(every_n_minutes=minutes)
