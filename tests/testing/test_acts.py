"""A law holds only if the callback acted: runs reach every gate, and a callback that never acts fails."""

import pytest
from law_examples import rotate

from noether import (
    AfterEpoch,
    AfterUpdate,
    At,
    AtEval,
    BeforeTraining,
    EveryNEpochs,
    EveryNSamples,
    EveryNUpdates,
    LogText,
    Run,
    TrainingIteration,
    callback,
    compose,
    every_n_epochs,
    every_n_samples,
    every_n_updates,
    identity,
    log,
    on,
    when,
)
from noether.core.callbacks import CheckpointCallback, EMACallback, FixedUpdateEarlyStopping, OnlineLossCallback
from noether.core.callbacks.base import CallbackBase
from noether.core.callbacks.periodic import PeriodicCallback
from noether.testing import (
    LawError,
    check_composition,
    check_independent,
    check_pure,
    check_rank_agreement,
    check_resumable,
    drive,
)
from noether.testing.acts import count_acts, parts_of
from noether.testing.law_runs import record_runs
from noether.testing.strategies import runs
from noether.testing.traces import Trace


class ReachedError(Exception):
    """The body of a callback was called."""


def body(state, event):
    raise ReachedError


def says(state, event):
    return state, (LogText(f"{state.iteration}"),)


def does_nothing(state, event):
    return state, ()


GATES = {
    "5 epochs": every_n_epochs(5),
    "700 epochs": every_n_epochs(700),
    "50 updates": every_n_updates(50),
    "a million updates": every_n_updates(10**6),
    "12345 samples": every_n_samples(12345),
    "a point": when(At(TrainingIteration(sample=4321))),
    "a late window": when(EveryNUpdates(7).starting(TrainingIteration(epoch=40))),
    "a window of one epoch": when(
        EveryNUpdates(2).starting(TrainingIteration(epoch=29)).until(TrainingIteration(epoch=30))
    ),
    "a union": when(EveryNSamples(10**7) | EveryNEpochs(10**5)),
    "the end only": every_n_updates(10**9, at_end=True),
    "an evaluation": on(AtEval),
    "the start": on(BeforeTraining),
    "a resume": when(lambda state, event: getattr(event, "resumed", False)),
    "a skipped update": when(lambda state, event: getattr(event, "skipped", False)),
    "a loss that is not finite": when(lambda state, event: not getattr(event, "finite", True)),
    "two parameter groups": when(lambda state, event: len(getattr(event, "lr", ())) > 1),
    "an end within an epoch": when(lambda state, event: state.ended and state.epoch_start != state.iteration),
    "an end by another callback": when(lambda state, event: state.ended and state.stop is not None),
    "accumulation": when(lambda state, event: len(getattr(event, "accumulated", ())) > 1),
    "a short batch": when(
        lambda state, event: isinstance(event, AfterUpdate) and event.samples < event.run.effective_batch_size
    ),
    "a late update without a gate": when(lambda state, event: state.iteration.update >= 50),
}  # fmt: skip


ONE_CALLBACK = [(check_pure,), (check_resumable,), (check_rank_agreement,)]


@pytest.mark.usefixtures("first_counterexample")
@pytest.mark.parametrize(("gate", "law"), rotate([(gate,) for gate in GATES], ONE_CALLBACK))
def test_a_law_reaches_the_body_behind_a_gate(gate, law):
    with pytest.raises((ReachedError, LawError)) as error:
        law(GATES[gate](body))
    assert isinstance(error.value if isinstance(error.value, ReachedError) else error.value.__cause__, ReachedError)


@pytest.mark.usefixtures("first_counterexample")
@pytest.mark.parametrize(
    "at",
    [
        {"every_n_epochs": 30},
        {"every_n_updates": 1000},
        {"every_n_samples": 10_000},
    ],
    ids=str,
)
def test_a_law_reaches_the_interval_of_a_class(at):
    class Raises(PeriodicCallback):
        def periodic_callback(self, state, event, interval):
            return body(state, event)

    with pytest.raises(ReachedError):
        check_resumable(Raises(**at))


def test_a_late_run_is_short():
    @every_n_updates(10**6)
    def late(state, event):
        return state, (LogText("late"),)

    with record_runs() as tried:
        check_pure(late, examples=20)
    assert max(len(drive(late, trace).events) for trace in tried) < 200


class OnlyAtAnUnreachablePoint(CallbackBase):
    def after_update(self, state, event):
        return (state.request_stop("late") if state.iteration.update > 10**7 else state), ()


class TracksOnly(PeriodicCallback):
    """It tracks each update; its interval is longer than the runs."""

    def init(self, state):
        return {self.name: 0}

    def track_after_update_step(self, state, event):
        return state.remember(self.name, self.memory(state) + 1), ()

    def periodic_callback(self, state, event, interval):
        return log(state, event, {"updates": self.memory(state)})


SHORT = runs(max_epochs=2).filter(lambda trace: not trace.first_update)
SILENT = {
    "a condition that is never true": (
        when(lambda state, event: False)(says), {}, "says never acted .* condition of its `when` was never true",
    ),
    "a function that returns the state": (does_nothing, {}, "does_nothing never acted .* always returned the same"),
    "a hook that returns the state": (
        OnlyAtAnUnreachablePoint(), {}, "OnlyAtAnUnreachablePoint never acted .* always returned the same state",
    ),
    "a window before its first point": (
        when(EveryNUpdates(70).until(TrainingIteration(update=60)))(says), {}, "its schedule is never due",
    ),
    "runs that are too short": (
        every_n_updates(50)(says), {"traces": SHORT},
        r"says never acted in \d+ runs; give traces=... that reach it, .*: its schedule is first due at update 50, and",
    ),
    "runs too short for an interval": (TracksOnly(every_n_updates=60), {"traces": SHORT}, "TracksOnly/U60 never acted"),
    "runs too short for a stop": (
        FixedUpdateEarlyStopping(stop_at_update=60), {"traces": SHORT}, "first due at update 60",
    ),
    "one of several": (compose(on(AfterUpdate)(says), does_nothing), {}, "does_nothing never acted"),
    "one of several behind a gate": (
        on(AfterEpoch)(compose(says, when(lambda state, event: False)(body))), {}, "body never acted",
    ),
    "a gate below a memory": (
        callback("sum", init=lambda state: 0, track=lambda memory, event: memory + 1)(every_n_epochs(9)(says)),
        {"traces": SHORT}, "sum never acted .* first due at epoch 9",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "law"), rotate([(kind,) for kind in SILENT], ONE_CALLBACK))
def test_a_callback_that_never_acts_fails(kind, law):
    tested, arguments, message = SILENT[kind]
    with pytest.raises(LawError, match=message):
        law(tested, **arguments, examples=20)


def test_every_callback_of_a_law_about_several_has_to_act():
    speaks = on(AfterUpdate)(says)
    with pytest.raises(LawError, match="does_nothing never acted"):
        check_composition(speaks, does_nothing, speaks, examples=10)
    with pytest.raises(LawError, match="does_nothing never acted"):
        check_independent(speaks, does_nothing, examples=10)


@pytest.mark.parametrize(
    "tested",
    [
        FixedUpdateEarlyStopping(stop_at_sample=10**6),
        EMACallback(target_factors=(0.5,), every_n_epochs=40),
        OnlineLossCallback(every_n_updates=900, nan="log"),
        CheckpointCallback(every_n_samples=5000, save_weights=True),
        every_n_updates(60)(compose(says, on(AfterUpdate)(does_nothing))),
        compose(identity, every_n_epochs(8)(says), every_n_updates(90)(says), every_n_samples(3000)(says)),
    ],
    ids=str,
)
def test_schedules_far_from_the_start_obey_the_laws(tested):
    check_pure(tested, examples=8)
    check_resumable(tested, examples=8)


def test_acts_are_counted_exactly():
    run = Run(end=TrainingIteration(epoch=4), updates_per_epoch=5, samples_per_epoch=10, effective_batch_size=2)
    tested = compose(
        every_n_updates(3)(says),
        callback("sum", init=lambda state: 0, track=lambda memory, event: memory + 1)(every_n_epochs(2)(says)),
        TracksOnly(every_n_updates=6),
        when(lambda state, event: isinstance(event, AfterUpdate) and state.iteration.update == 7)(does_nothing),
        does_nothing,
        FixedUpdateEarlyStopping(stop_at_update=18),
    )
    parts = count_acts(tested, [Trace(run)], every=True)
    assert [(part.label, part.acts, part.effects) for part in parts] == [
        ("says", 6, 6), ("sum", 1, 1), ("TracksOnly/U6", 3, 3), ("does_nothing", 1, 0), ("does_nothing", 0, 0),
        ("FixedUpdateEarlyStopping/stop_at_update=18", 1, 1),
    ]  # fmt: skip


def test_parts_are_inside_of_decorators_and_reducers():
    tested = compose(every_n_epochs(2)(compose(says, on(AfterEpoch)(body))), callback("named")(does_nothing))
    assert [(part.label, str(part.schedule)) for part in parts_of(tested)] == [
        ("says", "E2"), ("body", "E2"), ("named", "None"),
    ]  # fmt: skip
