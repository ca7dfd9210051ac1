"""`BestCheckpointCallback(keep=k)` keeps the k best checkpoints."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from noether import AfterEpoch, TrainState, log
from noether.core.callbacks import BestCheckpointCallback
from noether.core.errors import SettingsError

NAN, INFINITY = float("nan"), float("inf")
VALUES = st.lists(st.one_of(st.integers(0, 5).map(float), st.sampled_from([NAN, INFINITY, -INFINITY])), max_size=15)


def best(**settings):
    return BestCheckpointCallback(**{"every_n_epochs": 1, "metric_key": "val/accuracy", **settings})


def follow(values, callback, cut=None):
    """Return the epoch that each pointer names after an epoch for each value."""
    state, pointers = TrainState(), {}
    for epoch, value in enumerate(values, 1):
        if epoch == cut:  # what a checkpoint holds; the callback keeps nothing
            state = TrainState(iteration=state.iteration, callback_states=state.callback_states)
        state, _ = log(state.next_epoch(), AfterEpoch(), {"val/accuracy": value})
        state, effects = callback(state, AfterEpoch())
        for effect in effects:
            pointers |= dict.fromkeys(getattr(effect, "pointers", ()), epoch)
    return pointers


@given(VALUES, st.integers(1, 5), st.sampled_from(["higher", "lower"]), st.integers(0, 15))
def test_the_pointers_name_the_k_best(values, keep, mode, cut):
    pointers = follow(values, best(keep=keep, mode=mode), cut)
    sign = -1 if mode == "higher" else 1
    finite = [epoch for epoch, value in enumerate(values, 1) if abs(value) < INFINITY]
    ranked = sorted(finite, key=lambda epoch: (sign * values[epoch - 1], epoch))
    top = [epoch for name, epoch in pointers.items() if name.startswith("top_")]
    assert sorted(top) == ([] if keep == 1 else sorted(ranked[:keep]))
    assert pointers.get("best_model.val.accuracy") == (ranked[0] if ranked else None)
    assert pointers.keys() - {"best_model.val.accuracy"} == {f"top_{n}.val.accuracy" for n in range(1, len(top) + 1)}


@given(VALUES, st.integers(2, 5))
def test_the_best_one_does_not_depend_on_how_many_are_kept(values, keep):
    one, many = (follow(values, best(keep=each, min_delta=1.0, tolerances=(2,))) for each in (1, keep))
    assert one == {name: epoch for name, epoch in many.items() if not name.startswith("top_")}


def test_a_checkpoint_that_is_among_the_best_is_requested_with_the_weights_that_were_measured():
    callback = best(keep=2, metric_key="val/accuracy/ema=0.5")
    state = TrainState().remember("weights/ema=0.5", {"params": {}, "buffers": {}})
    for value in (0.9, 0.8):
        state, _ = log(state.next_epoch(), AfterEpoch(), {"val/accuracy/ema=0.5": value})
        state, effects = callback(state, AfterEpoch())
    resumable, measured = effects
    assert (resumable.pointers, measured.pointers) == ((), ("top_2.val.accuracy.ema=0.5",))
    assert (measured.tag, measured.weights_of) == ("E2_U0_S0.ema=0.5", "ema=0.5")


def test_keep_below_one_is_refused():
    with pytest.raises(SettingsError, match="keep: 0 is not a whole number of at least 1"):
        best(keep=0)
