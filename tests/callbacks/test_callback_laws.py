"""Laws of every shipped callback: it is pure, returns the same state when it does not fire, and resumes exactly."""

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from law_examples import examples

from noether.core.callback import label_of, listens_to, tracker_of
from noether.core.callbacks import (
    CheckpointCallback,
    EMACallback,
    EtaCallback,
    EvaluateCallback,
    MetricEarlyStopping,
    ReduceLROnPlateauCallback,
    TrainTimeCallback,
)
from noether.core.effect import LogScalars, SaveCheckpoint
from noether.core.event import AfterAccumulationStep, AfterEpoch, AfterTraining, AfterUpdate, AtEval, BeforeTraining
from noether.core.iteration import TrainingIteration
from noether.core.loop import Move, next_move
from noether.core.reducer import compose
from noether.core.run import Run
from noether.core.schedules.schedule import INTERVALS
from noether.core.state import TrainState
from noether.core.tensors.memory import check_memory
from noether.core.tensors.tree import FrozenDict
from noether.effects import CheckpointStore
from noether.testing import call_purely, same
from noether.testing.shipped import all_examples, sometimes


def forward(state, batch):
    outputs = batch[0] * state.params["w"]
    return {"total": (outputs - batch[1]).square().mean()}, outputs


VAL = [(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0])), (torch.tensor([0.5]), torch.tensor([0.0]))]
RUN = Run(end=TrainingIteration(epoch=3), updates_per_epoch=3, samples_per_epoch=10, effective_batch_size=4,
          data={"val": VAL}, forward=forward, config={"seed": 0}, frozen=frozenset())  # fmt: skip


def next_update(state, run):
    """Return the state and the event after one more update, computed from the state alone."""
    update = state.iteration.update
    size = run.iteration_after(update + 1).sample - state.iteration.sample
    finite = update not in {1, 5}
    weight = state.params["w"] * 0.5 + math.sin(update) if finite else state.params["w"] * math.nan
    outputs = ({"drift": weight.abs(), "shape": weight + torch.arange(3.0)}, {"drift": 2.0, "shape": torch.ones(1)})
    event = AfterUpdate(
        run=run, samples=size, losses={"total": weight.square(), "aux": float(update)}, outputs=outputs,
        accumulated=(size - 1, 1), lr={"default": 0.1}, weight_decay={"default": 0.0}, grad_norm=weight.abs(),
        gradients={"w": weight * 2},
        finite=torch.tensor(finite), skipped=update == 3, duration_s=0.5 + update, data_s=0.125, step_s=0.25,
        forward_s=0.125, time_s=7.0,
    )  # fmt: skip
    step = state.opt_state["state"]["w"]["step"] + 1
    after = state.replace(params=FrozenDict(w=weight), opt_state={"state": {"w": {"step": step}}, "groups": ()})
    return after.advance(samples=size), event


def continue_run(reducer, state, run=RUN):
    """Yield `(event, state before, state after, effects)` of every remaining event of a run."""
    while (move := next_move(state, run)) is not Move.NOTHING:
        if move is Move.END_EPOCH:
            state, event = state.next_epoch(), AfterEpoch(run=run, time_s=5.0)
        elif move is Move.END_TRAINING:
            state, event = state.replace(ended=True), AfterTraining(run=run, time_s=6.0)
        else:
            state, event = next_update(state, run)
        after, effects = reducer(state, event)
        yield event, state, after, effects
        state = after


def start(reducer):
    opt_state = {"state": {"w": {"step": torch.tensor(0.0)}}, "groups": ()}
    initial = TrainState(params={"w": torch.tensor(3.0)}, buffers={"seen": torch.tensor(2)}, opt_state=opt_state)
    return reducer(initial, BeforeTraining(run=RUN))[0]


QUICK = (("every_n_epochs", 1, True), ("every_n_updates", 2, False), ("every_n_samples", 7, True))
SETTINGS = [
    pytest.param(*each, at_end, marks=() if (*each, at_end) in QUICK else pytest.mark.slow)
    for each in (*((interval, 1) for interval in INTERVALS), ("every_n_updates", 2), ("every_n_samples", 7))
    for at_end in (False, True)
]


@pytest.mark.parametrize(("interval", "n", "at_end"), SETTINGS)
def test_every_callback_is_a_pure_function(interval, n, at_end):
    members = all_examples(interval, n, at_end=at_end)
    reducer = compose(*members)
    acted = set()
    initial = start(reducer)
    acted |= {type(member) for member in members if call_purely(member, initial, BeforeTraining(run=RUN))[1]}
    for event, state, after, effects in list(continue_run(reducer, initial)):
        requests = ()
        for member in members:
            before, (state, more) = state, call_purely(member, state, event)  # noqa: PLW2901  # a fold, as the reducer's
            if state.stop is not None and before.stop is None:
                state = state.replace(stopped_by=label_of(member))  # noqa: PLW2901  # a fold, as the reducer's
            requests += more
            if more:
                acted.add(type(member))
        assert same((state, requests), (after, effects))
    at_eval = compose(*members)(start(reducer), AtEval(run=RUN))[1]
    assert {key for effect in at_eval if isinstance(effect, LogScalars) for key in effect.values} == {
        "loss/val/total", "val/error", "val/error/ema=0.5", "loss/val/total/ema=0.9",
    }  # fmt: skip
    silent = {MetricEarlyStopping, ReduceLROnPlateauCallback}  # they write text only when they act
    assert acted | silent == {type(member) for member in members}


@pytest.mark.parametrize(
    "member",
    [member for member in all_examples("every_n_updates", 3, at_end=False) if member is not sometimes],
    ids=lambda member: member.name,
)
def test_a_callback_that_does_not_fire_returns_the_same_state(member):
    state = TrainState(params={"w": torch.tensor(1.0)}).advance(samples=4).advance(samples=4)
    events = [AfterEpoch(run=RUN), AfterAccumulationStep(run=RUN, samples=4)]
    if type(member) not in {
        CheckpointCallback,
        EMACallback,
        EtaCallback,
        TrainTimeCallback,
    }:
        events.append(AfterTraining(run=RUN))
    if not listens_to(member, AtEval):
        events.append(AtEval(run=RUN))
    if tracker_of(member) is None:
        events.append(AfterUpdate(run=RUN, samples=4))
    for event in events:
        after, effects = member(state, event)
        assert after is state
        assert effects == ()


def save_and_load(state, event):
    """Return a state after saving it to disk and loading it."""
    with tempfile.TemporaryDirectory() as directory:
        store = CheckpointStore(Path(directory), "law")
        store.save(SaveCheckpoint(tag="cut"), state, event)
        return store.load(store.find("cut"))


@examples(40, quick=12)
@given(st.sampled_from(list(INTERVALS)), st.integers(1, 8), st.booleans(), st.integers(0, 15))
def test_a_run_resumed_from_the_store_at_any_event_equals_the_uncut_run(interval, n, at_end, cut):
    def reducer():
        return compose(*all_examples(interval, n, at_end=at_end))

    first = reducer()
    state = start(first)
    uncut = [state, *(after for _, _, after, _ in continue_run(first, state))]
    effects = [effects for *_, effects in continue_run(reducer(), state)]
    cut = min(cut, len(uncut) - 1)
    for name, memory in uncut[cut].callback_states.items():
        check_memory(name, memory)
    loaded = save_and_load(uncut[cut], AfterUpdate())
    assert same(loaded, uncut[cut])
    second = reducer()
    resumed, _ = second(loaded, BeforeTraining(run=RUN, resumed=True))
    assert resumed is loaded
    rest = list(continue_run(second, resumed))
    assert same([after for _, _, after, _ in rest], uncut[cut + 1 :])
    assert same([requests for *_, requests in rest], effects[cut:])


@examples(30, quick=15)
@given(st.sampled_from(list(INTERVALS)), st.integers(1, 8), st.integers(0, 12), st.data())
def test_a_single_callback_resumed_at_any_event_does_the_same(interval, n, cut, data):
    """A single callback, with those whose metrics it reads, requests the same after a cut."""
    members = all_examples(interval, n, at_end=True)
    chosen = data.draw(st.sampled_from(members))
    alone = [m for m in members if m in (chosen, sometimes) or isinstance(m, (EMACallback, EvaluateCallback))]
    events = list(continue_run(compose(*alone), start(compose(*alone))))
    cut = min(cut, len(events) - 1)
    event, before, after, effects = events[cut]
    loaded = save_and_load(before, event)
    assert same(compose(*alone)(loaded, event), (after, effects))


def as_subclass(event):
    """Return the event as one of a loop of the user's own: a subclass of a subclass, with a field more."""
    base = type(event)
    kind = dataclass(frozen=True, kw_only=True, eq=False)(
        type(base.__name__, (base,), {"__annotations__": {"temperature": float}, "temperature": 0.5})
    )
    return type(base.__name__, (kind,), {}).of(**vars(event), temperature=0.25)


@pytest.mark.parametrize(("interval", "n"), [("every_n_epochs", 1), ("every_n_updates", 2), ("every_n_samples", 7)])
def test_every_callback_takes_a_subclass_of_an_event_for_its_base(interval, n):
    members = all_examples(interval, n, at_end=True)
    reducer, silent = compose(*members), compose(*members)
    initial = start(reducer)
    expected = list(continue_run(reducer, initial))
    assert same(reducer(initial, as_subclass(AtEval(run=RUN))), silent(initial, AtEval(run=RUN)))
    for event, before, after, effects in expected:
        assert same(reducer(before, as_subclass(event)), (after, effects))
        for member in members:
            assert listens_to(member, type(as_subclass(event))) == listens_to(member, type(event))
            result = member(before, event)
            assert same(member(before, as_subclass(event)), result)
            before, _ = result  # noqa: PLW2901  # a fold, as the reducer's
