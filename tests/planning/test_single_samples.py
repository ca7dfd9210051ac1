"""A batch of one sample on which the model fails is found before training, and nothing else is warned of."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from noether import TrainState
from noether.config import ConfigError, load
from noether.planning.plan import make_plan
from noether.planning.single_samples import find_single_sample_warnings
from noether.testing import same
from noether.training.experiment import build

MODULE = """
import torch
from torch import nn

class Points(torch.utils.data.Dataset):
    def __init__(self, n: int = 16, shape: list[int] = (2,)):
        self.x = torch.randn(n, *shape, generator=torch.Generator().manual_seed(0))
    def __len__(self): return len(self.x)
    def __getitem__(self, i): return self.x[i], self.x[i].mean()

class Stream(torch.utils.data.IterableDataset):
    def __len__(self): return 0
    def __iter__(self): return iter(())

def make(norm: str, *, reduces: bool = False, needs_values: bool = False) -> nn.Module:
    return Net(norm, reduces, needs_values)

class Net(nn.Module):
    def __init__(self, norm, reduces, needs_values):
        super().__init__()
        self.norm, self.reduces, self.needs_values = getattr(nn, norm)(2), reduces, needs_values
    def forward(self, x):
        if self.needs_values and x.sum().item() == 0: return x
        if self.reduces: x = x.mean(dim=(2, 3), keepdim=True)
        return self.norm(x).flatten(1).mean(1)

def loss(outputs, batch): return {"mse": (outputs - batch[1]).square().mean()}
def strict(outputs, batch): return outputs.squeeze() * len(outputs.squeeze())
"""

CONFIG = """\
run: {{name: single}}
model: {{kind: single.make, norm: {norm}, reduces: {reduces}, needs_values: {needs_values}}}
data:
  train: {{kind: single.Points, n: {n}, shape: {shape}}}
  val: {{kind: single.Points, n: {val}, shape: {shape}}}
optimizer: {{kind: torch.optim.SGD, lr: 0.1}}
trainer:
  {end}
  effective_batch_size: {size}
  max_batch_size: {max_size}
  drop_last: {drop_last}
  loss: single.loss
callbacks:
  - {{kind: noether.core.callbacks.MetricCallback, every_n_epochs: 1, dataset_key: val, metric: single.{metric}}}
  - {{kind: noether.core.callbacks.CheckpointCallback, every_n_updates: 1}}
"""
DEFAULTS = {
    "norm": "BatchNorm1d", "reduces": "false", "needs_values": "false", "n": 17, "shape": [2], "val": 16, "size": 4,
    "max_size": "null", "drop_last": "false", "end": "max_epochs: 2", "metric": "loss_of",
}  # fmt: skip
FAILS = "on which the model cannot train: ValueError: Expected more than 1 value per channel when training"
LAST, EVERY = "the last update of an epoch has", "every update has"
SPATIAL = {"norm": "BatchNorm2d", "shape": [2, 4, 4]}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    metric = "\ndef loss_of(outputs, batch): return (outputs - batch[1]).square()\n"
    Path("single.py").write_text(MODULE + metric)
    yield tmp_path
    sys.modules.pop("single", None)


def warnings_of(**changes):
    """Return the warnings of `validate`, which those of the plan have to equal where no values are needed."""
    Path("single.yaml").write_text(CONFIG.format(**{**DEFAULTS, **changes}))
    config = load("single.yaml")
    validated = [str(each) for each in find_single_sample_warnings(build(config))]
    planned = [str(each) for each in make_plan(config).warnings if "one sample" in each.message]
    assert planned == ([] if changes.get("needs_values") else validated)
    return validated


WARNED = {
    "last batch of one": ({}, LAST, "drop_last: true or another effective_batch_size"),
    "last micro-batch of one": (
        {"n": 13, "size": 8, "max_size": 4},
        LAST,
        "drop_last: true or another effective_batch_size or max_batch_size",
    ),
    "every update": ({"n": 15, "size": 5, "max_size": 4}, EVERY, "another max_batch_size"),
    "updates of one": ({"n": 4, "size": 1}, EVERY, "a larger effective_batch_size"),
    "maps of one": ({**SPATIAL, "reduces": "true"}, LAST, "drop_last: true or another effective_batch_size"),
    "a model that needs values": ({"needs_values": "true"}, LAST, "drop_last: true or another effective_batch_size"),
}


@pytest.mark.parametrize(("changes", "where", "fix"), WARNED.values(), ids=WARNED)
def test_a_batch_of_one_sample_is_warned_of_where_the_model_cannot_train_on_it(folder, changes, where, fix):
    (message,) = warnings_of(**changes)
    assert message.startswith(f"single.yaml:9: trainer.effective_batch_size: {where} a batch of one sample, {FAILS}")
    assert message.endswith(f"; write {fix}")


@pytest.mark.parametrize(
    "changes",
    [
        {"n": 16},
        {"drop_last": "true"},
        {"end": "max_updates: 4"},
        {"n": 18, "size": 6, "max_size": 3},
        {"norm": "LayerNorm"},
        SPATIAL,
        {"shape": [2, 3]},
        {"val": 17},
    ],
)
def test_nothing_is_warned_of_where_training_succeeds(folder, changes):
    assert warnings_of(**({"n": 16} if "val" in changes else {}), **changes) == []


def test_an_evaluation_that_fails_on_its_last_sample_is_warned_of(folder):
    (message,) = warnings_of(n=16, val=17, metric="strict")
    assert message.startswith(
        "single.yaml:14: callbacks[0]: the last batch of val has one sample, "
        "on which MetricCallback/E1/val/strict fails: TypeError: len() of a 0-d tensor"
    )
    assert message.endswith("; write another trainer.eval_batch_size")


def test_the_search_changes_neither_weights_nor_buffers(folder):
    Path("single.yaml").write_text(CONFIG.format(**DEFAULTS))
    experiment = build(load("single.yaml"))
    before = TrainState.from_module(experiment.model)
    values = {name: tensor.clone() for name, tensor in (*before.params.items(), *before.buffers.items())}
    assert len(list(find_single_sample_warnings(experiment))) == 1
    after = TrainState.from_module(experiment.model)
    assert same(values, {**after.params, **after.buffers})
    assert isinstance(experiment.model, nn.Module)
    assert experiment.model.training


def test_an_empty_evaluation_set_is_refused(folder):
    text = CONFIG.format(**DEFAULTS)
    for kind in ("single.Stream", "single.Points, n: 0"):
        Path("single.yaml").write_text(text.replace("single.Points, n: 16, shape: [2]", kind))
        with pytest.raises(ConfigError, match=r"^single.yaml:5: data.val: the dataset has no samples$"):
            build(load("single.yaml"))


def test_a_collate_that_leaves_out_the_sample_is_no_failure_of_the_model(folder):
    filters = "\n    def collate(self, samples): return torch.stack([s[0] for s in samples]) if samples[1:] else None\n"
    module = Path("single.py").read_text().replace("class Stream", f"class Filtered(Points):{filters}\nclass Stream")
    Path("single.py").write_text(module)
    Path("single.yaml").write_text(CONFIG.format(**DEFAULTS).replace("single.Points", "single.Filtered"))
    assert list(find_single_sample_warnings(build(load("single.yaml")))) == []


def test_one_sample_in_all_is_not_compared(folder):
    Path("single.yaml").write_text(CONFIG.format(**{**DEFAULTS, "n": 1, "size": 1}))
    assert list(find_single_sample_warnings(build(load("single.yaml")))) == []
    assert torch.is_grad_enabled()
