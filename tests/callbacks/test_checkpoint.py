"""`CheckpointCallback`: its requests, and its forecast before training."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from noether.core.callbacks import CheckpointCallback
from noether.core.effect import LogText, SaveCheckpoint
from noether.core.event import AfterEpoch, AfterTraining, AfterUpdate, BeforeTraining
from noether.core.iteration import TrainingIteration
from noether.core.reducer import compose
from noether.core.run import Run
from noether.core.state import TrainState
from noether.testing.strategies import run_lengths

RUN = Run(end=TrainingIteration(epoch=3), updates_per_epoch=2, samples_per_epoch=8, effective_batch_size=4)
STATE = TrainState().advance(samples=4).next_epoch()


def requests(**settings):
    return CheckpointCallback(every_n_epochs=1, id="c", **settings)(STATE, AfterEpoch(run=RUN))[1]


def save(*, weights, optimizer, keep, pointers=("latest",), **part):
    return (SaveCheckpoint(weights=weights, optimizer=optimizer, pointers=pointers, retention={"c": keep}, **part),)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"save_optim": True}, save(weights=True, optimizer=True, keep=None)),
        (
            {"save_weights": False, "save_latest_weights": False, "save_optim": True},
            save(weights=False, optimizer=True, keep=None),
        ),
        ({"save_optim": True, "keep": 2}, save(weights=True, optimizer=True, keep=2)),
        ({"save_weights": False}, save(weights=True, optimizer=True, keep=0)),
        ({"save_weights": False, "save_latest_optim": False}, save(weights=True, optimizer=False, keep=0)),
        ({"save_latest_optim": False}, save(weights=True, optimizer=False, keep=None)),
        (
            {"save_latest_optim": False, "model_names": ("a",)},
            save(weights=True, optimizer=False, keep=None, models=("a",), tag="E1_U1_S4.a", pointers=("latest.a",)),
        ),
        (
            {"save_latest_optim": False, "model_names": ("a.b", "c")},
            save(
                weights=True,
                optimizer=False,
                keep=None,
                models=("a.b", "c"),
                tag="E1_U1_S4.a.b-c",
                pointers=("latest.a.b-c",),
            ),
        ),
        ({"save_optim": True, "model_names": ("a",)}, save(weights=True, optimizer=True, keep=None)),
    ],
)
def test_requests_for_each_combination_of_settings(settings, expected):
    assert requests(**settings) == expected


def test_after_training_a_checkpoint_is_always_requested():
    callback = CheckpointCallback(every_n_epochs=1, id="c", save_latest_optim=False)
    expected = save(weights=True, optimizer=False, keep=None, pointers=("latest", "last"))
    for state in (STATE, STATE.advance(samples=4)):
        assert callback(state, AfterTraining(run=RUN)) == (state, expected)


def test_between_firings_nothing_is_requested():
    callback = CheckpointCallback(every_n_updates=2, save_weights=True)
    state = TrainState().advance(samples=4)
    assert callback(state, AfterUpdate(run=RUN)) == (state, ())
    assert callback.produces == ()
    assert compose(callback)(TrainState(), BeforeTraining())[0].callback_states == {}


@pytest.mark.parametrize(
    ("settings", "state", "text"),
    [
        (
            {"save_latest_optim": False},
            TrainState(),
            "c will save 3 checkpoints of weights (2 MB each), and keep all of them.",
        ),
        (
            {"keep": 3},
            TrainState().advance(samples=4),
            (
                "c will save 3 checkpoints of weights (2 MB each), and keep all of them. "
                "It will save 3 checkpoints of weights and optimizer (6 MB each), and keep only the newest."
            ),
        ),
        (
            {"save_weights": True, "save_optim": True, "keep": 2},
            TrainState(),
            (
                "c will save 3 checkpoints of weights and optimizer (6 MB each plus the optimizer's memory), "
                "and keep the newest 2."
            ),
        ),
        (
            {"save_weights": True, "save_optim": True, "keep": 9},
            TrainState().advance(samples=4),
            "c will save 3 checkpoints of weights and optimizer (6 MB each), and keep all of them.",
        ),
        (
            {"save_weights": False, "save_latest_optim": False},
            TrainState(iteration=TrainingIteration(2, 4, 16)),
            "c will save 1 checkpoint of weights (2 MB), and keep it.",
        ),
        (
            {"save_latest_optim": False, "model_names": ("w",)},
            TrainState(),
            "c will save 3 checkpoints of weights of w (1 MB each), and keep all of them.",
        ),
    ],
)
def test_the_forecast_before_training(settings, state, text):
    weights = torch.zeros(500_000)
    state = state.replace(params={"w": weights[:250_000]}, buffers={"b": weights[250_000:]},
                          opt_state={"state": {"w": {"m": torch.zeros(500_000, dtype=torch.float64)}}})  # fmt: skip
    callback = CheckpointCallback(every_n_epochs=1, id="c", **settings)
    assert callback(state, BeforeTraining(run=RUN)) == (state, (LogText(text),))
    assert callback(state, BeforeTraining(run=RUN, resumed=True)) == (state, (LogText(text),))


def test_one_small_checkpoint_is_forecast_in_the_singular_and_in_bytes():
    callback = CheckpointCallback(every_n_epochs=9, id="c", save_latest_optim=False)
    state = TrainState(params={"w": torch.zeros(300)})
    assert callback(state, BeforeTraining(run=RUN))[1] == (
        LogText("c will save 1 checkpoint of weights (1.2 kB), and keep it."),
    )


def test_a_run_without_an_end_has_no_forecast():
    state = TrainState()
    assert CheckpointCallback(every_n_epochs=1, save_weights=True)(state, BeforeTraining()) == (state, ())


@given(
    run_lengths(max_epochs=4),
    st.sampled_from(["every_n_epochs", "every_n_updates", "every_n_samples"]),
    st.integers(1, 20),
)
def test_the_forecast_number_is_that_of_the_iterations_with_requests(run, interval, n):
    callback = CheckpointCallback(**{interval: n}, id="c", save_optim=True)
    (forecast,) = callback(TrainState(), BeforeTraining(run=run))[1]
    state, saved = TrainState(), set()

    def dispatch(state, event):
        if callback(state, event)[1]:
            saved.add(state.iteration)

    for update in range(1, run.final.update + 1):
        after = run.iteration_after(update)
        state = state.advance(samples=after.sample - state.iteration.sample)
        dispatch(state, AfterUpdate(run=run))
        if after.epoch > state.iteration.epoch:
            state = state.next_epoch()
            dispatch(state, AfterEpoch(run=run))
    dispatch(state, AfterTraining(run=run))
    noun = "checkpoint" if len(saved) == 1 else "checkpoints"
    assert forecast.text.startswith(f"c will save {len(saved)} {noun} of ")


def test_by_default_the_newest_is_resumable_and_older_ones_keep_weights():
    lasting, newest = requests(model_names=("a",))
    assert (lasting.weights, lasting.optimizer, lasting.models, lasting.pointers) == (True, False, ("a",), ())
    assert (newest.weights, newest.optimizer, newest.models, newest.pointers) == (True, True, (), ("latest",))


def test_a_newest_checkpoint_with_more_parts_is_a_second_checkpoint():
    lasting, newest = requests(save_weights=True, save_latest_optim=True, keep=3)
    assert (lasting.weights, lasting.optimizer, lasting.pointers, lasting.retention) == (True, False, (), {"c": 3})
    assert (newest.weights, newest.optimizer, newest.pointers) == (True, True, ("latest",))
    assert newest.retention == {"c/latest": 0}
    assert newest.tag.endswith(".latest")
