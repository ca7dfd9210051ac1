"""The laws of composition, over runs as a loop would drive them; and the reducer's fast path, against a naive fold."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loop_traces import drive, fold, gated_callback, move_to, outcomes, plain_callback, several, start

from noether.core.callback import listens_to, tracker_of
from noether.core.callbacks import CallbackBase, PeriodicCallback
from noether.core.combinators import callback, every_n_epochs, every_n_updates, on, when
from noether.core.effect import LogText
from noether.core.errors import SettingsError
from noether.core.event import (
    EVENTS,
    AfterAccumulationStep,
    AfterEpoch,
    AfterTraining,
    AfterUpdate,
    AtEval,
    BeforeTraining,
)
from noether.core.iteration import TrainingIteration
from noether.core.metrics import log
from noether.core.reducer import compose, identity
from noether.core.schedules.gate import Gate
from noether.core.schedules.schedule import At, EveryNEpochs, EveryNUpdates
from noether.core.state import TrainState
from noether.core.tensors.tree import FrozenDict, tensors
from noether.testing import same
from noether.testing.strategies import run_lengths, schedules

small_runs = run_lengths(max_epochs=3)
accumulations = st.integers(1, 3)
few = settings(max_examples=40, deadline=None)


def say(text):
    return lambda state, event: (state, (LogText(text),))


def note(state, event):
    return state, (LogText(str(state.iteration)),)


def random_brackets(members, draw):
    """Return `compose` of `members`, in random brackets."""
    if len(members) < 2:
        return compose(*members)
    cut = draw(st.integers(0, len(members)))
    if cut in {0, len(members)}:
        return compose(*members)
    return compose(random_brackets(members[:cut], draw), random_brackets(members[cut:], draw))


@few
@given(several(), small_runs, accumulations, st.data())
def test_composition_is_associative(members, run, accumulation, data):
    naive = outcomes(drive(fold(*members), run, accumulation=accumulation))
    reducer = random_brackets(members, data.draw)
    assert same(outcomes(drive(reducer, run, accumulation=accumulation)), naive)


@few
@given(several(max_size=3), small_runs, accumulations)
def test_identity_is_the_unit(members, run, accumulation):
    alone = outcomes(drive(compose(*members), run, accumulation=accumulation))
    for units in [(identity, *members), (*members, identity), (compose(), *members, compose())]:
        assert same(outcomes(drive(compose(*units), run, accumulation=accumulation)), alone)


@few
@given(several(one=plain_callback, min_size=1, max_size=4), schedules(12), st.booleans(), small_runs, accumulations)
def test_gating_commutes_with_composition(members, schedule, at_end, run, accumulation):
    gate = when(schedule, at_end=at_end)
    outside = outcomes(drive(compose(gate(compose(*members))), run, accumulation=accumulation))
    inside = outcomes(drive(compose(*map(gate, members)), run, accumulation=accumulation))
    assert same(outside, inside)


@few
@given(several(min_size=1), small_runs, accumulations)
def test_no_callback_changes_its_input(members, run, accumulation):
    reducer = compose(*members)
    kept = []

    def watched(state, event):
        kept.append((state, copy.deepcopy(values(state)), writes(state)))
        return reducer(state, event)

    for _ in drive(watched, run, accumulation=accumulation):
        pass
    for state, copied, versions in kept:  # at the end: neither the call itself nor a later one wrote to it
        assert same(values(state), copied)
        assert writes(state) == versions


def writes(state):
    """Return how often each tensor of the state was written to, as torch counts it."""
    return {name: tensor._version for name, tensor in tensors(values(state))}  # noqa: SLF001  # torch's counter of writes


def values(state):
    return dict(vars(state))


@few
@given(several(one=gated_callback, min_size=1), small_runs)
def test_where_no_gate_opens_the_state_is_the_same_object(members, run):
    reducer = compose(*members)
    for event, before, after, effects in drive(reducer, run):
        if isinstance(event, BeforeTraining) or not any(m.gate.opens(before, event) for m in members):
            assert effects == ()
            assert after is before or isinstance(event, BeforeTraining)
        else:
            assert after is not before or effects


@given(st.sampled_from(EVENTS))
def test_a_callback_that_does_nothing_returns_its_state(event_type):
    nothing = compose(identity, lambda state, event: (state, ()), compose(), CallbackBase())
    state = start().advance(samples=4)
    assert nothing(state, event_type()) == (state, ())
    assert nothing(state, event_type())[0] is state


@settings(max_examples=50, deadline=None)
@given(several(min_size=1, max_size=6), small_runs, st.data())
def test_a_reducer_misses_no_firing_at_updates_in_any_order(members, run, data):
    """The states jump to earlier and later updates at random; the cached thresholds of a reducer hide no firing."""
    reducer, naive = compose(*members), fold(*members)
    state, _ = naive(start(), BeforeTraining(run=run))
    updates = data.draw(st.lists(st.integers(1, run.final.update), min_size=1, max_size=25))
    for update in updates:
        length = data.draw(st.integers(1, min(3, update)))  # also states that jump over several updates
        previous = run.iteration_after(update - length)
        reached = run.iteration_after(update)
        iteration = TrainingIteration(previous.epoch, reached.update, reached.sample)
        at = move_to(state, previous, iteration)
        event = AfterUpdate(run=run, samples=1, losses={"total": torch.tensor(0.5)})
        assert same(reducer(at, event), naive(at, event))


@settings(max_examples=50, deadline=None)
@given(several(one=gated_callback, min_size=1, max_size=4), st.data())
def test_a_reducer_misses_no_firing_if_counters_move_independently(members, data):
    reducer, naive = compose(*members), fold(*members)
    count = st.integers(0, 14)
    state, _ = naive(start(), BeforeTraining())
    for _ in range(12):
        previous = data.draw(st.builds(TrainingIteration, count, count, count))
        iteration = TrainingIteration(previous.epoch, previous.update + 1, previous.sample + data.draw(count))
        at = move_to(state, previous, iteration)
        assert same(reducer(at, AfterUpdate()), naive(at, AfterUpdate()))


def test_an_overridden_update_hook_runs_at_every_update():
    class Every(PeriodicCallback):
        def after_update(self, state, event):
            return state, (LogText("update"),)

    reducer = compose(Every(every_n_updates=100), every_n_updates(50)(note))
    state = TrainState()
    for _ in range(3):
        state = state.advance(samples=1)
        assert reducer(state, AfterUpdate()) == (state, (LogText("update"),))


def test_a_reducer_fires_again_after_a_return_to_an_earlier_update():
    reducer = compose(every_n_updates(4)(note), when(At(TrainingIteration(update=6)))(say("six")))
    fired = {}
    for update in (1, 2, 3, 4, 5, 6, 7, 8, 4, 3, 6, 2, 8, 1, 4):
        state = TrainState(
            previous=TrainingIteration(update=update - 1, sample=update - 1),
            iteration=TrainingIteration(update=update, sample=update),
        )
        fired.setdefault(update, set()).add(len(reducer(state, AfterUpdate())[1]))
    assert fired == {1: {0}, 2: {0}, 3: {0}, 4: {1}, 5: {0}, 6: {1}, 7: {0}, 8: {1}}


@few
@given(several(min_size=1), small_runs)
def test_a_reducer_that_does_not_listen_does_nothing(members, run):
    reducer = compose(*members)
    for event, before, _, effects in drive(fold(*members), run, accumulation=2):
        if not listens_to(reducer, type(event)):
            assert effects == ()
            assert [m(before, event)[1] for m in members] == [()] * len(members)


def test_a_tracking_callback_listens_to_updates():
    class Tracks(PeriodicCallback):
        def track_after_update_step(self, state, event):
            return state, ()

    reducer = compose(Tracks(every_n_epochs=2))
    assert listens_to(reducer, AfterUpdate)
    assert tracker_of(reducer) is reducer
    assert tracker_of(compose(note)) is None
    assert not listens_to(compose(Tracks(every_n_updates=2)), AfterEpoch)


def test_listens_to_by_kind_of_callback():
    def heard(member):
        return {event_type for event_type in EVENTS if listens_to(compose(member), event_type)}

    assert heard(note) == set(EVENTS)
    assert heard(on(AfterEpoch)(note)) == {AfterEpoch}
    assert heard(every_n_updates(2)(note)) == {AfterUpdate}
    assert heard(every_n_epochs(2, at_end=True)(note)) == {AfterEpoch, AfterTraining}
    assert heard(when(EveryNEpochs(1) | EveryNUpdates(1))(note)) == {AfterEpoch, AfterUpdate}
    assert heard(every_n_updates(2)(on(AfterEpoch)(note))) == set()
    assert heard(CallbackBase()) == set()
    assert listens_to(compose(), AfterUpdate) is False


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("iteration", TrainingIteration(9)),
        ("previous", TrainingIteration(9)),
        ("seed", 99),
        ("ended", True),
        ("pending", FrozenDict()),
    ],
)
def test_only_the_loop_may_change_its_fields(name, value):
    def meddle(state, event):
        return state.replace(**{name: value}), ()

    with pytest.raises(ValueError, match=f"^meddle changed state.{name}, which only the loop may change\nraised by"):
        compose(note, meddle)(TrainState().advance(samples=1), AfterUpdate())


def test_effects_after_an_accumulation_step_are_refused():
    message = r"^LogText\(text='E0_U0_S0'\) was requested after an accumulation step; log and save after an update$"
    with pytest.raises(ValueError, match=message):
        compose(note)(TrainState(), AfterAccumulationStep())


def test_state_may_change_after_an_accumulation_step():
    def count(state, event):
        return state.remember("count", 1), ()

    assert compose(on(AfterAccumulationStep)(count))(TrainState(), AfterAccumulationStep())[0].memory("count") == 1


def remembering(name, memory):
    return callback(name, init=lambda state: memory)(identity)


def test_missing_memory_is_filled_in_before_training():
    reducer = compose(remembering("a", {"x": [1, 2]}), compose(remembering("b", None)))
    state, effects = reducer(TrainState(callback_states={"b": 5}), BeforeTraining())
    assert (dict(state.callback_states), effects) == ({"a": {"x": (1, 2)}, "b": 5}, ())
    assert reducer(state, BeforeTraining())[0] is state
    assert reducer(state, BeforeTraining(resumed=True))[0] is state


def test_memory_is_filled_in_once_for_nested_reducers():
    calls = []
    inner = compose(callback("a", init=lambda state: calls.append("a") or 0, produces=())(identity))
    compose(on(BeforeTraining)(inner))(TrainState(callback_states={"a": 1}), BeforeTraining())
    outer_calls = len(calls)
    calls.clear()
    state, _ = compose(on(BeforeTraining)(inner))(TrainState(), BeforeTraining())
    assert state.memory("a") == 0
    assert len(calls) == outer_calls  # only the outermost reducer calls `init`


def test_unclaimed_memory_is_refused_on_resume():
    saved = TrainState(callback_states={"Progress/U10": 1})
    reducer = compose(remembering("Progress/U20", 0))
    with pytest.raises(LookupError) as refused:
        reducer(saved, BeforeTraining(resumed=True))
    assert str(refused.value) == (
        "the saved run contains memory of 'Progress/U10', which no callback claims; did you mean 'Progress/U20'? "
        "Give a callback that id, or drop the memory with --drop-memory Progress/U10, in Python with "
        "drop_memory=['Progress/U10'] of noether.open_run or noether.train"
    )
    with pytest.raises(LookupError, match=r"which no callback claims\. Give a callback that id"):
        compose()(saved, BeforeTraining(resumed=True))
    assert reducer(saved, BeforeTraining())[0].memory("Progress/U10") == 1  # a new run may begin from any state


def test_memory_of_another_kind_of_loop_is_left_out_on_resume():
    saved = TrainState(callback_states={"session": {"accumulation": 2}, "session/generators": 1, "count": 3})
    state, _ = compose(remembering("count", 0))(saved, BeforeTraining(resumed=True))
    assert state.callback_states == {"count": 3}
    with pytest.raises(LookupError, match="'sessions'"):
        compose()(TrainState(callback_states={"sessions": 1}), BeforeTraining(resumed=True))


def test_missing_memory_is_filled_in_on_resume():
    state, _ = compose(remembering("new", 3))(TrainState(), BeforeTraining(resumed=True))
    assert state.memory("new") == 3


@pytest.mark.parametrize("field", ["params", "buffers", "opt_state"])
@pytest.mark.parametrize("view", [lambda t: t, lambda t: t[1:], lambda t: t.view(2, 2).t(), lambda t: t.detach()])
def test_memory_that_shares_storage_with_the_model_is_refused(field, view):
    tensor = torch.zeros(4)
    state = TrainState(**{field: {"w": tensor}})
    reducer = compose(callback("ema", init=lambda state: {"w": view(getattr(state, field)["w"])})(identity))
    with pytest.raises(ValueError, match=r"^memory 'ema' shares storage with the params, buffers or opt_state: clone"):
        reducer(state, BeforeTraining())
    cloned = compose(callback("ema", init=lambda state: {"w": getattr(state, field)["w"].clone()})(identity))
    assert cloned(state, BeforeTraining())[0].memory("ema")["w"] is not tensor


@pytest.mark.parametrize(
    ("memory", "message"),
    [
        ({"a": {1, 2}}, "memory 'm': a is a set; memory is made of str, int, float, bool, None, tensors, tuples and"),
        (object(), "memory 'm': it is a object; memory is made of"),
        ([1, {"deep": [lambda: 0]}], "memory 'm': 1.deep.0 is a function; memory is made of"),
        (1j, "memory 'm': it is a complex"),
        (b"x", "memory 'm': it is a bytes"),
        ({1: 2}, "memory 'm': the key 1 is a int; keys are str"),
        ({"a": ({None: 2},)}, "memory 'm': the key None is a NoneType; keys are str"),
    ],
)
def test_memory_that_cannot_be_saved_is_refused(memory, message):
    with pytest.raises(TypeError) as refused:
        compose(remembering("m", memory))(TrainState(), BeforeTraining())
    assert str(refused.value).startswith(message)


def test_a_resumed_state_cannot_change_before_training():
    def change(state, event):
        return state.request_stop("now"), ()

    def ask(state, event):
        return log(state, event, {"x": 1.0})

    with pytest.raises(
        ValueError, match=r"^change changed the state in a resumed BeforeTraining; it may only return effects"
    ):
        compose(change)(TrainState(), BeforeTraining(resumed=True))
    assert compose(change)(TrainState(), BeforeTraining())[0].stop == "now"
    state = TrainState()
    after, effects = compose(ask)(state, BeforeTraining(resumed=True))
    assert after is state
    assert effects[0].values == {"x": 1.0}


@pytest.mark.parametrize("wrong", [None, 3, PeriodicCallback, "noether.core.callbacks.LrCallback"])
def test_compose_refuses_other_objects(wrong):
    with pytest.raises(TypeError, match="compose takes callbacks"):
        compose(identity, wrong)


def test_a_reducer_has_the_declarations_of_its_members():
    first = callback("first", produces=("a", "b/*"))(identity)
    second = callback("second", produces=(), consumes=("a", "b/x", "c"))(identity)
    assert compose(first, second).produces == ("a", "b/*")
    assert compose(first, second).consumes == ("c",)
    assert compose(second, first).consumes == ("a", "b/x", "c")
    assert compose(note, second).consumes == ()  # a bare function may produce anything
    assert compose(first, note).produces is None
    assert compose().produces == ()
    assert repr(compose(first, note)) == "compose(first, note)"


def test_a_member_may_be_any_object_with_a_gate():
    class Own:
        gate = Gate(EveryNUpdates(3))

        def __call__(self, state, event):
            opened = self.gate.opens(state, event)
            return state, () if opened is None else (LogText(opened),)

    reducer, state, effect_counts = compose(Own()), TrainState(), []
    for _ in range(6):
        state = state.advance(samples=1)
        effect_counts.append(len(reducer(state, AfterUpdate())[1]))
    assert effect_counts == [0, 0, 1, 0, 0, 1]


@pytest.mark.parametrize("wrap", [compose, on(AfterUpdate), every_n_updates(2), callback("outer"), every_n_epochs(1)])
def test_an_unknown_reading_is_refused_with_the_nearest_name(wrap):
    def clip(state, event):
        return state, ()

    clip.readings = ("gradnorm",)
    message = "clip declares the unknown reading 'gradnorm'; readings: .*; did you mean 'grad_norm'?"
    with pytest.raises(SettingsError, match=message):
        wrap(clip)


def test_a_known_reading_passes_through_every_decorator():
    @callback("norm", readings=("grad_norm",))
    def norm(state, event):
        return state, ()

    wrapped = [norm, on(AfterUpdate)(norm), every_n_updates(2)(norm), callback("outer")(norm), compose(norm, norm)]
    assert [each.readings for each in wrapped] == [("grad_norm",)] * len(wrapped)
    outer = callback("outer", readings=("finite", "grad_norm"))(norm)
    assert outer.readings == ("grad_norm", "finite")
    with pytest.raises(SettingsError, match=r"^norm declares the unknown reading 'norm'; readings: "):
        callback("norm", readings=("norm",))


def test_a_class_with_an_unknown_reading_is_refused_where_it_is_defined():
    message = "^Clip declares the unknown reading 'gradnorm'; .*; did you mean 'grad_norm'?"
    with pytest.raises(SettingsError, match=message):
        type("Clip", (CallbackBase,), {"readings": ("gradnorm",)})

    class Clip(PeriodicCallback):
        reading: str = "grad_norm"

        @property
        def readings(self):
            return (self.reading,)

        def periodic_callback(self, state, event, interval):
            return state, ()

    assert Clip(every_n_updates=1).readings == ("grad_norm",)
    with pytest.raises(SettingsError, match=message):
        Clip(every_n_updates=1, reading="gradnorm")


def test_effects_come_in_the_order_of_the_members():
    reducer = compose(say("a"), compose(say("b"), say("c")), say("d"))
    assert [effect.text for effect in reducer(TrainState(), AtEval())[1]] == ["a", "b", "c", "d"]


def test_a_later_member_sees_the_changes_of_an_earlier_one():
    def stop(state, event):
        return state.request_stop("first"), ()

    def tell(state, event):
        return state, (LogText(str(state.stop)),)

    assert compose(tell, stop, tell)(TrainState(), AfterTraining())[1] == (LogText("None"), LogText("first"))
