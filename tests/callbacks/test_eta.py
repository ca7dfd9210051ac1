"""`EtaCallback`: times computed by hand, and firings at the announced updates."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from noether.core.callbacks import EtaCallback
from noether.core.callbacks.eta import ETA, ETACallback
from noether.core.effect import ShowProgress
from noether.core.event import AfterEpoch, AfterTraining, AfterUpdate, AtEval, BeforeTraining
from noether.core.iteration import TrainingIteration
from noether.core.loop import Move, next_move
from noether.core.reducer import compose
from noether.core.run import Run
from noether.core.schedules.schedule import INTERVALS
from noether.core.state import TrainState
from noether.testing import same
from noether.testing.strategies import points, run_lengths

# Epochs of 4 updates with 4, 4, 4 and 3 samples.
RUN = Run(end=TrainingIteration(epoch=2), updates_per_epoch=4, samples_per_epoch=15, effective_batch_size=4)


def events(reducer, run=RUN, seconds=lambda update: 1.0, state=None):
    """Yield `(event, state, effects)` of every event from `state` to the end of the run."""
    resumed = state is not None
    state, _ = reducer(state if resumed else TrainState(), BeforeTraining(run=run, resumed=resumed))
    while (move := next_move(state, run)) is not Move.NOTHING:
        if move is Move.END_EPOCH:
            state, event = state.next_epoch(), AfterEpoch(run=run)
        elif move is Move.END_TRAINING:
            state, event = state.replace(ended=True), AfterTraining(run=run)
        else:
            after = run.iteration_after(state.iteration.update + 1)
            state = state.advance(samples=after.sample - state.iteration.sample)
            event = AfterUpdate(run=run, samples=1, duration_s=seconds(state.iteration.update))
        state, effects = reducer(state, event)
        yield event, state, effects


def table(callback, **settings):
    """Return the progress shown at each event as `(event, update, fired, fires, mean, next, left, due)`."""
    return [
        (type(event).__name__.removeprefix("After"), state.iteration.update,
         e.fired, e.fires, e.update_s, e.next_s, e.left_s, e.due)
        for event, state, effects in events(compose(callback), **settings)
        for e in effects
    ]  # fmt: skip


def slow_first(update):
    """Return 10 s for the first update, then 1, 2, 3, ... s, whose mean is half of the number of the update."""
    return 10.0 if update == 1 else update - 1.0


def test_updates_computed_by_hand():
    assert table(EtaCallback(every_n_updates=3), seconds=slow_first) == [
        # only the first update is known
        ("Update", 1, 0, 3, 10.0, 20.0, 70.0, False),
        # from here on, the first update is left out
        ("Update", 2, 0, 3, 1.0, 1.0, 6.0, False),
        ("Update", 3, 0, 6, 1.5, 4.5, 7.5, False),
        ("Update", 3, 3, 6, 1.5, 4.5, 7.5, True),
        ("Update", 4, 3, 6, 2.0, 4.0, 8.0, False),
        ("Update", 5, 3, 6, 2.5, 2.5, 7.5, False),
        # the next firing would be after the end
        ("Update", 6, 3, None, 3.0, None, 6.0, False),
        ("Update", 6, 6, None, 3.0, None, 6.0, True),
        ("Update", 7, 6, None, 3.5, None, 3.5, False),
        ("Update", 8, 6, None, 4.0, None, 0.0, False),
        ("Training", 8, 6, None, 4.0, None, 0.0, False),
    ]


def test_epochs_computed_by_hand():
    assert table(EtaCallback(every_n_epochs=1), seconds=slow_first) == [
        ("Update", 1, 0, 4, 10.0, 30.0, 70.0, False),
        ("Update", 2, 0, 4, 1.0, 2.0, 6.0, False),
        ("Update", 3, 0, 4, 1.5, 1.5, 7.5, False),
        # the event AfterEpoch is still to come: it fires at this update
        ("Update", 4, 0, 4, 2.0, 0.0, 8.0, False),
        ("Epoch", 4, 4, 8, 2.0, 8.0, 8.0, True),
        ("Update", 5, 4, 8, 2.5, 7.5, 7.5, False),
        ("Update", 6, 4, 8, 3.0, 6.0, 6.0, False),
        ("Update", 7, 4, 8, 3.5, 3.5, 3.5, False),
        ("Update", 8, 4, 8, 4.0, 0.0, 0.0, False),
        ("Epoch", 8, 8, None, 4.0, None, 0.0, True),
        ("Training", 8, 8, None, 4.0, None, 0.0, False),
    ]


def test_samples_with_a_short_last_batch_computed_by_hand():
    # after each update: 4, 8, 12, 15, 19, 23, 27, 30 samples
    assert table(EtaCallback(every_n_samples=15), seconds=slow_first) == [
        ("Update", 1, 0, 4, 10.0, 30.0, 70.0, False),
        ("Update", 2, 0, 4, 1.0, 2.0, 6.0, False),
        ("Update", 3, 0, 4, 1.5, 1.5, 7.5, False),
        ("Update", 4, 0, 8, 2.0, 8.0, 8.0, False),
        ("Update", 4, 4, 8, 2.0, 8.0, 8.0, True),
        ("Update", 5, 4, 8, 2.5, 7.5, 7.5, False),
        ("Update", 6, 4, 8, 3.0, 6.0, 6.0, False),
        ("Update", 7, 4, 8, 3.5, 3.5, 3.5, False),
        ("Update", 8, 4, None, 4.0, None, 0.0, False),
        ("Update", 8, 8, None, 4.0, None, 0.0, True),
        ("Training", 8, 8, None, 4.0, None, 0.0, False),
    ]


def test_an_interval_in_samples_that_no_update_ends_at():
    shown = table(EtaCallback(every_n_samples=10))
    assert [(update, fires) for event, update, _, fires, *_, due in shown if event == "Update" and not due] == [
        (1, 3), (2, 3), (3, 6), (4, 6), (5, 6), (6, 8), (7, 8), (8, None),
    ]  # fmt: skip
    assert [update for _, update, *_, due in shown if due] == [3, 6, 8]


@pytest.mark.parametrize(
    ("end", "final", "left_s"),
    [
        (TrainingIteration(epoch=3), TrainingIteration(3, 12, 45), 10.0),
        (TrainingIteration(update=6), TrainingIteration(1, 6, 23), 4.0),
        (TrainingIteration(sample=16), TrainingIteration(1, 5, 19), 3.0),
        (TrainingIteration(sample=15), TrainingIteration(1, 4, 15), 2.0),
    ],
)
def test_the_end_is_that_of_the_counter_that_ends_the_run(end, final, left_s):
    trace = events(compose(EtaCallback(every_n_updates=100)), run=RUN.replace(end=end))
    _, (_, state, (shown,)) = next(trace), next(trace)
    assert state.iteration.update == 2
    assert (shown.end, shown.left_s) == (final, left_s)
    _, state, (last,) = list(trace)[-1]
    assert state.iteration == final
    assert (last.end, last.left_s) == (final, 0.0)


def test_a_firing_beyond_the_end_is_not_shown():
    for interval, n in (("every_n_updates", 9), ("every_n_epochs", 3), ("every_n_samples", 31)):
        shown = table(EtaCallback(**{interval: n}))
        assert {(fired, fires, next_s, due) for _, _, fired, fires, _, next_s, _, due in shown} == {
            (0, None, None, False)
        }


def test_without_an_update_no_times_are_shown():
    callback, state = EtaCallback(every_n_epochs=1), TrainState().advance(samples=4)
    _, (shown,) = callback(state.next_epoch(), AfterEpoch(run=RUN))  # of a loop without `AfterUpdate`
    assert shown == ShowProgress(
        end=TrainingIteration(2, 8, 30), fired=1, fires=8, update_s=None, next_s=None, left_s=None, due=True
    )


def test_a_loop_without_durations_shows_no_times():
    shown = table(EtaCallback(every_n_updates=4), seconds=lambda update: 0.0)
    assert {times for *_, mean, next_s, left_s, _ in shown for times in (mean, next_s, left_s)} == {None}
    assert [(update, fired, fires) for event, update, fired, fires, *_, due in shown if due] == [
        (4, 4, 8),
        (8, 8, None),
    ]


def test_a_standalone_evaluation_shows_nothing():
    state = TrainState().advance(samples=4)
    assert EtaCallback(every_n_updates=1)(state, AtEval(run=RUN)) == (state, ())


def test_after_training_progress_is_shown_once_more_to_end_the_display():
    state = TrainState().advance(samples=4)
    _, (shown,) = EtaCallback(every_n_updates=3)(state, AfterTraining(run=RUN))
    assert not shown.due
    _, (shown,) = EtaCallback(every_n_updates=3, at_end=True)(state, AfterTraining(run=RUN))
    assert shown.due
    state = state.advance(samples=4).advance(samples=4)  # the interval ends at the last update
    _, (shown,) = EtaCallback(every_n_updates=3, at_end=True)(state, AfterTraining(run=RUN))
    assert not shown.due


def test_two_runs_side_by_side_do_not_share_a_mean():
    eta = EtaCallback(every_n_updates=1)
    initial = TrainState()
    slow, _ = eta(initial.advance(samples=4), AfterUpdate(run=RUN, duration_s=8.0))
    _, (quick, _) = eta(initial.advance(samples=4), AfterUpdate(run=RUN, duration_s=0.5))
    assert quick.update_s == 0.5
    _, (shown, _) = eta(slow.advance(samples=4), AfterUpdate(run=RUN, duration_s=4.0))
    assert shown.update_s == 4.0


def test_it_logs_no_metric_and_declares_no_reading():
    eta = EtaCallback(every_n_samples=512)
    assert (eta.produces, eta.readings, eta.name) == ((), (), "EtaCallback/S512")
    assert ETA is ETACallback is EtaCallback


ETAS = st.builds(
    lambda interval, n, at_end: EtaCallback(**{interval: n}, at_end=at_end),
    st.sampled_from(list(INTERVALS)),
    st.integers(1, 40),
    st.booleans(),
)


@st.composite
def runs_of_any_length(draw):
    """Draw runs that end with an epoch, an update or a sample."""
    run = draw(run_lengths(max_epochs=4))
    return run.replace(end=draw(st.one_of(st.just(run.end), points(30).filter(lambda point: point.epoch < 5))))


@given(runs_of_any_length(), ETAS)
def test_it_fires_at_the_announced_update(run, eta):
    trace = list(events(compose(eta), run=run))
    shown = [(type(event), state.iteration.update, effects) for event, state, effects in trace]
    firings = [
        any(effect.due for effect in effects) and event_type is not AfterTraining for event_type, _, effects in shown
    ]
    for at, (_, _, effects) in enumerate(shown):
        later = (update for (_, update, _), fired in zip(shown[at + 1 :], firings[at + 1 :], strict=True) if fired)
        assert {effect.fires for effect in effects} <= {next(later, None)}


@given(runs_of_any_length(), ETAS)
def test_due_is_true_only_where_it_fires(run, eta):
    last = 0
    for event, state, effects in events(compose(eta), run=run):
        fires = eta.gate.opens(state, event) is not None
        # shown at every update, after training (which ends the display), and at every firing
        always = isinstance(event, AfterUpdate) or (isinstance(event, AfterTraining) and not fires)
        assert [effect.due for effect in effects] == [False] * always + [True] * fires
        for effect in effects:
            last = state.iteration.update if effect.due else last
            assert effect.fired == last


@given(runs_of_any_length(), ETAS, st.lists(st.integers(1, 64), min_size=1, max_size=8))
def test_times_are_computed_from_the_mean_of_all_updates_but_the_first(run, eta, eighths):
    # sums of eighths of a second are exact
    took = [eighths[update % len(eighths)] / 8 for update in range(run.final.update + 1)]
    for _, state, effects in events(compose(eta), run=run, seconds=took.__getitem__):
        update = state.iteration.update
        mean = sum(took[2 : update + 1]) / (update - 1) if update > 1 else took[1]
        for effect in effects:
            assert effect.end == run.final
            assert (effect.update_s, effect.left_s) == (mean, mean * (run.final.update - update))
            assert effect.next_s == (None if effect.fires is None else mean * (effect.fires - update))


@given(runs_of_any_length(), ETAS, st.integers(0, 40))
def test_a_resumed_run_shows_the_same(run, eta, cut):
    uncut = list(events(compose(eta), run=run, seconds=slow_first))
    cut = min(cut, len(uncut) - 1)
    _, kept, _ = uncut[cut]
    again = EtaCallback(**{name: getattr(eta, name) for name in (*INTERVALS, "at_end")})
    rest = list(events(compose(again), run=run, seconds=slow_first, state=kept))
    assert [effects for *_, effects in rest] == [effects for *_, effects in uncut[cut + 1 :]]
    assert same([state for _, state, _ in rest], [state for _, state, _ in uncut[cut + 1 :]])


def test_after_an_early_stop_no_time_is_left():
    run = Run(end=TrainingIteration(update=8), updates_per_epoch=4, samples_per_epoch=16, effective_batch_size=4)
    eta, state = EtaCallback(every_n_updates=3), TrainState()
    for _ in range(2):
        state, _ = eta(state.advance(samples=4), AfterUpdate(run=run, samples=4, duration_s=1.0))
    _, (shown,) = eta(state.request_stop("enough").replace(ended=True), AfterTraining(run=run))
    assert (shown.fires, shown.next_s, shown.left_s) == (None, None, 0.0)


def test_a_loop_without_durations_gets_no_estimate():
    run = Run(end=TrainingIteration(update=8), updates_per_epoch=4, samples_per_epoch=16, effective_batch_size=4)
    eta, state = EtaCallback(every_n_updates=3), TrainState()
    for _ in range(2):
        state, (shown,) = eta(state.advance(samples=4), AfterUpdate(run=run, samples=4))
        assert (shown.update_s, shown.next_s, shown.left_s) == (None, None, None)


def test_a_run_without_an_end_shows_the_time_to_the_next_firing():
    event = AfterUpdate(samples=4, duration_s=0.5)
    _, (shown,) = EtaCallback(every_n_updates=3)(TrainState().advance(samples=4), event)
    assert (shown.end, shown.fires, shown.update_s, shown.next_s, shown.left_s) == (None, 3, 0.5, 1.0, None)


def test_without_lengths_the_epochs_so_far_give_the_estimates():
    eta, state, run = EtaCallback(every_n_epochs=2), TrainState(), Run(end=TrainingIteration(epoch=4))
    shown = []
    for updates in (3, 5, 4):
        for _ in range(updates):
            event = AfterUpdate(run=run, samples=4, duration_s=0.5)
            state, (each,) = eta(state.advance(samples=4), event)
            shown.append((each.end, each.fires, each.left_s))
        state, _ = eta(state.next_epoch(), AfterEpoch(run=run))
    assert shown[:3] == [(None, None, None)] * 3
    assert shown[3] == (None, 6, 0.5 * 8)  # 3 updates in every epoch
    assert shown[8] == (None, 16, 0.5 * 7)  # 4 updates in every epoch
    assert shown[11] == (None, 16, 0.5 * 4)


def test_without_lengths_the_updates_so_far_tell_when_samples_are_reached():
    eta, state, run = EtaCallback(every_n_samples=30), TrainState(), Run(end=TrainingIteration(sample=50))
    for _ in range(2):
        state, (shown,) = eta(state.advance(samples=4), AfterUpdate(run=run, samples=4, duration_s=0.5))
    assert (shown.fires, shown.next_s, shown.left_s) == (8, 3.0, 5.5)
