"""Each law catches the faulty callbacks and schedules that break it, with a message that says how."""

import itertools
import math
import time

import pytest
import torch
from hypothesis import strategies as st

from noether import (
    AfterAccumulationStep,
    AfterEpoch,
    AfterUpdate,
    BeforeTraining,
    EveryNEpochs,
    EveryNSamples,
    EveryNUpdates,
    LogText,
    SaveCheckpoint,
    TrainingIteration,
    callback,
    every_n_epochs,
    every_n_updates,
    log,
    on,
)
from noether.core.callbacks.periodic import PeriodicCallback
from noether.core.schedules.window import Thresholds
from noether.testing import (
    ImpureError,
    LawError,
    check_composition,
    check_independent,
    check_pure,
    check_rank_agreement,
    check_resumable,
    check_schedule,
)
from noether.testing.counterexamples import assert_law

# Callbacks with one fault each.

_HIDDEN = itertools.count()


@every_n_updates(1)
def counts_outside(state, event):
    return log(state, event, {"count": next(_HIDDEN)})


@on(AfterEpoch)
def reads_the_clock(state, event):
    return state, (LogText(f"{time.monotonic()}"),)


@on(AfterUpdate)
def averages_in_place(state, event):
    state.params["w"].mul_(0.5)
    return state, ()


@on(AfterEpoch)
def draws(state, event):
    return log(state, event, {"noise": torch.randn(())})


class RemembersOnItself(PeriodicCallback):
    """It keeps its best value in an attribute, although the dataclass is frozen."""

    best = (math.inf,)

    def periodic_callback(self, state, event, interval):
        best = min(vars(self).get("best", math.inf), float(event.losses["total"]))
        object.__setattr__(self, "best", best)
        return log(state, event, {"best": best})


@callback("ages", init=lambda state: {1: 0})
@on(AfterUpdate)
def remembers_a_dict_with_numbers_as_keys(state, event):
    return state, ()


@callback("kept", init=lambda state: 0)
@on(AfterUpdate)
def remembers_a_set(state, event):
    return state.remember("kept", frozenset({1})), ()


@callback("first_update", init=lambda state: state.iteration.update)
@on(AfterUpdate, BeforeTraining)
def logs_resumes(state, event):
    """It acts differently at the start of a run and at a resume, which the law allows."""
    if isinstance(event, BeforeTraining):
        return state, (LogText("resumed" if event.resumed else "started"),)
    return state, (LogText(f"{state.iteration.update - state.memory('first_update')}"),)


class Forgets(PeriodicCallback):
    """It keeps memory in an attribute and declares none in `init`."""

    waits: tuple[int, ...] = ()

    def periodic_callback(self, state, event, interval):
        object.__setattr__(self, "waits", (*self.waits, state.iteration.update))
        return state, (LogText(f"{len(self.waits)} firings"),)


@every_n_epochs(1)
def halves(state, event):
    return _scale_lr(state, state.hyperparams["lr_scale"] / 2), ()


@every_n_epochs(1)
def caps(state, event):
    return _scale_lr(state, min(state.hyperparams["lr_scale"], 0.75)), ()


def _scale_lr(state, scale):
    return state.replace(hyperparams=state.hyperparams | {"lr_scale": scale})


@every_n_epochs(1)
def counts_metrics(state, event):
    return log(state, event, {"metrics": len(state.metrics)})


@on(AfterUpdate)
def stops_when_slow(state, event):
    return (state.request_stop("slow") if event.duration_s > 0.5 else state), ()


@on(AfterUpdate)
def saves_on_the_first_rank(state, event):
    return state, ((SaveCheckpoint(),) if event.run.rank == 0 else ())


@on(AfterUpdate)
def logs_on_the_first_rank(state, event):
    return log(state, event, {"x": 1.0}) if event.run.rank == 0 else (state, ())


@on(AfterAccumulationStep)
def stops_at_a_local_loss(state, event):
    return (state.request_stop("low") if event.losses["total"] > 0.1 else state), ()


class CountsCalls:
    """It counts its calls outside of the state, so its effects depend on the calls before."""

    calls = 0

    def __call__(self, state, event):
        type(self).calls += 1
        return state, (LogText(f"call {self.calls}"),) if isinstance(event, AfterEpoch) else ()


MUTANTS = [
    (check_pure, counts_outside, ImpureError, "counts_outside returns another result when called again"),
    (check_pure, reads_the_clock, ImpureError, r"reads_the_clock reads the clock: time.monotonic\(\)"),
    (check_pure, averages_in_place, ImpureError, "averages_in_place writes to its arguments"),
    (check_pure, draws, ImpureError, "draws draws from a global random generator"),
    (check_pure, RemembersOnItself(every_n_updates=1), ImpureError, "RemembersOnItself/U1 assigns to itself"),
    pytest.param(
        *(check_resumable, RemembersOnItself(every_n_updates=1)),
        *(LawError, "RemembersOnItself/U1 does not resume exactly"),
        marks=pytest.mark.slow,
    ),
    (check_resumable, counts_outside, LawError, "counts_outside does not resume exactly"),
    (check_resumable, Forgets(every_n_updates=1), LawError, "does not resume exactly.*\n.*firings"),
    (check_resumable, remembers_a_set, Exception, "kept"),
    (check_resumable, remembers_a_dict_with_numbers_as_keys, Exception, "ages"),
    (check_rank_agreement, stops_when_slow, LawError, "stops_when_slow makes different decisions on different ranks"),
    (check_rank_agreement, saves_on_the_first_rank, LawError, r"effects\[0\] is nothing, expected SaveCheckpoint"),
    (check_rank_agreement, logs_on_the_first_rank, LawError, r"state.metrics\['x'\] is nothing"),
    (check_rank_agreement, stops_at_a_local_loss, LawError, r"state.stop is '?low|state.stop is None"),
]


@pytest.mark.parametrize(("check", "mutant", "error", "message"), MUTANTS)
def test_a_faulty_callback_is_caught(check, mutant, error, message):
    with pytest.raises(error, match=message):
        check(mutant, examples=1000)  # a fault that few runs show is found among so many


def test_a_callback_may_act_differently_at_a_resume():
    check_resumable(logs_resumes)


@pytest.mark.parametrize(
    ("a", "b"), [(halves, caps), (counts_metrics, every_n_epochs(1)(lambda s, e: log(s, e, {"a": 1.0})))]
)
def test_callbacks_that_depend_on_their_order_are_caught(a, b):
    with pytest.raises(
        LawError,
        match="depend on their order: the run differs with the second one first\n  at AfterEpoch E1_U1_S1: state",
    ):
        check_independent(a, b)


def test_a_composition_that_depends_on_its_grouping_is_caught():
    with pytest.raises(LawError, match=r"behave differently as .* than as compose"):
        check_composition(CountsCalls(), halves, counts_metrics)


# Schedules with one fault each.


class Remainder(EveryNSamples):
    def due(self, previous, iteration):
        return iteration.sample % self.n == 0


class Late(EveryNUpdates):
    def next_due(self, iteration):
        return Thresholds(update=super().next_due(iteration).update + self.n)


class Rounded(EveryNSamples):
    def count(self, start, end, run):
        return end.sample // self.n - start.sample // self.n


class FromTheStart(EveryNEpochs):
    def count(self, start, end, run):
        return super().count(TrainingIteration(), end, run)


class Twice(EveryNUpdates):
    def due(self, previous, iteration):
        return super().due(previous, iteration) or iteration.update == 3


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (Remainder(3), "Remainder S3 counts|Remainder S3 is"),
        (Late(2), "Late U2 is due at .*, before its next_due"),
        (Rounded(2), "Rounded S2 counts .* firings"),
        (FromTheStart(1), "FromTheStart E1 counts"),
        (Twice(2), "Twice U2 counts|Twice U2 is due"),
    ],
)
def test_a_faulty_schedule_is_caught(schedule, message):
    with pytest.raises(LawError, match=f"^{message}"):
        check_schedule(schedule)


def test_the_error_is_that_of_the_simplest_example():
    def refuse_large(number):
        if number >= 1000:
            raise LawError(f"{number} is too large")

    with pytest.raises(LawError, match=r"^1000 is too large"):
        assert_law(refuse_large, st.integers(0, 10**9), examples=20)
