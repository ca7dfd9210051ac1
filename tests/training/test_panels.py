"""What a run says of itself at its start and at its end."""

import io
import json
import shlex
from pathlib import Path
from time import monotonic

import pytest
from rich.console import Console as RichConsole
from tiny_runs import CALLBACKS, make_config

from noether.cli.commands.train import start
from noether.config import load
from noether.effects import Console
from noether.planning.warnings import find_start_warnings
from noether.training.experiment import build
from noether.training.runs import execution, start_panel
from noether.training.runs.train import train

BEST = {"kind": f"{CALLBACKS}.BestCheckpointCallback", "every_n_epochs": 1, "metric_key": "loss/val/square"}
EVALUATE = {"kind": f"{CALLBACKS}.OfflineLossCallback", "every_n_epochs": 1, "dataset_key": "val"}


@pytest.fixture
def shown(capsys, tiny_module):
    """Return a function that gives the lines that were printed since its last call, by their first word."""

    def read():
        lines = capsys.readouterr().out.splitlines()
        begins = [number for number, line in enumerate(lines) if line.startswith("directory ")]
        blocks = [lines[begin:] for begin in begins]
        return [{line.split("  ")[0]: line.partition("  ")[2].strip() for line in block} for block in blocks]

    return read


def test_the_start_says_what_is_trained_until_where_and_what_callbacks_do(shown):
    run = train(make_config({"kind": "tiny.stop"}, max_hours=2))
    start, end = shown()
    assert {name: start[name] for name in list(start)[:7]} == {
        "directory": str(run.directory),
        "model": "torch.nn.Linear, 3 parameters",
        "data": "train 8 samples",
        "device": "cpu, float32, updates of 4 samples",
        "optimizer": "SGD, lr 0.1",
        "end": "4 epochs = 8 updates = 32 samples, or after 2 hours in this process",
        "callbacks": "CheckpointCallback every epoch; OnlineLossCallback every update; stop",
    }
    assert end["stopped by"] == "stop"


def test_the_end_has_best_values_with_their_checkpoints_and_commands(shown):
    config = make_config(EVALUATE, BEST)
    config["data"]["val"] = {"kind": "tiny.Data"}
    run = train(config)
    _, end = shown()
    best = run.state.callback_states["BestCheckpointCallback/E1/loss/val/square"]["best"]
    last, *rest = end["loss/val/square"].split()
    assert (float(last), float(rest[0])) == pytest.approx((run.metrics["loss/val/square"], best), rel=1e-4)
    assert rest[1:] == ["E4_U8_S32", "best_model.loss.val.square"]
    assert "loss/val/total" not in end["last values"]  # the same number as the only loss, which is in the table
    assert "E4_U8_S32" in end["checkpoints"]
    assert end["training"].startswith("8 updates, 32 samples in ")
    assert {name: shlex.split(end[name]) for name in ("evaluate", "show", "report", "continue")} == {
        "evaluate": [
            "noether",
            "eval",
            str(run.directory),
            "--checkpoint",
            "best_model.loss.val.square",
            "--data",
            "val",
        ],
        "show": ["noether", "show", str(run.directory)],
        "report": ["noether", "report", str(run.directory)],
        "continue": ["noether", "train", "--resume", str(run.directory), "--set", "trainer.max_epochs=8"],
    }


def test_an_interrupted_run_of_a_program_says_how_to_resume_it(capsys, tiny_module):
    with Path("tiny.py").open("a") as module:
        module.write("import signal\ndef interrupt(state, event):\n")
        module.write("    signal.raise_signal(signal.SIGTERM)\n    return state, ()\n")
    run = train(make_config({"kind": "tiny.interrupt"}))
    assert not run.finished
    *_, last = capsys.readouterr().out.splitlines()
    assert last == f"resume with noether.train(resume={str(run.directory)!r})"


def test_commands_that_make_no_sense_are_left_out(shown):
    config = make_config(checkpoints={"at_end": False})
    config["callbacks"] = []
    train(config)
    _, end = shown()
    assert "evaluate" not in end
    assert "continue" not in end
    assert "metric" not in end


def test_a_resumed_run_says_where_it_begins(shown):
    run = train(make_config())
    shown()
    train(resume=run.directory, overrides=["trainer.max_epochs=5"])
    start, end = shown()
    assert start["begins at"] == "E4_U8_S32, 80 % of the run"
    assert end["training"].startswith("2 updates, 8 samples in ")


def test_the_command_warns_of_callbacks_that_never_fire(shown):
    late = {"kind": f"{CALLBACKS}.OnlineLossCallback", "every_n_epochs": 7}
    Path("tiny.yaml").write_text(json.dumps(make_config(late)))
    assert start(Path("tiny.yaml"), [], []) == 0
    said, _ = shown()
    assert "the run does not reach epoch 7, so OnlineLossCallback/E7 never fires" in said["warnings"]
    assert find_start_warnings(build(load(Path("tiny.yaml"), ["callbacks.2.every_n_epochs=4"]))) == []


def test_datasets_that_take_long_are_announced_above_the_panel(monkeypatch, tiny_module):
    monkeypatch.setattr(start_panel, "_BUILDING_AFTER_S", 0.0)
    output = io.StringIO()
    console = Console(RichConsole(file=output))
    deadline = monotonic() + 60
    with start_panel.show_building(console, Path("out/tiny/1")):
        while "\n" not in output.getvalue() and monotonic() < deadline:
            pass
    assert output.getvalue() == "building datasets and model of out/tiny/1\n"
    with start_panel.show_building(None, Path("out/tiny/1")):
        pass


def test_datasets_that_are_built_at_once_are_not_announced(capsys, tiny_module):
    train(make_config())
    assert "building" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["describe_start", "describe_end"])
def test_an_error_in_a_panel_does_not_end_the_run(shown, monkeypatch, caplog, name):
    def fail(*_, **__):
        raise ValueError("no panel")

    monkeypatch.setattr(execution, name, fail)
    assert train(make_config()).finished
    assert len(shown()) == 1
    assert "panel failed and may have lost log entries; training continues: ValueError: no panel" in caplog.text
