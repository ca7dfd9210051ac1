"""A forward pass in float16 with dynamic loss scaling has the bits of `torch.amp.GradScaler`, and resumes exactly."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny_runs import CALLBACKS, make_config
from torch import nn

from noether import TrainState
from noether.config import ConfigError
from noether.testing import assert_same
from noether.training.runs.train import train
from noether.training.step.loss_scaling import LossScaling, find_float16_problem
from noether.training.step.optimizer import FunctionalOptimizer
from noether.training.step.step import Step


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


def mse(outputs, batch):
    return {"mse": (outputs.float() - batch[1]).square().mean(), "size": 0.5 * outputs.float().square().mean()}


def make_batch(seed, size):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4, 3, generator=generator) * size
    return x, x.sum(1, keepdim=True)


def torch_run(batches, scaler, clip, micro_batches):
    """Return params, scales, and which updates were skipped, in the way of torch's documentation."""
    model = make_model()
    optimizer, found = torch.optim.AdamW(model.parameters(), lr=0.05), []
    for update in batches:
        optimizer.zero_grad()
        for batch in update:
            with torch.autocast("cpu", dtype=torch.float16):
                losses = mse(model(batch[0]), batch)
                loss = (losses["mse"] + losses["size"]) / micro_batches
            scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
        before = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        found.append((norm.item(), scaler.get_scale() < before, scaler.state_dict()))
    return dict(model.named_parameters()), found


@pytest.mark.parametrize("donate", [False, True])
@settings(max_examples=8)
@given(
    sizes=st.lists(st.sampled_from([0.1, 1.0, 30.0, 3000.0]), min_size=1, max_size=6),
    power=st.integers(0, 24),
    interval=st.integers(1, 3),
    factors=st.sampled_from([(2.0, 0.5), (3.0, 0.3)]),
    micro_batches=st.sampled_from([1, 2]),
)
@example(sizes=[1.0, 1.0, 1.0], power=24, interval=1, factors=(2.0, 0.5), micro_batches=1)
def test_updates_have_the_bits_of_grad_scaler(donate, sizes, power, interval, factors, micro_batches):
    given_to_both = dict(zip(("growth_factor", "backoff_factor"), factors, strict=True), growth_interval=interval)
    batches = [
        [make_batch(10 * index + part, size) for part in range(micro_batches)] for index, size in enumerate(sizes)
    ]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**power, **given_to_both)
    expected, found = torch_run(batches, scaler, 1.0, micro_batches)
    model = make_model()
    step = Step(
        model=model,
        loss=mse,
        optimizer=FunctionalOptimizer(torch.optim.AdamW, {"lr": 0.05}),
        lr={"default": lambda position: 0.05},
        precision=torch.float16,
        loss_scaling=LossScaling(init_scale=2.0**power, **given_to_both),
        clip_grad_norm=1.0,
        donate=donate,
    )
    state = TrainState(params={name: each.detach().clone() for name, each in model.named_parameters()})
    state = state.replace(opt_state=step.optimizer.init(state.params))
    for update, (norm, skipped, memory) in zip(batches, found, strict=True):
        state, event = step(state, update)
        state = state.advance(samples=event.samples)
        assert event.skipped == skipped
        assert event.finite is (not skipped)
        assert_same(event.grad_norm.item(), norm)
        assert state.memory("grad_scaler") == memory
        assert float(event.losses["total"]) == pytest.approx(float(event.losses["mse"] + event.losses["size"]))
    assert_same(dict(state.params), {name: each.detach() for name, each in expected.items()})


def test_gradients_overflow_in_the_example_above():
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
    _, found = torch_run([[make_batch(0, 1.0)]] * 12, scaler, 1.0, 1)
    assert {skipped for _, skipped, _ in found} == {True, False}


def make_step(**more):
    model = nn.Linear(3, 1)
    state = TrainState(params={name: each.detach().clone() for name, each in model.named_parameters()})
    step = Step(
        model=model,
        loss=more.pop("loss", mse),
        optimizer=FunctionalOptimizer(torch.optim.SGD, {"lr": 0.05}),
        lr={"default": lambda position: 0.05},
        precision=torch.float16,
        **more,
    )
    return step, state.replace(opt_state=step.optimizer.init(state.params))


def test_an_overflow_is_skipped_where_other_nonfinite_updates_raise():
    step, state = make_step(nonfinite="raise", loss_scaling=LossScaling(init_scale=2.0**60))
    after, event = step(state, [make_batch(0, 1.0)])
    assert event.skipped
    assert after.memory("grad_scaler")["scale"] == 2.0**59
    assert_same(dict(after.params), dict(state.params))
    with pytest.raises(FloatingPointError, match="loss 'mse' is nan"):
        step(state, [(torch.full((4, 3), math.nan), torch.ones(4, 1))])
    step, state = make_step(
        nonfinite="raise", loss_scaling=LossScaling(init_scale=1.0), loss=lambda o, b: (o - o).float().sqrt().sum()
    )
    with pytest.raises(FloatingPointError, match="the gradient of 'weight' is not finite"):
        step(state, [make_batch(0, 1.0)])


def test_the_scale_never_becomes_infinite():
    scaling = LossScaling(init_scale=2.0**127, growth_interval=1)
    assert scaling.advance(TrainState(), finite=True).memory("grad_scaler")["scale"] == 2.0**127


def test_a_model_that_float16_cannot_train_is_named(monkeypatch):
    cpu = torch.device("cpu")
    assert find_float16_problem(cpu, {"weight": torch.zeros(1)}) is None
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: torch.no_grad())
    assert find_float16_problem(cpu, {}) == "torch cannot compute in float16 on cpu: write bfloat16"


# Runs by YAML


@pytest.mark.usefixtures("tiny_module")
def test_a_run_in_float16_that_is_cut_resumes_with_its_scale(caplog):
    config = make_config({"kind": f"{CALLBACKS}.GradNormCallback", "every_n_updates": 1}, precision="float16")
    config["optimizer"]["lr"] = 1e-4
    config["trainer"] |= {"max_epochs": 6, "compile": True, "loss": "tiny.steep_loss"}
    uncut = train(config)
    cut = train({**config, "trainer": {**config["trainer"], "max_epochs": 2}})
    resumed = train(resume=cut.directory, overrides=["trainer.max_epochs=6"])
    assert_same(dict(resumed.state.params), dict(uncut.state.params))
    assert_same(resumed.state.memory("grad_scaler"), uncut.state.memory("grad_scaler"))
    assert resumed.metrics == uncut.metrics
    scale = uncut.state.memory("grad_scaler")["scale"]
    assert 1 < scale < 65536  # some updates overflowed
    assert max(float(value) for key, value in uncut.metrics.items() if "grad_norm" in key) < 1000  # unscaled
    assert "updates are not compiled: precision: float16 decides in the middle of an update" in caplog.text


@pytest.mark.usefixtures("tiny_module")
def test_parameters_in_float16_are_refused_with_file_and_setting():
    config = make_config(precision="float16")
    config["model"] = {"kind": "tiny.make_half"}
    with pytest.raises(ConfigError, match=r"trainer.precision: the parameter '0.weight' is torch.float16"):
        train(config)
