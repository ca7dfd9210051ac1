"""`TrainTimeCallback`: means, maxima and totals computed by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from noether.core.callbacks import TrainTimeCallback
from noether.core.effect import LogScalars, SetSummary
from noether.core.event import AfterEpoch, AfterTraining, AfterUpdate, BeforeTraining
from noether.core.reducer import compose
from noether.core.state import TrainState


def go(callback, updates, state=None):
    """Return the state after updates with these readings, and the requests at each."""
    state, requests = state or TrainState(), []
    for readings in updates:
        state, effects = callback(state.advance(samples=4), AfterUpdate(samples=4, **readings))
        requests.append(effects)
    return state, requests


def test_mean_and_max_computed_by_hand():
    updates = [
        {"data_s": 0.5, "step_s": 2.0, "forward_s": 0.25, "backward_s": 1.5, "optimizer_s": 0.125},
        {"data_s": 0.25, "step_s": 1.0, "forward_s": 0.75, "backward_s": 0.5, "optimizer_s": 0.125},
        {"data_s": 0.0, "step_s": 4.0, "forward_s": 2.0, "backward_s": 1.0, "optimizer_s": 1.0},
    ]
    state, requests = go(TrainTimeCallback(every_n_updates=2), updates)
    expected = {
        "train_time/data_s/mean/U2": 0.375,
        "train_time/data_s/max/U2": 0.5,
        "train_time/step_s/mean/U2": 1.5,
        "train_time/step_s/max/U2": 2.0,
        "train_time/forward_s/mean/U2": 0.5,
        "train_time/forward_s/max/U2": 0.75,
        "train_time/backward_s/mean/U2": 1.0,
        "train_time/backward_s/max/U2": 1.5,
        "train_time/optimizer_s/mean/U2": 0.125,
        "train_time/optimizer_s/max/U2": 0.125,
    }
    assert requests == [(), (LogScalars(expected),), ()]
    assert {key: measured.value for key, measured in state.metrics.items()} == expected


def test_each_interval_starts_empty():
    _, requests = go(TrainTimeCallback(every_n_updates=2), [{"data_s": seconds} for seconds in (9.0, 9.0, 1.0, 0.5)])
    assert requests[-1][0].values["train_time/data_s/mean/U2"] == 0.75
    assert requests[-1][0].values["train_time/data_s/max/U2"] == 1.0


def test_parts_that_the_loop_does_not_measure_are_left_out():
    updates = [{"data_s": 0.5, "step_s": 1.0, "forward_s": None, "backward_s": 0.25}]
    state, ((logged,),) = go(TrainTimeCallback(every_n_updates=1), updates)
    assert set(logged.values) == {
        f"train_time/{part}/{what}/U1" for part in ("data_s", "step_s", "backward_s") for what in ("mean", "max")
    }
    _, (totals,) = TrainTimeCallback(every_n_updates=1)(state, AfterTraining())
    assert totals == SetSummary(
        {"train_time/data_s/total": 0.5, "train_time/step_s/total": 1.0, "train_time/backward_s/total": 0.25}
    )


def test_a_loop_that_measures_nothing_logs_nothing():
    state, requests = go(TrainTimeCallback(every_n_updates=1), [{}, {}])
    assert requests == [(), ()]
    assert TrainTimeCallback(every_n_updates=1)(state, AfterTraining())[1] == ()


def test_a_skipped_update_counts():
    _, (_, (logged,)) = go(TrainTimeCallback(every_n_updates=2), [{"data_s": 1.0}, {"data_s": 3.0, "skipped": True}])
    assert logged.values["train_time/data_s/mean/U2"] == 2.0


@pytest.mark.parametrize("every", [1, 2, 100])
def test_totals_cover_the_whole_run_at_any_interval(every):
    state, _ = go(TrainTimeCallback(every_n_updates=every), [{"data_s": 0.5, "step_s": 2.0}] * 3)
    after, effects = TrainTimeCallback(every_n_updates=every)(state, AfterTraining())
    assert after is state
    assert effects == (SetSummary({"train_time/data_s/total": 1.5, "train_time/step_s/total": 6.0}),)


def test_firings_at_an_epoch_and_at_the_end():
    callback = TrainTimeCallback(every_n_epochs=1, at_end=True)
    state, requests = go(callback, [{"data_s": 1.0}, {"data_s": 2.0}])
    assert requests == [(), ()]
    state, (logged,) = callback(state.next_epoch(), AfterEpoch())
    assert logged.values["train_time/data_s/mean/E1"] == 1.5
    _, (totals,) = callback(state, AfterTraining())  # the interval ended with the epoch
    assert totals.values["train_time/data_s/total"] == 3.0
    state, _ = go(callback, [{"data_s": 5.0}], state)
    _, (logged, totals) = callback(state, AfterTraining())
    assert logged.values["train_time/data_s/mean/E1"] == logged.values["train_time/data_s/max/E1"] == 5.0
    assert totals.values["train_time/data_s/total"] == 8.0


def test_nothing_is_logged_without_an_update():
    callback, state = TrainTimeCallback(every_n_epochs=1, at_end=True), TrainState()
    assert callback(state.next_epoch(), AfterEpoch())[1] == ()
    assert callback(state, AfterTraining()) == (state, ())


EIGHTHS = st.integers(0, 1000).map(lambda eighths: eighths / 8)  # their sums are exact


@given(st.lists(st.tuples(EIGHTHS, EIGHTHS), min_size=1, max_size=15), st.integers(1, 5), st.integers(0, 15))
def test_a_resumed_run_continues_with_its_times(times, n, cut):
    updates = [{"data_s": data_s, "forward_s": forward_s} for data_s, forward_s in times]
    uncut, requests = go(TrainTimeCallback(every_n_updates=n), updates)
    state, first = go(TrainTimeCallback(every_n_updates=n), updates[:cut])
    state, _ = compose(TrainTimeCallback(every_n_updates=n))(state, BeforeTraining(resumed=cut > 0))
    state, rest = go(TrainTimeCallback(every_n_updates=n), updates[cut:], state)
    assert first + rest == requests
    for end in range(n, len(updates) + 1, n):
        interval = [data_s for data_s, _ in times[end - n : end]]
        (logged,) = requests[end - 1]
        assert logged.values[f"train_time/data_s/mean/U{n}"] == sum(interval) / n
        assert logged.values[f"train_time/data_s/max/U{n}"] == max(interval)
    _, (totals,) = TrainTimeCallback(every_n_updates=n)(state, AfterTraining())
    assert totals.values["train_time/data_s/total"] == sum(data_s for data_s, _ in times)
    assert totals == TrainTimeCallback(every_n_updates=n)(uncut, AfterTraining())[1][0]


def test_the_callback_declares_the_parts_of_a_step():
    callback = TrainTimeCallback(every_n_epochs=5)
    assert callback.readings == ("forward_s", "backward_s", "optimizer_s")
    assert compose(callback).readings == callback.readings
    assert callback.produces == ("train_time/*/mean/E5", "train_time/*/max/E5")


def test_a_part_measured_at_some_updates_is_averaged_over_those():
    callback = TrainTimeCallback(every_n_updates=3)
    _, requests = go(callback, [{"data_s": 1.0, "forward_s": 2.0}, {"data_s": 2.0}, {"data_s": 3.0}])
    values = requests[-1][0].values
    assert (values["train_time/data_s/mean/U3"], values["train_time/forward_s/mean/U3"]) == (2.0, 2.0)
