"""An experiment is a function of its configuration, whatever the process drew before."""

import sys
import textwrap

import numpy as np
import pytest
import torch

from noether.config import ConfigError, load
from noether.core.event import AtEval
from noether.testing import same
from noether.training.experiment import build

MODULE = """
    import numpy as np, torch
    from torch import nn

    class Split(torch.utils.data.Dataset):
        def __init__(self):
            self.order = np.random.permutation(12)
        def __len__(self):
            return len(self.order)
        def __getitem__(self, index):
            return torch.ones(2) * float(self.order[index]), torch.zeros(1)

    class Drawing(nn.Linear):
        def __init__(self):
            super().__init__(2, 1)
        def forward(self, inputs):
            return super().forward(inputs) + torch.randn(len(inputs), 1)

    def loss(outputs, batch):
        return {"mse": (outputs - batch[1]).square().mean()}
"""

CONFIG = """
    run: {name: drawn}
    model: {kind: drawn.Drawing}
    data: {train: {kind: drawn.Split}, val: {kind: drawn.Split}}
    optimizer: {kind: torch.optim.SGD, lr: 0.1}
    trainer:
      max_epochs: 1
      effective_batch_size: 4
      loss: drawn.loss
      evaluate: {val: [loss], every_n_epochs: 1}
    callbacks:
      - {kind: noether.core.callbacks.OnlineLossCallback, every_n_epochs: 1}
      - kind: noether.core.callbacks.BestMetricCallback
        every_n_epochs: 1
        metric_key: loss/online/mse/E1
        optional_target_metric_keys: [loss/val/mse]
"""


@pytest.fixture
def make_experiment(tmp_path, monkeypatch):
    (tmp_path / "drawn.py").write_text(textwrap.dedent(MODULE))
    (tmp_path / "drawn.yaml").write_text(textwrap.dedent(CONFIG))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "drawn", raising=False)  # of another test's folder

    def make(*settings):
        np.random.seed(None)  # noqa: NPY002  # as in a new process
        torch.seed()
        return build(load("drawn.yaml", settings))

    return make


def test_a_dataset_that_draws_in_its_constructor_draws_the_same_again(make_experiment):
    first, second = make_experiment(), make_experiment()
    assert same(list(first.run.data["train"]), list(second.run.data["train"]))
    assert not same(list(first.run.data["train"]), list(first.run.data["val"]))
    assert same(first.state.params, second.state.params)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_model_that_draws_in_evaluation_draws_the_same_for_any_workers(make_experiment, workers):
    alone, other = make_experiment(), make_experiment(f"trainer.num_workers={workers}")
    measured = [each.reducer(each.state, AtEval(run=each.run))[0].metrics for each in (alone, other, other)]
    assert same(measured[0], measured[1])
    assert same(measured[1], measured[2])


def test_an_evaluation_runs_before_the_callbacks_that_read_its_metrics(make_experiment):
    names = [type(member).__name__ for member in make_experiment().reducer.members]
    assert names == ["OnlineLossCallback", "EvaluateCallback", "BestMetricCallback"]


def test_a_seed_that_no_generator_takes_is_refused(make_experiment):
    with pytest.raises(ConfigError, match=r"run.seed: 99999999999999999999 is not below 9223372036854775808"):
        make_experiment("run.seed=99999999999999999999")
