"""A loop without a model, which drives callbacks through the events of a run; and strategies for callbacks."""

import math
from dataclasses import replace

import torch
from hypothesis import strategies as st

from noether.core.callback import init_of, label_of
from noether.core.callbacks import PeriodicCallback
from noether.core.combinators import callback, on, when
from noether.core.effect import LogText
from noether.core.event import AfterAccumulationStep, AfterEpoch, AfterTraining, AfterUpdate, AtEval, BeforeTraining
from noether.core.loop import Move, next_move
from noether.core.metrics import log
from noether.core.reducer import identity
from noether.core.schedules.schedule import INTERVALS
from noether.core.state import TrainState
from noether.core.tensors.tree import FrozenDict
from noether.testing.strategies import schedules


def start():
    return TrainState(params={"w": torch.arange(3.0)}, buffers={"b": torch.zeros(2)}, seed=7)


def step(state, run, accumulation, dispatch):
    """Return the state after an update that depends on params, counters and hyperparams, and its readings."""
    done = state.iteration
    size = min(run.effective_batch_size, (done.epoch + 1) * run.samples_per_epoch - done.sample)
    parts = min(accumulation, size)
    for index in range(parts):
        losses = {"total": math.cos(done.update + index)}
        state = dispatch(state, AfterAccumulationStep(run=run, losses=losses, samples=size // parts,
                                                  accumulation_step=index, accumulation_steps=parts))  # fmt: skip
    scale = state.hyperparams["lr_scale"]
    params = FrozenDict({name: p * 0.5 + scale * math.sin(done.update) for name, p in state.params.items()})
    losses = {"total": torch.tensor(math.sin(done.update)), "aux": float(done.update)}
    readings = {"samples": size, "losses": losses, "lr": {"default": 0.1 * scale}, "duration_s": 0.25}
    return state.replace(params=params).advance(samples=size), readings


def drive(reducer, run, state=None, *, resumed=False, accumulation=1):
    """Yield `(event, state before it, state after it, effects)` of every event from `state` to the run's end."""
    seen = []

    def dispatch(state, event):
        after, effects = reducer(state, event)
        seen.append((event, state, after, effects))
        return after

    state = dispatch(start() if state is None else state, BeforeTraining(run=run, resumed=resumed))
    while True:
        yield from seen
        seen.clear()
        move = next_move(state, run)
        if move is Move.NOTHING:
            return
        if move is Move.END_EPOCH:
            state = dispatch(state.next_epoch(), AfterEpoch(run=run))
        elif move is Move.END_TRAINING:
            state = dispatch(state.replace(ended=True), AfterTraining(run=run))
        else:
            state, readings = step(state, run, accumulation, dispatch)
            state = dispatch(state, AfterUpdate(run=run, **readings))


def outcomes(trace):
    """Return the event names, states and effects of a trace; compare them with `same`."""
    return [(type(event).__name__, after, effects) for event, _, after, effects in trace]


def fold(*members):
    """Return the naive fold that `compose` must equal."""

    def call(state, event):
        if isinstance(event, BeforeTraining):
            for member in members:
                for name, memory in init_of(member, state).items():
                    if name not in state.callback_states:
                        state = state.remember(name, memory)
        effects = ()
        for member in members:
            was_stopped = state.stop is not None
            state, requested = member(state, event)
            if state.stop is not None and not was_stopped and state.stopped_by is None:
                state = state.replace(stopped_by=label_of(member))
            effects += requested
        return state, effects

    return call


def refuses_effects(event):
    """Return whether a reducer refuses effects or changes of the state at an event."""
    return isinstance(event, AfterAccumulationStep) or (isinstance(event, BeforeTraining) and event.resumed)


def says(tag):
    """Log a line with everything that earlier callbacks may have changed, so that their order shows."""

    def say(state, event):
        if isinstance(event, AfterAccumulationStep):
            return state, ()
        seen = sorted((key, measured.value) for key, measured in state.metrics.items())
        return state, (LogText(f"{tag} {type(event).__name__} {state.iteration} {seen} {state.hyperparams}"),)

    return say


def logs(tag):
    def logging(state, event):
        if refuses_effects(event):
            return state, ()
        return log(state, event, {f"metric/{tag}": len(state.metrics) + float(state.iteration.update)})

    return logging


def halves(tag):
    def halve(state, event):
        if refuses_effects(event):
            return state, ()
        scale = state.hyperparams["lr_scale"] * (0.5 + tag / 8)
        return state.replace(hyperparams=state.hyperparams | {"lr_scale": scale}), ()

    return halve


def counts(tag):
    @callback(f"count/{tag}", init=lambda state: 0)
    def count(state, event):
        if refuses_effects(event):
            return state, ()
        return state.remember(f"count/{tag}", state.memory(f"count/{tag}") + 1), ()

    return count


def stops(tag):
    def stop(state, event):
        if isinstance(event, AfterUpdate) and state.iteration.update >= 5 + tag:
            return state.request_stop(f"stop {tag}"), ()
        return state, ()

    return stop


def sums(tag, schedule):
    """Sum at every update, log when the schedule is due."""

    @callback(f"sum/{tag}", init=lambda state: {"samples": 0, "loss": torch.zeros(())}, track=_add)
    @when(schedule)
    def tell_sum(state, event):
        memory = state.memory(f"sum/{tag}")
        return log(state, event, {f"samples/{tag}": memory["samples"], f"loss/{tag}": memory["loss"]})

    return tell_sum


def _add(memory, event):
    return {"samples": memory["samples"] + event.samples, "loss": memory["loss"] + event.losses["total"]}


class Tally(PeriodicCallback):
    """Counts accumulation steps and updates; logs and resets the counts when it is due."""

    tag: int = 0

    def name_parts(self):
        return (*super().name_parts(), str(self.tag))

    def init(self, state):
        return {self.name: {"steps": 0, "updates": 0}}

    def track_after_accumulation_step(self, state, event):
        memory = self.memory(state)
        return state.remember(self.name, {**memory, "steps": memory["steps"] + 1}), ()

    def track_after_update_step(self, state, event):
        memory = self.memory(state)
        return state.remember(self.name, {**memory, "updates": memory["updates"] + 1}), ()

    def periodic_callback(self, state, event, interval):
        line = LogText(f"{self.name} {interval} {dict(self.memory(state))}")
        return state.remember(self.name, self.init(state)[self.name]), (line,)


class Bell(PeriodicCallback):
    """Counts how often it is due."""

    tag: int = 0

    def name_parts(self):
        return (*super().name_parts(), str(self.tag))

    def init(self, state):
        return {self.name: 0}

    def periodic_callback(self, state, event, interval):
        return state.remember(self.name, self.memory(state) + 1), (LogText(f"{self.name} {interval}"),)


PLAIN = (says, logs, halves, counts)


@st.composite
def periodic(draw, tag, kinds=(Tally, Bell)):
    kind, interval = draw(st.sampled_from(kinds)), draw(st.sampled_from(list(INTERVALS)))
    return kind(tag=tag, at_end=draw(st.booleans()), **{interval: draw(st.integers(1, 12))})


@st.composite
def plain_callback(draw, tag):
    """A callback without schedule and tracking."""
    made = draw(st.sampled_from((*PLAIN, stops)))(tag)
    events = draw(st.lists(st.sampled_from((BeforeTraining, AfterUpdate, AfterEpoch, AfterTraining, AtEval)),
                           max_size=3, unique=True))  # fmt: skip
    return on(*events)(made) if events else made


@st.composite
def gated_callback(draw, tag):
    """A callback that acts only when its schedule is due."""
    if draw(st.booleans()):
        return draw(periodic(tag, kinds=(Bell,)))
    made = draw(st.sampled_from(PLAIN))(tag)
    return when(draw(schedules(12)), at_end=draw(st.booleans()))(made)


@st.composite
def anything(draw, tag):
    kind = draw(st.sampled_from(("plain", "gated", "periodic", "sums", "nothing", "predicate")))
    if kind == "sums":
        return sums(tag, draw(schedules(12)))
    if kind == "nothing":
        return draw(st.sampled_from((identity, lambda state, event: (state, ()))))
    if kind == "predicate":
        return when(lambda state, event: state.iteration.update % 3 == tag % 3)(draw(st.sampled_from(PLAIN))(tag))
    return draw({"plain": plain_callback, "gated": gated_callback, "periodic": periodic}[kind](tag))


@st.composite
def several(draw, one=anything, min_size=0, max_size=5):
    """Lists of callbacks with distinct names and keys."""
    return [draw(one(tag)) for tag in range(draw(st.integers(min_size, max_size)))]


def move_to(state, previous, iteration):
    """Return `state` moved to another update."""
    return replace(state, previous=previous, iteration=iteration)
