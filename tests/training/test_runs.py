"""`noether.train`: the same runs as the command line, from a file or a dict."""

import json
import logging
import signal
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

import noether
from noether.config import ConfigError
from noether.testing import same
from noether.training.runs.train import train

DIGITS = "noether.examples.digits"
CALLBACKS = "noether.core.callbacks"


def make_config(**trainer):
    return {
        "run": {"name": "small", "output": "out"},
        "model": {"kind": f"{DIGITS}.ConvNet", "width": 2, "dropout": 0.2},
        "data": {
            "train": {"kind": f"{DIGITS}.Digits", "split": "train"},
            "val": {"kind": f"{DIGITS}.Digits", "split": "val"},
        },
        "optimizer": {"kind": "torch.optim.AdamW", "lr": 2e-3, "betas": (0.9, 0.99)},
        "trainer": {"effective_batch_size": 128, "loss": f"{DIGITS}.cross_entropy", "max_epochs": 2, **trainer},
        "callbacks": [
            {"kind": f"{CALLBACKS}.MetricCallback", "every_n_epochs": 1, "dataset_key": "val", "metric": "accuracy"},
            {"kind": f"{CALLBACKS}.BestMetricCallback", "every_n_epochs": 1, "metric_key": "val/accuracy"},
            {"kind": f"{CALLBACKS}.CheckpointCallback", "every_n_epochs": 1, "save_weights": True, "save_optim": True},
        ],
    }


MODULE = """
import os

def act(state, event):
    if "FAIL" in os.environ:
        raise KeyError("mine")
    if "SIGNAL" in os.environ:
        os.kill(os.getpid(), int(os.environ["SIGNAL"]))
    return state, ()
"""


@pytest.fixture(autouse=True)
def in_working_directory(tmp_path, monkeypatch):
    """Change to a directory with a module of the user's, and remove the module from `sys.modules` afterwards."""
    path = list(sys.path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(MODULE)
    yield
    sys.path[:] = path
    sys.modules.pop("mine", None)


def logged(run):
    lines = [json.loads(line) for line in (run.directory / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in ("run", "time_s")} for line in lines]


def test_a_dict_is_trained_and_its_run_is_returned():
    run = train(make_config())
    assert run.directory.parent == Path("out/small")  # relative to the working directory
    assert run.finished
    assert run.ending == f"ended at {run.state.iteration}"
    assert run.state.iteration.epoch == 2
    last = logged(run)[-1]["metrics"]
    assert run.metrics["val/accuracy"] == last["val/accuracy"]
    assert run.metrics["val/accuracy/best"] == max(line["metrics"]["val/accuracy"] for line in logged(run))
    newest = (run.directory / "checkpoints/latest").read_text().split()[0]
    weights = load_file(run.directory / "checkpoints" / newest / "weights.safetensors")
    assert all(same(weights[name], tensor) for name, tensor in run.state.params.items())


def test_train_is_exported():
    assert noether.train is train


def test_a_file_and_a_dict_are_the_same_run():
    values = make_config(max_epochs=1)
    Path("small.yaml").write_text(json.dumps(values))  # JSON is YAML
    from_dict, from_file = train(values), train("small.yaml", overrides=["run.name=file"])
    assert same(from_dict.state.params, from_file.state.params)
    assert logged(from_dict) == logged(from_file)


def test_a_resumed_run_equals_the_uncut_run():
    uncut = train(make_config())
    half = train(make_config(max_epochs=1), output="half")
    resumed = train(resume=half.directory, overrides=["trainer.max_epochs=2"])
    assert resumed.directory == half.directory
    assert resumed.directory.parent == Path("half/small")
    assert same(resumed.state.params, uncut.state.params)
    assert same(resumed.state.opt_state, uncut.state.opt_state)
    assert logged(resumed) == logged(uncut)


def test_a_finished_run_is_returned_as_it_is(caplog):
    caplog.set_level(logging.INFO)
    first = train(make_config(max_epochs=1))
    again = train(resume=first.directory)
    assert again.finished
    assert same(again.state.params, first.state.params)
    assert f"already {first.ending}; to continue it, set a later end (trainer.max_epochs is 1)" in caplog.text


def test_output_moves_a_resumed_run():
    first = train(make_config(max_epochs=1))
    moved = train(resume=first.directory, output="else where", overrides=["trainer.max_epochs=2"])
    assert moved.directory == Path("else where/small") / first.directory.name
    assert not first.directory.exists()


@pytest.mark.parametrize(
    ("section", "setting", "value", "message"),
    [
        ("trainer", "max_epohcs", 3, "trainer.max_epohcs: unknown setting; did you mean 'max_epochs'?"),
        ("optimizer", "lr", "fast", "optimizer.lr: 'fast' is not a number"),
        ("model", "kind", f"{DIGITS}.ConvNte", f"model.kind: '{DIGITS}.ConvNte': '{DIGITS}' has no 'ConvNte'; did you"),
        ("trainer", "max_epochs", np.int64(0), "trainer.max_epochs: 0 is not a whole number of at least 1"),
        ("optimizer", "lr", np.float32(-1), "optimizer.lr: -1.0 is not a number of at least 0"),
        ("model", "width", {8}, "model.width: {8} is not a plain value; write a function or class as"),
        ("model", "width", object, "model.width: 'builtins.object' is not a whole number"),
        ("run", 3, "x", "run: the key 3 is not text"),
    ],
)  # fmt: skip
def test_a_wrong_setting_is_named_by_its_path(section, setting, value, message):
    config = make_config()
    config[section][setting] = value
    with pytest.raises(ConfigError) as error:
        train(config)
    assert str(error.value).startswith(message)
    assert not Path("out").exists()


def test_an_error_that_only_the_built_objects_show_is_named_by_its_path():
    config = make_config()
    config["callbacks"][2]["model_names"] = ["haed"]
    with pytest.raises(ConfigError, match=r"^trainer.effective_batch_size: "):
        train({**config, "trainer": {**config["trainer"], "effective_batch_size": 10**6}})


def test_a_deeply_nested_value_is_refused():
    config = make_config()
    config["model"]["itself"] = config["model"]
    with pytest.raises(ConfigError, match=r"^model: is nested too deeply"):
        train(config)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give either a config or resume=RUN_DIR"),
        ({"config": {}, "resume": "x"}, "give either a config or resume=RUN_DIR"),
        ({"config": {}, "drop_memory": ["x"]}, "drop_memory needs resume=RUN_DIR"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(TypeError, match=f"^{message}$"):
        train(**arguments)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_returns_the_run(number, monkeypatch):
    """A callback sends the signal, so that it always comes at the same update."""
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    config = make_config()
    config["callbacks"].append({"kind": "mine.act", "every_n_updates": 7})
    monkeypatch.setenv("SIGNAL", str(int(number)))
    run = train(config)
    assert not run.finished
    assert run.ending == "interrupted at E0_U7_S896"
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers
    monkeypatch.delenv("SIGNAL")
    resumed = train(resume=run.directory)
    assert resumed.finished
    config["run"]["name"] = "uncut"
    assert same(resumed.state.params, train(config).state.params)


def test_training_in_another_thread():
    runs = []
    thread = threading.Thread(target=lambda: runs.append(train(make_config(max_epochs=1))))
    thread.start()
    thread.join()
    assert runs[0].finished


def test_an_error_is_raised_and_leaves_a_run_that_can_be_resumed(monkeypatch):
    monkeypatch.setenv("FAIL", "yes")
    config = make_config()
    config["callbacks"].append({"kind": "mine.act", "every_n_updates": 15})
    with pytest.raises(KeyError, match="mine"):
        train(config)
    (directory,) = Path("out/small").iterdir()
    monkeypatch.delenv("FAIL")
    run = train(resume=directory)
    assert run.finished
    config["run"]["name"] = "uncut"
    assert same(run.state.params, train(config).state.params)
