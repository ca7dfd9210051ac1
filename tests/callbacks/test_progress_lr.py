"""`ProgressCallback` and `LrCallback`: lines and values computed by hand."""

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
    """Return the state after updates of these durations, and all requests; an epoch ends after its last update."""
    state, requests = state or TrainState(), []
    for duration_s in seconds:
        after = run.iteration_after(state.iteration.update + 1)
        state = state.advance(samples=after.sample - state.iteration.sample)
        event = AfterUpdate(run=run, samples=1, duration_s=duration_s, time_s=0.0, **readings)
        state, effects = callback(state, event)
        requests += effects
        if after.epoch > state.iteration.epoch:
            state, effects = callback(state.next_epoch(), AfterEpoch(run=run, time_s=0.0))
            requests += effects
    return state, requests


def test_progress_computed_by_hand():
    _, requests = go(ProgressCallback(every_n_updates=2), [10.0, 2.0, 0.5, 1.5, 1.0, 3.0])
    assert [effect.text for effect in requests] == [
        # the estimate leaves out the first interval, which is slower
        " 25.0 %  epoch 0/2  update 2/8  sample 8/30  6000.0 ms/update  last 0:00:12  total 0:00:12  left unknown",
        # 2 s in 2 updates, 4 updates left
        (
            " 50.0 %  epoch 0/2  update 4/8  sample 15/30  1000.0 ms/update  last 0:00:02  total 0:00:14  "
            "left 0:00:04  ends 1970-01-01 00:00:04 UTC"
        ),
        # 6 s in 4 updates, 2 updates left
        (
            " 75.0 %  epoch 1/2  update 6/8  sample 23/30  2000.0 ms/update  last 0:00:04  total 0:00:18  "
            "left 0:00:03  ends 1970-01-01 00:00:03 UTC"
        ),
    ]


def test_progress_at_epochs_and_at_the_end_of_training():
    callback = ProgressCallback(every_n_epochs=2, at_end=True)
    state, requests = go(callback, [3600.0] * 5)
    assert requests == []
    state, requests = callback(state, AfterTraining(run=RUN))
    assert requests == (
        LogText(
            " 62.5 %  epoch 1/2  update 5/8  sample 19/30  3600000.0 ms/update  "
            "last 5:00:00  total 5:00:00  left unknown",
            is_progress=True,
        ),
    )


def test_progress_at_an_epoch_whose_updates_had_a_line_already():
    callback = ProgressCallback(every_n_updates=4)
    state, _ = go(callback, [1.0] * 4)
    again = ProgressCallback(every_n_epochs=1, id=callback.name)
    _, requests = again(state, AfterEpoch(run=RUN))
    assert "  no update  last 0:00:00  total 0:00:04  left unknown" in requests[0].text


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
def test_the_percentage_follows_the_counter_that_ends_the_run(end, share):
    _, requests = go(ProgressCallback(every_n_updates=2), [1.0, 1.0], run=RUN.replace(end=end))
    assert requests[0].text.startswith(f"{share}  epoch 0/")


def test_the_expected_end_is_computed_from_the_time_of_the_event():
    state, _ = go(ProgressCallback(every_n_updates=1), [1.0])
    state = state.advance(samples=4)
    _, requests = ProgressCallback(every_n_updates=1)(state, AfterUpdate(run=RUN, duration_s=100.0, time_s=86_400.0))
    assert requests[0].text.endswith("left 0:10:00  ends 1970-01-02 00:10:00 UTC")


@pytest.mark.parametrize(("duration_s", "time_s"), [(1e13, 1.0), (1e300, 1.0), (100.0, -1e15), (100.0, 1e300)])
def test_an_end_that_no_calendar_has_is_left_out(duration_s, time_s):
    """After a very slow update, or with a wrong clock."""
    state, _ = go(ProgressCallback(every_n_updates=1), [1.0])
    state = state.advance(samples=4)
    event = AfterUpdate(run=RUN, duration_s=duration_s, time_s=time_s)
    _, requests = ProgressCallback(every_n_updates=1)(state, event)
    assert "left " in requests[0].text
    assert " ends " not in requests[0].text


def test_a_run_of_unknown_length_has_no_percentage():
    run = Run(end=TrainingIteration(epoch=2))
    event = AfterUpdate(run=run, samples=4, duration_s=2.0)
    _, effects = ProgressCallback(every_n_updates=1)(TrainState().advance(samples=4), event)
    assert effects[0].text == "epoch 0  update 1  sample 4  2000.0 ms/update  last 0:00:02  total 0:00:02"


def test_a_resumed_run_continues_with_its_times():
    uncut, cut = ProgressCallback(every_n_updates=2), ProgressCallback(every_n_updates=2)
    seconds = [5.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    expected_state, expected = go(uncut, seconds)
    state, first = go(cut, seconds[:3])
    state, nothing = compose(cut)(state, BeforeTraining(run=RUN, resumed=True))
    assert nothing == ()
    state, rest = go(ProgressCallback(every_n_updates=2), seconds[3:], state=state)
    assert first + rest == expected
    assert state.memory("ProgressCallback/U2") == expected_state.memory("ProgressCallback/U2")


def test_the_aliases():
    assert (Progress, LR) == (ProgressCallback, LrCallback)


# --- learning rate


def lr(callback, updates, **readings):
    readings = {"lr": {"default": 0.1}, "weight_decay": {"default": 0.01}, **readings}
    return [effect.values for effect in go(callback, [0.0] * updates, **readings)[1]]


def test_lr_at_its_interval_and_at_the_first_update():
    state, requests = go(LrCallback(every_n_updates=3), [0.0] * 7, lr={"default": 0.1}, weight_decay={"default": 0.0})
    assert requests == [LogScalars({"optim/lr": 0.1, "optim/wd": 0.0})] * 3
    assert state.metrics["optim/lr"].iteration.update == 6
    assert dict(state.callback_states) == {}  # the event has all values


def test_lr_of_several_groups_has_a_key_for_each():
    readings = {"lr": {"decay": 0.1, "no_decay": 0.2}, "weight_decay": {"decay": 0.01, "no_decay": 0.0}}
    assert lr(LrCallback(every_n_updates=1), 1, **readings) == [
        {"optim/lr/decay": 0.1, "optim/lr/no_decay": 0.2, "optim/wd/decay": 0.01, "optim/wd/no_decay": 0.0}
    ]


def test_lr_at_epochs_is_that_of_the_last_update():
    callback, state, rates = LrCallback(every_n_epochs=1), TrainState(), []
    for update in range(1, 9):
        state, requests = go(callback, [0.0], state=state, lr={"default": update / 10})
        rates += [(update, effect.values["optim/lr"]) for effect in requests]
    assert rates == [(1, 0.1), (4, 0.4), (8, 0.8)]


def test_lr_at_the_end_is_that_of_the_last_update():
    callback = LrCallback(every_n_updates=3, at_end=True)
    state, _ = go(callback, [0.0] * 4, lr={"default": 0.3})
    assert callback(state, AfterTraining(run=RUN))[1] == (LogScalars({"optim/lr": 0.3}),)
    state, _ = go(callback, [0.0] * 3, lr={"default": 0.3})
    assert callback(state, AfterTraining(run=RUN)) == (state, ())


def test_lr_logs_nothing_without_an_update():
    state = TrainState()
    assert LrCallback(every_n_epochs=1, at_end=True)(state, AfterTraining()) == (state, ())
    assert LrCallback(every_n_updates=1)(state, AtEval()) == (state, ())
