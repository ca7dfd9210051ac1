"""An experiment is a function of its configuration, whatever the process drew before."""

import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

from noether.config import ConfigError, load
from noether.config.serialization import dump
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

    def halves(batch):
        return len(batch[0]) // 2

    def fractions(batch):
        return len(batch[0]) / 4
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


def test_a_function_of_the_configuration_counts_the_samples_everywhere(make_experiment):
    experiment = make_experiment("data.batch_size=drawn.halves")
    assert list(experiment.run.data) == ["train", "val"]
    assert experiment.run.config["data"]["batch_size"] == "drawn.halves"
    state, batches = experiment.data.next_batches(experiment.state)
    assert batches.sizes == (2,)
    assert experiment.step(state, batches)[1].samples == experiment.step(state, [*batches])[1].samples == 2
    assert [size for _, size in experiment.run.data["val"].with_sizes()] == [2, 2, 2]
    assert experiment.run.count_samples(batches[0]) == 2


def test_a_function_that_returns_no_whole_number_is_refused_with_its_place(make_experiment):
    experiment = make_experiment("data.batch_size=drawn.fractions")
    message = (
        r"^--set data.batch_size=drawn.fractions: data.batch_size: drawn.fractions returned 1.0 as the number of samp"
    )
    with pytest.raises(ValueError, match=message):
        experiment.data.next_batches(experiment.state)
    with pytest.raises(ValueError, match=message):
        list(experiment.run.data["val"].with_sizes())


def test_a_configuration_with_such_a_function_is_written_as_it_was_read(make_experiment):
    config = make_experiment("data.batch_size=drawn.halves").config
    Path("again.yaml").write_text(dump(config))
    again = load("again.yaml")
    assert again == config
    assert again.batch_size == "drawn.halves"
