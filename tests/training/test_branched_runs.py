"""A new run that starts at a checkpoint of another one equals that run from there on."""

import json
from pathlib import Path

import pytest
from tiny_runs import CALLBACKS, contents, make_config

from noether.config import ConfigError
from noether.training.runs.train import train

EVALUATES = {"kind": f"{CALLBACKS}.OfflineLossCallback", "every_n_epochs": 1, "dataset_key": "val"}
AVERAGES = {"kind": f"{CALLBACKS}.EMACallback", "every_n_epochs": 1, "target_factors": [0.5]}
BEST = {"kind": f"{CALLBACKS}.BestCheckpointCallback", "every_n_epochs": 1, "metric_key": "loss/val/square"}
WATCHED = [AVERAGES, EVALUATES, EVALUATES | {"weights": "ema=0.5"}, BEST]


def make_run():
    config = make_config(*WATCHED, optimizer={"kind": "torch.optim.AdamW", "lr": 0.1})
    config["data"]["val"] = {"kind": "tiny.Data"}
    return train(config)


def log_of(run):
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if key not in ("run", "time_s")} for line in lines]


def files_of(run, pointer):
    tag = (run / "checkpoints" / pointer).read_text().split()[0]
    return tag, contents(Path(run / "checkpoints" / tag).parent)[run / "checkpoints" / tag / "weights.safetensors"]


@pytest.mark.parametrize("name", ["E1", "E2_U4", "U6", "best", "newest"])
def test_a_branch_equals_the_run_from_its_checkpoint_on(tiny_module, notes, name):
    run = make_run()
    before = contents(run.directory)
    notes()
    branched = train(resume=run.directory, checkpoint=name, into="branches/b")
    assert contents(run.directory) == before
    assert branched.directory == Path("branches/b")
    assert (branched.state.iteration, branched.metrics) == (run.state.iteration, run.metrics)
    assert log_of(branched.directory) == log_of(run.directory)
    for pointer in ("last", "best_model.loss.val.square", "last.ema=0.5"):
        assert files_of(branched.directory, pointer) == files_of(run.directory, pointer)
    summary = json.loads((branched.directory / "summary.json").read_text())
    tag = Path(summary["branched_from"]).name
    assert summary["branched_from"] == str(run.directory.resolve() / "checkpoints" / tag)
    assert notes()[0] == f"branches/b starts at {tag} of {run.directory}"


def test_a_branch_continues_with_other_settings_and_can_be_resumed(tiny_module, notes):
    run = make_run()
    before = contents(run.directory)
    branched = train(resume=run.directory, checkpoint="E2", into="b", overrides=["trainer.max_epochs=3"])
    assert branched.ending == "ended at E3_U6_S24"
    again = train(resume="b", overrides=["trainer.max_epochs=4"], checkpoint="latest")
    assert again.metrics == run.metrics
    assert contents(run.directory) == before
    assert json.loads(Path("b/summary.json").read_text())["branched_from"].endswith("/checkpoints/E2_U4_S16")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"checkpoint": "E1"}, "--checkpoint E1: the run would lose what it did after E1_U2_S8: give --into"),
        ({"checkpoint": "last.ema=0.5"}, "--checkpoint last.ema=0.5: the run would lose"),
        ({"checkpoint": "E9", "into": "b"}, "--checkpoint E9: no checkpoint 'E9' in "),
        ({"checkpoint": "E0", "into": "b"}, "--checkpoint E0: no checkpoint 'E0' in "),
        ({"checkpoint": "last.ema=0.5", "into": "b"}, "--checkpoint last.ema=0.5: E4_U8_S32.ema=0.5 does not hold"),
        ({"checkpoint": "E1", "into": "."}, "--into .: exists already"),
        ({"checkpoint": "E1", "into": "b", "output": "o"}, "--into b: says where the new run is"),
        ({"checkpoint": "E1", "into": "b", "overrides": ["model.in_features=3"]}, "model.in_features"),
        ({"checkpoint": "E1", "into": "b", "drop_memory": ["x"]}, "--drop-memory x: the run has no such memory"),
    ],
)
def test_a_refused_branch_leaves_no_directory(tiny_module, settings, message):
    run = make_run()
    before = contents(Path())
    with pytest.raises(ConfigError) as error:
        train(resume=run.directory, **settings)
    assert message in str(error.value)
    assert contents(Path()) == before


def test_a_branch_inside_of_the_run_and_weights_alone_are_refused_with_the_way_out(tiny_module):
    config = make_config(max_epochs=2)
    config["callbacks"] = [{"kind": f"{CALLBACKS}.CheckpointCallback", "every_n_epochs": 1}]
    run = train(config).directory
    with pytest.raises(ConfigError, match="lies in the run itself"):
        train(resume=run, into=run / "b")
    with pytest.raises(ConfigError) as error:
        train(resume=run, checkpoint="E1", into="b")
    assert str(error.value) == (
        "--checkpoint E1: E1_U2_S8 does not hold weights, optimizer and state of the whole model; those that do: "
        f"E2_U4_S16.latest; or start a new run from its weights: noether train {run}/config.yaml --set "
        f"run.init_from={run}/checkpoints/E1_U2_S8"
    )
    started = train(run / "config.yaml", overrides=[f"run.init_from={run}/checkpoints/E1"], output="new")
    assert started.state.iteration.epoch == 2
    for name in ("checkpoint", "into"):
        with pytest.raises(TypeError, match=f"{name} needs resume=RUN_DIR"):
            train(config, **{name: "x"})
