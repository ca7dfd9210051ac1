"""A plain update gives the bits, and the errors, of a step that asks for all of its options."""

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from law_examples import examples
from torch import nn

from noether import Mean, TrainState
from noether.core.tensors.donation import donate, lease
from noether.testing import same
from noether.training.step.optimizer import FunctionalOptimizer
from noether.training.step.plain_update import PlainUpdate
from noether.training.step.step import Step
from noether.training.value_schedules import Constant, Linear

SECONDS = ("forward_s", "backward_s", "optimizer_s")


class Mixed(nn.Module):
    """Has tied weights, batch norm, dropout, a buffer that forward registers, and a parameter that is rarely used."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.norm, self.dropout = nn.BatchNorm1d(3), nn.Dropout(0.3)
        self.rare = nn.Parameter(torch.ones(3))

    def forward(self, x):
        if not hasattr(self, "largest"):
            self.register_buffer("largest", torch.zeros(()))
        self.largest = torch.maximum(self.largest, x.detach().max())
        hidden = self.dropout(self.norm(self.first(x).relu()))
        return {"scores": self.second(hidden * self.rare if x.sum() > 0 else hidden), "rare": self.rare}


class Words(nn.Module):
    """Has a sparse gradient, which no kernel takes, where the first number is above zero."""

    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(5, 3), nn.Linear(3, 3)

    def forward(self, x):
        self.words.sparse = bool(x[0, 0] > 0)
        return {"scores": self.head(self.words(x.argmax(dim=1)))}


class Linears(nn.Sequential):
    """Without buffers and random numbers."""

    def __init__(self):
        super().__init__(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))

    def forward(self, x):
        return {"scores": super().forward(x)}


class Writing(Linears):
    """Writes to a parameter where the first number is above zero."""

    def forward(self, x):
        if x[0, 0] > 0:
            with torch.no_grad():
                self[0].weight.add_(1)
        return super().forward(x)


def mse(outputs, batch):
    return {"mse": (outputs["scores"] - batch[1]).square().mean()}


def weighted(outputs, batch):
    """Leave the loss out of a batch whose first number is above zero."""
    return {"mse": Mean((outputs["scores"] - batch[1]).square().mean(), weight=int(batch[0][0, 0] <= 0))}


def constant(outputs, batch):
    """Has no gradient where the first number is above zero."""
    loss = (outputs["scores"] - batch[1]).square().mean()
    return {"mse": loss.detach() if batch[0][0, 0] > 0 else loss}


OPTIMIZERS = {
    "adamw fused": (torch.optim.AdamW, {"fused": True}),
    "adamw": (torch.optim.AdamW, {}),
    "sgd nesterov": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
}


def make_step(model, loss, optimizer, **options):
    cls, values = OPTIMIZERS[optimizer]
    decay = {"default": Linear(start=0.1, end=0.0, updates=5)}
    return Step(
        model=model, loss=loss, optimizer=FunctionalOptimizer(cls, {"lr": 0.1, **values}), donate=True,
        lr={"default": Constant(value=0.1)}, weight_decay=decay, **options,
    )  # fmt: skip


def first_state(step):
    torch.manual_seed(0)
    state = lease(TrainState.from_module(type(step.model)()))  # values, without the module
    return donate(state.replace(opt_state=step.optimizer.init(state.params)))


def make_batch(number):
    generator = torch.Generator().manual_seed(number)
    return torch.randn(4, 3, generator=generator), torch.randn(4, 3, generator=generator)


def fields_of(value):
    """Return the fields of a state or an event, but not the seconds, which only one of the steps measures."""
    names = (each.name for each in dataclasses.fields(value))
    return {name: getattr(value, name) for name in names if name not in SECONDS}


def make_update(step, state, number):
    """Return the state after an update and the event, or the state before it and the error."""
    try:
        after, event = step(state, [make_batch(number)])
    except (ValueError, RuntimeError) as error:
        return state, str(error)
    return after.advance(samples=4), event


@pytest.fixture
def updates(monkeypatch):
    """Return a list that gets the samples of each plain update."""
    made, plain = [], PlainUpdate.__call__

    def call(self, tensors, state, batch, samples):
        made.append(samples)
        return plain(self, tensors, state, batch, samples)

    monkeypatch.setattr(PlainUpdate, "__call__", call)
    return made


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    ("model", "loss"),
    [(Mixed, mse), (Linears, mse), (Words, mse), (Writing, mse), (Linears, weighted), (Linears, constant)],
)
def test_a_plain_update_has_the_bits_and_errors_of_the_step(model, loss, optimizer, updates):
    made = 0

    @examples(15, quick=5)
    @given(numbers=st.lists(st.integers(0, 30), min_size=2, max_size=8), data=st.data())
    def check(numbers, data):
        nonlocal made
        plain = make_step(model(), loss, optimizer)
        whole = make_step(model(), loss, optimizer, elapsed_s=itertools.count().__next__)
        assert PlainUpdate.is_possible(plain)
        assert not PlainUpdate.is_possible(whole)
        states, held = [first_state(plain), first_state(whole)], []
        for number in (*numbers, 4, 5):  # of which no model and no loss makes an error, so the last update is plain
            if data.draw(st.booleans(), label="whether somebody holds the state"):
                held.append((lease(states[0]), lease(states[1])))
            updates.clear()
            (states[0], result), (states[1], expected) = map(make_update, (plain, whole), states, (number, number))
            made += len(updates)
            assert type(result) is type(expected)
            assert result == expected if isinstance(result, str) else same(fields_of(result), fields_of(expected))
            assert same(fields_of(states[0]), fields_of(states[1]))
        assert all(same(fields_of(one), fields_of(other)) for one, other in held)

    check()
    assert made


@pytest.mark.parametrize(
    "options",
    [
        {"precision": torch.bfloat16},
        {"clip_grad_norm": 1.0},
        {"clip_grad_value": 1.0},
        {"nonfinite": "skip"},
        {"grad_norm": True},
        {"gradients": lambda state: True},
        {"elapsed_s": itertools.count().__next__},
        {"donate": False},
    ],
)
def test_a_step_with_an_option_makes_no_plain_update(options, updates):
    step = dataclasses.replace(make_step(Linears(), mse, "adamw"), **options)
    state = first_state(step)
    for number in range(3):
        state, _ = make_update(step, state, number)
    assert state.iteration.update == 3
    assert not updates


def test_accumulated_and_observed_updates_are_not_plain(updates):
    step = make_step(Linears(), mse, "adamw")
    state, _ = make_update(step, first_state(step), 0)
    state, _ = step(state, [make_batch(1), make_batch(2)])
    state, _ = step(state, [make_batch(3)], lambda state, event: state)
    assert not updates
    step(state, [make_batch(4)])
    assert updates == [(4,)]
