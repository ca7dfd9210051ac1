"""First mistakes in a model, a loss or a metric: one message without a traceback, which names what failed."""

import json

import pytest
from command import invoke

MODULE = """\
import torch
from torch import nn


class Points(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return {"image": torch.ones(2), "label": torch.ones(1)}


class Net(nn.Module):
    def __init__(self, width: int = 2):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 2), nn.Linear(width, 1))

    def forward(self, image):
        return self.layers(image)


class Unnamed(Net):
    def forward(self, x):
        return self.layers(x)


class Whole(Net):
    def forward(self, batch):
        return self.layers(batch["image"])


class Unfinished(Net):
    def __init__(self):
        self.layer = nn.Linear(2, 1)


def mse(outputs, batch):
    return {"mse": nn.functional.mse_loss(outputs, batch["label"])}


def mean(outputs, batch):
    return outputs.mean().item()


def detached(outputs, batch):
    return {"mse": mse(outputs, batch)["mse"].detach()}


def second(outputs, batch):
    return nn.functional.mse_loss(outputs, batch[1])
"""


def configuration(model=None, **trainer):
    return {
        "run": {"name": "first", "output": "out"},
        "model": {"kind": "mine.Net", **(model or {})},
        "data": {"train": {"kind": "mine.Points"}, "val": {"kind": "mine.Points"}},
        "optimizer": {"kind": "torch.optim.SGD", "lr": 0.1},
        "trainer": {"max_epochs": 1, "effective_batch_size": 4, "loss": "mine.mse", **trainer},
        "callbacks": [],
    }


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "mine.py").write_text(MODULE)
    return tmp_path


EVALUATE = {"val": ["mine.second"], "every_n_epochs": 1}


@pytest.mark.parametrize(
    ("changes", "message", "code"),
    [
        (
            {"model": {"width": 3}},
            "in layers.1 (Linear(in_features=3, out_features=1, bias=True)), called with input (4",
            1,
        ),
        (
            {"model": {"kind": "mine.Unnamed"}},
            "in the call of Unnamed.forward(x) for the batch {image: (4, 2) float32",
            1,
        ),
        (
            {"model": {"kind": "mine.Unfinished"}},
            "config.yaml:1: model: AttributeError: cannot assign module before",
            2,
        ),
        ({"loss": "mine.mean"}, "mine.mean returned a float: return the loss, a 0-dimensional tensor, or", 1),
        ({"loss": "mine.detached"}, "mine.detached returned 'mse' without a gradient", 1),
        (
            {"loss": "mine.second"},
            "in the loss mine.second, called with outputs (4, 1) float32 and the whole batch {",
            1,
        ),
        ({"evaluate": EVALUATE}, "in the metric second, called with outputs (4, 1) float32 and the whole", 1),
    ],
    ids=["shape", "entry", "constructor", "float", "detached", "loss", "metric"],
)
def test_a_first_mistake_is_answered_in_one_line(changes, message, code, folder):
    """As Lightning#10541 and Lightning#7878."""
    (folder / "config.yaml").write_text(json.dumps(configuration(**changes)))
    output = invoke("train", "config.yaml", cwd=folder, code=code)
    (line,) = [line for line in output.splitlines() if line.startswith("Error: ")]
    assert message in line
    assert "Traceback" not in output


def test_a_smoke_test_and_an_evaluation_answer_as_training_does(folder):
    evaluate = {"val": ["loss"], "every_n_epochs": 1}
    (folder / "config.yaml").write_text(json.dumps(configuration(evaluate=evaluate)))
    invoke("train", "config.yaml", cwd=folder)
    (run,) = (folder / "out/first").iterdir()
    (folder / "mine.py").write_text(MODULE.replace('outputs, batch["label"]', 'outputs, batch["target"]'))
    for argv in (("train", "config.yaml", "--smoke"), ("eval", run)):
        output = invoke(*argv, cwd=folder, code=1)
        assert "Error: KeyError: 'target'\n  in the loss mine.mse, called with outputs (4, 1) float32" in output
        assert "Traceback" not in output


def test_a_model_that_takes_the_whole_batch_is_trained(folder):
    (folder / "config.yaml").write_text(json.dumps(configuration({"kind": "mine.Whole"})))
    invoke("train", "config.yaml", cwd=folder)
