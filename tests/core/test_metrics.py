"""Metrics: recorded and logged in one go, and read only where they are current."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from noether.core.effect import LogScalars
from noether.core.event import AfterEpoch, AfterUpdate, AtEval, BeforeTraining
from noether.core.iteration import TrainingIteration
from noether.core.metrics import MetricError, current, is_current, log
from noether.core.state import Measured, TrainState
from noether.testing import same

SECOND = TrainState().advance(samples=4).advance(samples=4)


@pytest.mark.parametrize("event", [AfterUpdate(), AfterEpoch(), AtEval(), BeforeTraining()])
def test_log_records_the_metrics_and_returns_the_effect(event):
    state, effects = log(SECOND, event, {"a": 1.5, "b": 2})
    assert effects == (LogScalars({"a": 1.5, "b": 2}),)
    assert dict(state.metrics) == {"a": Measured(1.5, SECOND.iteration), "b": Measured(2, SECOND.iteration)}
    assert dict(SECOND.metrics) == {}


def test_log_keeps_other_metrics():
    state, _ = log(SECOND, AfterUpdate(), {"a": 1.0, "b": 2.0})
    later = state.advance(samples=4)
    state, _ = log(later, AfterUpdate(), {"b": 3.0})
    assert state.metrics["a"] == Measured(1.0, SECOND.iteration)
    assert state.metrics["b"] == Measured(3.0, later.iteration)


def test_a_resumed_run_logs_without_recording():
    state, effects = log(SECOND, BeforeTraining(resumed=True), {"a": 1.0})
    assert state is SECOND
    assert effects == (LogScalars({"a": 1.0}),)


@pytest.mark.parametrize("value", [torch.zeros(1), torch.zeros(2, 3), np.zeros(3)])
def test_only_single_numbers_are_logged(value):
    with pytest.raises(ValueError, match=r"^metric 'a' has shape .*; log a number or a 0-dimensional tensor$"):
        log(SECOND, AfterUpdate(), {"a": value})


def test_a_tensor_is_logged_unchanged():
    value = torch.tensor(2.0)
    state, effects = log(SECOND, AfterUpdate(), {"a": value})
    assert effects[0].values["a"] is value
    assert state.metrics["a"].value is value
    assert current(state, "a") == 2.0
    assert type(current(state, "a")) is float


def test_a_metric_is_current_at_its_update_before_and_after_the_epoch():
    state, _ = log(SECOND, AfterUpdate(), {"a": 1.0})
    assert is_current(state, "a")
    assert current(state.next_epoch(), "a") == 1.0
    assert not is_current(state.advance(samples=4), "a")
    assert not is_current(state, "b")


@given(st.integers(0, 50), st.integers(0, 50))
def test_current_reads_exactly_what_was_measured_at_this_update(measured, now):
    metrics = {"a": Measured(0.5, TrainingIteration(update=measured))}
    state = TrainState(iteration=TrainingIteration(update=now), metrics=metrics)
    if measured == now:
        assert current(state, "a") == 0.5
    else:
        with pytest.raises(MetricError, match=rf"is {now - measured} updates? old"):
            current(state, "a")


def test_an_unknown_metric_is_refused_with_those_that_exist():
    state, _ = log(SECOND, AfterUpdate(), {"val/accuracy": 1.0, "loss": 1.0})
    with pytest.raises(MetricError) as refused:
        current(state, "val/acuracy")
    assert str(refused.value) == (
        "no metric 'val/acuracy' was measured yet; measured: 'val/accuracy', 'loss'; did you mean 'val/accuracy'?"
    )
    with pytest.raises(MetricError, match=r"^no metric 'x' was measured yet; measured: none$"):
        current(SECOND, "x")


def test_an_old_metric_is_refused_with_its_age():
    state, _ = log(SECOND, AfterUpdate(), {"a": 1.0})
    state = state.advance(samples=4).advance(samples=4).next_epoch()
    with pytest.raises(MetricError) as refused:
        current(state, "a")
    tail = "current metrics: none. Give its producer the same interval, and list it first"
    assert str(refused.value) == (
        f"metric 'a' is 2 updates old: it was measured at E0_U2_S8, and the state is at E1_U4_S16; {tail}"
    )
    state, _ = log(state, AfterEpoch(), {"b": 1.0, "c": 1.0})
    with pytest.raises(MetricError, match=r"current metrics: 'b', 'c'. Give its producer"):
        current(state, "a")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -0.0])
def test_odd_numbers_are_metrics_too(value):
    state, _ = log(SECOND, AfterUpdate(), {"a": torch.tensor(value)})
    assert same(current(state, "a"), value)


@pytest.mark.parametrize("value", ["abc", None])
def test_a_value_that_is_not_a_number_is_refused_by_key(value):
    with pytest.raises(TypeError, match=f"metric 'k' is {value!r}; log a number"):
        log(TrainState(), AfterUpdate(samples=1), {"k": value})
