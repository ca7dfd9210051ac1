"""`run.tensorboard` and `run.wandb` from the command line."""

import os
import signal
import sys

import pytest
from command import MODULE, PAPER, SMALL, invoke, lines, only_run, start, wait_until
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

CHANGES = {
    "run:\n": "run:\n  tensorboard: true\n",
    # A checkpoint written in the background may be incomplete when the process is killed.
    "trainer:\n": "trainer:\n  checkpoints: {async: false}\n",
    # Checkpoints at the last update of an epoch, before it ends and is evaluated.
    "CheckpointCallback, every_n_epochs: 1": "CheckpointCallback, every_n_updates: 15",
}


def start_holding(folder, update, *argv):
    """Start a run that waits at an update; return its process once it waits."""
    (folder / "holding").unlink(missing_ok=True)
    wandb = {"WANDB_SILENT": "true", "WANDB_CACHE_DIR": folder / "cache"}
    process = start(*argv, cwd=folder, HOLD_AT=update, HOLD_IN=folder, **wandb)
    wait_until((folder / "holding").exists, process)
    return process


@pytest.mark.slow
def test_tensorboard_has_each_update_once_after_a_kill_and_a_signal(tmp_path):
    (tmp_path / "paper.py").write_text(MODULE)
    text = PAPER
    for old, new in CHANGES.items():
        assert text.count(old) == 1
        text = text.replace(old, new)
    (tmp_path / "paper.yaml").write_text(text)
    killed = start_holding(
        tmp_path, 20, "train", "paper.yaml", "--set", "trainer.checkpoints.async=false"
    )  # complete when the process is killed
    killed.kill()
    killed.communicate()
    run = only_run(tmp_path / "out/paper")
    interrupted = start_holding(tmp_path, 34, "train", "--resume", run, "--set", "run.wandb={mode: offline}")
    os.killpg(interrupted.pid, signal.SIGINT)  # as Ctrl-C in a terminal, which reaches every process of the group
    output, errors = interrupted.communicate()
    assert (interrupted.returncode, errors) == (130, "")
    assert output.splitlines()[0] == "resuming at E0_U15_S60"
    output = invoke("train", "--resume", run, "--set", "run.wandb=null", cwd=tmp_path)
    assert output.splitlines()[0] == "resuming at E2_U34_S136"
    read = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    scalars = {tag: [(each.step, each.value) for each in read.Scalars(tag)] for tag in read.Tags()["scalars"]}
    logged = {}
    for line in lines(run):
        for key, value in line["metrics"].items():
            logged.setdefault(key, []).append((line["update"], pytest.approx(value)))
    assert scalars == logged
    assert [step for step, _ in scalars["loss/online/total/U1"]] == list(range(1, 46))
    assert [step for step, _ in scalars["val/agreement"]] == [15, 30, 45]
    assert len(list((run / "wandb").rglob("run-*.wandb"))) == 1


@pytest.mark.parametrize(
    ("line", "sets", "place"),
    [
        ("tensorboard: true", (), "small.yaml:2: run.tensorboard"),
        ("wandb: {mode: offline}", (), "small.yaml:2: run.wandb"),
        ("seed: 0", ("--set", "run.tensorboard=true"), "--set run.tensorboard=true: run.tensorboard"),
    ],
)
def test_a_service_that_is_not_installed_is_refused_before_the_run_starts(tmp_path, monkeypatch, line, sets, place):
    name = "wandb" if "wandb" in line else "tensorboard"
    monkeypatch.setitem(sys.modules, name, None)  # so Python marks a module that cannot be imported
    (tmp_path / "small.yaml").write_text(SMALL.replace("run:\n", f"run:\n  {line}\n"))
    output = invoke("train", "small.yaml", *sets, cwd=tmp_path, code=2)
    assert output == f"Error: {place}: {name} is not installed; run: pip install 'noether[{name}]'\n"
    assert [path.name for path in tmp_path.iterdir()] == ["small.yaml"]
