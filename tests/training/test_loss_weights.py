"""Losses with weights, and losses that some micro-batches lack: an update equals that on one batch with all samples."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from law_examples import examples
from torch import nn

from noether import Mean, TrainState
from noether.core.tensors.losses import loss_weights
from noether.testing import same
from noether.training.step.compiled import CompiledStep
from noether.training.step.optimizer import FunctionalOptimizer
from noether.training.step.step import Step

NAMES = ("depth", "pose")


class Net(nn.Module):
    """Has dropout, so that a gradient that is computed again shows its random numbers."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
        self.unused = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return self.layers(x)[:, 0]


def make_step(loss, model=Net, **options):
    torch.manual_seed(0)
    network = model().double().train()
    optimizer = FunctionalOptimizer(torch.optim.SGD, {"lr": 1.0})
    state = TrainState.from_module(network, seed=3)
    state = state.replace(opt_state=optimizer.init(state.params))
    return Step(model=network, loss=loss, optimizer=optimizer, lr={"default": lambda _: 1.0}, **options), state


def make_loss(absent):
    """Return a loss function of three losses; one whose weights are all 0 is left out, or NaN with weight 0."""

    def loss(outputs, batch):
        losses = {"all": outputs.square().mean()}
        for name in NAMES:
            weights = batch[name]
            if weights.sum() or absent == "nan":
                mean = ((outputs - len(name)).abs() * weights).sum() / weights.sum()
                losses[name] = Mean(mean, weight=weights.sum())
        return losses

    return loss


WEIGHT = st.sampled_from([0.0, 0.0, 1.0, 2.0, 0.5])


@pytest.mark.parametrize(
    "options", [{}, {"donate": True}, {"clip_grad_norm": 0.1}], ids=["plain", "donated", "clipped"]
)
@pytest.mark.parametrize("absent", ["absent", "nan"])
@examples(100, quick=25)
@given(
    st.lists(st.lists(st.tuples(WEIGHT, WEIGHT), min_size=1, max_size=3), min_size=1, max_size=4),
    st.integers(0, 100),
    st.booleans(),
)
def test_an_update_does_not_depend_on_the_cut(options, absent, rows, seed, observed):
    generator = torch.Generator().manual_seed(seed)
    columns = torch.tensor([row for part in rows for row in part], dtype=torch.float64).T
    sizes = [len(part) for part in rows]
    x = torch.randn(sum(sizes), 3, dtype=torch.float64, generator=generator)
    batch = {"x": x, **dict(zip(NAMES, columns, strict=True))}
    parts = [
        dict(zip(batch, part, strict=True)) for part in zip(*(t.split(sizes) for t in batch.values()), strict=True)
    ]
    step, state = make_step(make_loss(absent), **options)
    whole, at_once = step(state, [batch])
    step, state = make_step(make_loss(absent), **options)
    seen = []

    def observe(state, event):
        seen.append(event.accumulation_step)
        return state

    cut, event = step(state, parts, observe if observed else None)
    assert seen == (list(range(len(parts))) if observed else [])
    assert event.samples == at_once.samples
    assert event.losses.keys() == at_once.losses.keys()
    for ours, theirs in ((event.losses, at_once.losses), (cut.params, whole.params)):
        for name in theirs:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-9, atol=1e-12)
    weights = {name: float(batch[name].sum()) for name in NAMES if name in event.losses}
    assert {name: event.loss_weights.get(name) for name in weights} == pytest.approx(weights)
    assert math.isclose(event.losses["total"], sum(each for name, each in event.losses.items() if name != "total"))


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return self.w * x


@given(st.lists(st.dictionaries(st.sampled_from("abc"), st.integers(-9, 9), min_size=1), min_size=1, max_size=5),
       st.data())  # fmt: skip
def test_a_loss_that_some_micro_batches_lack_is_averaged_over_the_others(parts, data):
    """Losses without weights, linear in the only parameter: the gradient is the sum of their mean slopes."""
    sizes = data.draw(st.lists(st.integers(1, 4), min_size=len(parts), max_size=len(parts)))

    def loss(outputs, batch):
        return {name: slope * outputs.mean() for name, slope in parts[int(batch["index"][0])].items()}

    batches = [
        {"x": torch.ones(size, dtype=torch.float64), "index": torch.full((size,), index)}
        for index, size in enumerate(sizes)
    ]
    step, state = make_step(loss, Linear)
    after, event = step(state, batches)
    names = {name for part in parts for name in part}
    slopes = {}
    for name in names:
        present = [(part[name], size) for part, size in zip(parts, sizes, strict=True) if name in part]
        slopes[name] = sum(slope * size for slope, size in present) / sum(size for _, size in present)
    assert float(after.params["w"]) == pytest.approx(-sum(slopes.values()), abs=1e-12)
    assert set(event.losses) == {*names, "total"}
    lacking = any(part.keys() != names for part in parts)
    expected = {name: sum(s for part, s in zip(parts, sizes, strict=True) if name in part) for name in names}
    assert event.loss_weights == (expected if lacking else {})


class Dropping(Net):
    def forward(self, x):
        return nn.functional.dropout(super().forward(x), 0.5, self.training)


def test_gradients_that_are_computed_again_have_the_same_random_numbers():
    """Equal weights in the first micro-batch put both losses in one group, which the second one splits."""

    def loss(outputs, batch):
        return {name: Mean((outputs - i).square().mean(), weight=batch[name].sum()) for i, name in enumerate(NAMES)}

    batches = [
        {"x": torch.randn(4, 3, dtype=torch.float64), "depth": torch.ones(4), "pose": torch.ones(4) * pose}
        for pose in (1.0, 2.0)
    ]
    seen = []

    def observe(state, event):
        seen.append({name: float(value) for name, value in event.losses.items()})
        return state

    step, state = make_step(loss, Dropping)
    _, event = step(state, batches, observe)
    assert float(event.losses["depth"]) == pytest.approx((seen[0]["depth"] + seen[1]["depth"]) / 2)
    assert float(event.losses["pose"]) == pytest.approx((seen[0]["pose"] + 2 * seen[1]["pose"]) / 3)
    again, first = make_step(loss, Dropping)
    assert same(step(state, batches)[0].params, again(first, batches)[0].params)


@pytest.mark.parametrize("parts", [1, 2])
def test_an_update_whose_losses_all_have_weight_0_is_skipped(parts):
    def loss(outputs, batch):
        return Mean(outputs.mean() * math.nan, weight=0)

    step, state = make_step(loss)
    batch = torch.ones(2, 3, dtype=torch.float64)
    after, event = step(state, [batch] * parts)
    assert after is state
    assert event.skipped
    assert (event.samples, dict(event.losses), len(event.outputs)) == (2 * parts, {}, parts)


def test_one_loss_with_a_weight_takes_one_backward_pass(monkeypatch):
    from noether.training.step import step as module

    made = []
    compute = module.compute_gradients
    monkeypatch.setattr(module, "compute_gradients", lambda *a, **k: made.append(1) or compute(*a, **k))

    def loss(outputs, batch):
        return {"ce": Mean(outputs.mean(), weight=len(batch) * 7), "z": Mean(outputs.mean(), weight=len(batch) * 7)}

    step, state = make_step(loss)
    _, event = step(state, [torch.ones(2, 3, dtype=torch.float64), torch.ones(3, 3, dtype=torch.float64)])
    assert len(made) == 2
    assert event.loss_weights == {"ce": 35, "z": 35}


def test_a_compiled_step_leaves_losses_with_weights_to_the_plain_step(caplog):
    def loss(outputs, batch):
        return Mean(outputs.mean(), weight=batch.sum())

    step, state = make_step(loss, Linear)
    compiled = CompiledStep(step)
    for _ in range(2):
        state, event = compiled(state, [torch.ones(2, dtype=torch.float64), torch.ones(1, dtype=torch.float64)])
    assert loss_weights(event.losses) == {"loss": 3}
    assert "updates are not compiled: the loss function gives weights (noether.Mean)" in caplog.text
