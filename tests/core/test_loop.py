"""`next_move`: a loop of a few lines, cut and resumed at random, equals the uncut run."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from noether.core.combinators import callback, every_n_epochs, every_n_samples, every_n_updates, on, when
from noether.core.effect import LogText
from noether.core.event import AfterEpoch, AfterTraining, AfterUpdate, BeforeTraining
from noether.core.iteration import TrainingIteration
from noether.core.loop import Move, next_move, updates_in_epoch
from noether.core.metrics import log
from noether.core.pending import dispatch_pending, set_pending
from noether.core.reducer import compose
from noether.core.run import Run
from noether.core.schedules.schedule import At
from noether.core.state import TrainState
from noether.core.tensors.tree import FrozenDict
from noether.effects.checkpoints.state_codec import decode_state, encode_state
from noether.testing import same
from noether.testing.strategies import run_lengths, schedules


def start_run(reducer, run, state, *, resumed):
    return reducer(state, BeforeTraining(run=run, resumed=resumed))[0]


def run_to_end(reducer, run, state):
    """Yield `(state, event name, effects)` of every event that is left."""
    while (move := next_move(state, run)) is not Move.NOTHING:
        if move is Move.END_EPOCH:
            state, event = state.next_epoch(), AfterEpoch(run=run)
        elif move is Move.END_TRAINING:
            state, event = state.replace(ended=True), AfterTraining(run=run)
        else:
            position = state.iteration.update - state.iteration.epoch * run.updates_per_epoch
            size = run.iteration_after(state.iteration.update + 1).sample - state.iteration.sample
            weight = state.params["w"] * 0.5 + position * state.hyperparams["lr_scale"]
            state = state.replace(params=FrozenDict(w=weight)).advance(samples=size)
            event = AfterUpdate(run=run, samples=size, losses={"total": weight})
        state, effects = reducer(state, event)
        yield state, type(event).__name__, effects


def callbacks(schedule, stop_at, n):
    @callback("mean", init=lambda state: {"sum": 0.0, "samples": 0},
              track=lambda m, e: {"sum": m["sum"] + e.losses["total"] * e.samples, "samples": m["samples"] + e.samples},
              produces=("mean",))  # fmt: skip
    @when(schedule, at_end=True)
    def mean(state, event):
        memory = state.memory("mean")
        state = state.remember("mean", {"sum": 0.0, "samples": 0})
        return log(state, event, {"mean": memory["sum"] / max(memory["samples"], 1)})

    @callback("halved", init=lambda state: 0, produces=())
    @every_n_samples(n)
    def halve(state, event):
        state = state.replace(hyperparams=state.hyperparams | {"lr_scale": state.hyperparams["lr_scale"] / 2})
        return state.remember("halved", state.memory("halved") + 1), (LogText("halved"),)

    @when(At(TrainingIteration(update=stop_at)))
    def stop(state, event):
        return state.request_stop("there"), (LogText("stop"),)

    def say(state, event):
        return state, (LogText(f"{state.iteration} {state.stop} {dict(state.callback_states)}"),)

    return compose(mean, halve, stop, every_n_updates(2)(say), every_n_epochs(1)(say), on(AfterTraining)(say))


@st.composite
def ended_runs(draw):
    run = draw(run_lengths(max_epochs=4))
    final = run.final
    end = draw(st.sampled_from((run.end, TrainingIteration(update=draw(st.integers(1, final.update))),
                                TrainingIteration(sample=draw(st.integers(1, final.sample))))))  # fmt: skip
    return run.replace(end=end)


@settings(max_examples=80, deadline=None)
@given(ended_runs(), schedules(12), st.integers(1, 40), st.integers(1, 20), st.data())
def test_a_run_resumed_anywhere_equals_the_uncut_run(run, schedule, stop_at, n, data):
    def fresh():
        return callbacks(schedule, stop_at, n)

    first = TrainState(params={"w": 1.0})
    reducer = fresh()
    state = start_run(reducer, run, first, resumed=False)
    uncut = [state, *run_to_end(reducer, run, state)]

    saved = [(state, ())]  # every state that was ever on disk, and the events that led to it
    for _ in range(data.draw(st.integers(1, 4))):
        loaded, history = saved[data.draw(st.integers(0, len(saved) - 1))]
        reducer = fresh()
        state = start_run(reducer, run, loaded, resumed=True)
        assert state is loaded
        events = data.draw(st.integers(0, 12))
        for step, _ in zip(run_to_end(reducer, run, state), range(events), strict=False):
            history = (*history, step)
            saved.append((step[0], history))
    loaded, history = saved[data.draw(st.integers(0, len(saved) - 1))]
    rest = run_to_end(fresh(), run, start_run(fresh(), run, loaded, resumed=True))
    assert same([*history, *rest], uncut[1:])


@settings(max_examples=60, deadline=None)
@given(ended_runs(), st.integers(1, 6))
def test_an_extended_run_equals_the_long_run(run, more):
    longer = run.replace(end=TrainingIteration(update=run.final.update + more))

    def say(state, event):
        return state, (LogText(f"{type(event).__name__} {state.iteration}"),)

    short = list(run_to_end(say, run, TrainState(params={"w": 1.0})))
    rest = list(run_to_end(say, longer, short[-1][0]))
    assert same(short[:-1] + rest, list(run_to_end(say, longer, TrainState(params={"w": 1.0}))))


@settings(max_examples=60, deadline=None)
@given(ended_runs())
def test_a_run_ends_once_and_at_its_end(run):
    steps = list(run_to_end(lambda state, event: (state, ()), run, TrainState(params={"w": 1.0})))
    state = steps[-1][0]
    names = [name for _, name, _ in steps]
    assert state.iteration == run.final
    assert names.count("AfterTraining") == 1
    assert names[-1] == "AfterTraining"
    assert names.count("AfterUpdate") == run.final.update
    assert names.count("AfterEpoch") == run.final.epoch
    assert list(run_to_end(lambda state, event: (state, ()), run, state)) == []


@settings(max_examples=60, deadline=None)
@given(ended_runs(), schedules(12), st.integers(1, 40), st.integers(1, 20), st.data())
def test_an_event_that_was_cut_short_is_dispatched_again(run, schedule, stop_at, n, data):
    reducer = callbacks(schedule, stop_at, n)
    state = start_run(reducer, run, TrainState(params={"w": torch.tensor(1.0)}), resumed=False)
    cut_after = data.draw(st.integers(0, run.final.update - 1))
    while state.iteration.update < cut_after and state.stop is None:
        state = state.advance(samples=2)
        state = reducer(state, AfterUpdate(run=run, samples=2, losses={"total": torch.tensor(0.5)}))[0]
    event = AfterUpdate(run=run, time_s=7.0, samples=3, losses={"total": torch.tensor(0.25)}, lr={"": 0.5},
                        outputs=({"y": torch.ones(2)},), accumulated=(1, 2), finite=torch.tensor(True))  # fmt: skip
    state = state.advance(samples=3)
    saved = decode_state(encode_state(set_pending(state, event))).replace(params=state.params)
    resumed = start_run(callbacks(schedule, stop_at, n), run, saved, resumed=True)
    requested = []
    again = dispatch_pending(resumed, run, reducer, lambda effects, state, event: requested.append((effects, event)))
    after, effects = reducer(state, event)
    assert same(again, after)
    assert same([requested[0][0]], [effects])
    kept = requested[0][1]
    assert kept.run is run
    assert same({**vars(kept), "run": None, "time_s": 7.0}, {**vars(event), "run": None})
    assert dispatch_pending(again, run, reducer, pytest.fail) is again


def test_outputs_that_no_checkpoint_can_hold_are_left_out():
    event = AfterUpdate(samples=2, outputs=(object(),))
    assert set_pending(TrainState(), event).pending["outputs"] is None


RUN = Run(end=TrainingIteration(epoch=2), updates_per_epoch=2, samples_per_epoch=4, effective_batch_size=2)


@pytest.mark.parametrize(
    ("state", "move"),
    [
        (TrainState(), Move.UPDATE),
        (TrainState(iteration=TrainingIteration(0, 1, 2)), Move.UPDATE),
        (TrainState(iteration=TrainingIteration(0, 2, 4)), Move.END_EPOCH),
        (TrainState(iteration=TrainingIteration(1, 2, 4)), Move.UPDATE),
        (TrainState(iteration=TrainingIteration(1, 4, 8)), Move.END_EPOCH),
        (TrainState(iteration=TrainingIteration(2, 4, 8)), Move.END_TRAINING),
        (TrainState(iteration=TrainingIteration(2, 4, 8), ended=True), Move.NOTHING),
        (TrainState(iteration=TrainingIteration(0, 1, 2), stop="why"), Move.END_TRAINING),
        (TrainState(iteration=TrainingIteration(0, 2, 4), stop="why"), Move.END_EPOCH),
        (TrainState(iteration=TrainingIteration(0, 1, 2), stop=""), Move.END_TRAINING),
        (TrainState(iteration=TrainingIteration(0, 1, 2), stop="why", ended=True), Move.NOTHING),
        (TrainState(iteration=TrainingIteration(0, 1, 2), ended=True), Move.UPDATE),
        (TrainState(iteration=TrainingIteration(3, 6, 12)), Move.END_TRAINING),
    ],
)
def test_moves(state, move):
    assert next_move(state, RUN) is move


@pytest.mark.parametrize("missing", ["end", "updates_per_epoch"])
def test_next_move_names_the_missing_field_of_the_run(missing):
    given = {"end": TrainingIteration(epoch=2), "updates_per_epoch": 2}
    del given[missing]
    with pytest.raises(AttributeError, match=f"this run was not given '{missing}'"):
        next_move(TrainState(), Run(**given))


def test_a_state_keeps_the_start_of_its_epoch_and_its_lengths():
    state = TrainState(lengths={"updates_per_epoch": 2}).advance(samples=4).advance(samples=3).next_epoch()
    state = state.advance(samples=4)
    saved = encode_state(state)
    assert saved["state"]["epoch_start"] == "E1_U2_S7"
    back = decode_state(saved)
    assert (back.epoch_start, back.lengths) == (state.epoch_start, state.lengths)
    assert encode_state(back) == saved


def test_a_state_of_an_earlier_version_has_no_lengths_and_the_length_of_the_run_counts_its_epoch():
    saved = encode_state(TrainState(iteration=TrainingIteration(2, 21, 84)))
    assert not {"epoch_start", "lengths"} & set(saved["state"])
    state = decode_state(saved)
    assert (state.epoch_start, state.lengths) == (TrainingIteration(), {})
    assert updates_in_epoch(state, Run(updates_per_epoch=10)) == 1
    with pytest.raises(AttributeError, match="updates_per_epoch"):
        updates_in_epoch(state, Run())


def test_a_start_of_an_epoch_after_the_iteration_is_refused():
    saved = encode_state(TrainState().advance(samples=4))
    saved["state"]["epoch_start"] = "E0_U2_S8"
    with pytest.raises(ValueError, match="epoch_start E0_U2_S8 lies after iteration E0_U1_S4"):
        decode_state(saved)
