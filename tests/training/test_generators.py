"""A model or a loss may draw from the generators of numpy, Python and torch, as a function of the seed."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from law_examples import examples
from tiny_runs import CALLBACKS, make_config
from torch import nn
from torch.utils.data import Dataset, IterableDataset

from noether import TrainState
from noether.effects import CheckpointStore
from noether.session.randomness import derive, seed_all
from noether.testing import same
from noether.training.data.indexed import EvaluationData
from noether.training.data.streamed_evaluation import StreamedEvaluationData
from noether.training.runs.train import train
from noether.training.step.compiled import CompiledStep
from noether.training.step.optimizer import FunctionalOptimizer
from noether.training.step.step import Step


def draw():
    """Return one number that depends on all three generators."""
    return float(np.random.rand() + random.random() + torch.rand(()))  # noqa: NPY002, S311  # those that models draw from


class Noisy(nn.Linear):
    """Adds one random number to its outputs."""

    def __init__(self):
        super().__init__(2, 1)

    def forward(self, x):
        return super().forward(x) + draw()


def square(outputs, batch):
    return {"square": outputs.square().mean()}


def noisy_square(outputs, batch):
    return {"square": outputs.square().mean() * draw()}


class Points(Dataset):
    """Points whose loading draws random numbers, where they are loaded in this process."""

    def __len__(self):
        return 6

    def __getitem__(self, index):
        draw()
        return torch.full((2,), float(index))


class Stream(IterableDataset):
    def __len__(self):
        return 6

    def __iter__(self):
        return map(Points().__getitem__, range(6))


class OwnGenerators(nn.Linear):
    """Draws from generators that it holds, and from one that its helper holds."""

    def __init__(self):
        super().__init__(2, 1)
        self.numbers, self.torch = np.random.default_rng(), torch.Generator()
        self.torch.seed()
        self.helpers = [{"python": random.Random()}]  # noqa: S311  # no secret

    def forward(self, x):
        noise = self.numbers.random() + self.helpers[0]["python"].random()
        return super().forward(x) + noise + torch.rand((), generator=self.torch)


def make_drawing_loss():
    generator = np.random.default_rng()
    return lambda outputs, batch: {"square": outputs.square().mean() * generator.random()}


def make_step(model, loss, *, donate, rank=0):
    optimizer = FunctionalOptimizer(torch.optim.AdamW, {"lr": 0.1})
    return Step(model=model, loss=loss, optimizer=optimizer, lr={"default": lambda _: 0.1}, donate=donate, rank=rank)


def run_updates(step, updates, disturb):
    """Return the params after some updates, before each of which the generators are in another state."""
    torch.manual_seed(0)
    state = TrainState.from_module(nn.Linear(2, 1), seed=5)
    for update in range(updates):
        seed_all(disturb + update)
        state, _ = step(state, [torch.ones(2, 2), torch.ones(1, 2)])
        state = state.advance(samples=3)
    return {name: value.clone() for name, value in state.params.items()}


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize(
    ("model", "loss"), [(Noisy, square), (lambda: nn.Linear(2, 1), noisy_square)], ids=["model", "loss"]
)
@examples(100, quick=25)
@given(disturb=st.integers(0, 2**62), other=st.integers(0, 2**62))
def test_updates_do_not_depend_on_what_was_drawn_before(model, loss, donate, disturb, other):
    first, second = (run_updates(make_step(model(), loss, donate=donate), 3, each) for each in (disturb, other))
    assert same(first, second)


def test_each_update_and_each_rank_draws_other_numbers():
    drawn = []

    def record(outputs, batch):
        drawn.append((np.random.rand(), random.random(), float(torch.rand(()))))  # noqa: NPY002, S311  # as above
        return square(outputs, batch)

    for rank in (0, 1):
        run_updates(make_step(nn.Linear(2, 1), record, donate=False, rank=rank), 2, 0)
    assert all(len(set(numbers)) == 8 for numbers in zip(*drawn, strict=True))  # 2 ranks, 2 updates, 2 micro-batches


@pytest.mark.parametrize("donate", [False, True])
def test_a_model_that_draws_from_numpy_is_not_compiled_into_one_number(donate):
    step = make_step(Noisy(), noisy_square, donate=donate)
    expected = run_updates(step, 4, 1)
    assert same(run_updates(CompiledStep(make_step(Noisy(), noisy_square, donate=donate)), 4, 2), expected)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(lambda: EvaluationData(Points(), seed=3, batch_size=2), id="this process"),
        pytest.param(lambda: EvaluationData(Points(), seed=3, batch_size=2, num_workers=1), id="a worker"),
        pytest.param(lambda: StreamedEvaluationData(Stream(), seed=3, batch_size=2), id="a stream"),
    ],
)
def test_an_evaluation_draws_the_same_numbers_wherever_its_batches_are_loaded(data):
    seed_all(derive(3, "evaluation", 0))
    expected = draw()
    drawn = [draw() for _ in data()]
    assert drawn[0] == expected
    assert len(set(drawn)) == 3


MODULE = """
import random, numpy as np, torch
from torch import nn

class Data(torch.utils.data.Dataset):
    def __init__(self): self.rng = np.random.default_rng()
    def __len__(self): return 8
    def __getitem__(self, index):
        return torch.tensor([index + random.random() + self.rng.random(), np.random.rand()]) / 8

class Drop(nn.Linear):
    def forward(self, x): return super().forward(x) * (random.random() + np.random.rand())

def loss(outputs, batch): return {"square": outputs.square().mean() * (1 + np.random.rand())}
"""


@pytest.mark.parametrize("workers", [0, 1])
def test_a_resumed_run_draws_the_numbers_of_the_uncut_run(tiny_module, workers):
    Path("tiny.py").write_text(MODULE)
    evaluate = {"kind": f"{CALLBACKS}.OfflineLossCallback", "every_n_epochs": 1, "dataset_key": "val"}
    states = []
    for cut in (None, 1):
        config = make_config(evaluate, max_epochs=cut or 3, num_workers=workers)
        config |= {"model": {"kind": "tiny.Drop", "in_features": 2, "out_features": 1}}
        config["data"] |= {"val": {"kind": "tiny.Data"}}
        run = train(config)
        if cut is not None:
            train(resume=run.directory, overrides=["trainer.max_epochs=3"])
        store = CheckpointStore(run.directory / "checkpoints", run_id="")
        states.append(store.load(store.find("latest")))
    assert same(states[0].params, states[1].params)
    assert same(states[0].metrics["loss/val/square"], states[1].metrics["loss/val/square"])
