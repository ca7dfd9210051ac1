"""The phases of a process: sums over its events, which the summary of the run has."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from noether import AfterEpoch, AfterUpdate, TrainState, open_run
from noether.session.phases import PhaseTimes
from noether.session.timing import Clock
from noether.training.data.interruptible import InterruptibleData

SECONDS = st.integers(0, 100).map(float)


class Time:
    """A clock that a test moves."""

    def __init__(self):
        self.now_s, self.readings = 0.0, 0

    def __call__(self):
        self.readings += 1
        return self.now_s


@pytest.fixture
def time():
    return Time()


@pytest.fixture
def phases(tmp_path, time):
    with open_run(tmp_path / "run") as directory:
        yield PhaseTimes(directory.interpreter, directory, TrainState(), Clock(elapsed_s=time))


def at(update):
    state = TrainState()
    for _ in range(update):
        state = state.advance(samples=4)
    return state


@given(data=st.data(), updates=st.lists(st.tuples(SECONDS, SECONDS, st.lists(SECONDS, max_size=3)), max_size=8))
def test_the_phases_are_the_sums_over_the_events(tmp_path_factory, data, updates):
    """Each update is the seconds of its data and of its step, and the seconds of each batch of its evaluation."""
    time = Time()
    with open_run(tmp_path_factory.mktemp("run")) as directory:
        phases = PhaseTimes(lambda *_: None, directory, TrainState(), Clock(elapsed_s=time))
        for data_s, step_s, batches in updates:
            time.now_s += data_s + step_s
            evaluated = InterruptibleData(batches, lambda: False, None, phases.evaluate)
            for batch_s in evaluated:
                time.now_s += batch_s
            phases((), at(1), AfterUpdate(samples=4, data_s=data_s, step_s=step_s))
            time.now_s += data.draw(SECONDS)  # between two events, in none of the phases
        times = phases.read(TrainState())
    assert times["data_s"] == sum(data_s for data_s, _, _ in updates)
    assert times["step_s"] == sum(step_s for _, step_s, _ in updates)
    assert times["evaluation_s"] == sum(sum(batches) for _, _, batches in updates)
    assert times["total_s"] == time.now_s
    assert times["updates"] == len(updates)


def test_an_update_without_effects_reads_no_clock(phases, time):
    before = time.readings
    for update in range(1, 100):
        phases((), at(1), AfterUpdate(samples=4, data_s=0.1, step_s=0.2, time_s=1000 + update / 100))
    assert time.readings == before


def test_an_unfinished_evaluation_counts_until_the_event_ends(phases, time):
    batches = phases.evaluate([1, 2, 3])
    next(batches)
    time.now_s = 5.0
    assert phases.read(at(1))["evaluation_s"] == 5.0
    phases((), at(1), AfterEpoch())
    time.now_s = 9.0
    assert phases.read(at(1))["evaluation_s"] == 5.0
    next(batches)  # at a later event
    time.now_s = 10.0
    assert phases.read(at(1))["evaluation_s"] == 6.0


def test_the_summary_of_a_killed_run_has_its_phases(phases, tmp_path):
    summary = tmp_path / "run/summary.json"
    for update, time_s in enumerate([1000.0, 1009.0, 1010.0, 1019.0], start=1):
        phases((), at(update), AfterUpdate(samples=4, data_s=1.0, step_s=2.0, time_s=time_s))
        assert summary.exists() == (update >= 3)
    (times,) = json.loads(summary.read_text())["phases"].values()
    assert (times["updates"], times["data_s"], times["step_s"]) == (3, 3.0, 6.0)


def test_a_resumed_process_keeps_the_times_before_its_first_iteration(tmp_path):
    for begin in (0, 4, 8, 4):
        with open_run(tmp_path / "run") as directory:
            phases = PhaseTimes(directory.interpreter, directory, at(begin), Clock(elapsed_s=lambda: 0.0))
            for time_s in (1000.0, 2000.0):
                phases((), at(begin + 1), AfterUpdate(samples=4, time_s=time_s))
    assert list(json.loads((tmp_path / "run/summary.json").read_text())["phases"]) == ["E0_U0_S0", "E0_U4_S16"]
