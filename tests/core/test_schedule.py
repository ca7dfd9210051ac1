"""The laws of schedules, each against the run walked event by event."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from noether.core.errors import SettingsError
from noether.core.iteration import TrainingIteration
from noether.core.run import Run
from noether.core.schedules.base import Union
from noether.core.schedules.counting import floor_sum
from noether.core.schedules.schedule import At, EveryNEpochs, EveryNSamples, EveryNUpdates
from noether.core.schedules.window import Thresholds, earliest_thresholds
from noether.testing.strategies import points, run_lengths, schedules


def walk(run):
    """Yield `(counters the event reads, previous, iteration)` of every event, as a loop would dispatch them."""
    iteration = TrainingIteration()
    while not iteration.reached(run.final):
        size = min(run.effective_batch_size, (iteration.epoch + 1) * run.samples_per_epoch - iteration.sample)
        previous, iteration = iteration, iteration.advance(samples=size)
        yield ("update", "sample"), previous, iteration
        if iteration.update == (iteration.epoch + 1) * run.updates_per_epoch:
            iteration = iteration.next_epoch()
            yield ("epoch",), previous, iteration


def firings(schedule, run):
    fired = []
    for counters, previous, iteration in walk(run):
        part = schedule.select_counters(*counters)
        if part is not None and part.due(previous, iteration):
            fired.append(iteration)
    return fired


def firings_between(start, end, iterations):
    return [i for i in iterations if i != start and i.reached(start) and end.reached(i)]


@given(schedules(), run_lengths(), st.data())
def test_count_is_what_walking_the_run_counts(schedule, run, data):
    boundaries = [run.iteration_after(u) for u in range(run.final.update + 1)]
    start, end = sorted(data.draw(st.tuples(*[st.integers(0, run.final.update)] * 2)))
    counted = schedule.count(boundaries[start], boundaries[end], run)
    assert counted == len(firings_between(boundaries[start], boundaries[end], firings(schedule, run)))


@given(schedules(), run_lengths(), st.data())
def test_count_is_additive_over_adjoining_intervals(schedule, run, data):
    a, b, c = sorted(data.draw(st.tuples(*[st.integers(0, run.final.update)] * 3)))
    at = run.iteration_after
    assert schedule.count(at(a), at(c), run) == schedule.count(at(a), at(b), run) + schedule.count(at(b), at(c), run)


@given(st.integers(1, 40), st.integers(1, 10**6), st.data())
def test_closed_form_for_samples_reaches_far(n, epochs, data):
    batch = data.draw(st.integers(1, 50))
    length = data.draw(st.integers(batch, 400))
    run = Run(updates_per_epoch=-(-length // batch), samples_per_epoch=length, effective_batch_size=batch)
    far, step = epochs * run.updates_per_epoch, data.draw(st.integers(1, 20))
    near = run.iteration_after(far + step)
    expected = sum(
        run.iteration_after(far + k + 1).sample // n > run.iteration_after(far + k).sample // n for k in range(step)
    )
    assert EveryNSamples(n).count(run.iteration_after(far), near, run) == expected


@given(schedules(), run_lengths())
def test_nothing_is_due_before_next_due(schedule, run):
    for counters, previous, iteration in walk(run):
        part = schedule.select_counters(*counters)
        if part is not None and part.due(previous, iteration):
            assert part.next_due(previous).reached(iteration)


@given(st.one_of(st.builds(EveryNEpochs, st.integers(1, 5)), st.builds(EveryNUpdates, st.integers(1, 9)),
                 st.builds(EveryNSamples, st.integers(1, 40))), run_lengths())  # fmt: skip
def test_next_due_is_the_first_due(schedule, run):
    fired = firings(schedule, run)
    position = TrainingIteration()
    for firing in fired:
        threshold = getattr(schedule.next_due(position), schedule.counter)
        assert getattr(position, schedule.counter) < threshold <= getattr(firing, schedule.counter)
        before = [i for _, _, i in walk(run) if not i.reached(firing)]
        assert all(getattr(i, schedule.counter) < threshold for i in before)
        position = firing


@given(st.integers(1, 30), st.lists(st.integers(1, 12), min_size=1, max_size=30), st.data())
def test_multiples_crossed_do_not_depend_on_the_batches(n, sizes, data):
    schedule = data.draw(st.just(EveryNSamples(n)) | points().map(EveryNSamples(n).until))
    schedule = data.draw(st.just(schedule) | st.integers(1, 60).map(
        lambda s: schedule.starting(TrainingIteration(sample=s))))  # fmt: skip
    if schedule.window.until.update or schedule.window.until.epoch:
        return

    def crossed(lengths):
        multiples, iteration = [], TrainingIteration()
        for length in lengths:
            after = iteration.advance(samples=length)
            inside = [s for s in range(iteration.sample + 1, after.sample + 1)
                      if schedule.due(TrainingIteration(sample=s - 1), TrainingIteration(sample=s))]  # fmt: skip
            assert schedule.due(iteration, after) == bool(inside)
            multiples += inside
            iteration = after
        return multiples

    assert crossed(sizes) == crossed([1] * sum(sizes))


@given(schedules(), schedules(), schedules(), run_lengths())
def test_union_is_due_when_either_is(a, b, c, run):
    for counters, previous, iteration in walk(run):
        dues = [part.due(previous, iteration) for s in (a, b, c) if (part := s.select_counters(*counters))]
        united = (a | b | c).select_counters(*counters)
        assert (united is not None and united.due(previous, iteration)) == any(dues)
    assert (a | (b | c)).members == ((a | b) | c).members
    assert (a | a).members == a.members if isinstance(a, Union) else (a | a).members == (a,)


@given(schedules(), points(), run_lengths())
def test_windows_split_a_schedule_without_overlap_or_gap(schedule, point, run):
    until, after = schedule.until(point), firings(schedule, run)
    early = firings(until, run)
    assert set(early) <= set(after)
    assert all(i in early for i in after if not i.reached(point))
    late = firings(schedule.starting(point), run)
    assert set(late) == {i for i in after if i.reached(point)} or schedule.select_counters("sample") is not None


@given(st.integers(0, 50), st.integers(1, 50), st.integers(0, 80), st.integers(0, 80))
def test_floor_sum(terms, divisor, slope, offset):
    assert floor_sum(terms, divisor, slope, offset) == sum((slope * i + offset) // divisor for i in range(terms))


def test_count_reads_only_what_it_needs():
    start, end = TrainingIteration(), TrainingIteration(update=10**9)
    assert EveryNUpdates(10).count(start, end, Run()) == 10**8
    with pytest.raises(AttributeError, match="not given 'updates_per_epoch'"):
        EveryNUpdates(10).starting(TrainingIteration(epoch=2)).count(start, end, Run())


def test_a_batch_that_crosses_several_multiples_fires_once():
    assert EveryNSamples(3).due(TrainingIteration(sample=2), TrainingIteration(sample=10))
    run = Run(updates_per_epoch=2, samples_per_epoch=16, effective_batch_size=8)
    assert EveryNSamples(3).count(TrainingIteration(), run.iteration_after(2), run) == 2


@pytest.mark.parametrize("n", [0, -1, 2.7, 2.0, True, "3", None])
def test_an_interval_is_a_whole_number_of_at_least_one(n):
    with pytest.raises(SettingsError, match="is not a whole number of at least 1"):
        EveryNUpdates(n)


def test_points_lie_on_one_counter():
    for wrong in [
        (),
        (TrainingIteration(),),
        (TrainingIteration(1, 1, 1),),
        (TrainingIteration(1), TrainingIteration(0, 1)),
    ]:
        with pytest.raises(SettingsError, match="give points on one counter"):
            At(*wrong)


@pytest.mark.parametrize("wrong", [3, None, "E3", (1, 2, 3)], ids=str)
@pytest.mark.parametrize("setting", ["At", "starting", "until"])
def test_a_point_that_is_none_is_refused(setting, wrong):
    functions = {"At": At, "starting": EveryNUpdates(1).starting, "until": EveryNUpdates(1).until}
    with pytest.raises(SettingsError) as refused:
        functions[setting](wrong)
    assert str(refused.value).startswith(
        f"{setting}: {wrong!r} is not a point of a run: write TrainingIteration(epoch=3)"
    )


def test_until_the_start_is_refused():
    with pytest.raises(SettingsError, match="until: E0_U0_S0"):
        EveryNUpdates(1).until(TrainingIteration())


@given(st.integers(0, 99), st.integers(0, 99), st.integers(0, 99))
def test_iteration_round_trips_through_text(epoch, update, sample):
    iteration = TrainingIteration(epoch, update, sample)
    assert TrainingIteration.parse(str(iteration)) == iteration
    assert dataclasses.replace(iteration, epoch=epoch) == iteration


@pytest.mark.parametrize("text", ["", "U", "10", "S1_U2", "E1U2", "E1_", "_U2", "E-1", "E1_U2_S3_", "E٣", "E01"])
def test_invalid_text_is_refused(text):
    with pytest.raises(SettingsError, match="is not an iteration like"):
        TrainingIteration.parse(text)


def test_thresholds_merge_to_the_earlier():
    assert earliest_thresholds((Thresholds(1, None, 5), Thresholds(2, 3, None))) == Thresholds(1, 3, 5)
    assert earliest_thresholds(()) == Thresholds()
