"""The trainer: a function over a state that asks what comes next, does it, and tells the callbacks."""

from __future__ import annotations

import time
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

if TYPE_CHECKING:
    from collections.abc import Callable

    from noether.core.callback import Effects
    from noether.core.reducer import Reducer
    from noether.core.run import Run
    from noether.core.state import TrainState
    from noether.training.data.indexed import TrainingData
    from noether.training.data.streamed import StreamedData
    from noether.training.step.compiled import CompiledStep
    from noether.training.step.outputs import Accumulated
    from noether.training.step.step import Step


@final
@dataclass(frozen=True)
class Clock:
    """Where the loop reads time.

    Args:
        wall_s: Returns seconds since 1970.
        elapsed_s: Returns seconds since any moment, never going back.
    """

    wall_s: Callable[[], float] = time.time
    elapsed_s: Callable[[], float] = time.perf_counter


@final
@dataclass(frozen=True, kw_only=True)
class Trainer:
    """Trains a state. It remembers nothing: where the run is, the state says.

    Args:
        run: What is fixed for the run.
        step: Makes one update.
        data: Gives the batches.
        reducer: The callbacks, composed.
        interpreter: Carries out what they ask for.
        evaluate_first: Whether an evaluation is dispatched before the first update.
        interrupted: Asked between events; once it returns True, the state is saved and returned.
        clock: Where time is read.
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
        state = self._tell(state, BeforeTraining, resumed=resumed)
        if self.evaluate_first and not resumed:
            state = self._tell(state, AtEval)
        since_s = self.clock.elapsed_s()
        try:  # all in one frame: another would hold the tensors of the state that the run began with to its end
            while (move := next_move(state, self.run)) is not Move.NOTHING:
                if self.interrupted():
                    self._save(state)
                    return state
                if move is Move.END_EPOCH:
                    state = self._tell(state.next_epoch(), AfterEpoch)
                elif move is Move.END_TRAINING:
                    state = self._tell(state.replace(ended=True), AfterTraining)
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
        state, batches = self.data.update(state, last=self._last_update)
        loaded_s = self.clock.elapsed_s()
        state, outputs = self.step(state, batches, self._observe if self._is_observed else None)
        stepped_s = self.clock.elapsed_s()
        readings = {
            **vars(outputs),
            "duration_s": stepped_s - since_s,
            "data_s": loaded_s - waiting_s,
            "step_s": stepped_s - loaded_s,
        }
        return self._tell(state.advance(samples=outputs.samples), AfterUpdate, **readings), stepped_s

    @cached_property
    def _is_observed(self) -> bool:
        return listens_to(self.reducer, AfterAccumulationStep)

    def _observe(self, state: TrainState, seen: Accumulated) -> TrainState:
        return self._tell(state, AfterAccumulationStep, **vars(seen))

    def _tell(self, state: TrainState, event_type: type[Event], **readings: Any) -> TrainState:
        event = event_type.of(run=self.run, time_s=self.clock.wall_s(), **readings)
        return dispatch(state, event, self.reducer, self.interpreter)
