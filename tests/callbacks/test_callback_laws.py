"""What holds for every callback that is shipped: it is pure, still where nothing is due, and remembers over a save."""

import copy
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from noether.core.callbacks import (
    BestCheckpointCallback,
    BestMetricCallback,
    CheckpointCallback,
    EvaluateCallback,
    LrCallback,
    MetricEarlyStopping,
    OnlineLossCallback,
    ProgressCallback,
)
from noether.core.event import AfterAccumulationStep, AfterEpoch, AfterTraining, AfterUpdate, AtEval, BeforeTraining
from noether.core.iteration import TrainingIteration
from noether.core.reducer import compose
from noether.core.run import Run
from noether.core.state import TrainState
from noether.core.tree import FrozenDict, check_memory, freeze, tensors
from noether.core.upcoming import Move, next_move
from noether.testing import same


def error(outputs, batch):
    return (outputs - batch[1]).abs()


def forward(state, batch):
    outputs = batch[0] * state.params["w"]
    return {"total": (outputs - batch[1]).square().mean()}, outputs


VAL = [(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0])), (torch.tensor([0.5]), torch.tensor([0.0]))]
RUN = Run(end=TrainingIteration(epoch=3), updates_per_epoch=3, samples_per_epoch=10, effective_batch_size=4,
          data={"val": VAL}, forward=forward)  # fmt: skip
INTERVALS = ("every_n_epochs", "every_n_updates", "every_n_samples")


def shipped(interval, n, *, at_end):
    """Return every kind of callback at one interval, each after what it consumes."""
    when = {interval: n, "at_end": at_end}
    return (
        ProgressCallback(**when),
        LrCallback(**when),
        OnlineLossCallback(**when),
        EvaluateCallback(dataset_key="val", measures=("loss", error), **when),
        BestMetricCallback(metric_key="val/error", target_metric_keys=("loss/val/total",), **when),
        BestCheckpointCallback(metric_key="val/error", tolerances=(1, 2), **when),
        CheckpointCallback(save_weights=True, save_optim=True, keep=2, **when),
        MetricEarlyStopping(metric_key="loss/val/total", tolerance=4, **when),
    )


def go_on(reducer, state, run=RUN):
    """Yield `(event, state before, state after, effects)` of every event that is left of a run."""
    while (move := next_move(state, run)) is not Move.NOTHING:
        if move is Move.END_EPOCH:
            state, event = state.next_epoch(), AfterEpoch(run=run, time_s=5.0)
        elif move is Move.END_TRAINING:
            state, event = state.replace(ended=True), AfterTraining(run=run, time_s=6.0)
        else:
            update = state.iteration.update
            size = run.iteration_after(update + 1).sample - state.iteration.sample
            weight = state.params["w"] * 0.5 + math.sin(update)
            state = state.replace(params=FrozenDict(w=weight)).advance(samples=size)
            event = AfterUpdate(run=run, samples=size, losses={"total": weight.square(), "aux": float(update)},
                                lr={"default": 0.1}, skipped=update == 1, duration_s=0.5)  # fmt: skip
        after, effects = reducer(state, event)
        yield event, state, after, effects
        state = after


def began(reducer):
    return reducer(TrainState(params={"w": torch.tensor(3.0)}), BeforeTraining(run=RUN))[0]


def snapshot(state):
    return {name: getattr(state, name) for name in state.__slots__}


def writes(state):
    """Return how often each tensor of the state was written to, as torch counts it."""
    return {name: tensor._version for name, tensor in tensors(snapshot(state))}  # noqa: SLF001  # torch's counter of writes


@pytest.mark.parametrize("at_end", [False, True])
@pytest.mark.parametrize(
    ("interval", "n"), [*((i, 1) for i in INTERVALS), ("every_n_updates", 2), ("every_n_samples", 7)]
)
def test_every_callback_is_a_pure_function(interval, n, at_end):
    members = shipped(interval, n, at_end=at_end)
    reducer = compose(*members)
    acted = set()
    for event, state, after, effects in list(go_on(reducer, began(reducer))):
        for member in members:
            before = copy.deepcopy(snapshot(state))
            versions = writes(state)
            first = member(state, event)
            second = member(state, event)
            assert same(first, second)
            assert same(snapshot(state), before)
            assert writes(state) == versions
            if first[1]:
                acted.add(type(member))
            state = first[0]  # a fold, as the reducer's  # noqa: PLW2901  # a fold, as the reducer's
        assert same((state, effects), (after, effects))
    assert acted | {MetricEarlyStopping} == {type(member) for member in members}  # it may find nothing to say


@pytest.mark.parametrize("member", shipped("every_n_updates", 3, at_end=False), ids=lambda member: member.name)
def test_where_nothing_is_due_the_state_is_the_same_object(member):
    state = TrainState(params={"w": torch.tensor(1.0)}).advance(samples=4).advance(samples=4)
    events = [AfterEpoch(run=RUN), AfterAccumulationStep(run=RUN, samples=4)]
    if type(member) is not CheckpointCallback:  # that one saves after training, due or not
        events.append(AfterTraining(run=RUN))
    if not member.listens(AtEval):
        events.append(AtEval(run=RUN))
    if not member.tracks:
        events.append(AfterUpdate(run=RUN, samples=4))
    for event in events:
        after, effects = member(state, event)
        assert after is state
        assert effects == ()


def to_disk(memory):
    """Return memory as it is written and read: JSON beside tensors."""
    kept = []

    def encode(tree):
        if isinstance(tree, torch.Tensor):
            kept.append(tree.clone())
            return {"tensor": len(kept) - 1}
        if isinstance(tree, dict):
            return {"dict": {key: encode(value) for key, value in tree.items()}}
        return {"tuple": [encode(value) for value in tree]} if isinstance(tree, tuple) else {"leaf": tree}

    def decode(tree):
        ((kind, value),) = tree.items()
        if kind == "tensor":
            return kept[value]
        if kind == "dict":
            return {key: decode(entry) for key, entry in value.items()}
        return [decode(entry) for entry in value] if kind == "tuple" else value

    return freeze(decode(json.loads(json.dumps(encode(memory)))))


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(INTERVALS), st.integers(1, 8), st.booleans(), st.integers(0, 15))
def test_memory_survives_the_disk_at_any_event(interval, n, at_end, cut):
    def reducer():
        return compose(*shipped(interval, n, at_end=at_end))

    first = reducer()
    state = began(first)
    uncut = [state, *(after for _, _, after, _ in go_on(first, state))]
    effects = [effects for *_, effects in go_on(reducer(), state)]
    cut = min(cut, len(uncut) - 1)
    saved = uncut[cut]
    for name, memory in saved.callback_states.items():
        check_memory(name, memory)
    loaded = saved.replace(callback_states=to_disk(saved.callback_states))
    assert same(loaded, saved)
    second = reducer()
    resumed, _ = second(loaded, BeforeTraining(run=RUN, resumed=True))
    assert resumed is loaded
    rest = list(go_on(second, resumed))
    assert same([after for _, _, after, _ in rest], uncut[cut + 1 :])
    assert same([asked for *_, asked in rest], effects[cut:])
