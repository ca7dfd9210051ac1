"""Resuming a run with other settings: a run that had stopped, a schedule of another length, missing checkpoints."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from process_server import ForkedProcess
from tiny_runs import CALLBACKS, LOSS, SAVE, contents, make_config

from noether.config import ConfigError
from noether.core.effect import SaveCheckpoint
from noether.core.event import AfterTraining
from noether.core.reducer import UnclaimedMemoryError
from noether.effects import CheckpointError, open_run
from noether.testing import same
from noether.training.runs.train import train

pytestmark = pytest.mark.usefixtures("tiny_module")


def fixed(epoch):
    return {"kind": f"{CALLBACKS}.FixedUpdateEarlyStopping", "stop_at_epoch": epoch}


def patience(tolerance):
    watch = {"metric_key": "loss/online/total/U1", "min_delta": 100.0, "every_n_updates": 1}
    return {"kind": f"{CALLBACKS}.MetricEarlyStopping", "tolerance": tolerance, **watch}


def train_until_killed(*argv, at):
    """Run `noether train` in a separate process, which kills itself at an update."""
    process = ForkedProcess(["train", *argv], cwd=Path.cwd(), environment={**os.environ, "KILL_AT": str(at)})
    output = process.communicate(timeout=240)
    assert process.returncode == -signal.SIGKILL, output


@pytest.mark.parametrize("name", ["Adafactor", "RMSprop"])
def test_a_run_with_any_optimizer_resumes_exactly(name):
    config = {"optimizer": {"kind": f"torch.optim.{name}"}}
    run = train(resume=train(make_config(**config, max_epochs=2)).directory, overrides=["trainer.max_epochs=4"])
    assert same(run.state, train(make_config(**config)).state)


# A run that a callback stopped


def test_a_later_fixed_stop_continues_the_run(notes):
    run = train(make_config(fixed(1)))
    assert (run.state.iteration.epoch, run.state.stopped_by) == (1, "FixedUpdateEarlyStopping/stop_at_epoch=1")
    notes()
    run = train(resume=run.directory, overrides=["callbacks.2.stop_at_epoch=3"])
    assert (run.state.iteration.epoch, run.state.stop) == (3, "stop_at_epoch: 3 is reached")
    assert notes()[:2] == [
        "resuming at E1_U2_S8",
        "continuing a run that FixedUpdateEarlyStopping/stop_at_epoch=1 stopped: stop_at_epoch: 1 is reached",
    ]
    uncut = train(make_config(fixed(3)))
    assert run.metrics == uncut.metrics


@pytest.mark.parametrize("changes", [["trainer.max_epochs=8"], ["callbacks.2.stop_at_epoch=1", "trainer.max_epochs=8"]])
def test_a_fixed_stop_that_is_reached_is_refused(changes):
    run = train(make_config(fixed(2)))
    before = contents("out")
    with pytest.raises(ConfigError, match=r"callbacks\[2\].stop_at_epoch: \d is reached at E2_U4_S16 already, so"):
        train(resume=run.directory, overrides=changes)
    with pytest.raises(ConfigError, match="set a later point, or remove this callback"):
        train(resume=run.directory, continue_stopped=True)
    assert contents("out") == before


@pytest.mark.parametrize("forged", [5, "text", (), {}, {"params": None}])
def test_memory_that_does_not_fit_its_callback_is_refused(forged):
    run = train(make_config({"kind": f"{CALLBACKS}.EMACallback", "target_factors": [0.9], "every_n_epochs": 1}))
    with open_run(run.directory) as directory:
        state = directory.load().remember("weights/ema=0.9", forged)
        directory.interpreter([SaveCheckpoint(tag="forged", pointers=("latest",))], state, AfterTraining())
    before = contents("out")
    message = "the saved memory does not fit: .*EMACallback.*--drop-memory NAME; names are .*'weights/ema=0.9'"
    with pytest.raises(CheckpointError, match=message):
        train(resume=run.directory, overrides=["trainer.max_epochs=8"])
    assert contents("out") == before
    assert train(resume=run.directory, overrides=["trainer.max_epochs=8"], drop_memory=["weights/ema=0.9"]).finished


def test_an_error_of_a_users_callback_at_its_start_stays_as_it_is(tmp_path, monkeypatch):
    text = "from noether import BeforeTraining, on\n@on(BeforeTraining)\ndef fail(state, event):\n    "
    (tmp_path / "starts.py").write_text(f"{text}return (state, () + (None if event.resumed else ()))\n")
    monkeypatch.syspath_prepend(tmp_path)
    run = train(make_config({"kind": "starts.fail"}), allow=["starts"])
    with pytest.raises(TypeError, match="can only concatenate tuple"):
        train(resume=run.directory, overrides=["trainer.max_epochs=8"], allow=["starts"])


def test_a_larger_tolerance_continues_with_the_memory_of_the_callback(notes):
    run = train(make_config(patience(1)))
    assert run.state.iteration.update == 2
    notes()
    run = train(resume=run.directory, overrides=["callbacks.2.tolerance=4"])
    assert run.state.iteration.update == 5  # one firing without improvement was remembered
    assert not any("same settings" in line for line in notes())


@pytest.mark.parametrize("request_", [{"continue_stopped": True}, {"overrides": ["trainer.max_epochs=9"]}])
def test_an_unchanged_callback_may_stop_the_run_again(request_, notes):
    run = train(make_config(patience(1)))
    notes()
    run = train(resume=run.directory, **request_)
    assert run.state.iteration.update == 3
    name = "MetricEarlyStopping/U1/loss/online/total/U1"
    assert f"{name} has the same settings as before, so it may soon stop the run again" in notes()


def test_a_stop_by_nan_continues_when_the_user_asks_for_it():
    guard = {"kind": f"{CALLBACKS}.NanGuardCallback", "tolerance": 2, "every_n_updates": 1}
    config = make_config(guard, loss="tiny.nan_loss")
    run = train({**config, "callbacks": [SAVE, guard]})
    assert run.state.iteration.update == 2
    assert train(resume=run.directory).state.iteration.update == 2
    run = train(resume=run.directory, continue_stopped=True)
    assert (run.state.iteration.update, run.state.stop) == (3, "3 updates in a row were not finite")
    assert train(resume=run.directory, overrides=["callbacks.1.tolerance=9"]).state.iteration.update == 8


@pytest.mark.parametrize(
    "changes",
    [[], ["trainer.max_updates=8"], ["callbacks.1.every_n_updates=1"], ["trainer.record=events"]],
    ids=["nothing", "the same end", "the same setting", "another setting"],
)
def test_a_stopped_run_stays_stopped_without_a_reason_to_continue(changes, notes):
    run = train(make_config(patience(1)))
    before = contents("out")
    notes()
    again = train(resume=run.directory, overrides=changes)
    assert (again.ending, contents("out")) == (run.ending, before)
    end = "max_updates is 8" if "trainer.max_updates=8" in changes else "max_epochs is 4"
    fix = f"change the settings of MetricEarlyStopping/U1/loss/online/total/U1, or set a later end (trainer.{end})"
    assert notes() == [f"{run.directory} already {run.ending}; to continue it, give --continue, {fix}"]


def test_another_callback_may_change_and_the_run_stays_stopped():
    more = {"kind": f"{CALLBACKS}.LrCallback", "every_n_updates": 1}
    run = train(make_config(patience(1), more))
    again = train(resume=run.directory, overrides=["callbacks.3.every_n_updates=2"])
    assert again.ending == run.ending


def test_the_callback_that_stopped_may_be_removed():
    run = train(make_config({"kind": "tiny.stop"}))
    assert (run.state.stop, run.state.stopped_by) == ("three is enough", "stop")
    callbacks = json.dumps([SAVE, LOSS])
    assert train(resume=run.directory, overrides=[f"callbacks={callbacks}"]).state.iteration.update == 8


def test_memory_of_a_removed_callback_has_to_be_dropped():
    run = train(make_config(patience(1)))
    callbacks = f"callbacks={json.dumps([SAVE, LOSS])}"
    with pytest.raises(UnclaimedMemoryError, match="--drop-memory MetricEarlyStopping"):
        train(resume=run.directory, overrides=[callbacks])
    drop = ["MetricEarlyStopping/U1/loss/online/total/U1"]
    assert train(resume=run.directory, overrides=[callbacks], drop_memory=drop).state.iteration.update == 8


def test_the_decision_to_continue_survives_a_kill():
    """The next process finds the new configuration, which no longer shows that something changed."""
    run = train(make_config(patience(1), {"kind": "tiny.kill"}))
    train_until_killed("--resume", run.directory, "--set", "callbacks.2.tolerance=4", at=3)
    assert train(resume=run.directory).state.iteration.update == 5


@pytest.mark.parametrize(
    ("end", "update", "said"),
    [("max_epochs=1", 2, "trainer.max_epochs is 1"), ("max_updates=3", 4, ""), ("max_samples=24", 6, "")],
)
def test_the_end_may_move_before_the_position_and_to_another_counter(end, update, said, notes):
    run = train(make_config(max_epochs=1))
    if update > 2:
        run = train(resume=run.directory, overrides=["trainer.max_epochs=2"] if update == 4 else [])
    notes()
    assert train(resume=run.directory, overrides=[f"trainer.{end}"]).state.iteration.update == update
    assert said in notes()[-1]


# The learning rate and the weight decay


SCHEDULES = [
    {"kind": "cosine"},
    {"kind": "linear", "end_factor": 0.1},
    {"kind": "polynomial", "power": 2.0},
    {"kind": "cosine", "warmup_updates": 3},
]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda each: "-".join(map(str, each.values())))
@pytest.mark.parametrize("section", ["schedule", "weight_decay_schedule"])
def test_a_longer_schedule_reports_its_jump_and_can_keep_its_length(section, schedule, notes):
    run = train(make_config(optimizer={"weight_decay": 0.1, section: schedule}, max_epochs=2))
    shutil.copytree("out", "copy")
    notes()
    train(resume=run.directory, overrides=["trainer.max_epochs=4"])
    (line,) = [line for line in notes() if "jumps" in line]
    value = "learning rate" if section == "schedule" else "weight decay"
    end = 0.01 if "end_factor" in schedule else 0
    assert line.startswith(f"the {value} jumps from {end} to 0.")
    keep = ["trainer.max_epochs=4", f"optimizer.{section}.length=4"]
    assert " at update 5; to keep its old schedule, set " in line
    assert line.endswith(f" {keep[1]}")
    kept = train(resume=Path("copy") / run.directory.relative_to("out"), overrides=keep)
    assert not any("jumps" in line for line in notes())
    assert kept.state.iteration.update == 8
    assert "    length: 4\n" in (kept.directory / "config.yaml").read_text()


@pytest.mark.parametrize("schedule", [{"kind": "constant"}, {"kind": "step", "milestone_updates": [2], "gamma": 0.5}])
def test_a_schedule_without_an_end_does_not_jump(schedule, notes):
    run = train(make_config(optimizer={"schedule": schedule}, max_epochs=2))
    train(resume=run.directory, overrides=["trainer.max_epochs=4"])
    assert not any("jumps" in line for line in notes())


def test_groups_with_a_jump_are_counted(notes):
    groups = [{"name": "bias", "match": ["bias"], "lr": 0.5}]
    run = train(make_config(optimizer={"schedule": {"kind": "linear"}, "groups": groups}, max_epochs=2))
    train(resume=run.directory, overrides=["optimizer.schedule.length=8", "trainer.max_epochs=4"])
    assert (
        "the learning rate of the group 'bias', and of 1 more, jumps from 0 to 0.25 at update 5; "
        "to keep its old schedule, set optimizer.schedule.length=4"
    ) in notes()


# Checkpoints that are gone


EMPTY = {
    "empty": lambda path: [shutil.rmtree(each) if each.is_dir() else each.unlink() for each in path.iterdir()],
    "missing": shutil.rmtree,
}


@pytest.mark.parametrize("empty", EMPTY.values(), ids=EMPTY)
@pytest.mark.parametrize("logs", ["metrics.jsonl", "events.jsonl", "summary.json"])
def test_a_run_whose_checkpoints_are_gone_is_not_started_again(empty, logs):
    run = train(make_config(record="events"))
    empty(run.directory / "checkpoints")
    for name in {"metrics.jsonl", "events.jsonl", "summary.json"} - {logs}:
        (run.directory / name).unlink()
    before = contents("out")
    with pytest.raises(CheckpointError) as error:
        train(resume=run.directory)
    found = {
        "metrics.jsonl": "has 8 lines up to E3_U8_S32",
        "events.jsonl": "E4_U8_S32",
        "summary.json": "says 'ended at E4",
    }
    assert f"checkpoints is empty, but {logs} " in str(error.value)
    assert found[logs] in str(error.value)
    command = f"start a new run: noether train {run.directory}/config.yaml"
    assert command in str(error.value)
    assert contents("out") == before
    assert train(run.directory / "config.yaml").finished


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_again(notes):
    config = make_config({"kind": "tiny.kill"}, checkpoints={"async": False}, record="events")
    Path("tiny.yaml").write_text(json.dumps(config))  # JSON is YAML
    train_until_killed("tiny.yaml", at=1)
    (run,) = Path("out/tiny").iterdir()
    assert (run / "events.jsonl").stat().st_size
    assert not (run / "checkpoints").exists()
    train_until_killed("--resume", run, at=3)
    assert (run / "checkpoints/latest").exists()
    shutil.copytree(run, "copy")
    shutil.rmtree("copy/checkpoints")
    with pytest.raises(CheckpointError, match=r"is empty, but .*events.jsonl has \d lines up to E1_U[23]_S"):
        train(resume="copy")
    assert train(resume=run).state.iteration.update == 8
    assert "resuming at E1_U2_S8" in notes()


def test_a_run_that_ended_without_a_checkpoint_is_not_started_again():
    """A marker says that it never saved one, and its summary that it ended."""
    run = train(make_config())
    shutil.rmtree(run.directory / "checkpoints")
    (run.directory / ".never-saved").touch()
    with pytest.raises(CheckpointError, match="says 'ended at E4_U8_S32'"):
        train(resume=run.directory)
