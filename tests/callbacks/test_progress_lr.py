"""Progress and learning rate: what is said, worked out by hand."""

import pytest

from noether.core.callbacks import LrCallback, ProgressCallback
from noether.core.callbacks.lr import LR
from noether.core.callbacks.progress import Progress
from noether.core.effect import LogScalars, LogText
from noether.core.event import AfterEpoch, AfterTraining, AfterUpdate, AtEval, BeforeTraining
from noether.core.iteration import TrainingIteration
from noether.core.reducer import compose
from noether.core.run import Run
from noether.core.state import TrainState

RUN = Run(end=TrainingIteration(epoch=2), updates_per_epoch=4, samples_per_epoch=15, effective_batch_size=4)


def go(callback, seconds, *, run=RUN, state=None, **readings):
    """Return the state after updates of so many seconds, and all that was asked; epochs are ended where they end."""
    state, asked = state or TrainState(), []
    for duration_s in seconds:
        after = run.iteration_after(state.iteration.update + 1)
        state = state.advance(samples=after.sample - state.iteration.sample)
        event = AfterUpdate(run=run, samples=1, duration_s=duration_s, time_s=0.0, **readings)
        state, effects = callback(state, event)
        asked += effects
        if after.epoch > state.iteration.epoch:
            state, effects = callback(state.next_epoch(), AfterEpoch(run=run, time_s=0.0))
            asked += effects
    return state, asked


def test_progress_by_hand():
    _, asked = go(ProgressCallback(every_n_updates=2), [10.0, 2.0, 0.5, 1.5, 1.0, 3.0])
    assert [effect.text for effect in asked] == [
        # the first interval is slower than those to come: it is left out of the estimate
        " 25.0 %  epoch 0/2  update 2/8  sample 8/30  6000.0 ms/update  last 0:00:12  total 0:00:12  left unknown",
        # 2 s in 2 updates, 4 updates to go
        (
            " 50.0 %  epoch 0/2  update 4/8  sample 15/30  1000.0 ms/update  last 0:00:02  total 0:00:14  "
            "left 0:00:04  ends 1970-01-01 00:00:04 UTC"
        ),
        # 6 s in 4 updates, 2 updates to go
        (
            " 75.0 %  epoch 1/2  update 6/8  sample 23/30  2000.0 ms/update  last 0:00:04  total 0:00:18  "
            "left 0:00:03  ends 1970-01-01 00:00:03 UTC"
        ),
    ]


def test_progress_at_epochs_and_at_the_end_of_training():
    callback = ProgressCallback(every_n_epochs=2, at_end=True)
    state, asked = go(callback, [3600.0] * 5)
    assert asked == []
    state, asked = callback(state, AfterTraining(run=RUN))
    assert asked == (
        LogText(
            " 62.5 %  epoch 1/2  update 5/8  sample 19/30  3600000.0 ms/update  "
            "last 5:00:00  total 5:00:00  left unknown"
        ),
    )


def test_progress_after_an_epoch_whose_updates_were_told():
    callback = ProgressCallback(every_n_updates=4)
    state, _ = go(callback, [1.0] * 4)
    again = ProgressCallback(every_n_epochs=1, id=callback.name)
    _, asked = again(state, AfterEpoch(run=RUN))
    assert "  no update  last 0:00:00  total 0:00:04  left unknown" in asked[0].text


@pytest.mark.parametrize(
    ("end", "share"),
    [
        (TrainingIteration(epoch=2), " 25.0 %"),
        (TrainingIteration(update=5), " 40.0 %"),
        (TrainingIteration(sample=9), " 88.9 %"),
        (TrainingIteration(sample=8), "100.0 %"),
        (TrainingIteration(sample=5), "100.0 %"),
        (TrainingIteration(update=2), "100.0 %"),
    ],
)
def test_the_share_done_is_of_the_counter_that_ends_the_run(end, share):
    _, asked = go(ProgressCallback(every_n_updates=2), [1.0, 1.0], run=RUN.replace(end=end))
    assert asked[0].text.startswith(f"{share}  epoch 0/")


def test_progress_ends_when_the_clock_says():
    state, _ = go(ProgressCallback(every_n_updates=1), [1.0])
    state = state.advance(samples=4)
    _, asked = ProgressCallback(every_n_updates=1)(state, AfterUpdate(run=RUN, duration_s=100.0, time_s=86_400.0))
    assert asked[0].text.endswith("left 0:10:00  ends 1970-01-02 00:10:00 UTC")


def test_a_resumed_progress_goes_on_with_the_time_that_it_had():
    uncut, cut = ProgressCallback(every_n_updates=2), ProgressCallback(every_n_updates=2)
    seconds = [5.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    expected_state, expected = go(uncut, seconds)
    state, first = go(cut, seconds[:3])
    state, nothing = compose(cut)(state, BeforeTraining(run=RUN, resumed=True))
    assert nothing == ()
    state, rest = go(ProgressCallback(every_n_updates=2), seconds[3:], state=state)
    assert first + rest == expected
    assert state.memory("ProgressCallback/U2") == expected_state.memory("ProgressCallback/U2")


def test_the_names_of_the_class_based_framework():
    assert (Progress, LR) == (ProgressCallback, LrCallback)


# ------------------------------------------------------------------------------------------------ learning rate


def lr(callback, updates, **readings):
    readings = {"lr": {"default": 0.1}, "weight_decay": {"default": 0.01}, **readings}
    return [effect.values for effect in go(callback, [0.0] * updates, **readings)[1]]


def test_lr_at_its_interval_and_at_the_first_update():
    state, asked = go(LrCallback(every_n_updates=3), [0.0] * 7, lr={"default": 0.1}, weight_decay={"default": 0.0})
    assert asked == [LogScalars({"optim/lr": 0.1, "optim/wd": 0.0})] * 3
    assert state.metrics["optim/lr"].iteration.update == 6
    assert dict(state.callback_states) == {}  # the event carries all it needs


def test_lr_of_several_groups_has_a_key_for_each():
    readings = {"lr": {"decay": 0.1, "no_decay": 0.2}, "weight_decay": {"decay": 0.01, "no_decay": 0.0}}
    assert lr(LrCallback(every_n_updates=1), 1, **readings) == [
        {"optim/lr/decay": 0.1, "optim/lr/no_decay": 0.2, "optim/wd/decay": 0.01, "optim/wd/no_decay": 0.0}
    ]


def test_lr_at_epochs_is_that_of_the_last_update():
    callback, state, told = LrCallback(every_n_epochs=1), TrainState(), []
    for update in range(1, 9):
        state, asked = go(callback, [0.0], state=state, lr={"default": update / 10})
        told += [(update, effect.values["optim/lr"]) for effect in asked]
    assert told == [(1, 0.1), (4, 0.4), (8, 0.8)]


def test_lr_at_the_end_is_that_of_the_last_update():
    callback = LrCallback(every_n_updates=3, at_end=True)
    state, _ = go(callback, [0.0] * 4, lr={"default": 0.3})
    assert callback(state, AfterTraining(run=RUN))[1] == (LogScalars({"optim/lr": 0.3}),)
    state, _ = go(callback, [0.0] * 3, lr={"default": 0.3})
    assert callback(state, AfterTraining(run=RUN)) == (state, ())


def test_lr_says_nothing_where_no_update_has_been():
    state = TrainState()
    assert LrCallback(every_n_epochs=1, at_end=True)(state, AfterTraining()) == (state, ())
    assert LrCallback(every_n_updates=1)(state, AtEval()) == (state, ())
