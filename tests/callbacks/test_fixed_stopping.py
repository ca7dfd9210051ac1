"""`FixedUpdateEarlyStopping`: training stops at a fixed point of a longer run."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from noether.core.callbacks import FixedUpdateEarlyStopping
from noether.core.effect import LogText
from noether.core.errors import SettingsError
from noether.core.event import AfterEpoch, AfterTraining, AfterUpdate, AtEval, BeforeTraining
from noether.core.iteration import TrainingIteration
from noether.core.loop import Move, next_move
from noether.core.reducer import compose
from noether.core.state import TrainState
from noether.testing.strategies import run_lengths


def drive(reducer, run, state=None):
    """Return the state after each event of a run that starts at `state`."""
    state, _ = reducer(TrainState() if state is None else state, BeforeTraining(run=run, resumed=state is not None))
    seen = [state]
    while (move := next_move(state, run)) is not Move.NOTHING:
        if move is Move.END_EPOCH:
            state, event = state.next_epoch(), AfterEpoch(run=run)
        elif move is Move.END_TRAINING:
            state, event = state.replace(ended=True), AfterTraining(run=run)
        else:
            size = run.iteration_after(state.iteration.update + 1).sample - state.iteration.sample
            state, event = state.advance(samples=size), AfterUpdate(run=run, samples=size)
        state, _ = reducer(state, event)
        seen.append(state)
    return seen


def state_at(epoch=0, update=0, sample=0):
    return TrainState(iteration=TrainingIteration(epoch, update, sample))


@pytest.mark.parametrize(
    ("point", "before", "after"),
    [
        ({"stop_at_update": 3}, state_at(update=2, sample=8), state_at(update=3, sample=12)),
        ({"stop_at_update": 1}, state_at(), state_at(update=1, sample=4)),
        ({"stop_at_sample": 12}, state_at(update=2, sample=8), state_at(update=3, sample=12)),
        (
            {"stop_at_sample": 10},
            state_at(update=2, sample=8),
            state_at(update=3, sample=12),
        ),  # crossed
        ({"stop_at_sample": 9}, state_at(update=2, sample=8), state_at(update=3, sample=12)),
    ],
)
def test_training_stops_after_the_update_that_reaches_the_point(point, before, after):
    stopping = FixedUpdateEarlyStopping(**point)
    assert stopping(before, AfterUpdate(samples=4)) == (before, ())
    ((name, value),) = point.items()
    state, effects = stopping(after, AfterUpdate(samples=4))
    assert (state.stop, effects) == (
        f"{name}: {value} is reached",
        (LogText(f"stopping: {name}: {value} is reached"),),
    )
    assert state.replace(stop=None).iteration == after.iteration


def test_training_stops_after_the_epoch_that_reaches_the_point():
    stopping = FixedUpdateEarlyStopping(stop_at_epoch=2)
    filled = state_at(epoch=1, update=4, sample=16)
    assert stopping(filled, AfterUpdate(samples=4)) == (filled, ())
    state, effects = stopping(filled.next_epoch(), AfterEpoch())
    assert (state.stop, effects) == ("stop_at_epoch: 2 is reached", (LogText("stopping: stop_at_epoch: 2 is reached"),))


@pytest.mark.parametrize("point", [{"stop_at_epoch": 2}, {"stop_at_update": 2}, {"stop_at_sample": 5}])
def test_it_stops_once_and_keeps_the_first_reason(point):
    stopping = FixedUpdateEarlyStopping(**point)
    for reason in (None, "mine"):
        state = state_at(epoch=2, update=2, sample=8).replace(stop=reason)
        once, effects = stopping(state, AfterEpoch())
        assert once.stop == (reason or next(f"{name}: {n} is reached" for name, n in point.items()))
        assert len(effects) == (reason is None)
        assert stopping(once, AfterUpdate(samples=4)) == (once, ())
        assert stopping(once.next_epoch(), AfterEpoch())[1] == ()


def test_other_events_change_nothing():
    stopping, state = FixedUpdateEarlyStopping(stop_at_update=1), state_at(update=4)
    for event in (BeforeTraining(), BeforeTraining(resumed=True), AfterTraining(), AtEval()):
        assert stopping(state, event) == (state, ())
    assert (stopping.produces, stopping.init(state)) == ((), {})


def test_callbacks_with_different_points_have_different_names():
    names = [FixedUpdateEarlyStopping(**point).name for point in ({"stop_at_epoch": 2}, {"stop_at_update": 2})]
    assert names == ["FixedUpdateEarlyStopping/stop_at_epoch=2", "FixedUpdateEarlyStopping/stop_at_update=2"]


ONE = "give exactly one of stop_at_epoch, stop_at_update, stop_at_sample"


@pytest.mark.parametrize(
    ("given", "problems"),
    [
        ({}, [f"no point is given; {ONE}"]),
        (
            {"stop_at_epoch": 1, "stop_at_sample": 8},
            [f"stop_at_sample: stop_at_epoch and stop_at_sample are given; {ONE}"],
        ),
        (
            {"stop_at_epoch": 1, "stop_at_update": 0, "stop_at_sample": 8},
            [
                f"stop_at_sample: stop_at_epoch and stop_at_update and stop_at_sample are given; {ONE}",
                "stop_at_update: 0 is not a whole number of at least 1",
            ],
        ),
        *(
            ({name: n}, [f"{name}: {n!r} is not a whole number of at least 1"])
            for name in ("stop_at_epoch", "stop_at_update", "stop_at_sample")
            for n in (0, -1, 2.0, True, "3")
        ),
    ],
)
def test_invalid_settings_are_refused(given, problems):
    with pytest.raises(SettingsError) as refused:
        FixedUpdateEarlyStopping(**given)
    assert [str(problem) for problem in refused.value.problems] == problems


COUNTERS = st.sampled_from(["epoch", "update", "sample"])


@given(run_lengths(), COUNTERS, st.integers(1, 200))
def test_a_run_stops_at_the_first_iteration_that_reaches_the_point(run, counter, point):
    uncut = [state.iteration for state in drive(compose(), run)]
    expected = next((at for at in uncut if getattr(at, counter) >= point), None)
    states = drive(compose(FixedUpdateEarlyStopping(**{f"stop_at_{counter}": point})), run)
    stopped = next((state.iteration for state in states if state.stop is not None), None)
    assert stopped == expected
    last = states[-1]
    assert last.ended
    assert last.iteration.update == (run.final if expected is None else expected).update
    # If the last update completes an epoch, `AfterEpoch` comes before `AfterTraining`.
    assert last.iteration == run.iteration_after(last.iteration.update)


@given(run_lengths(), COUNTERS, st.integers(1, 60), st.integers(0, 60))
def test_a_resumed_run_stops_at_the_same_point(run, counter, point, cut):
    stopping = FixedUpdateEarlyStopping(**{f"stop_at_{counter}": point})
    states = drive(compose(stopping), run)
    cut = min(cut, len(states) - 1)
    resumed = drive(compose(stopping), run, states[cut])
    rest = [(state.iteration, state.stop, state.ended) for state in states[cut:]]
    assert [(state.iteration, state.stop, state.ended) for state in resumed] == rest
