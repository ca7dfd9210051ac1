"""Every decorator, also called as a function; and what it refuses."""

import pytest
from hypothesis import given, settings
from loop_traces import drive, start

from noether.core.callback import OptionalKey, declaration_of, listens_to, tracker_of
from noether.core.callbacks import BestMetricCallback, LrCallback, PeriodicCallback, ProgressCallback
from noether.core.combinators import callback, every_n_epochs, every_n_samples, every_n_updates, on, when
from noether.core.effect import LogText
from noether.core.errors import SettingsError
from noether.core.event import (
    AfterAccumulationStep,
    AfterEpoch,
    AfterTraining,
    AfterUpdate,
    AtEval,
    BeforeTraining,
    Event,
)
from noether.core.iteration import TrainingIteration
from noether.core.metrics import log
from noether.core.reducer import compose
from noether.core.run import Run
from noether.core.schedules.schedule import At, EveryNEpochs, EveryNSamples, EveryNUpdates
from noether.core.state import TrainState
from noether.testing.strategies import run_lengths, schedules


def note(state, event):
    return state, (LogText(f"{type(event).__name__} {state.iteration}"),)


def lines(callback, run, **options):
    """Return the texts that a callback logs in a run."""
    return [effect.text for *_, effects in drive(compose(callback), run, **options) for effect in effects]


RUN = Run(end=TrainingIteration(epoch=2), updates_per_epoch=3, samples_per_epoch=10, effective_batch_size=4)


def test_a_gate_as_decorator_and_as_function():
    @every_n_updates(2)
    def decorated(state, event):
        return note(state, event)

    expected = ["AfterUpdate E0_U2_S8", "AfterUpdate E1_U4_S14", "AfterUpdate E1_U6_S20"]
    assert lines(decorated, RUN) == lines(every_n_updates(2)(note), RUN) == expected
    assert decorated.__name__ == "decorated"
    assert decorated.__wrapped__(TrainState(), AtEval())[1] == (LogText("AtEval E0_U0_S0"),)


def test_every_n_epochs():
    assert lines(every_n_epochs(1)(note), RUN) == ["AfterEpoch E1_U3_S10", "AfterEpoch E2_U6_S20"]
    assert lines(every_n_epochs(2)(note), RUN) == ["AfterEpoch E2_U6_S20"]
    assert lines(every_n_epochs(3)(note), RUN) == []


def test_every_n_samples():
    assert lines(every_n_samples(9)(note), RUN) == ["AfterUpdate E0_U3_S10", "AfterUpdate E1_U5_S18"]
    assert len(lines(every_n_samples(1)(note), RUN)) == 6
    assert lines(every_n_samples(21)(note), RUN) == []


def test_at_end_fires_after_training_unless_it_was_due_there():
    end = "AfterTraining E2_U6_S20"
    assert lines(every_n_updates(4, at_end=True)(note), RUN) == ["AfterUpdate E1_U4_S14", end]
    assert lines(every_n_updates(3, at_end=True)(note), RUN) == ["AfterUpdate E0_U3_S10", "AfterUpdate E1_U6_S20"]
    assert lines(every_n_epochs(2, at_end=True)(note), RUN) == ["AfterEpoch E2_U6_S20"]
    assert lines(every_n_epochs(3, at_end=True)(note), RUN) == [end]
    assert lines(every_n_samples(20, at_end=True)(note), RUN) == ["AfterUpdate E1_U6_S20"]
    assert lines(every_n_samples(21, at_end=True)(note), RUN) == [end]
    either = EveryNEpochs(2) | EveryNUpdates(5)
    assert end not in lines(when(either, at_end=True)(note), RUN)


def test_at_end_of_a_run_that_stops_in_an_epoch():
    def stop(state, event):
        return state.request_stop("enough"), ()

    stopping = when(At(TrainingIteration(update=4)))(stop)
    assert lines(compose(stopping, every_n_epochs(1, at_end=True)(note)), RUN) == [
        "AfterEpoch E1_U3_S10",
        "AfterTraining E1_U4_S14",
    ]


def test_at_end_reads_the_last_update_without_its_epoch():
    """At the last update its epoch was not counted yet, so a window that begins there never opened."""
    one_epoch = RUN.replace(end=TrainingIteration(epoch=1))
    late = EveryNUpdates(1).starting(TrainingIteration(epoch=1))
    assert lines(when(late, at_end=True)(note), one_epoch) == ["AfterTraining E1_U3_S10"]


@settings(max_examples=60, deadline=None)
@given(schedules(12), run_lengths(max_epochs=3))
def test_at_end_fires_exactly_when_the_last_update_and_epoch_did_not(schedule, run):
    trace = list(drive(compose(when(schedule, at_end=True)(note)), run))
    last_update = [effects for event, *_, effects in trace if isinstance(event, AfterUpdate)][-1]
    last_epoch = [effects for event, *_, effects in trace if isinstance(event, AfterEpoch)][-1]
    (end,) = [effects for event, *_, effects in trace if isinstance(event, AfterTraining)]
    assert bool(end) == (not last_update and not last_epoch)


def test_at_end_of_a_run_without_updates():
    nothing = TrainState()
    assert every_n_updates(2, at_end=True)(note)(nothing, AfterTraining())[1] == (LogText("AfterTraining E0_U0_S0"),)
    assert every_n_updates(2)(note)(nothing, AfterTraining()) == (nothing, ())


def test_when_takes_a_schedule():
    schedule = EveryNEpochs(1) | At(TrainingIteration(update=2))
    expected = ["AfterUpdate E0_U2_S8", "AfterEpoch E1_U3_S10", "AfterEpoch E2_U6_S20"]
    assert lines(when(schedule)(note), RUN) == expected
    assert declaration_of(when(schedule)(note)).gate.schedule == schedule


def test_when_takes_a_predicate():
    @when(lambda state, event: isinstance(event, AfterTraining if state.ended else AfterUpdate)
          and state.iteration.sample in {14, 20})  # fmt: skip
    def decorated(state, event):
        return note(state, event)

    assert lines(decorated, RUN) == ["AfterUpdate E1_U4_S14", "AfterUpdate E1_U6_S20", "AfterTraining E2_U6_S20"]
    assert declaration_of(decorated).gate is None


def test_a_predicate_is_called_on_every_event():
    event_types = []
    when(lambda state, event: event_types.append(type(event)) or False)(note)(TrainState(), AtEval())
    compose(when(lambda state, event: event_types.append(type(event)) or False)(note))(
        TrainState(), AfterAccumulationStep()
    )
    assert event_types == [AtEval, AfterAccumulationStep]


def test_at_end_does_not_go_with_a_predicate():
    with pytest.raises(TypeError, match=r"^at_end needs a schedule; a predicate can test for AfterTraining itself$"):
        when(lambda state, event: True, at_end=True)


def test_on():
    @on(AfterTraining)
    def decorated(state, event):
        return note(state, event)

    assert lines(decorated, RUN) == ["AfterTraining E2_U6_S20"]
    assert lines(on(BeforeTraining, AfterEpoch)(note), RUN) == [
        "BeforeTraining E0_U0_S0",
        "AfterEpoch E1_U3_S10",
        "AfterEpoch E2_U6_S20",
    ]
    state = TrainState()
    assert on(AfterEpoch)(note)(state, AtEval()) == (state, ())
    assert on(Event)(note)(state, AtEval())[1] != ()


@pytest.mark.parametrize("wrong", [(), ("AfterUpdate",), (note,), (AfterUpdate, int)])
def test_on_takes_types_of_events(wrong):
    with pytest.raises(TypeError, match="on takes types of events, like on"):
        on(*wrong)


@pytest.mark.parametrize("n", [0, -1, 2.7, 2.0, True, "3", None])
@pytest.mark.parametrize(("adverb", "name"), [(every_n_epochs, "every_n_epochs"), (every_n_updates, "every_n_updates"),
                                              (every_n_samples, "every_n_samples")])  # fmt: skip
def test_bad_intervals(adverb, name, n):
    with pytest.raises(SettingsError) as refused:
        adverb(n)
    assert str(refused.value) == f"{name}: {n!r} is not a whole number of at least 1"


class Tracks(PeriodicCallback):
    def track_after_update_step(self, state, event):
        return state, ()


def tracking(body):
    return callback("mean", init=lambda state: 0, track=lambda memory, event: memory)(body)


SCHEDULED = "already has a schedule: unite both with | or remove one"
TRACKING = (
    "tracks every update, but behind this gate it would miss some: "
    "put @callback(track=...) above the gate, or give it an interval"
)


@pytest.mark.parametrize(
    ("inner", "message"),
    [
        (every_n_updates(3)(note), f"note {SCHEDULED}"),
        (every_n_epochs(3)(note), f"note {SCHEDULED}"),
        (LrCallback(every_n_updates=3), f"LrCallback/U3 {SCHEDULED}"),
        (callback("named", init=lambda state: 0)(every_n_updates(3)(note)), f"named {SCHEDULED}"),
        (tracking(note), f"mean {TRACKING}"),
        (tracking(every_n_updates(3)(note)), f"mean {TRACKING}"),
        (callback("outer")(tracking(note)), f"outer {TRACKING}"),
        (Tracks(every_n_updates=3), f"Tracks/U3 {TRACKING}"),
        (ProgressCallback(every_n_updates=3), f"ProgressCallback/U3 {TRACKING}"),
        (compose(note, every_n_updates(3)(note)), f"note {SCHEDULED}"),
        (compose(note, compose(tracking(note))), f"mean {TRACKING}"),
        (callback("outer")(compose(note, every_n_updates(3)(note))), f"note {SCHEDULED}"),
        (callback("outer")(callback("x")(compose(LrCallback(every_n_updates=3)))), f"LrCallback/U3 {SCHEDULED}"),
    ],
)
@pytest.mark.parametrize("gate", [every_n_updates(2), every_n_epochs(2), when(EveryNSamples(2))])
def test_a_callback_with_a_schedule_or_tracking_cannot_be_gated(inner, message, gate):
    with pytest.raises(TypeError) as refused:
        gate(inner)
    assert str(refused.value) == message


@pytest.mark.parametrize("limit", [on(AfterUpdate), on(AfterEpoch), when(lambda state, event: True)])
@pytest.mark.parametrize("inner", [every_n_updates(2)(note), LrCallback(every_n_updates=2), tracking(note)])
def test_an_event_or_predicate_goes_below_a_schedule_and_tracking(limit, inner):
    message = (
        r"already has a schedule: put (on|when) below it, next to the function, or remove one$|tracks every update"
    )
    for each in (inner, compose(note, inner), callback("outer")(compose(inner))):
        with pytest.raises(TypeError, match=message):
            limit(each)
    below = every_n_updates(2)(when(lambda state, event: state.iteration.update > 2)(note))
    assert lines(below, RUN) == ["AfterUpdate E1_U4_S14", "AfterUpdate E1_U6_S20"]


def samples_seen(gate):
    @callback("seen", init=lambda state: 0, track=lambda memory, event: memory + event.samples, produces=("seen",))
    @gate
    def log_seen(state, event):
        return log(state, event, {"seen": state.memory("seen")})

    return log_seen


@pytest.mark.parametrize(
    ("gate", "expected"),
    [
        (every_n_updates(2), [8, 14, 20]),
        (every_n_epochs(1), [10, 20]),
        (every_n_samples(9), [10, 18]),
        (every_n_updates(4, at_end=True), [14, 20]),
        (on(AfterTraining), [20]),
        (when(lambda state, event: isinstance(event, AfterEpoch)), [10, 20]),
    ],
)
def test_tracking_sees_every_update_outside_of_a_gate(gate, expected):
    logged = [effect.values["seen"] for *_, effects in drive(compose(samples_seen(gate)), RUN) for effect in effects]
    assert logged == expected


def test_tracking_runs_before_the_body():
    body = samples_seen(every_n_updates(1))
    state, effects = body(TrainState().advance(samples=4), AfterUpdate(samples=4))
    assert effects[0].values == {"seen": 4}
    assert state.memory("seen") == 4


def test_tracking_alone_does_not_call_a_body_that_does_not_listen():
    body = samples_seen(on(AfterTraining))
    state, effects = body(TrainState().advance(samples=4), AfterUpdate(samples=4))
    assert (state.memory("seen"), effects) == (4, ())
    assert listens_to(body, AfterUpdate)
    assert not listens_to(body, AfterEpoch)
    assert tracker_of(body) is not None
    assert tracker_of(callback("still", init=lambda state: 0)(note)) is None


def test_tracking_needs_a_memory():
    message = r"^callback 'x' has track but no memory: add init=lambda state: ..., its first memory$"
    with pytest.raises(TypeError, match=message):
        callback("x", track=lambda memory, event: memory)


def test_a_callback_fills_in_its_own_memory_when_called_alone():
    @callback("count", init=lambda state: len(state.params))
    def count(state, event):
        return state.remember("count", state.memory("count") + 1), ()

    assert count(start(), AtEval())[0].memory("count") == 2
    assert count(TrainState(callback_states={"count": 5}), AtEval())[0].memory("count") == 6
    assert dict(count.init(start())) == {"count": 1}


def test_memory_and_declarations_pass_through_every_decorator():
    inner = callback("inner", init=lambda state: 1, produces=("a",), consumes=("b",))(note)
    wrapped = [
        inner,
        every_n_updates(2)(inner),
        on(AfterUpdate)(inner),
        when(lambda state, event: True)(inner),
        callback("outer")(inner),
        compose(inner),
        every_n_updates(2)(compose(inner)),
        every_n_epochs(1)(on(AfterUpdate)(compose(inner))),
    ]
    for each in wrapped:
        assert dict(each.init(TrainState())) == {"inner": 1}
        assert (each.produces, each.consumes) == (("a",), ("b",))
    outer = callback("outer", init=lambda state: 2, produces=(), consumes=("c", "b"))(inner)
    assert dict(outer.init(TrainState())) == {"inner": 1, "outer": 2}
    assert (outer.produces, outer.consumes) == ((), ("b", "c"))
    best = BestMetricCallback(every_n_epochs=1, metric_key="val/loss", optional_target_metric_keys=("x",))
    assert callback("outer")(best).consumes == compose(best).consumes == ("val/loss", "nonfinite", "x")


def test_a_key_that_one_needs_and_another_may_read_is_required():
    inner = callback("inner", consumes=(OptionalKey("a"), "b"), produces=())(note)
    outer = callback("outer", consumes=("a", OptionalKey("b"), OptionalKey("c")))(inner)
    assert declaration_of(outer).consumes == ("a", "b", "c")
    assert declaration_of(outer).required == ("a", "b")
    assert declaration_of(compose(inner, outer)).required == ("a", "b")


def test_a_decorated_reducer_calls_all_its_members():
    both = compose(note, callback("count", init=lambda state: 0)(note))
    assert lines(every_n_updates(5)(both), RUN) == ["AfterUpdate E1_U5_S18"] * 2
    assert lines(on(AfterTraining)(both), RUN) == ["AfterTraining E2_U6_S20"] * 2
    assert (
        lines(when(lambda state, event: isinstance(event, AfterTraining))(both), RUN) == ["AfterTraining E2_U6_S20"] * 2
    )
    assert lines(callback("named")(on(AfterTraining)(both)), RUN) == ["AfterTraining E2_U6_S20"] * 2


def test_a_producer_and_its_consumer_can_be_decorated_together():
    produce = callback("produce", produces=("val/accuracy",))(lambda s, e: log(s, e, {"val/accuracy": 0.5}))
    best = BestMetricCallback(every_n_epochs=1, metric_key="val/accuracy")
    reducer = compose(callback("both")(compose(on(AfterEpoch)(produce), best)))
    state, _ = reducer(TrainState(), BeforeTraining(run=RUN))
    _, effects = reducer(state.advance(samples=4).next_epoch(), AfterEpoch(run=RUN))
    assert effects[1].values["val/accuracy/best"] == 0.5
