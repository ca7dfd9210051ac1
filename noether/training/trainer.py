"""The trainer: a loop that asks the state for the next move, makes it, and dispatches the event to the callbacks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, final

from noether.core.callback import listens_to
from noether.core.effect import SaveCheckpoint
from noether.core.event import (
    AfterAccumulationStep,
    AfterEpoch,
    AfterTraining,
    AfterUpdate,
    AtEval,
    BeforeTraining,
    Event,
)
from noether.core.loop import Move, dispatch, next_move
from noether.core.tensors.tree import FrozenDict
from noether.session.timing import Clock
from noether.training.data.sample_counts import SampleCounts

if TYPE_CHECKING:
    from collections.abc import Callable

    from noether.core.callback import Effects
    from noether.core.reducer import Reducer
    from noether.core.run import Run
    from noether.core.state import TrainState
    from noether.training.data.indexed import TrainingData
    from noether.training.data.streamed import StreamedData
    from noether.training.step.compiled import CompiledStep
    from noether.training.step.step import Step


@final
@dataclass(frozen=True, kw_only=True)
class Trainer:
    """Trains a state. It keeps no position: the state holds it.

    Args:
        run: The facts that stay fixed during the run.
        step: Makes one update.
        data: Returns the batches.
        reducer: The callbacks, composed.
        interpreter: Runs their effects.
        evaluate_first: Whether to dispatch an evaluation before the first update of a new run.
        interrupted: Called between events; once it returns True, the trainer saves the state and returns it.
        clock: Where the trainer reads time.
    """

    run: Run
    step: Step | CompiledStep
    data: TrainingData | StreamedData
    reducer: Reducer
    interpreter: Callable[[Effects, TrainState, Event], None]
    evaluate_first: bool = False
    interrupted: Callable[[], bool] = lambda: False
    clock: Clock = Clock()

    def __call__(self, state: TrainState, *, resumed: bool = False) -> TrainState:
        """Return the state at the end of the run, or where it was interrupted."""
        state = self._dispatch(state, BeforeTraining, resumed=resumed)
        if self.evaluate_first and not resumed:
            state = self._dispatch(state, AtEval)
        since_s = self.clock.elapsed_s()
        try:  # all in one frame: another one would keep the tensors of the initial state alive until the end
            while (move := next_move(state, self.run)) is not Move.NOTHING:
                if self.interrupted():
                    self._save(state)
                    return state
                if move is Move.END_EPOCH:
                    state = self._dispatch(state.next_epoch(), AfterEpoch)
                elif move is Move.END_TRAINING:
                    state = self._dispatch(state.replace(ended=True), AfterTraining)
                else:
                    state, since_s = self._update(state, since_s)
            return state
        finally:
            self.data.close()

    @cached_property
    def _last_update(self) -> int:
        return self.run.final.update

    def _save(self, state: TrainState) -> None:
        save = SaveCheckpoint(pointers=("latest",), retention=FrozenDict(interrupted=0))
        self.interpreter((save,), state, AfterUpdate(run=self.run, time_s=self.clock.wall_s()))

    def _update(self, state: TrainState, since_s: float) -> tuple[TrainState, float]:
        """Return the state after one update, and the time at which it was completed."""
        waiting_s = self.clock.elapsed_s()
        state, batches = self.data.next_batches(state, last=self._last_update)
        loaded_s = self.clock.elapsed_s()
        state, event = self.step(state, batches, self._observe if self._is_observed else None)
        stepped_s = self.clock.elapsed_s()
        event = event.replace(
            run=self.run,
            time_s=self.clock.wall_s(),
            duration_s=stepped_s - since_s,
            data_s=loaded_s - waiting_s,
            step_s=stepped_s - loaded_s,
        )
        self._sample_counts.check(state.iteration.update, event.samples)
        state = state.advance(samples=event.samples)
        return dispatch(state, event, self.reducer, self.interpreter), stepped_s

    @cached_property
    def _sample_counts(self) -> SampleCounts:
        return SampleCounts(self.run)

    @cached_property
    def _is_observed(self) -> bool:
        return listens_to(self.reducer, AfterAccumulationStep)

    def _observe(self, state: TrainState, event: AfterAccumulationStep) -> TrainState:
        event = event.replace(run=self.run, time_s=self.clock.wall_s())
        return dispatch(state, event, self.reducer, self.interpreter)

    def _dispatch(self, state: TrainState, event_type: type[Event], **fields: Any) -> TrainState:
        event = event_type.of(run=self.run, time_s=self.clock.wall_s(), **fields)
        return dispatch(state, event, self.reducer, self.interpreter)
