"""`noether eval` carries out what callbacks request, on the datasets that the user names, and changes nothing else."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_runs import CALLBACKS, MODULE, contents, make_config

from noether.cli.commands.evaluate import evaluate
from noether.config import ConfigError
from noether.core.callbacks import EvaluateCallback, MetricCallback, OfflineLossCallback
from noether.core.callbacks.data_iterator import PeriodicDataIteratorCallback
from noether.effects import CheckpointError, open_run
from noether.training.runs import services
from noether.training.runs.directories import load_checkpoint
from noether.training.runs.evaluated_data import evaluate_on
from noether.training.runs.train import train

MORE = """
from dataclasses import dataclass
from pathlib import Path
from noether import Effect, LogText, SaveCheckpoint, SaveTensors, SetSummary, ShowProgress, log
from noether.core.callbacks.data_iterator import PeriodicDataIteratorCallback
from noether.core.effect import MeasurePeakMemory

class Half(Data):
    def __len__(self):
        return 4

@dataclass(frozen=True)
class Ring(Effect):
    times: int

def ring(effect, state, event):
    Path("rings").write_text(f"{type(event).__name__} {effect.times}")

def largest(outputs, batch):
    return outputs.max()

class Predictions(PeriodicDataIteratorCallback):
    def process_data(self, state, batch, forward):
        return {"outputs": forward(state, batch)[1]}

    def process_results(self, state, event, results):
        name = f"predictions/{self.dataset_key}"
        state, logged = log(state, event, {self.key("largest"): results["outputs"].max()})
        return state, (*logged, LogText("predicted"), SaveTensors(name=name, tensors={"y": results["outputs"]}),
                       SetSummary({"samples": results["samples"]}), Ring(3), SaveCheckpoint(pointers=("mine",)),
                       MeasurePeakMemory())
"""
EVALUATES = {"kind": f"{CALLBACKS}.EvaluateCallback", "every_n_epochs": 1, "dataset_key": "val", "measures": ["loss"]}


@pytest.fixture
def finished(tiny_module):
    """A finished run that evaluates `val`, beside which `test` is in the configuration."""
    Path("tiny.py").write_text(MODULE + MORE)
    config = make_config(EVALUATES, max_epochs=2)
    config["data"] |= {"val": {"kind": "tiny.Data"}, "test": {"kind": "tiny.Half"}}
    return train(config).directory


@pytest.fixture
def with_effects(finished):
    """The same run with a callback that requests every kind of effect, which acts in no training."""
    text = (finished / "config.yaml").read_text()
    entry = "callbacks:\n- kind: tiny.Predictions\n  every_n_epochs: 9\n  dataset_key: val\n"
    text = text.replace("callbacks:\n", entry).replace("tensorboard: false", "tensorboard: true")
    text = text.replace("  handlers: {}", "  handlers: {tiny.Ring: tiny.ring}")
    (finished / "config.yaml").write_text(text)
    return finished


def new_files(run, before):
    """Return the names of the files that are new, after checking that no other has changed."""
    after = contents(run)
    assert {path: after[path] for path in before} == before
    return sorted(str(path.relative_to(run)) for path in after.keys() - before.keys())


def test_all_effects_of_an_evaluation_are_carried_out(with_effects, capsys):
    run, before, tag = with_effects, contents(with_effects), "E2_U4_S16"
    with open_run(run):  # as a process that trains the run holds it
        assert evaluate(run, "latest", None, (), ()) == 0
    output, names = capsys.readouterr(), new_files(run, before)
    folder = f"eval/{tag}"
    *own, events = names
    assert own == [f"{folder}.json", f"{folder}/summary.json", f"{folder}/tensors/predictions/val.safetensors"]
    assert events.startswith("tensorboard/eval/events.out.tfevents.")
    metrics = json.loads((run / f"{folder}.json").read_text())
    tensors = load_file(run / f"{folder}/tensors/predictions/val.safetensors")
    assert tensors["y"].shape == (8, 1)
    assert metrics["val/largest"] == tensors["y"].max().item()
    assert metrics.keys() == {"val/largest", "loss/val/square", "loss/val/total", "memory/peak_bytes"}
    assert json.loads((run / folder / "summary.json").read_text()) == {"samples": 8}
    assert Path("rings").read_text() == "AtEval 3"
    assert f"{tag}          predicted\n" in output.out
    assert output.err == f"Warning: an evaluation saves no checkpoint, so the callbacks do not get {tag}\n"
    logged = EventAccumulator(str(run / "tensorboard/eval")).Reload()
    assert [(each.step, each.value) for each in logged.Scalars("val/largest")] == [
        (4, pytest.approx(metrics["val/largest"]))
    ]


def test_a_second_evaluation_overwrites_nothing_of_the_first(with_effects):
    evaluate(with_effects, "latest", None, (), ())
    before = contents(with_effects)
    evaluate(with_effects, "E2", None, (), ())
    names = [name for name in new_files(with_effects, before) if name.startswith("eval/")]
    folder = "eval/E2_U4_S16.2"
    assert names == [f"{folder}.json", f"{folder}/summary.json", f"{folder}/tensors/predictions/val.safetensors"]


def test_a_resumed_run_keeps_its_charts_and_those_of_evaluations(finished):
    train(resume=finished, overrides=["trainer.max_epochs=3", "run.tensorboard=true"])
    evaluate(finished, "E2", None, (), ())
    before = {path: content for path, content in contents(finished / "tensorboard").items() if "eval" in str(path)}
    assert before
    train(resume=finished, overrides=["trainer.max_epochs=4"])
    assert {path: path.read_bytes() for path in before} == before
    steps = [each.step for each in EventAccumulator(str(finished / "tensorboard")).Reload().Scalars("loss/val/square")]
    assert steps == [6, 8]


@pytest.mark.parametrize(
    ("weights", "name"), [(None, "eval"), ("slow/ema=0.9", "eval.slow.ema=0.9")], ids=["training", "average"]
)
def test_an_evaluation_is_a_run_of_its_own_in_each_service(tmp_path, monkeypatch, weights, name):
    monkeypatch.setattr(services, "WeightsAndBiases", lambda path, **settings: (path, settings))
    wandb = SimpleNamespace(project="p", entity=None, mode=None)
    config = SimpleNamespace(run=SimpleNamespace(name="tiny", tensorboard=False, wandb=wandb))
    ((path, settings),), missing = services.evaluation_services(tmp_path / "7", config, weights)
    assert (path, missing) == (tmp_path / "7/wandb" / name, [])
    run_id = f"tiny-7-{name}"
    assert settings == {"run_id": run_id, "group": "tiny-7", "job_type": "eval", **vars(wandb)}
    monkeypatch.setattr(services, "find_spec", lambda _: None)
    assert services.evaluation_services(tmp_path / "7", config, weights) == ([], ["wandb"])


def test_any_dataset_of_the_configuration_is_evaluated(with_effects):
    assert evaluate(with_effects, "last", None, (), (), ["test"]) == 0
    assert evaluate(with_effects, "last", None, (), (), ["test", "val", "test"]) == 0
    first, again, val = (
        json.loads((with_effects / f"eval/E2_U4_S16.{name}.json").read_text()) for name in ("test", "test.2", "val")
    )
    keys = {"test/largest", "loss/test/square", "loss/test/total"}
    assert first.keys() == again.keys() == {*keys, "memory/peak_bytes"}
    assert all(first[key] == again[key] for key in keys)
    assert val.keys() == {key.replace("test", "val") for key in first}
    assert val["loss/val/square"] != first["loss/test/square"]
    assert load_file(with_effects / "eval/E2_U4_S16.test/tensors/predictions/test.safetensors")["y"].shape == (4, 1)


def test_without_callbacks_that_evaluate_the_losses_of_a_named_dataset_are_measured(tiny_module):
    config = make_config(max_epochs=1)
    config["data"]["val"] = {"kind": "tiny.Data"}
    run = train(config).directory
    with pytest.raises(ConfigError, match=r"no callback evaluates data; .*, or give --data NAME"):
        evaluate(run, "latest", None, (), ())
    assert evaluate(run, "latest", None, (), (), ["val"]) == 0
    assert json.loads((run / "eval/E1_U2_S8.val.json").read_text()).keys() == {"loss/val/square", "loss/val/total"}


def test_an_unknown_dataset_is_refused_with_those_that_exist(finished):
    before = contents(finished)
    with pytest.raises(ConfigError) as error:
        evaluate(finished, "latest", None, (), (), ["tset"])
    known = "it has 'train', 'val', 'test'; did you mean 'test'?"
    assert str(error.value) == f"--data tset: data has no 'tset', {known}"
    assert contents(finished) == before


class Plain(PeriodicDataIteratorCallback):
    """A user's callback, which declares no keys."""

    scale: float = 1.0

    def process_data(self, state, batch, forward):
        return {"y": forward(state, batch)[1]}


VAL = {"every_n_epochs": 1, "dataset_key": "val"}
TRAIN = {"every_n_updates": 50, "dataset_key": "train"}


@pytest.mark.parametrize(
    ("callbacks", "passes"),
    [
        pytest.param([OfflineLossCallback(**VAL), OfflineLossCallback(**TRAIN)], [[0]], id="of one kind"),
        pytest.param([Plain(**VAL), Plain(**TRAIN, id="b", batch_size=2)], [[0]], id="with equal settings"),
        pytest.param([Plain(**VAL), Plain(**TRAIN, scale=2.0)], [[0, 1]], id="with other settings"),
        pytest.param(
            [EvaluateCallback(**VAL, measures=("loss", "accuracy")), MetricCallback(**TRAIN, metric="accuracy")],
            [[0]],
            id="measured by another",
        ),
        pytest.param(
            [EvaluateCallback(**VAL, measures=("loss", "accuracy")),
             EvaluateCallback(**TRAIN, measures=("loss", "binary_accuracy"))],
            [[0], [1]],
            id="measured in part by another",
        ),
        pytest.param(
            [OfflineLossCallback(**TRAIN), OfflineLossCallback(**VAL | {"dataset_key": "test"})],
            [[1]],
            id="that of the dataset first",
        ),
    ],
)  # fmt: skip
def test_two_callbacks_that_measure_one_key_are_run_once(callbacks, passes):
    def say(state, event):
        return state, ()

    first, *more = evaluate_on([*callbacks, say], "test")
    found = [first.members[:-1], *(reducer.members for reducer in more)]
    kinds = [[type(callbacks[index]) for index in group] for group in passes]
    assert [[type(each) for each in group] for group in found] == kinds
    assert first.members[-1] is say
    assert {each.dataset_key for group in found for each in group} == {"test"}
    if passes == [[1]]:
        assert found[0][0] is callbacks[1]


def test_a_checkpoint_that_training_replaces_meanwhile_is_found_again():
    found = iter(["E1", "E2", "E2"])

    def load(manifest):
        if manifest == "E1":
            raise CheckpointError("E1/weights.safetensors is missing")
        return torch.zeros(())

    reader = SimpleNamespace(find=lambda _: next(found), load=load)
    assert load_checkpoint(reader, "latest") == ("E2", torch.zeros(()))
    damaged = SimpleNamespace(find=lambda _: "E1", load=load)
    with pytest.raises(CheckpointError, match="is missing"):
        load_checkpoint(damaged, "latest")
