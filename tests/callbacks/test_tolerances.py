"""Tolerances keep the checkpoints of early stopping; NaN and infinity in callbacks that watch a metric."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from noether.core.callbacks import (
    BestCheckpointCallback,
    BestMetricCallback,
    MetricEarlyStopping,
    ReduceLROnPlateauCallback,
)
from noether.core.combinators import callback, on
from noether.core.effect import LogScalars, LogText, SaveCheckpoint
from noether.core.event import AfterEpoch, AfterTraining, AfterUpdate, BeforeTraining
from noether.core.iteration import TrainingIteration
from noether.core.loop import Move, dispatch, next_move
from noether.core.metrics import log
from noether.core.reducer import compose
from noether.core.run import Run
from noether.core.state import TrainState
from noether.effects import CheckpointStore
from noether.effects.interpreter import Interpreter

NAN, INF = math.nan, math.inf
KEY, BEST = "val/accuracy", "best_model.val.accuracy"


def log_values(values):
    """Return a callback that logs the next of `values` after each epoch."""
    return callback("measure", produces=(KEY,))(
        on(AfterEpoch)(lambda state, event: log(state, event, {KEY: values[state.iteration.epoch - 1]}))
    )


def train(values, interpreter, *members):
    """Return the state after a run with an epoch of one update for each value, which ends at `state.stop`."""
    run = Run(end=TrainingIteration(epoch=len(values)), updates_per_epoch=1)
    reducer = compose(log_values(values), *members)
    state = dispatch(TrainState(params={"w": torch.zeros(1)}), BeforeTraining(run=run), reducer, interpreter)
    while (move := next_move(state, run)) is not Move.NOTHING:
        if move is Move.UPDATE:
            params = {"w": state.params["w"] + 1}
            state, event = state.replace(params=params).advance(samples=1), AfterUpdate(run=run, samples=1)
        elif move is Move.END_EPOCH:
            state, event = state.next_epoch(), AfterEpoch(run=run)
        else:
            state, event = state.replace(ended=True), AfterTraining(run=run)
        state = dispatch(state, event, reducer, interpreter)
    return state


def watch(kind, **settings):
    return kind(every_n_epochs=1, metric_key=KEY, **settings)


def best_of_a_run(values, *members, **settings):
    """Return the update of the best checkpoint at the end of a run with `members`, or None."""
    pointers = {}

    def interpreter(effects, state, event):
        saves = [effect for effect in effects if isinstance(effect, SaveCheckpoint)]
        pointers.update({pointer: str(state.iteration) for save in saves for pointer in save.pointers})

    train(values, interpreter, *members, watch(BestCheckpointCallback, **settings))
    return pointers.get(BEST)


def saving_interpreter(store):
    """Return an interpreter that saves to disk and writes no logs."""
    ignored = [lambda *_: None]
    return Interpreter({SaveCheckpoint: [store.save], LogScalars: ignored, LogText: ignored})


ANY = st.lists(st.sampled_from([0.0, 0.1, 0.2, 0.3, 0.5, 1.0, NAN, INF, -INF]), min_size=1, max_size=14)


def values_with_waits(waits):
    """Return values with an improvement after each number of waits."""
    return [value for best, wait in enumerate(waits) for value in (float(best), *[NAN] * wait)]


CLIMBING = st.lists(st.integers(0, 5), min_size=1, max_size=5).map(values_with_waits)
FALLING = CLIMBING.map(lambda values: [-value for value in values])
VALUES = st.one_of(ANY, CLIMBING, FALLING)
MODES = st.sampled_from(["higher", "lower"])


@settings(max_examples=60)
@given(VALUES, st.lists(st.integers(1, 5), unique=True, max_size=4), MODES, st.sampled_from([0.0, 0.1, 0.5]))
def test_a_tolerance_keeps_the_checkpoint_of_early_stopping(tmp_path_factory, values, tolerances, mode, min_delta):
    improving = {"mode": mode, "min_delta": min_delta}
    store = CheckpointStore(tmp_path_factory.mktemp("run"), "run")
    train(values, saving_interpreter(store), watch(BestCheckpointCallback, tolerances=tuple(tolerances), **improving))
    expected = {BEST: best_of_a_run(values, **improving)}
    for tolerance in tolerances:
        stopping = watch(MetricEarlyStopping, tolerance=tolerance, **improving)
        expected[f"{BEST}.tolerance={tolerance}"] = best_of_a_run(values, stopping, **improving)
    pointers = {name: tag for name, tag in expected.items() if tag is not None}
    assert store.pointers() == pointers
    # Only these checkpoints are on disk, each with the weights of its time.
    assert {manifest.tag for manifest in store.manifests()} == set(pointers.values())
    for manifest in store.manifests():
        assert store.load(manifest).params["w"].item() == manifest.iteration.epoch


def test_tolerances_computed_by_hand(tmp_path):
    store = CheckpointStore(tmp_path, "run")
    values = [0.5, NAN, 0.6, 0.6, 0.4, 0.7, -INF, 0.7, 0.1, 0.8]
    train(values, saving_interpreter(store), watch(BestCheckpointCallback, tolerances=(1, 2, 3, 4)))
    assert store.pointers() == {
        BEST: "E10_U10_S10",
        f"{BEST}.tolerance=1": "E1_U1_S1",
        f"{BEST}.tolerance=2": "E3_U3_S3",
        f"{BEST}.tolerance=3": "E6_U6_S6",
        f"{BEST}.tolerance=4": "E10_U10_S10",
    }
    assert [manifest.tag for manifest in store.manifests()] == ["E1_U1_S1", "E3_U3_S3", "E6_U6_S6", "E10_U10_S10"]


def test_a_tolerance_that_was_exceeded_stays_exceeded(tmp_path):
    store = CheckpointStore(tmp_path, "run")
    values = [0.1, 0.0, 0.0, 0.0, 0.2, 0.0, 0.3, 0.4]
    train(values, saving_interpreter(store), watch(BestCheckpointCallback, tolerances=(2, 3, 4)))
    assert store.pointers() == {
        BEST: "E8_U8_S8",
        f"{BEST}.tolerance=2": "E1_U1_S1",
        f"{BEST}.tolerance=3": "E1_U1_S1",
        f"{BEST}.tolerance=4": "E8_U8_S8",
    }
    assert [manifest.tag for manifest in store.manifests()] == ["E1_U1_S1", "E8_U8_S8"]


# --- NaN and infinity

# In order: the best after each value; the epochs at which a checkpoint is saved; with a tolerance of 2 the epoch at
# which it stops, counting NaN and infinity; the epoch of the first NaN; and, with a factor of a half, the scale after
# each value.
TABLE = [
    ("higher", [0.5, 0.5, 0.5], [0.5, 0.5, 0.5], [1], 3, None, [1, 1, 0.5]),
    ("lower", [0.5, 0.5, 0.5], [0.5, 0.5, 0.5], [1], 3, None, [1, 1, 0.5]),
    ("higher", [0.5, 0.4, 0.6, 0.6], [0.5, 0.5, 0.6, 0.6], [1, 3], None, None, [1, 1, 1, 1]),
    ("higher", [0.0, -0.0, 0.0], [0.0, 0.0, 0.0], [1], 3, None, [1, 1, 0.5]),
    ("lower", [0.0, -0.0, 0.0], [0.0, 0.0, 0.0], [1], 3, None, [1, 1, 0.5]),
    ("higher", [NAN, NAN, 0.5], [None, None, 0.5], [3], 2, 1, [1, 0.5, 0.5]),
    ("lower", [NAN, NAN, 0.5], [None, None, 0.5], [3], 2, 1, [1, 0.5, 0.5]),
    ("higher", [NAN, 0.5, NAN, 0.6], [None, 0.5, 0.5, 0.6], [2, 4], None, 1, [1, 1, 1, 1]),
    ("higher", [0.5, NAN, 0.5, 0.6], [0.5, 0.5, 0.5, 0.6], [1, 4], 3, 2, [1, 1, 0.5, 0.5]),
    ("lower", [0.5, NAN, 0.4, NAN, NAN], [0.5, 0.5, 0.4, 0.4, 0.4], [1, 3], 5, 2, [1, 1, 1, 1, 0.5]),
    ("higher", [INF, 0.5, INF, INF], [None, 0.5, 0.5, 0.5], [2], 4, None, [1, 1, 1, 0.5]),
    ("lower", [-INF, 0.5, -INF, -INF], [None, 0.5, 0.5, 0.5], [2], 4, None, [1, 1, 1, 0.5]),
    ("higher", [-INF, -INF, 0.5], [None, None, 0.5], [3], 2, None, [1, 0.5, 0.5]),
    ("lower", [INF, INF, 0.5], [None, None, 0.5], [3], 2, None, [1, 0.5, 0.5]),
    ("higher", [0.5, -INF, INF, 0.9], [0.5, 0.5, 0.5, 0.9], [1, 4], 3, None, [1, 1, 0.5, 0.5]),
    ("lower", [0.5, INF, NAN, -INF], [0.5, 0.5, 0.5, 0.5], [1], 3, 3, [1, 1, 0.5, 0.5]),
    ("lower", [NAN, INF, NAN, 0.5], [None, None, None, 0.5], [4], 2, 1, [1, 0.5, 0.5, 0.5]),
]
CASES = pytest.mark.parametrize(("mode", "values", "bests", "saved", "stop", "nan", "scales"), TABLE)


def each_epoch(values, member):
    """Return the state and the requests of `member` after each epoch, until it stops."""
    states, requests = [], []

    def look(state, event):
        if not isinstance(event, AfterEpoch):
            return state, ()
        after, effects = member(state, event)
        states.append(after)
        requests.append(effects)
        return after, effects

    train(values, lambda *_: None, look)
    return states, requests


@CASES
def test_nan_and_infinity_in_a_best_metric(mode, values, bests, saved, stop, nan, scales):
    _, requests = each_epoch(values, watch(BestMetricCallback, mode=mode))
    logged = [{key: v for each in effects if isinstance(each, LogScalars) for key, v in each.values.items()}
              for effects in requests]  # fmt: skip
    assert [values.get(f"{KEY}/best") for values in logged] == bests
    reached = [values.get(f"{KEY}/best_update") for values in logged]
    assert list(dict.fromkeys(update for update in reached if update is not None)) == saved


@CASES
def test_nan_and_infinity_in_a_best_checkpoint(mode, values, bests, saved, stop, nan, scales):
    _, requests = each_epoch(values, watch(BestCheckpointCallback, mode=mode))
    saves = [any(isinstance(each, SaveCheckpoint) for each in effects) for effects in requests]
    assert [epoch for epoch, is_saved in enumerate(saves, start=1) if is_saved] == saved


@CASES
def test_nan_and_infinity_in_early_stopping(mode, values, bests, saved, stop, nan, scales):
    states, _ = each_epoch(values, watch(MetricEarlyStopping, mode=mode, tolerance=2))
    assert (len(states), states[-1].stop is None) == (stop or len(values), stop is None)
    states, _ = each_epoch(values, watch(MetricEarlyStopping, mode=mode, tolerance=2, nan="stop"))
    first = min(filter(None, (stop, nan)), default=None)
    assert len(states) == (first or len(values))
    assert (states[-1].stop == "val/accuracy is NaN") == (nan is not None and nan == first)
    raising = watch(MetricEarlyStopping, mode=mode, tolerance=2, nan="raise")
    if nan is not None and nan == first:
        with pytest.raises(FloatingPointError, match=rf"^val/accuracy is NaN at E{nan}_U{nan}_S{nan}; to continue"):
            each_epoch(values, raising)
    else:
        assert len(each_epoch(values, raising)[0]) == (stop or len(values))


@CASES
def test_nan_and_infinity_in_a_plateau(mode, values, bests, saved, stop, nan, scales):
    states, _ = each_epoch(values, watch(ReduceLROnPlateauCallback, mode=mode, tolerance=2, factor=0.5))
    assert [state.hyperparams["lr_scale"] for state in states] == scales
