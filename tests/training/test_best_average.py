"""The best checkpoint by a metric of averaged weights holds the weights that were measured."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import CALLBACKS, make_config
from torch import nn

from noether import AfterEpoch, Session, TrainState, log
from noether.cli.commands.evaluate import evaluate
from noether.core.callbacks import BestCheckpointCallback, BestMetricCallback, EMACallback, OfflineLossCallback
from noether.core.effect import SaveCheckpoint
from noether.core.tensors.stored_weights import measured_weights
from noether.effects import open_run
from noether.training.runs.train import train

MODULE = """
import torch
from torch import nn

class Data(torch.utils.data.Dataset):
    def __len__(self): return 8
    def __getitem__(self, index): return torch.tensor([float(index), 1.0]) / 8

def make_model():
    return nn.ModuleDict({"body": nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)), "head": nn.Linear(3, 1)})

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = make_model()
    def forward(self, x): return self.parts["head"](self.parts["body"](x))

def loss(outputs, batch): return {"square": (outputs - batch.sum(1, keepdim=True)).square().mean()}
"""
SAVES_NOTHING = {"save_weights": False, "save_last_weights": False, "save_latest_weights": False}


def kind(name, **settings):
    return {"kind": f"{CALLBACKS}.{name}", "every_n_epochs": 1, **settings}


def best_in(directory, key):
    """Return the best value of a metric in the log of a run, and the manifest of the checkpoint that it is at."""
    lines = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    values = [line["metrics"][key] for line in lines if key in line["metrics"]]
    tag = (directory / "checkpoints" / f"best_model.{key.replace('/', '.')}").read_text().split()[0]
    return min(values), tag


@pytest.mark.parametrize(
    ("average", "weights", "more"),
    [
        pytest.param({"target_factors": [0.5]}, "ema=0.5", {}, id="saved at the same events"),
        pytest.param({"target_factors": [0.5], **SAVES_NOTHING}, "ema=0.5", {}, id="saved by nothing else"),
        pytest.param({"target_factors": [0.9, 0.5], **SAVES_NOTHING}, "ema=0.5", {}, id="the second of two"),
        pytest.param({"target_factors": [0.5], "id": "slow"}, "slow/ema=0.5", {}, id="a callback with a name"),
        pytest.param({"target_factors": [0.5], "model_paths": ["parts.body"]}, "ema=0.5", {}, id="of a part"),
        pytest.param({"target_factors": [0.5], **SAVES_NOTHING}, "ema=0.5", {"tolerances": [2]}, id="with tolerances"),
    ],
)
@pytest.mark.parametrize("donate", [False, True])
def test_evaluating_the_best_checkpoint_gives_the_best_value(tiny_module, average, weights, more, donate):
    Path("tiny.py").write_text(MODULE)
    key = f"loss/val/square/{weights}"
    config = make_config(
        kind("EMACallback", **average),
        kind("OfflineLossCallback", dataset_key="val", weights=weights),
        kind("OfflineLossCallback", dataset_key="val"),
        kind("BestCheckpointCallback", metric_key=key, **more),
        donate=donate,
        max_epochs=6,
    )
    config |= {"model": {"kind": "tiny.Net"}}
    config["optimizer"]["lr"] = 0.3
    config["data"]["val"] = {"kind": "tiny.Data"}
    run = train(config)
    best, tag = best_in(run.directory, key)
    assert tag.endswith(f".{weights.replace('/', '.')}")
    assert evaluate(run.directory, f"best_model.{key.replace('/', '.')}", None, (), ()) == 0
    evaluated = json.loads((run.directory / "eval" / f"{tag}.json").read_text())
    assert evaluated[key] == best
    import tiny  # the module of the user

    model, batch = tiny.Net().eval(), torch.stack(list(map(tiny.Data().__getitem__, range(8))))
    model.load_state_dict(load_file(run.directory / "checkpoints" / tag / "weights.safetensors"))
    assert tiny.loss(model(batch), batch)["square"].item() == pytest.approx(best, rel=1e-5)
    raw = load_file(
        run.directory / "checkpoints" / "/".join((tag.split(".ema")[0].split(".slow")[0], "weights.safetensors"))
    )
    assert any(not torch.equal(raw[name], value) for name, value in model.state_dict().items())


def test_a_session_saves_the_average_that_it_measured(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    batches = list(torch.randn(4, 5, 2))

    def square(outputs, batch):
        return {"square": (outputs - batch.sum(1, keepdim=True)).square().mean()}

    key = "loss/val/square/ema=0.8"
    callbacks = [
        EMACallback(every_n_epochs=1, target_factors=(0.8,), **SAVES_NOTHING),
        OfflineLossCallback(every_n_epochs=1, dataset_key="val", weights="ema=0.8"),
        BestMetricCallback(every_n_epochs=1, metric_key=key),
        BestCheckpointCallback(every_n_epochs=1, metric_key=key),
    ]
    with open_run(tmp_path) as directory:
        session = Session(callbacks, directory=directory, model=model, optimizer=optimizer, data={"val": batches},
                          loss=square, max_epochs=4)  # fmt: skip
        for batch in session.batches(batches):
            losses = square(model(batch), batch)
            optimizer.zero_grad()
            losses["square"].backward()
            optimizer.step()
            session.update(losses)
        best = float(session.state.metrics[f"{key}/best"].value)
    model.load_state_dict(load_file(tmp_path / "checkpoints" / best_in(tmp_path, key)[1] / "weights.safetensors"))
    model.eval()
    with torch.no_grad():
        found = sum(square(model(batch), batch)["square"].double() for batch in batches) / len(batches)
    assert best == best_in(tmp_path, key)[0]
    assert found.item() == pytest.approx(best, rel=1e-6)


def request(metric_key, stored=("ema=0.5",), **settings):
    """Return what a best checkpoint requests at the first value of a metric."""
    state = TrainState().advance(samples=1).next_epoch()
    for weights in stored:
        state = state.remember(f"weights/{weights}", {"params": {}, "buffers": {}})
    state, _ = log(state, AfterEpoch(), {metric_key: 0.5})
    callback = BestCheckpointCallback(every_n_epochs=1, metric_key=metric_key, **settings)
    return callback(state, AfterEpoch())[1]


def test_a_state_to_resume_from_is_saved_beside_the_average():
    retention = {"BestCheckpointCallback/E1/val/accuracy/ema=0.5": 0}
    average = SaveCheckpoint(tag="E1_U1_S1.ema=0.5", optimizer=False, weights_of="ema=0.5", retention=retention,
                             pointers=("best_model.val.accuracy.ema=0.5",))  # fmt: skip
    assert request("val/accuracy/ema=0.5") == (SaveCheckpoint(retention=retention), average)
    (of_part,) = request("val/accuracy/ema=0.5", model_names=("body",))
    assert (of_part.weights_of, of_part.models, of_part.tag) == ("ema=0.5", ("body",), average.tag)


def test_the_weights_in_training_are_saved_for_their_own_metrics():
    for key in ("val/accuracy", "val/accuracy/ema=0.9", "val/accuracy-ema=0.5"):
        (save,) = request(key, mode="higher")
        assert (save.weights_of, save.tag, save.optimizer) == (None, None, True)


def test_weights_of_names_the_weights_of_a_key_that_does_not():
    _, save = request("val/accuracy", weights_of="ema=0.5")
    assert (save.weights_of, save.pointers) == ("ema=0.5", ("best_model.val.accuracy",))
    callback = BestCheckpointCallback(every_n_epochs=1, metric_key="val/accuracy", weights_of="ema=0.5")
    assert "weights/ema=0.5" in callback.consumes


def test_the_longest_name_of_weights_wins():
    state = TrainState()
    for name in ("ema=0.5", "slow/ema=0.5"):
        state = state.remember(f"weights/{name}", {"params": {}, "buffers": {}})
    assert measured_weights(state, "val/accuracy/slow/ema=0.5") == "slow/ema=0.5"
    assert measured_weights(state, "val/accuracy/ema=0.5") == "ema=0.5"
    assert measured_weights(state, "val/accuracy") is None
