"""Runs without a model: the events of a loop as data, and the result of driving callbacks through them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, final

import torch

from noether.core.event import AfterAccumulationStep, AfterEpoch, AfterTraining, AfterUpdate, BeforeTraining
from noether.core.loop import Move, next_move
from noether.core.reducer import compose
from noether.core.state import TrainState
from noether.core.tensors.tree import FrozenDict

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from noether.core.callback import Callback, Effects
    from noether.core.effect import Effect
    from noether.core.event import Event
    from noether.core.run import Run

    Dispatch = Callable[[TrainState, Event], TrainState]

_EffectType = TypeVar("_EffectType", bound="Effect")


@final
@dataclass(frozen=True)
class Reading:
    """Losses and duration of one update.

    Args:
        losses: Mean loss of each accumulation step. An update has as many steps, but at most one for each sample.
        duration_s: Seconds since the previous update.
    """

    losses: tuple[float, ...] = (1.0,)
    duration_s: float = 0.25


@final
@dataclass(frozen=True)
class Trace:
    """A run as data: its shape, the readings of each update, and where a process ends and another resumes.

    Args:
        run: Gives the end of the run and the sizes of its epochs and batches.
        readings: One for each update; the last one is repeated if the run has more updates.
        interruptions: Numbers of updates and ends of epochs, counted together, after which a process ends; the next
            process starts with `BeforeTraining(resumed=True)`.
        seed: Seed of the state at the start.

    Example:
        >>> from noether import Run, TrainingIteration
        >>> run = Run(end=TrainingIteration(epoch=1), updates_per_epoch=2, samples_per_epoch=3, effective_batch_size=2)
        >>> driven = drive(lambda state, event: (state, ()), Trace(run))
        >>> [(type(event).__name__, event.samples) for event in driven.events[1:5]]
        [('AfterAccumulationStep', 2), ('AfterUpdate', 2), ('AfterAccumulationStep', 1), ('AfterUpdate', 1)]
    """

    run: Run
    readings: tuple[Reading, ...] = (Reading(),)
    interruptions: tuple[int, ...] = ()
    seed: int = 0

    def __str__(self) -> str:
        run = self.run
        sizes = f"{run.samples_per_epoch} samples per epoch in batches of {run.effective_batch_size}"
        # A + joins the losses of one update.
        losses = ", ".join("+".join(map(str, each.losses)) for each in self.readings)
        cut = f", interrupted after {', '.join(map(str, self.interruptions))}" if self.interruptions else ""
        return f"a run to {run.end}, {sizes}, losses {losses}, seed {self.seed}{cut}"

    def start(self) -> TrainState:
        """Return the state at the start: params `w` and `b`, a buffer, and the state of an optimizer."""
        params = {"w": torch.tensor([1.0, -2.0]), "b": torch.tensor(0.5)}
        moments = {name: {"exp_avg": torch.zeros_like(param)} for name, param in params.items()}
        opt_state = {"state": moments, "groups": {}}
        return TrainState(params=params, buffers={"seen": torch.tensor(0)}, opt_state=opt_state, seed=self.seed)

    def without_interruptions(self) -> Trace:
        """Return the trace of the same run in one process."""
        return replace(self, interruptions=())

    def on_rank(self, rank: int) -> Trace:
        """Return the trace that one of two ranks sees; losses, outputs and durations differ between the ranks."""
        readings = tuple(replace(each, duration_s=each.duration_s + rank) for each in self.readings)
        return replace(self, run=self.run.replace(rank=rank, world_size=2), readings=readings)

    def reading(self, update: int) -> Reading:
        """Return the reading of the update with this index."""
        return self.readings[min(update, len(self.readings) - 1)]


class DrivenRun(NamedTuple):
    """Result of driving a callback through a run, with one entry for each event, in order."""

    events: tuple[Event, ...]
    states: tuple[TrainState, ...]
    effects: tuple[Effects, ...]

    def since(self, number: int) -> DrivenRun:
        """Return the part from the event with index `number` on."""
        return DrivenRun(self.events[number:], self.states[number:], self.effects[number:])


def drive(callback: Callback, trace: Trace, state: TrainState | None = None, *, resumed: bool = False) -> DrivenRun:
    """Return the events of a run, and the settled state and the effects that a callback returns at each.

    Args:
        callback: Any callback, most often the result of `compose`.
        trace: The run.
        state: The state to start from; None for `trace.start()`.
        resumed: Whether the run resumes from that state.

    Example:
        >>> from noether import LogText, Run, TrainingIteration, every_n_updates
        >>> @every_n_updates(2)
        ... def say(state, event):
        ...     return state, (LogText(str(state.iteration)),)
        >>> run = Run(end=TrainingIteration(update=4), updates_per_epoch=3, samples_per_epoch=9, effective_batch_size=3)
        >>> [effect.text for effect in effects_of(drive(say, Trace(run)), LogText)]
        ['E0_U2_S6', 'E1_U4_S12']
    """
    reducer, run = compose(callback), trace.run  # a reducer fills in the memory that is missing
    driven: list[tuple[Event, TrainState, Effects]] = []

    def dispatch(state: TrainState, event: Event) -> TrainState:
        state, effects = reducer(state, event)
        driven.append((event, state, effects))
        return state

    state = dispatch(trace.start() if state is None else state, BeforeTraining(run=run, resumed=resumed))
    while (move := next_move(state, run)) is not Move.NOTHING:
        if move is Move.END_TRAINING:
            state = dispatch(state.replace(ended=True), AfterTraining(run=run))
            continue
        if move is Move.END_EPOCH:
            state = dispatch(state.next_epoch(), AfterEpoch(run=run))
        else:
            state = _update(state, trace, dispatch)
        if state.iteration.update + state.iteration.epoch in trace.interruptions:
            state = dispatch(state, BeforeTraining(run=run, resumed=True))
    events, states, effects = zip(*driven, strict=True)
    return DrivenRun(events, states, effects)


def effects_of(stream: DrivenRun | Iterable[Effects], kind: type[_EffectType]) -> list[_EffectType]:
    """Return the effects of one type in a stream of them, in order.

    Example:
        >>> from noether import LogScalars, LogText
        >>> effects_of([(LogText("a"),), (), (LogScalars({"x": 1}), LogText("b"))], LogText)
        [LogText(text='a'), LogText(text='b')]
    """
    sequence = stream.effects if isinstance(stream, DrivenRun) else stream
    return [effect for effects in sequence for effect in effects if isinstance(effect, kind)]


def _update(state: TrainState, trace: Trace, dispatch: Dispatch) -> TrainState:
    """Return the state after one update, which depends on the params, the losses and the hyperparams."""
    run, update = trace.run, state.iteration.update
    reading = trace.reading(update)
    sizes = _sizes(run.iteration_after(update + 1).sample - run.iteration_after(update).sample, reading)
    offset = run.rank / 8  # each rank measures its own part of the batch
    outputs = tuple({"drift": state.params["w"].abs() + offset, "scale": step + offset} for step in range(len(sizes)))
    for step, (samples, loss) in enumerate(zip(sizes, reading.losses, strict=False)):
        seen = AfterAccumulationStep(
            run=run, losses={"total": torch.tensor(loss + offset)}, outputs=outputs[step], samples=samples,
            accumulation_step=step, accumulation_steps=len(sizes),
        )  # fmt: skip
        state = dispatch(state, seen)
    loss = sum(loss * size for loss, size in zip(reading.losses, sizes, strict=False)) / sum(sizes)
    lr = {"default": 0.1 * state.hyperparams["lr_scale"]}
    event = AfterUpdate(
        run=run, time_s=1e9 + update + offset, samples=sum(sizes), losses={"total": torch.tensor(loss)}, lr=lr,
        outputs=outputs, accumulated=sizes, weight_decay={"default": 0.01}, grad_norm=torch.tensor(abs(loss)),
        finite=torch.tensor(math.isfinite(loss)), **_durations(reading.duration_s),
    )  # fmt: skip
    return dispatch(_optimizer_step(state, loss).advance(samples=sum(sizes)), event)


def _durations(duration_s: float) -> dict[str, Any]:
    parts = {"data_s": 4, "step_s": 2, "forward_s": 8, "backward_s": 8, "optimizer_s": 8}
    return {"duration_s": duration_s, **{name: duration_s / part for name, part in parts.items()}}


def _sizes(samples: int, reading: Reading) -> tuple[int, ...]:
    """Return the samples of each accumulation step."""
    steps = min(len(reading.losses), samples)
    return tuple(samples // steps + (step < samples % steps) for step in range(steps))


def _optimizer_step(state: TrainState, loss: float) -> TrainState:
    gradient = torch.tensor(loss if math.isfinite(loss) else math.nan).tanh()
    scale = 0.1 * state.hyperparams["lr_scale"]
    memory = {name: {"exp_avg": 0.5 * gradient.expand_as(param)} for name, param in state.params.items()}
    return state.replace(
        params=FrozenDict({name: 0.9 * param - scale * gradient for name, param in state.params.items()}),
        buffers=FrozenDict({name: buffer + 1 for name, buffer in state.buffers.items()}),
        opt_state={"state": memory, "groups": {}},
    )
