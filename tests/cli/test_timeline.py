"""Laws of the timeline: each firing is in one column, and labels are at their updates."""

from hypothesis import example, given
from hypothesis import strategies as st

from noether import Run, TrainingIteration
from noether.cli.plan.timeline import UNICODE_MARKS, counts, edges, row, scale, ticks
from noether.core.event import AfterTraining, AtEval, BeforeTraining
from noether.core.schedules.forecast import Occasions, firings
from noether.testing.strategies import run_lengths, schedules

columns = st.integers(1, 90)
once = st.sets(st.sampled_from((BeforeTraining, AtEval, AfterTraining))).map(tuple)


@given(schedules(), once, run_lengths(), columns)
def test_every_firing_is_in_one_column(schedule, kinds, run, width):
    occasions, places = Occasions(schedule, kinds), edges(run, width)
    counted = counts(occasions, run, width)
    assert sum(counted) == firings(occasions, run).count
    assert len(counted) == len(places) - 1 == min(width, run.final.update)
    assert (places[0], places[-1]) == (0, run.final.update)
    assert places == sorted(set(places))
    assert [mark != UNICODE_MARKS.nothing for mark in row(occasions, run, width, UNICODE_MARKS)] == [
        count > 0 for count in counted
    ]


@given(run_lengths(max_epochs=40), st.integers(20, 90))
@example(Run(end=TrainingIteration(epoch=18), updates_per_epoch=1, samples_per_epoch=1, effective_batch_size=1), 90)
def test_labels_are_at_the_columns_of_their_updates(run, width):
    places, lines = edges(run, width), scale(run, width)
    labels = {tick.update: f"U{tick.update}" for tick in ticks(run, width)}
    for update, label in labels.items():
        column = next((i for i in range(len(places) - 1) if places[i] < update <= places[i + 1]), 0)
        place = max(0, min(column, len(places) - 1 - len(label)))  # the line has no more columns
        if lines[-1].find(label, place) != place:  # only if an earlier label would touch it
            assert lines[-1][max(0, place - 1) : place + len(label)].strip()
    assert len(lines[-1]) <= max(len(places) - 1, len("U0"))
    assert lines[-1].startswith("U0")
