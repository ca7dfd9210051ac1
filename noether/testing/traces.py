"""Runs without a model: the events of a loop as data, and the result of driving callbacks through them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar, final

import torch

from noether.core.event import (
    EVENTS,
    AfterAccumulationStep,
    AfterEpoch,
    AfterTraining,
    AfterUpdate,
    AtEval,
    BeforeTraining,
)
from noether.core.loop import Move, next_move
from noether.core.reducer import compose
from noether.core.tensors.tree import FrozenDict
from noether.testing.models import TracedModel

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from noether.core.callback import Callback, Effects
    from noether.core.effect import Effect
    from noether.core.event import Event
    from noether.core.run import Run
    from noether.core.state import TrainState

    Dispatch = Callable[[TrainState, Event], TrainState]

_EffectType = TypeVar("_EffectType", bound="Effect")
_EventType = TypeVar("_EventType", bound="Event")
_OWN_EVENTS: Final[dict[type[Event], Any]] = {kind: type(f"Own{kind.__name__}", (kind,), {}) for kind in EVENTS}


@final
@dataclass(frozen=True)
class Reading:
    """Losses and duration of one update.

    Args:
        losses: Mean loss of each accumulation step. An update has as many steps, but at most one for each sample; it is
            empty, without losses and samples, if there are none.
        duration_s: Seconds since the previous update.
        skipped: Whether the loop skips the update, as one with gradients that are not finite.
    """

    losses: tuple[float, ...] = (1.0,)
    duration_s: float = 0.25
    skipped: bool = False

    def __str__(self) -> str:
        text = "+".join(map(str, self.losses)) or "empty"  # a + joins the losses of one update
        return f"{text} (skipped)" if self.skipped else text


@final
@dataclass(frozen=True)
class Trace:
    """A run as data: its shape, the readings of each update, and where a process ends and another resumes.

    A place in a run is its number of completed updates and ends of epochs, counted together.

    Args:
        run: Gives the end of the run and the sizes of its epochs and batches.
        readings: One for each update; the last one is repeated if the run has more updates.
        interruptions: Places at which a process ends; the next process starts with `BeforeTraining(resumed=True)`.
        seed: Seed of the state at the start.
        model: Params, names of losses and outputs, and datasets.
        first_update: Completed updates at the start, >= 0; if there are any, the callbacks join a run that is resumed.
        evaluations: Places at which the model is evaluated with `AtEval`.
        stop: Number of the update at which another callback stops the run; None if none does.
        finite_metrics: Whether a metric is finite that a law provides because a callback consumes it.
        clock_s: Wall-clock time at update 0, in seconds since 1970.
        own_events: Whether the events are of subclasses, as a loop may define them.

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
    model: TracedModel = field(default=TracedModel(), repr=False)
    first_update: int = 0
    evaluations: tuple[int, ...] = ()
    stop: int | None = None
    finite_metrics: bool = False
    clock_s: float = 1e9
    own_events: bool = False

    def __str__(self) -> str:
        run = self.run
        sizes = f"{run.samples_per_epoch} samples per epoch in batches of {run.effective_batch_size}"
        parts = [f"a run to {run.end}", sizes, f"losses {', '.join(map(str, self.readings))}", f"seed {self.seed}"]
        if self.first_update:
            parts.insert(1, f"resumed with new callbacks at {run.iteration_after(self.first_update)}")
        if self.interruptions:
            parts.append(f"interrupted after {', '.join(map(str, self.interruptions))}")
        if self.evaluations:
            parts.append(f"evaluated after {', '.join(map(str, self.evaluations))}")
        if self.stop is not None:
            parts.append(f"stopped at update {self.stop}")
        if len(self.model.groups) > 1:
            parts.append(f"parameter groups {', '.join(self.model.groups)}")
        if self.own_events:
            parts.append("with events of subclasses")
        return ", ".join(parts)

    def start(self) -> TrainState:
        """Return the state at the start: the params of the model, a buffer, and the state of an optimizer."""
        state = self.model.start(self.seed)
        if not self.first_update:
            return state
        iteration = self.run.iteration_after(self.first_update)
        before = self.run.iteration_after(self.first_update - 1)
        start = self.run.iteration_after(iteration.epoch * self.run.updates_per_epoch)
        return state.replace(iteration=iteration, previous=before, epoch_start=start)

    @property
    def is_finite(self) -> bool:
        """Whether all losses are finite and no metric of a law may be anything else."""
        losses = (loss for reading in self.readings for loss in reading.losses)
        return self.finite_metrics and all(map(math.isfinite, losses))

    def with_finite_values(self) -> Trace:
        """Return the trace with finite losses and metrics, and no skipped updates."""
        readings = tuple(
            replace(each, losses=tuple(loss if math.isfinite(loss) else 1.0 for loss in each.losses), skipped=False)
            for each in self.readings
        )
        return replace(self, readings=readings, finite_metrics=True)

    def with_model(self, model: TracedModel) -> Trace:
        """Return the trace of the same run with another model."""
        return replace(self, model=model, run=model.complete_run(self.run))

    def without_interruptions(self) -> Trace:
        """Return the trace of the same run in one process."""
        return replace(self, interruptions=())

    def on_rank(self, rank: int) -> Trace:
        """Return the trace that one of two ranks sees; losses, outputs and durations differ between the ranks."""
        readings = tuple(replace(each, duration_s=each.duration_s + rank) for each in self.readings)
        run = self.run.replace(rank=rank, world_size=2, gather=lambda _, value: (value, value))
        return replace(self, run=run, readings=readings)

    def event(self, kind: type[_EventType], **fields: Any) -> _EventType:
        """Return an event of this run, of the given type or of a subclass."""
        chosen: Any = _OWN_EVENTS[kind] if self.own_events else kind
        made: _EventType = chosen(run=self.run, **fields)
        return made

    def reading(self, update: int) -> Reading:
        """Return the reading of the update after `update` others."""
        return self.readings[min(update - self.first_update, len(self.readings) - 1)]


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
    reducer = compose(callback)  # it fills in the memory that is missing
    driven: list[tuple[Event, TrainState, Effects]] = []

    def dispatch(state: TrainState, event: Event) -> TrainState:
        state, effects = reducer(state, event)
        driven.append((event, state, effects))
        return state

    run_loop(trace, dispatch, state, resumed=resumed)
    events, states, effects = zip(*driven, strict=True)
    return DrivenRun(events, states, effects)


def run_loop(trace: Trace, dispatch: Dispatch, state: TrainState | None = None, *, resumed: bool = False) -> None:
    """Call `dispatch` for every event of a run.

    Args:
        trace: The run.
        dispatch: `(state, event) -> state`.
        state: As for `drive`.
        resumed: As for `drive`.
    """
    run = trace.run
    if state is None:
        state, resumed = trace.start(), trace.first_update > 0
    state = dispatch(state, trace.event(BeforeTraining, resumed=resumed, time_s=_time_s(state, trace)))
    while True:
        if _place(state) in trace.evaluations:
            state = dispatch(state, trace.event(AtEval, time_s=_time_s(state, trace)))
        move = next_move(state, run)
        if move is Move.NOTHING:
            break
        if move is Move.END_TRAINING:
            state = dispatch(state.replace(ended=True), trace.event(AfterTraining, time_s=_time_s(state, trace)))
            continue
        if move is Move.END_EPOCH:
            state = dispatch(state.next_epoch(), trace.event(AfterEpoch, time_s=_time_s(state, trace)))
        else:
            state = _update(state, trace, dispatch)
        if _place(state) in trace.interruptions:
            state = dispatch(state, trace.event(BeforeTraining, resumed=True, time_s=_time_s(state, trace)))


def effects_of(stream: DrivenRun | Iterable[Effects], kind: type[_EffectType]) -> list[_EffectType]:
    """Return the effects of one type in a stream of them, in order.

    Example:
        >>> from noether import LogScalars, LogText
        >>> effects_of([(LogText("a"),), (), (LogScalars({"x": 1}), LogText("b"))], LogText)
        [LogText(text='a'), LogText(text='b')]
    """
    sequence = stream.effects if isinstance(stream, DrivenRun) else stream
    return [effect for effects in sequence for effect in effects if isinstance(effect, kind)]


def _place(state: TrainState) -> int:
    return state.iteration.update + state.iteration.epoch


def _time_s(state: TrainState, trace: Trace) -> float:
    return trace.clock_s + state.iteration.update + trace.run.rank / 8


def _update(state: TrainState, trace: Trace, dispatch: Dispatch) -> TrainState:
    """Return the state after one update, which depends on the params, the losses and the hyperparams."""
    run, model, update = trace.run, trace.model, state.iteration.update
    reading = trace.reading(update)
    sizes = _sizes(run.iteration_after(update + 1).sample - run.iteration_after(update).sample, reading)
    offset = run.rank / 8  # each rank measures its own part of the batch
    losses = [loss + offset for loss in reading.losses[: len(sizes)]]
    outputs = tuple(model.outputs_of(update + step, loss) for step, loss in enumerate(losses))
    for step, (samples, loss) in enumerate(zip(sizes, losses, strict=True)):
        seen = trace.event(
            AfterAccumulationStep, time_s=_time_s(state, trace), losses=model.losses_of(loss), outputs=outputs[step],
            samples=samples, accumulation_step=step, accumulation_steps=len(sizes),
        )  # fmt: skip
        state = dispatch(state, seen)
    event = trace.event(
        AfterUpdate, time_s=_time_s(state, trace) + 1, samples=sum(sizes), outputs=outputs, accumulated=sizes,
        lr=model.learning_rates(state), weight_decay=model.weight_decay,
        **_measurements(state, model, reading, sizes), **_durations(reading.duration_s),
    )  # fmt: skip
    if not event.skipped:
        state = model.step(state, _mean(reading, sizes))
    state = state.advance(samples=sum(sizes))
    if state.iteration.update == trace.stop:
        state = state.request_stop("another callback stops the run")
    return dispatch(state, event)


def _measurements(state: TrainState, model: TracedModel, reading: Reading, sizes: tuple[int, ...]) -> dict[str, Any]:
    if not sizes:
        return {"skipped": True}
    loss = _mean(reading, sizes)
    finite = torch.tensor(math.isfinite(loss) and not reading.skipped)
    grad_norm = torch.tensor(math.inf if reading.skipped and math.isfinite(loss) else abs(loss))
    trained = {name: param for name, param in state.params.items() if name not in model.frozen}
    # Cast from double precision: a loss that a dtype of few bits does not hold is an overflow there, not an error.
    gradients = FrozenDict(
        {name: torch.full_like(param, loss, dtype=torch.float64).to(param.dtype) for name, param in trained.items()}
    )
    return {
        "losses": model.losses_of(loss),
        "grad_norm": grad_norm,
        "gradients": None if reading.skipped else gradients,
        "finite": finite,
        "skipped": reading.skipped,
    }


def _mean(reading: Reading, sizes: tuple[int, ...]) -> float:
    return sum(loss * size for loss, size in zip(reading.losses, sizes, strict=False)) / sum(sizes)


def _durations(duration_s: float) -> dict[str, Any]:
    parts = {"data_s": 4, "step_s": 2, "forward_s": 8, "backward_s": 8, "optimizer_s": 8}
    return {"duration_s": duration_s, **{name: duration_s / part for name, part in parts.items()}}


def _sizes(samples: int, reading: Reading) -> tuple[int, ...]:
    """Return the samples of each accumulation step; empty if the update is."""
    steps = min(len(reading.losses), samples)
    return tuple(samples // steps + (step < samples % steps) for step in range(steps))
