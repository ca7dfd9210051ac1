"""Callbacks that do not fit together are refused before the first update; coverage is tested against walked runs."""

import re
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loop_traces import drive

from noether.core.callbacks import (
    BestCheckpointCallback,
    BestMetricCallback,
    EvaluateCallback,
    LrCallback,
    MetricCallback,
    MetricEarlyStopping,
    OfflineLossCallback,
    OnlineLossCallback,
)
from noether.core.combinators import callback, every_n_epochs, on, when
from noether.core.declarations import DeclarationError, check_declarations, covers
from noether.core.event import AfterTraining, AfterUpdate, BeforeTraining
from noether.core.iteration import TrainingIteration
from noether.core.metric_keys import keys_overlap
from noether.core.metrics import is_current, log
from noether.core.reducer import compose, identity
from noether.core.run import Run
from noether.core.schedules.gate import Gate
from noether.core.schedules.schedule import At, EveryNEpochs, EveryNSamples, EveryNUpdates
from noether.core.state import TrainState
from noether.testing.strategies import run_lengths, schedules


def misfits(*callbacks, run=None):
    """Return the index and the message of each misfit."""
    try:
        check_declarations(callbacks, TrainState(), run or Run())
    except DeclarationError as error:
        return [(callbacks.index(misfit.callback), misfit.message) for misfit in error.misfits]
    return []


def metric(**interval):
    return MetricCallback(dataset_key="val", metric="accuracy", **interval)


def best(**settings):
    return BestMetricCallback(**{"metric_key": "val/accuracy", **settings})


def stopping(**settings):
    return MetricEarlyStopping(**{"metric_key": "val/accuracy", "tolerance": 2, **settings})


def test_fitting_callbacks_are_accepted():
    fitting = (OnlineLossCallback(every_n_epochs=1), metric(every_n_epochs=1), best(every_n_epochs=2),
               OfflineLossCallback(dataset_key="val", every_n_epochs=1), stopping(every_n_epochs=1),
               BestCheckpointCallback(metric_key="loss/val/total", every_n_epochs=3))  # fmt: skip
    assert misfits(*fitting) == []
    assert misfits() == []


def test_a_metric_without_producer_is_refused():
    assert misfits(best(every_n_epochs=1, metric_key="val/acuracy", mode="higher"), metric(every_n_epochs=1)) == [
        (
            0,
            (
                "BestMetricCallback/E1/val/acuracy consumes 'val/acuracy', which no callback produces; "
                "produced before it: nothing"
            ),
        )
    ]
    assert misfits(metric(every_n_epochs=1), best(every_n_epochs=1, metric_key="val/acuracy", mode="higher")) == [
        (
            1,
            (
                "BestMetricCallback/E1/val/acuracy consumes 'val/acuracy', which no callback produces; "
                "produced before it: val/accuracy; did you mean 'val/accuracy'?"
            ),
        )
    ]


def test_a_consumer_before_its_producer_is_refused():
    assert misfits(best(every_n_epochs=1), metric(every_n_epochs=1)) == [
        (
            0,
            (
                "BestMetricCallback/E1/val/accuracy consumes 'val/accuracy': "
                "list it after MetricCallback/E1/val/accuracy, which produces it"
            ),
        )
    ]


def test_a_consumer_that_skips_a_missing_metric_needs_a_producer_but_not_its_interval():
    for skipping in (best(every_n_epochs=1, missing="skip"), stopping(every_n_updates=3, missing="skip")):
        assert misfits(metric(every_n_epochs=2), skipping) == []
        assert len(misfits(skipping)) == len(misfits(skipping, metric(every_n_epochs=2))) == 1
    assert (
        "list it after MetricCallback"
        in misfits(best(every_n_epochs=1, missing="skip"), metric(every_n_epochs=1))[0][1]
    )


def test_a_consumer_due_without_its_producer_is_refused():
    assert misfits(metric(every_n_epochs=2), best(every_n_epochs=1)) == [
        (
            1,
            (
                "BestMetricCallback/E1/val/accuracy consumes 'val/accuracy' where MetricCallback/E2/val/accuracy does "
                "not produce it: E1 against E2; give both the same interval, or set missing: skip"
            ),
        )
    ]
    assert misfits(metric(every_n_epochs=1), stopping(every_n_epochs=1, at_end=True)) == [
        (
            1,
            (
                "MetricEarlyStopping/E1/val/accuracy consumes 'val/accuracy' where MetricCallback/E1/val/accuracy does "
                "not produce it: E1 and at the end against E1; give both the same interval, or set missing: skip"
            ),
        )
    ]
    consumer = callback("late", consumes=("val/accuracy",), produces=())
    gated = when(EveryNUpdates(3) | EveryNEpochs(3))(identity)
    assert misfits(metric(every_n_epochs=2), consumer(gated)) == [
        (
            1,
            (
                "late consumes 'val/accuracy' where MetricCallback/E2/val/accuracy does not produce it: "
                "U3|E3 against E2; give both the same interval"
            ),
        )
    ]
    at = when(At(TrainingIteration(update=3), TrainingIteration(update=9)))(identity)
    assert misfits(metric(every_n_epochs=2), consumer(at))[0][1].endswith(
        "at_U3_U9 against E2; give both the same interval"
    )


def test_producer_and_consumer_at_the_end_fit():
    assert misfits(metric(every_n_epochs=1, at_end=True), stopping(every_n_epochs=1, at_end=True)) == []


def test_two_producers_of_one_key_are_refused():
    message = "EvaluateCallback/E1/val and MetricCallback/E1/val/accuracy both produce 'val/accuracy'; remove one"
    both = EvaluateCallback(every_n_epochs=1, dataset_key="val", measures=("accuracy",))
    assert misfits(metric(every_n_epochs=1), both) == [(1, message)]
    star = callback("star", produces=("val/*",))(identity)
    assert misfits(metric(every_n_epochs=1), star) == [
        (1, "star and MetricCallback/E1/val/accuracy both produce 'val/*'; remove one")
    ]
    assert misfits(OnlineLossCallback(every_n_epochs=1), OnlineLossCallback(every_n_epochs=2)) == []


def test_two_memories_of_one_name_are_refused():
    message = "3 callbacks have a memory named 'a'; give this one another id or name"
    members = [callback("a", init=lambda state: 0)(lambda state, event: (state, ())) for _ in range(3)]
    assert misfits(*members) == [(2, message)]
    assert misfits(best(every_n_epochs=1, id="b"), stopping(every_n_epochs=1, id="b"), metric(every_n_epochs=1))[0] == (
        1,
        "2 callbacks have a memory named 'b'; give this one another id or name",
    )


def test_a_reader_of_an_optional_key_comes_after_its_producer():
    offline, online = OfflineLossCallback(every_n_epochs=1, dataset_key="val"), OnlineLossCallback(every_n_epochs=1)
    assert misfits(offline, online) == [
        (
            0,
            (
                "OfflineLossCallback/E1/val reads 'loss/online/*/E1', which OnlineLossCallback/E1 logs later at the "
                "same event: list it after OnlineLossCallback/E1"
            ),
        )
    ]
    assert misfits(online, offline) == []
    assert misfits(offline, OnlineLossCallback(every_n_epochs=2)) == []
    assert misfits(offline) == []


def test_all_misfits_are_reported_together():
    callbacks = (best(every_n_epochs=1), stopping(every_n_epochs=1), metric(every_n_epochs=1), metric(every_n_epochs=2))
    assert [index for index, _ in misfits(*callbacks)] == [3, 0, 1]
    with pytest.raises(DeclarationError) as refused:
        compose(*callbacks)(TrainState(), BeforeTraining())
    assert str(refused.value) == "\n".join(message for _, message in misfits(*callbacks))


def test_a_function_without_declarations_may_produce_any_key():
    def bare(state, event):
        return state, ()

    assert misfits(bare, best(every_n_epochs=1)) == []
    assert misfits(bare, metric(every_n_epochs=2), best(every_n_epochs=1)) == []
    assert len(misfits(best(every_n_epochs=1), bare)) == 1
    assert len(misfits(callback("says", produces=())(bare), best(every_n_epochs=1))) == 1


def test_a_reducer_checks_before_the_first_update_only():
    reducer = compose(best(every_n_epochs=1))
    for resumed in (False, True):
        with pytest.raises(DeclarationError, match="which no callback produces"):
            reducer(TrainState(), BeforeTraining(resumed=resumed))
    state = TrainState().advance(samples=1)
    assert reducer(state, AfterUpdate()) == (state, ())


def test_a_nested_reducer_is_checked_as_one():
    produce = callback("produce", produces=("x",))(identity)
    consume = callback("consume", consumes=("x", "y"), produces=())(identity)
    inside = on(AfterTraining)(compose(produce, consume))
    assert misfits(inside) == [(0, "consume consumes 'y', which no callback produces; produced before it: x")]


# ------------------------------------------------------------------------------------------------ coverage

INTERVALS = st.one_of(*(st.builds(kind, st.integers(1, 9)) for kind in (EveryNEpochs, EveryNUpdates, EveryNSamples)))


def uncovered_events(producer, consumer, run):
    """Return the events of `run` at which the consumer is open and the producer's value is not current."""

    def produce(state, event):
        return log(state, event, {"value": 0.0}) if producer.opens(state, event) else (state, ())

    return [
        event
        for event, _, after, _ in drive(compose(produce), run)
        if consumer.opens(after, event) and not is_current(after, "value")
    ]


def open_events(gate, run):
    return [event for event, before, _, _ in drive(identity, run) if gate.opens(before, event)]


def agrees(producer, consumer, run, long):
    """Compare `covers` for `run` with a walk through it; `long` is long enough to contain an uncovered event."""
    answer = covers(producer, consumer, run)
    if answer is True:
        assert uncovered_events(producer, consumer, run) == []
    if answer is False:
        # A window may be closed during the whole run.
        never_due = any(not open_events(Gate(member), long) for member in consumer.schedule.members)
        assert uncovered_events(producer, consumer, long) or never_due


@settings(max_examples=100, deadline=None)
@given(INTERVALS, INTERVALS, run_lengths(max_epochs=3), st.booleans())
def test_coverage_of_intervals_agrees_with_walking_the_run(producer, consumer, run, at_end):
    long = run.replace(end=TrainingIteration(epoch=74))  # beyond the least common multiple of any two
    agrees(Gate(producer, at_end), Gate(consumer, at_end), run, long)
    assert covers(Gate(producer), Gate(producer), run) is True


@settings(max_examples=150, deadline=None)
@given(schedules(6), schedules(6), st.booleans(), st.booleans(), run_lengths(max_epochs=3), st.data())
def test_coverage_of_any_schedule_agrees_with_walking_the_run(producer, other, at_end, reads_at_end, run, data):
    consumer = Gate(data.draw(st.sampled_from((other, producer, producer | other))), reads_at_end)
    # A consumer at the end needs a producer at the end, which another test checks.
    agrees(Gate(producer, at_end or reads_at_end), consumer, run, run.replace(end=TrainingIteration(epoch=31)))


@settings(max_examples=150, deadline=None)
@given(INTERVALS, INTERVALS, run_lengths(max_epochs=1))
def test_coverage_of_intervals_is_undecided_only_for_samples(producer, consumer, run):
    answer = covers(Gate(producer), Gate(consumer), run)
    if "sample" not in {producer.counter, consumer.counter}:
        assert answer is not None
    elif answer is None:
        assert producer.n > 1


@pytest.mark.parametrize(
    ("producer", "consumer"),
    [
        (EveryNSamples(4), EveryNUpdates(4)),  # how many updates cross a multiple depends on the batches
        (EveryNSamples(4), EveryNEpochs(1)),
        (EveryNUpdates(4), EveryNSamples(4)),
        (EveryNUpdates(4), EveryNEpochs(1)),  # the length of an epoch is unknown
        (EveryNSamples(4), EveryNSamples(6)),  # the length of a batch is unknown
        (EveryNUpdates(2), At(TrainingIteration(update=4))),  # `covers` does not compare single points
        (At(TrainingIteration(update=4)), EveryNUpdates(4)),
        (EveryNUpdates(2).until(TrainingIteration(update=9)), EveryNUpdates(4)),  # windows that differ
        (EveryNUpdates(2), EveryNUpdates(3).until(TrainingIteration(update=9))),  # a window may leave out the rest
        (EveryNUpdates(2) | EveryNUpdates(3), EveryNUpdates(5)),  # several may cover it together
    ],
)
def test_undecided_coverage(producer, consumer):
    assert covers(Gate(producer), Gate(consumer), Run()) is None


def test_coverage_without_a_gate():
    gate = Gate(EveryNUpdates(2))
    assert covers(None, gate, Run()) is True
    assert covers(None, None, Run()) is True
    assert covers(gate, None, Run()) is None


def test_a_batch_that_crosses_several_multiples_is_no_misfit():
    long = Run(updates_per_epoch=10, samples_per_epoch=80, effective_batch_size=8)
    short = Run(updates_per_epoch=80, samples_per_epoch=80, effective_batch_size=1)
    producer, consumer = Gate(EveryNSamples(4)), Gate(EveryNSamples(6))
    assert covers(producer, consumer, long) is None
    assert covers(producer, consumer, short) is False
    assert uncovered_events(producer, consumer, long.replace(end=TrainingIteration(epoch=3))) == []


def test_a_consumer_at_the_end_needs_a_producer_at_the_end():
    """A producer at every update is not enough, because a run may end before its first update."""
    producer, consumer = Gate(EveryNUpdates(1)), Gate(EveryNUpdates(1), at_end=True)
    assert covers(producer, consumer, Run()) is False
    none = Run(end=TrainingIteration(), updates_per_epoch=1, samples_per_epoch=1, effective_batch_size=1)
    assert len(uncovered_events(producer, consumer, none)) == 1
    assert uncovered_events(Gate(EveryNUpdates(1), at_end=True), consumer, none) == []


def test_a_window_that_begins_with_an_epoch_opens_later_for_updates():
    late = TrainingIteration(epoch=1)
    producer, consumer = Gate(EveryNUpdates(1).starting(late)), Gate(EveryNEpochs(1).starting(late))
    run = Run(end=late, updates_per_epoch=2, samples_per_epoch=2, effective_batch_size=1)
    assert covers(producer, consumer, run) is None
    assert len(uncovered_events(producer, consumer, run)) == 1


# ------------------------------------------------------------------------------------------------ key patterns

WORDS = st.text("ab[]*?!", max_size=4)


@given(st.lists(WORDS, min_size=1, max_size=3), st.lists(WORDS, min_size=1, max_size=3))
def test_matching_is_symmetric_and_every_key_matches_itself(a, b):
    assert keys_overlap("/".join(a), "/".join(a))
    assert keys_overlap("/".join(a), "/".join(b)) == keys_overlap("/".join(b), "/".join(a))


@given(st.text("ab*", max_size=4), st.text("ab*", max_size=4))
def test_two_patterns_match_if_some_key_matches_both(a, b):
    pattern_a, pattern_b = (re.compile(p.replace("*", ".*")) for p in (a, b))
    keys = ("".join(letters) for n in range(7) for letters in product("ab", repeat=n))
    assert keys_overlap(a, b) == any(pattern_a.fullmatch(key) and pattern_b.fullmatch(key) for key in keys)


@pytest.mark.parametrize(
    ("pattern", "key", "expected"),
    [
        ("loss/val/*", "loss/val/total", True),
        ("loss/val/*", "loss/val", False),
        ("loss/val/*", "loss/val/total/ema=0.9", False),
        ("*/accuracy", "val/accuracy", True),
        ("val/iou[0]", "val/iou[0]", True),
        ("val/iou[0]", "val/iou0", False),
        ("lo*s/x", "loss/x", True),
        ("a*/x", "*b/x", True),
        ("a*c", "b*", False),
    ],
)
def test_patterns(pattern, key, expected):
    assert keys_overlap(pattern, key) is expected


def test_two_lr_callbacks_produce_the_same_keys():
    assert [index for index, _ in misfits(LrCallback(every_n_epochs=1), LrCallback(every_n_updates=9))] == [1] * 4


def test_every_n_epochs_of_a_consumer_is_its_gate():
    consumer = every_n_epochs(3)(callback("c", consumes=("val/accuracy",), produces=())(identity))
    assert misfits(metric(every_n_epochs=2), consumer)[0][1].endswith("E3 against E2; give both the same interval")
    assert misfits(metric(every_n_epochs=1), consumer) == []
