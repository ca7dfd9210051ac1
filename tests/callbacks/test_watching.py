"""The callbacks that watch one metric: best value, best checkpoint, early stopping."""

import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from noether.core.callback import declaration_of
from noether.core.callbacks import (
    BestCheckpointCallback,
    BestMetricCallback,
    MetricEarlyStopping,
    ReduceLROnPlateauCallback,
)
from noether.core.callbacks.improvement import improves
from noether.core.declarations import DeclarationError
from noether.core.effect import LogScalars, LogText, SaveCheckpoint, SetSummary
from noether.core.errors import SettingsError
from noether.core.event import AfterEpoch, AfterTraining, AtEval, BeforeTraining
from noether.core.metric_keys import direction_of
from noether.core.metrics import MetricError, log
from noether.core.reducer import compose
from noether.core.state import TrainState

NAN, INF = math.nan, math.inf
VALUES = st.lists(st.sampled_from([0.0, 0.1, 0.2, 0.25, 0.3, 0.5, 1.0, NAN, INF, -INF]), max_size=25)
MODES = st.sampled_from(["higher", "lower"])


def watch(kind, key="val/accuracy", **settings):
    return kind(every_n_epochs=1, metric_key=key, **settings)


def go(callback, values, state=None, key="val/accuracy"):
    """Return the state and the requests of each epoch with one of `values`, until `state.stop`."""
    state, requests = state or TrainState(), []
    for value in values:
        if state.stop is not None:
            break
        state, _ = log(state.advance(samples=1).next_epoch(), AfterEpoch(), {key: value})
        state, effects = callback(state, AfterEpoch())
        requests.append(effects)
    return state, requests


# --- better


@pytest.mark.parametrize(
    ("value", "best", "mode", "expected"),
    [
        (0.5, None, "higher", True),
        (0.5, None, "lower", True),
        (0.5, 0.5, "higher", False),
        (0.5, 0.5, "lower", False),
        (0.6, 0.5, "higher", True),
        (0.4, 0.5, "lower", True),
        (0.4, 0.5, "higher", False),
        (0.6, 0.5, "lower", False),
        (NAN, None, "higher", False),
        (NAN, 0.5, "lower", False),
        (0.5, 0.0, "higher", True),
        (INF, 0.5, "higher", False),
        (INF, None, "higher", False),
        (INF, INF, "higher", False),
        (-INF, None, "higher", False),
        (0.0, -INF, "higher", True),
        (0.0, INF, "higher", True),
        (INF, None, "lower", False),
        (0.0, INF, "lower", True),
        (0.0, -INF, "lower", True),
        (-INF, -INF, "lower", False),
        (-0.0, 0.0, "lower", False),
    ],
)
def test_improves(value, best, mode, expected):
    assert improves(value, best, mode) is expected


@pytest.mark.parametrize(("value", "expected"), [(0.75, False), (0.7500001, True), (0.5, False), (NAN, False)])
def test_an_improvement_is_more_than_min_delta(value, expected):
    assert improves(value, 0.5, "higher", 0.25) is expected
    assert improves(-value, -0.5, "lower", 0.25) is expected


@pytest.mark.parametrize(
    ("key", "direction"),
    [
        *((f"val/{word}", "higher") for word in ("accuracy", "f1", "auc", "iou", "psnr", "r2")),
        *((f"val/{word}", "lower") for word in ("loss", "error", "rmse", "mse", "mae", "perplexity")),
        ("loss/val/total", "lower"),
        ("val/Accuracy", "higher"),
        ("val/top1_accuracy", "higher"),
        ("val/accuracy/ema=0.999", "higher"),
        ("val/dice", None),
        ("val/lossy", None),
        ("val/accuracy_error", None),
        ("", None),
    ],
)
def test_direction_of_a_key(key, direction):
    assert direction_of(key) == direction


def test_mode_wins_over_the_key():
    assert watch(BestMetricCallback, mode="lower").direction == "lower"
    _, requests = go(watch(BestMetricCallback, mode="lower"), [0.5, 0.25])
    assert requests[-1][0].values["val/accuracy/best"] == 0.25


# --- best metric


def test_best_metric_computed_by_hand():
    state, requests = go(watch(BestMetricCallback), [0.5, 0.75, 0.75, 0.25])
    logged = [effects[0] for effects in requests]
    assert logged == [
        LogScalars({"val/accuracy/best": best, "val/accuracy/best_update": update})
        for best, update in [(0.5, 1), (0.75, 2), (0.75, 2), (0.75, 2)]
    ]
    assert requests[-1][1] == SetSummary({"val/accuracy/best": 0.75, "val/accuracy/best_at": "E2_U2_S2"})
    assert state.memory("BestMetricCallback/E1/val/accuracy") == {"best": 0.75, "at": "E2_U2_S2", "targets": {}}
    assert state.metrics["val/accuracy/best"].iteration == state.iteration


@given(VALUES, MODES)
def test_best_is_the_first_extreme_of_the_numbers(values, mode):
    _, requests = go(watch(BestMetricCallback, mode=mode), values)
    for end, effects in enumerate(requests, start=1):
        numbers = [value for value in values[:end] if math.isfinite(value)]
        if not numbers:
            assert not any(isinstance(each, (LogScalars, SetSummary)) for each in effects)
            continue
        best = max(numbers) if mode == "higher" else min(numbers)
        assert effects[0].values == {"val/accuracy/best": best, "val/accuracy/best_update": values.index(best) + 1}


def test_targets_have_their_values_at_the_best():
    callback = watch(BestMetricCallback, target_metric_keys=("a",), optional_target_metric_keys=("b", "never"))
    state, targets = TrainState(), []
    for accuracy, a, b in [(0.5, 1.0, None), (0.75, 2.0, 20.0), (0.25, 3.0, 30.0), (1.0, 4.0, None)]:
        measured = {"val/accuracy": accuracy, "a": a} | ({} if b is None else {"b": b})
        state, _ = log(state.advance(samples=1).next_epoch(), AfterEpoch(), measured)
        state, effects = callback(state, AfterEpoch())
        targets.append({key: value for key, value in effects[0].values.items() if "at_best" in key})
    a, b = "a/at_best/val/accuracy", "b/at_best/val/accuracy"
    assert targets == [{a: 1.0}, {a: 2.0, b: 20.0}, {a: 2.0, b: 20.0}, {a: 4.0}]
    assert set(callback.produces) == {
        "val/accuracy/best",
        "val/accuracy/best_update",
        a,
        b,
        "never/at_best/val/accuracy",
    }
    assert set(callback.consumes) == {"val/accuracy", "nonfinite", "a", "b", "never"}
    assert declaration_of(callback).required == ("val/accuracy", "a")


def test_a_missing_target_is_refused():
    with pytest.raises(MetricError, match="no metric 'a' was measured yet"):
        go(watch(BestMetricCallback, target_metric_keys=("a",)), [0.5])


@pytest.mark.parametrize(
    "callback", [watch(BestMetricCallback), watch(BestCheckpointCallback), watch(MetricEarlyStopping, tolerance=2)]
)
def test_a_value_that_is_not_current_is_refused(callback):
    state, _ = go(callback, [0.5])
    with pytest.raises(MetricError, match="metric 'val/accuracy' is 1 update old: it was measured at E1_U1_S1"):
        callback(state.advance(samples=1).next_epoch(), AfterEpoch())
    with pytest.raises(MetricError, match="no metric 'val/accuracy' was measured yet; measured: none"):
        callback(TrainState().next_epoch(), AfterEpoch())
    assert callback(state, AtEval()) == (state, ())


@pytest.mark.parametrize(
    "callback", [watch(BestMetricCallback), watch(BestCheckpointCallback), watch(MetricEarlyStopping, tolerance=9)]
)
def test_a_tensor_is_remembered_as_a_number(callback):
    state, _ = go(callback, [torch.tensor(0.5)])
    best = state.memory(callback.name)["best"]
    assert (best, type(best)) == (0.5, float)


# --- early stopping


def test_stopping_computed_by_hand():
    callback = watch(MetricEarlyStopping, tolerance=2)
    state, requests = go(callback, [0.5, 0.4, 0.6, 0.6, 0.5, 0.9])
    reason = "val/accuracy has not been higher than 0.6 for 2 of 2 firings"
    assert requests == [(), (), (), (), (LogText(f"stopping: {reason}"),)]
    assert (state.stop, state.iteration.epoch) == (reason, 5)
    assert state.memory(callback.name) == {"best": 0.6, "since": 2}


def index_of_stop(values, tolerance, mode="higher", min_delta=0.0, nan="count"):
    """Return the index of the value at which training stops, or None: a naive implementation of patience."""
    best, waited = None, 0
    for index, value in enumerate(values):
        if math.isnan(value) and nan == "stop":
            return index
        sign = 1 if mode == "higher" else -1
        better = math.isfinite(value) and (best is None or sign * value > sign * best + min_delta)
        best, waited = (value, 0) if better else (best, waited + 1)
        if waited == tolerance:
            return index
    return None


@given(VALUES, st.integers(1, 5), MODES, st.sampled_from([0.0, 0.1, 0.5]), st.sampled_from(["count", "stop"]))
def test_stopping_is_patience(values, tolerance, mode, min_delta, nan):
    callback = watch(MetricEarlyStopping, tolerance=tolerance, mode=mode, min_delta=min_delta, nan=nan)
    state, _ = go(callback, values)
    expected = index_of_stop(values, tolerance, mode, min_delta, nan)
    assert (state.stop is not None) == (expected is not None)
    assert state.iteration.epoch == (len(values) if expected is None else expected + 1)


@pytest.mark.parametrize(
    ("nan", "values", "stop"),
    [
        ("stop", [0.5, NAN], "val/accuracy is NaN"),
        ("stop", [0.5, 0.4], None),
        ("count", [0.5, NAN], None),
        ("count", [0.5, NAN, NAN], "val/accuracy has not been higher than 0.5 for 2 of 2 firings"),
        ("count", [NAN, NAN], "val/accuracy has not been finite for 2 of 2 firings"),
        ("count", [NAN, 0.5], None),
    ],
)
def test_nan(nan, values, stop):
    assert go(watch(MetricEarlyStopping, tolerance=2, nan=nan), values)[0].stop == stop


def test_nan_is_raised_with_nan_raise():
    with pytest.raises(FloatingPointError, match=r"^val/accuracy is NaN at E1_U1_S1; to continue, set nan: count$"):
        go(watch(MetricEarlyStopping, tolerance=2, nan="raise"), [NAN])


def test_the_first_reason_to_stop_stays():
    callback = watch(MetricEarlyStopping, tolerance=1)
    state, _ = go(callback, [0.5])
    state, _ = log(state.advance(samples=1).next_epoch().request_stop("mine"), AfterEpoch(), {"val/accuracy": 0.1})
    assert callback(state, AfterEpoch())[0].stop == "mine"


# --- best checkpoint


def test_best_checkpoint_computed_by_hand():
    callback = watch(BestCheckpointCallback, model_names=("encoder",))
    _, requests = go(callback, [0.5, 0.75, 0.75, NAN, 1.0])
    save = SaveCheckpoint(
        models=("encoder",),
        pointers=("best_model.val.accuracy",),
        retention={"BestCheckpointCallback/E1/val/accuracy": 0},
    )
    assert requests == [(save,), (save,), (), (), (save,)]
    assert callback.produces == ("checkpoints/best_model.val.accuracy",)


@given(VALUES, st.lists(st.integers(1, 6), unique=True, max_size=4), MODES, st.sampled_from([0.0, 0.1, 0.5]))
def test_a_tolerance_keeps_the_checkpoint_of_early_stopping(values, tolerances, mode, min_delta):
    """Each pointer names the best checkpoint of a run with that early stopping."""
    settings = {"mode": mode, "min_delta": min_delta}
    _, requests = go(watch(BestCheckpointCallback, tolerances=tuple(tolerances), **settings), values)
    pointed = {
        pointer: epoch
        for epoch, effects in enumerate(requests, start=1)
        for save in effects
        if isinstance(save, SaveCheckpoint)
        for pointer in save.pointers
    }
    for tolerance in tolerances:
        stopping = watch(MetricEarlyStopping, tolerance=tolerance, **settings)
        state, _ = go(stopping, values)
        _, alone = go(watch(BestCheckpointCallback, **settings), values[: state.iteration.epoch])
        kept = [
            epoch
            for epoch, effects in enumerate(alone, start=1)
            if any(isinstance(each, SaveCheckpoint) for each in effects)
        ]
        assert pointed.get(f"best_model.val.accuracy.tolerance={tolerance}") == (kept[-1] if kept else None)


@given(VALUES, MODES, st.integers(0, 25))
def test_a_resumed_run_watches_as_the_uncut_run(values, mode, cut):
    for kind, settings in [(BestCheckpointCallback, {"tolerances": (1, 3)}), (BestMetricCallback, {}),
                           (MetricEarlyStopping, {"tolerance": 4})]:  # fmt: skip
        state, whole = go(watch(kind, mode=mode, **settings), values)
        half, first = go(watch(kind, mode=mode, **settings), values[:cut])
        end, rest = go(watch(kind, mode=mode, **settings), values[cut:], half)
        assert first + rest == whole
        assert (end.callback_states, end.stop) == (state.callback_states, state.stop)


def test_at_end_fires_unless_the_last_epoch_did():
    callback = watch(BestCheckpointCallback, at_end=True)
    state, _ = go(callback, [0.5])
    assert callback(state, AfterTraining()) == (state, ())
    state, _ = log(state.advance(samples=1), AfterTraining(), {"val/accuracy": 0.75})
    assert callback(state, AfterTraining())[1][0].pointers == ("best_model.val.accuracy",)


@pytest.mark.parametrize("at_end", [False, True])
def test_at_the_end_of_training_there_is_nothing_to_stop(at_end):
    stopping = MetricEarlyStopping(every_n_epochs=5, metric_key="val/accuracy", tolerance=1, at_end=at_end)
    state, _ = log(TrainState().advance(samples=4), AfterTraining(), {"val/accuracy": math.nan})
    state, effects = stopping(state.replace(ended=True), AfterTraining())
    assert (state.stop, effects) == (None, ())  # a longer run can continue


def test_two_callbacks_that_move_one_pointer_are_refused():
    best = {"metric_key": "val/accuracy"}
    pair = compose(BestCheckpointCallback(every_n_epochs=1, **best), BestCheckpointCallback(every_n_epochs=2, **best))
    with pytest.raises(DeclarationError, match=r"both produce 'checkpoints/best_model.val.accuracy'; remove one"):
        pair(TrainState(), BeforeTraining())


# --- values that are not finite


WATCHING = [
    (BestMetricCallback, {}),
    (BestCheckpointCallback, {"tolerances": (1, 3)}),
    (MetricEarlyStopping, {"tolerance": 30}),
    (ReduceLROnPlateauCallback, {"tolerance": 3}),
]


@pytest.mark.parametrize(("kind", "settings"), WATCHING)
@given(values=VALUES, mode=MODES, saved_best=st.sampled_from([None, INF, -INF, NAN]))
def test_the_best_of_all_values_is_the_best_of_the_finite_ones(kind, settings, values, mode, saved_best):
    callback = watch(kind, mode=mode, **settings)
    memory = {**callback.init(TrainState())[callback.name], "best": saved_best, "at": "E1_U1_S1"}
    start = TrainState().remember(callback.name, memory)  # an infinite best of a run that an earlier version saved
    finite = [value for value in values if math.isfinite(value)]
    best = (max if mode == "higher" else min)(finite) if finite else saved_best
    state, requests = go(callback, values, start)
    assert repr(callback.memory(state)["best"]) == repr(best) or callback.memory(state)["best"] == best
    saves = [value for value, effects in zip(values, requests, strict=True)
             if any(isinstance(each, SaveCheckpoint) for each in effects)]  # fmt: skip
    _, finite_requests = go(watch(kind, mode=mode, **settings), finite)
    assert saves == [value for value, effects in zip(finite, finite_requests, strict=True)
                     if any(isinstance(each, SaveCheckpoint) for each in effects)]  # fmt: skip


@pytest.mark.parametrize(("kind", "settings"), WATCHING)
@pytest.mark.parametrize(("value", "mode", "is_reported"), [
    (INF, "higher", True), (-INF, "lower", True), (-INF, "higher", False), (INF, "lower", False), (NAN, "lower", False),
])  # fmt: skip
def test_an_infinite_value_that_would_be_the_best_is_reported(kind, settings, value, mode, is_reported):
    callback = watch(kind, mode=mode, **settings)
    line = LogText(f"{callback.name}: val/accuracy is {value} at E2_U2_S2, which is never the best")
    for values in ([0.5, value], [NAN, value]):
        _, requests = go(callback, values)
        assert [each for each in requests[1] if isinstance(each, LogText)] == [line] * is_reported


# --- missing


PRESENT = st.lists(st.sampled_from([0.0, 0.1, 0.2, 0.5, 1.0, NAN, INF]), max_size=12)
SKIPPING = [
    (BestMetricCallback, {}),
    (BestCheckpointCallback, {"tolerances": (1, 3)}),
    (MetricEarlyStopping, {"tolerance": 2}),
    (ReduceLROnPlateauCallback, {"tolerance": 2, "cooldown": 1}),
]


def run_with_gaps(callback, values):
    """Return the last state and the requests of the firings with a value; a value of None is not logged."""
    state, requests = TrainState(), []
    for value in values:
        state = state.advance(samples=1).next_epoch()
        if value is None:
            after, effects = callback(state, AfterEpoch())
            assert after is state
            assert effects == ()
        else:
            state, _ = log(state, AfterEpoch(), {"val/accuracy": value})
            state, effects = callback(state, AfterEpoch())
            requests.append(effects)
    return state, requests


def without_places(requests):
    """Return requests without the iterations that they name."""

    def strip(effect):
        if isinstance(effect, LogText):
            return re.sub(r" at E\d+_U\d+_S\d+", "", effect.text)
        return {k: v for k, v in effect.values.items() if "_" not in k} if hasattr(effect, "values") else effect

    return [tuple(map(strip, effects)) for effects in requests]


@pytest.mark.parametrize(("kind", "more"), SKIPPING)
@given(values=PRESENT, gaps=st.lists(st.integers(0, 12), max_size=6))
def test_firings_without_a_metric_do_not_count(kind, more, values, gaps):
    spread = list(values)
    for gap in gaps:
        spread.insert(gap, None)
    callback = watch(kind, missing="skip", **more)
    state, requests = run_with_gaps(callback, spread)
    expected, expected_requests = run_with_gaps(watch(kind, **more), values)
    assert repr(without_places(requests)) == repr(without_places(expected_requests))
    assert state.stop == expected.stop
    assert state.hyperparams == expected.hyperparams
    for counter in ("best", "since", "longest", "cooling"):
        memory, expected_memory = callback.memory(state), callback.memory(expected)
        assert repr(memory.get(counter)) == repr(expected_memory.get(counter))


@pytest.mark.parametrize(("kind", "more"), SKIPPING)
def test_a_missing_metric_raises_and_names_the_setting(kind, more):
    state, _ = log(TrainState().advance(samples=1).next_epoch(), AfterEpoch(), {"val/accuracy": 0.5})
    later = state.advance(samples=1).next_epoch()
    for firing in (TrainState().advance(samples=1).next_epoch(), later):
        with pytest.raises(MetricError) as raised:
            watch(kind, **more)(firing, AfterEpoch())
        name = f"{kind.__name__}/E1/val/accuracy"
        assert str(raised.value).endswith(f"; to leave out such firings of {name}, set missing: skip")
        assert watch(kind, missing="skip", **more)(firing, AfterEpoch()) == (firing, ())
    with pytest.raises(SettingsError, match="missing: 'ignore' is not one of 'skip', 'raise'"):
        watch(kind, missing="ignore", **more)


def test_a_target_that_is_missing_at_the_best_is_left_out_there():
    best = watch(BestMetricCallback, target_metric_keys=("a", "b"), missing="skip")
    state, _ = log(TrainState().advance(samples=1).next_epoch(), AfterEpoch(), {"val/accuracy": 0.5, "a": 1.0})
    _, (logged, _) = best(state, AfterEpoch())
    assert set(logged.values) == {"val/accuracy/best", "val/accuracy/best_update", "a/at_best/val/accuracy"}
    strict = watch(BestMetricCallback, target_metric_keys=("a", "b"))
    with pytest.raises(MetricError, match=r"no metric 'b' was measured yet; .* set missing: skip"):
        strict(state, AfterEpoch())
