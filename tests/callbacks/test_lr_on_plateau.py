"""`ReduceLROnPlateauCallback`: when it reduces, by how much, and that the step uses the scale."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from noether.core.callback import declaration_of
from noether.core.callbacks import EvaluateCallback, NanGuardCallback, ReduceLROnPlateauCallback
from noether.core.combinators import callback, on
from noether.core.effect import LogText
from noether.core.errors import SettingsError
from noether.core.event import AfterEpoch, AfterTraining, AfterUpdate, AtEval, BeforeTraining
from noether.core.iteration import TrainingIteration
from noether.core.metrics import MetricError, log
from noether.core.reducer import compose
from noether.core.run import Run
from noether.core.state import TrainState
from noether.core.tensors.forward import forward
from noether.testing import same
from noether.training.data.indexed import EvaluationData, TrainingData
from noether.training.step.optimizer import FunctionalOptimizer
from noether.training.step.step import Step
from noether.training.trainer import Trainer

NAN, INF = math.nan, math.inf
KEY = "loss/val/total"


def reduce(**settings):
    return ReduceLROnPlateauCallback(
        **{"every_n_epochs": 1, "metric_key": KEY, "tolerance": 2, "factor": 0.5, **settings}
    )


def go(member, values, state=None):
    """Return the state, and `lr_scale` and the effects after each epoch with one of `values`."""
    state, scales, requests = state or TrainState(), [], []
    for value in values:
        state, _ = log(state.advance(samples=1).next_epoch(), AfterEpoch(), {KEY: value})
        state, effects = member(state, AfterEpoch())
        scales.append(state.hyperparams["lr_scale"])
        requests.append(effects)
    return state, scales, requests


# --- when


@pytest.mark.parametrize(
    ("given", "values", "scales"),
    [
        ({}, [0.5, 0.4, 0.3, 0.2], [1, 1, 1, 1]),
        ({}, [0.5, 0.5, 0.5, 0.5, 0.5], [1, 1, 0.5, 0.5, 0.25]),
        ({}, [0.5, 0.6, 0.4, 0.6, 0.6, 0.3, 0.3], [1, 1, 1, 1, 0.5, 0.5, 0.5]),
        ({"tolerance": 1}, [0.5, 0.6, 0.6, 0.4], [1, 0.5, 0.25, 0.25]),
        ({"tolerance": 1, "cooldown": 1}, [0.5] * 6, [1, 0.5, 0.5, 0.25, 0.25, 0.125]),
        ({"cooldown": 2}, [0.5] * 8, [1, 1, 0.5, 0.5, 0.5, 0.5, 0.25, 0.25]),
        # An improvement during the cooldown counts.
        ({"tolerance": 1, "cooldown": 1}, [0.5, 0.5, 0.4, 0.45], [1, 0.5, 0.5, 0.25]),
        ({"min_delta": 0.25}, [1.0, 0.75, 0.74, 0.5, 0.495], [1, 1, 1, 1, 0.5]),
        ({"mode": "higher"}, [0.5, 0.6, 0.6, 0.6], [1, 1, 1, 0.5]),
        ({"metric_key": KEY, "mode": "lower"}, [0.5, 0.6, 0.6, 0.6], [1, 1, 0.5, 0.5]),
        ({"tolerance": 1, "factor": 0.25}, [0.5, 0.5, 0.5], [1, 0.25, 0.0625]),
        ({"tolerance": 1, "min_scale": 0.3}, [0.5] * 5, [1, 0.5, 0.3, 0.3, 0.3]),
        ({"tolerance": 1, "min_scale": 1.0}, [0.5] * 3, [1, 1, 1]),
        ({}, [NAN, NAN, NAN, 0.5, NAN], [1, 0.5, 0.5, 0.5, 0.5]),
    ],
)
def test_scales_computed_by_hand(given, values, scales):
    assert go(reduce(**given), values)[1] == scales


def test_a_reduction_is_reported():
    _, _, requests = go(reduce(min_scale=0.2), [NAN, NAN, 0.123456789, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5])
    assert [effects for effects in requests if effects] == [
        (LogText("learning rate times 0.5: loss/val/total has not been finite for 2 firings"),),
        (LogText("learning rate times 0.5: loss/val/total has not been lower than 0.123457 for 2 firings"),),
        (LogText("learning rate times 0.8: loss/val/total has not been lower than 0.123457 for 2 firings"),),
    ]  # at min_scale nothing more is reported
    _, _, requests = go(reduce(mode="higher", tolerance=1), [0.5, 0.5])
    assert requests[1] == (
        LogText("learning rate times 0.5: loss/val/total has not been higher than 0.5 for 1 firing"),
    )


def test_a_scale_below_min_scale_is_not_changed():
    state = TrainState(hyperparams={"lr_scale": 0.1, "other": 3})
    after, scales, requests = go(reduce(tolerance=1, min_scale=0.2), [0.5, 0.5], state)
    assert (scales, requests) == ([0.1, 0.1], [(), ()])
    assert after.hyperparams is state.hyperparams


def test_other_hyperparams_are_not_changed():
    after, _, _ = go(reduce(tolerance=1), [0.5, 0.5], TrainState(hyperparams={"lr_scale": 0.1, "other": 3}))
    assert after.hyperparams == {"lr_scale": 0.05, "other": 3}


VALUES = st.lists(st.one_of(st.sampled_from([0.0, 0.1, 0.2, 0.3, 0.5, NAN, INF, -INF]), st.floats(-1, 1)), max_size=30)


@given(
    VALUES,
    st.sampled_from(["lower", "higher"]),
    st.fixed_dictionaries(
        {
            "tolerance": st.integers(1, 4),
            "cooldown": st.integers(0, 4),
            "factor": st.sampled_from([0.1, 0.5, 0.9]),
            "min_delta": st.sampled_from([0.0, 0.1, 0.3]),
            "min_scale": st.sampled_from([0.0, 0.01, 0.3, 1.0]),
        }
    ),
)
def test_it_decides_as_the_scheduler_of_torch(values, mode, given):
    # For torch, an infinite value in the better direction is the best for ever.
    values = [value for value in values if value != (-INF if mode == "lower" else INF)]
    base = 0.25  # a power of two: multiplying by it is exact
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=base)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, mode={"lower": "min", "higher": "max"}[mode], threshold_mode="abs", threshold=given["min_delta"],
        patience=given["tolerance"] - 1, cooldown=given["cooldown"], factor=given["factor"],
        min_lr=base * given["min_scale"], eps=0,
    )  # fmt: skip
    expected = []
    for value in values:
        theirs.step(value)
        expected.append(optimizer.param_groups[0]["lr"])
    _, scales, _ = go(reduce(mode=mode, **given), values)
    assert [base * scale for scale in scales] == expected


@given(VALUES, st.integers(0, 30), st.integers(0, 3))
def test_a_resumed_run_decides_the_same(values, cut, cooldown):
    member = reduce(cooldown=cooldown)
    state, scales, requests = go(member, values)
    half, first, early = go(member, values[:cut])
    end, rest, more = go(member, values[cut:], half)
    assert (first + rest, early + more) == (scales, requests)
    assert (end.callback_states, end.hyperparams) == (state.callback_states, state.hyperparams)


def test_it_acts_only_at_its_interval_on_a_current_value():
    member = reduce(every_n_epochs=2)
    state = TrainState().advance(samples=1).next_epoch()
    for event in (AfterUpdate(samples=1), AfterEpoch(), AfterTraining(), AtEval()):
        assert member(state, event) == (state, ())
    with pytest.raises(MetricError, match="no metric 'loss/val/total' was measured yet; measured: none"):
        member(state.advance(samples=1).next_epoch(), AfterEpoch())
    assert (member.produces, member.consumes) == ((), (KEY, "nonfinite"))
    assert declaration_of(member).required == (KEY,)
    assert member.name == "ReduceLROnPlateauCallback/E2/loss/val/total"
    assert member.init(state) == {member.name: {"best": None, "since": 0, "cooling": 0}}


def test_updates_that_are_not_finite_do_not_count():
    guard = NanGuardCallback(every_n_epochs=1, tolerance=9)
    measure = callback("measure", produces=(KEY,))(on(AfterEpoch)(lambda s, e: log(s, e, {KEY: 0.5})))
    reducer = compose(guard, measure, reduce())
    state, _ = reducer(TrainState(), BeforeTraining())
    for finite, scale in ((False, 1.0), (True, 1.0), (False, 1.0), (True, 1.0), (False, 1.0), (True, 0.5)):
        state, _ = reducer(state.advance(samples=1), AfterUpdate(samples=1, finite=finite))
        state, _ = reducer(state.next_epoch(), AfterEpoch())
        assert state.hyperparams["lr_scale"] == scale


# --- settings


@pytest.mark.parametrize(
    ("given", "problems"),
    [
        *(
            ({"factor": factor}, [f"factor: {factor!r} is not a number between 0 and 1, both excluded"])
            for factor in (0, 1, 0.0, 1.0, -0.5, 1.5, NAN, INF, True, "0.5", None)
        ),
        *(
            ({"min_scale": scale}, [f"min_scale: {scale!r} is not a number from 0 to 1"])
            for scale in (-0.1, 1.1, NAN, True, "0", None)
        ),
        *(
            ({"tolerance": n}, [f"tolerance: {n!r} is not a whole number of at least 1"])
            for n in (0, -1, 2.0, True, None)
        ),
        *(({"cooldown": n}, [f"cooldown: {n!r} is not a whole number of at least 0"]) for n in (-1, 1.0, False, None)),
        ({"min_delta": -0.1}, ["min_delta: -0.1 is not a number of at least 0"]),
        (
            {"metric_key": "val/dice"},
            ["mode: the key 'val/dice' does not say whether higher or lower is better; give mode"],
        ),
        (
            {"every_n_epochs": None, "mode": "min", "tolerance": 0, "cooldown": -1, "factor": 2, "min_scale": 2},
            [
                "no interval is set; give exactly one of every_n_epochs, every_n_updates, every_n_samples",
                "mode: 'min' is not one of 'higher', 'lower'",
                "tolerance: 0 is not a whole number of at least 1",
                "cooldown: -1 is not a whole number of at least 0",
                "factor: 2 is not a number between 0 and 1, both excluded",
                "min_scale: 2 is not a number from 0 to 1",
            ],
        ),
    ],
)
def test_invalid_settings_are_refused(given, problems):
    with pytest.raises(SettingsError) as refused:
        reduce(**given)
    assert [str(problem) for problem in refused.value.problems] == problems


@pytest.mark.parametrize("given", [{"min_scale": 0}, {"min_scale": 1}, {"cooldown": 0}, {"factor": 0.999}])
def test_settings_at_the_limits_of_their_ranges(given):
    assert go(reduce(**given), [0.5])[1] == [1.0]


# --- the step uses the scale

BATCH = (torch.tensor([[1.0, 2.0], [3.0, -1.0]]), torch.tensor([[1.0], [0.0]]))


def squares(outputs, batch):
    return {"mse": (outputs - batch[1]).square().mean()}


def make_model():
    torch.manual_seed(0)
    return nn.Linear(2, 1)


def constant_lr(lr):
    optimizer = FunctionalOptimizer(torch.optim.SGD, {"lr": lr, "momentum": 0.9})
    step = Step(model=make_model(), loss=squares, optimizer=optimizer, lr={"default": lambda _: lr})
    state = TrainState.from_module(make_model())
    return step, state.replace(opt_state=optimizer.init(state.params))


def test_the_step_uses_the_scaled_learning_rate():
    step, state = constant_lr(0.1)
    plain, outputs = step(state, [BATCH])
    assert dict(outputs.lr) == {"default": 0.1}
    reduced, _, _ = go(reduce(tolerance=1), [0.5, 0.5], state)
    after, outputs = step(reduced, [BATCH])
    assert dict(outputs.lr) == {"default": 0.05}
    again, initial = constant_lr(0.05)
    seeded = initial.replace(iteration=reduced.iteration)
    assert same(after.params, again(seeded, [BATCH])[0].params)
    assert not same(after.params, plain.params)


class Points(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return torch.tensor([float(index), 1.0]), torch.tensor([float(index % 2)])


def test_in_training_every_later_update_uses_the_scale():
    """No loss improves by min_delta, so each epoch but the first halves the learning rate of later updates."""
    rates = []

    @callback("watch", produces=())
    @on(AfterUpdate)
    def watch(state, event):
        rates.append(event.lr["default"])
        return state, ()

    step, state = constant_lr(0.01)
    run = Run(
        end=TrainingIteration(epoch=4), updates_per_epoch=2, samples_per_epoch=4, effective_batch_size=2,
        data={"val": EvaluationData(Points(), seed=0, batch_size=4)}, forward=forward(make_model(), squares),
    )  # fmt: skip
    data = TrainingData(Points(), seed=0, effective_batch_size=2)
    evaluate = EvaluateCallback(every_n_epochs=1, dataset_key="val", measures=("loss",))
    reducer = compose(watch, evaluate, reduce(tolerance=1, min_delta=1000.0))
    Trainer(run=run, step=step, data=data, reducer=reducer, interpreter=lambda *_: None)(state)
    assert rates == [0.01, 0.01, 0.01, 0.01, 0.005, 0.005, 0.0025, 0.0025]


def test_into_module_writes_the_scale_into_a_live_optimizer():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    state, _, _ = go(reduce(tolerance=1), [0.5, 0.5, 0.5], TrainState.from_module(model, optimizer))
    state.into_module(model, optimizer)
    assert optimizer.param_groups[0]["lr"] == 0.125
