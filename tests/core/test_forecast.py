"""Forecasts agree with runs that are walked event by event, and make few calls."""

import dataclasses
from math import lcm

import pytest
from hypothesis import given
from hypothesis import strategies as st
from loop_traces import drive

from noether.core.callback import declaration_of, listens_to
from noether.core.combinators import on, when
from noether.core.event import EVENTS, AfterEpoch, AfterTraining, AfterUpdate, AtEval, BeforeTraining
from noether.core.iteration import TrainingIteration
from noether.core.run import Run
from noether.core.schedules.base import Schedule
from noether.core.schedules.counting import multiples_of_any, steps_crossing_multiples
from noether.core.schedules.forecast import Firing, Occasions, events_at, fires, firings, nth_firing, occasions_of
from noether.core.schedules.schedule import At, EveryNEpochs, EveryNSamples, EveryNUpdates
from noether.testing.strategies import run_lengths, schedules

START = TrainingIteration()


def walk_firings(callback, run):
    """Return the events at which a real loop calls the inside of `callback`."""
    seen = []

    def note(state, event):
        seen.append(Firing(type(event), state.iteration))
        return state, ()

    for _ in drive(callback(note), run):
        pass
    return seen


def occasions(callback, run):
    made = callback(lambda state, event: (state, ()))
    listened = tuple(kind for kind in EVENTS if kind is not AtEval and listens_to(made, kind))
    return occasions_of(declaration_of(made), listened, run)


@st.composite
def ends(draw):
    """Runs that end anywhere, on any counter."""
    run = draw(run_lengths())
    counter = draw(st.sampled_from(("epoch", "update", "sample")))
    return run.replace(end=TrainingIteration(**{counter: draw(st.integers(1, getattr(run.final, counter)))}))


@given(schedules(), st.booleans(), ends())
def test_firings_of_a_gate_are_those_of_the_run(schedule, at_end, run):
    seen, when_due = walk_firings(when(schedule, at_end=at_end), run), occasions(when(schedule, at_end=at_end), run)
    found = firings(when_due, run)
    assert found.count == len(seen)
    assert (found.first, found.last) == ((seen[0], seen[-1]) if seen else (None, None))
    assert [nth_firing(when_due, n, run) for n in range(1, len(seen) + 1)] == seen
    with pytest.raises(ValueError, match=f"there is no firing {len(seen) + 1}; there are {len(seen)}"):
        nth_firing(when_due, len(seen) + 1, run)


@given(schedules(), st.booleans(), ends(), st.data())
def test_firings_in_a_part_of_the_run(schedule, at_end, run, data):
    seen, when_due = walk_firings(when(schedule, at_end=at_end), run), occasions(when(schedule, at_end=at_end), run)
    low, high = sorted(data.draw(st.tuples(*[st.integers(0, run.final.update)] * 2)))
    inside = [firing for firing in seen if low < firing.iteration.update <= high]
    found = firings(when_due, run, run.iteration_after(low), run.iteration_after(high))
    assert found.count == len(inside)
    assert (found.first, found.last) == ((inside[0], inside[-1]) if inside else (None, None))


@given(schedules(), st.booleans(), ends())
def test_firings_at_an_update(schedule, at_end, run):
    seen, when_due = walk_firings(when(schedule, at_end=at_end), run), occasions(when(schedule, at_end=at_end), run)
    for update in range(1, run.final.update + 1):
        there = tuple(firing for firing in seen if firing.iteration.update == update)
        assert tuple(at for at in events_at(update, run) if fires(when_due, at, run)) == there


@given(st.sets(st.sampled_from((BeforeTraining, AfterUpdate, AfterEpoch, AfterTraining)), min_size=1), ends())
def test_a_callback_without_gate_fires_at_every_event_it_listens_to(kinds, run):
    seen, when_due = walk_firings(on(*kinds), run), occasions(on(*kinds), run)
    assert [nth_firing(when_due, n, run) for n in range(1, firings(when_due, run).count + 1)] == seen


@given(st.lists(st.integers(1, 60), max_size=5), st.integers(0, 3000))
def test_multiples_of_any(numbers, limit):
    assert multiples_of_any(numbers, limit) == sum(any(n % k == 0 for k in numbers) for n in range(1, limit + 1))


@given(st.integers(1, 12), st.integers(1, 40), run_lengths(), st.integers(0, 200))
def test_multiples_crossing_agrees_with_a_walk(step, n, run, updates):
    samples = [run.iteration_after(update).sample for update in range(updates + 1)]
    crossing = [u for u in range(step, updates + 1, step) if samples[u] // n > samples[u - 1] // n]
    assert steps_crossing_multiples(step, n, updates, run) == len(crossing)


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=2),
    st.lists(st.integers(1, 24), max_size=2),
    run_lengths(),
    st.data(),
)
def test_a_union_repeats_itself_after_its_period(updates, samples, run, data):
    """A union fires as often far from the start, where a test cannot walk, as near it."""
    members = [*map(EveryNUpdates, updates), *map(EveryNSamples, samples)]
    union = members[0]
    for member in members[1:]:
        union |= member
    period = lcm(*updates, run.updates_per_epoch) * lcm(1, *samples)  # a multiple of the shortest one
    low = data.draw(st.integers(0, 40))
    at, far = run.iteration_after, data.draw(st.integers(1, 10**6)) * period
    for length in (1, 7, 60):
        near = union.count(at(low), at(low + length), run)
        assert union.count(at(far + low), at(far + low + length), run) == near
    whole = union.count(START, at(period), run) if period < 2000 else None
    if whole is not None:
        assert union.count(at(low), at(far + low), run) == whole * (far // period)


@dataclasses.dataclass(frozen=True)
class Calls:
    """Records the calls of the methods of schedules, and of `Run.iteration_after`."""

    names: list = dataclasses.field(default_factory=list)

    def watch(self, monkeypatch):
        kinds = [Schedule, EveryNUpdates, EveryNEpochs, EveryNSamples, At]
        names = ("count", "due", "next_due", "threshold_after", "thresholds_in", "updates_crossing")
        for kind, name in [(kind, name) for kind in kinds for name in names] + [(Run, "iteration_after")]:
            if name in vars(kind):
                monkeypatch.setattr(kind, name, self.counting(vars(kind)[name]))

    def counting(self, function):
        def recorded(*args, **kwargs):
            self.names.append(function.__qualname__)
            return function(*args, **kwargs)

        return recorded


EVERYTHING = {
    "updates": EveryNUpdates(3),
    "samples": EveryNSamples(32),
    "two of updates": EveryNUpdates(3) | EveryNUpdates(4),
    "two events": EveryNUpdates(3) | EveryNEpochs(1),
    "with a point": EveryNUpdates(4) | At(TrainingIteration(update=1)),
    "in windows": EveryNUpdates(2).until(TrainingIteration(update=5)) | EveryNUpdates(5).starting(TrainingIteration(6)),
    "samples among them": EveryNSamples(48) | EveryNSamples(32) | EveryNUpdates(3),
    "large coprime intervals": EveryNSamples(99_991) | EveryNUpdates(9973) | EveryNUpdates(7),
}


@pytest.mark.parametrize("samples", [32, 31])
@pytest.mark.parametrize("schedule", EVERYTHING.values(), ids=EVERYTHING)
def test_a_billion_updates_take_as_few_calls_as_a_thousand(schedule, samples, monkeypatch):
    calls = Calls()
    calls.watch(monkeypatch)

    def count_calls(updates):
        run = Run(
            end=TrainingIteration(update=updates),
            updates_per_epoch=4,
            samples_per_epoch=samples,
            effective_batch_size=8,
        )
        calls.names.clear()
        firings(Occasions(schedule, (AfterTraining,)), run)
        return len(calls.names)

    # A bisection needs one more step for a run of twice the length; a walk would need twice as many.
    halvings = (10**9).bit_length()
    assert count_calls(10**9) <= halvings * count_calls(1000)
    assert count_calls(10**9) - count_calls(10**9 // 2) <= count_calls(1000)
