"""The trainer: a loop that asks the state for the next move, makes it, and dispatches the event to the callbacks."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Final, final

from noether.core.callback import listens_to
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
from noether.core.pending import dispatch_pending, set_pending
from noether.core.stretch import Stretch
from noether.core.tensors.donation import was_donated
from noether.core.tensors.modes import ModeWatch, describe_evaluation_mode, find_trained_parts_in_evaluation
from noether.distributed.ranks import ONE_PROCESS, Ranks
from noether.session.hidden_state import ModelWatch
from noether.session.timing import Clock
from noether.training.data.interruptible import DataInterrupt
from noether.training.data.sample_counts import SampleCounts
from noether.training.replicated.agreement import StateAgreement
from noether.training.replicated.loop import ReplicatedUpdates
from noether.training.replicated.step import ReplicatedStep

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from noether.core.callback import Effects
    from noether.core.reducer import Reducer
    from noether.core.run import Run
    from noether.core.state import TrainState
    from noether.training.data.indexed import TrainingData
    from noether.training.data.streamed import StreamedData
    from noether.training.step.compiled import CompiledStep
    from noether.training.step.step import Step

_LOGGER: Final = logging.getLogger(__name__)


@final
@dataclass(frozen=True, kw_only=True)
class Trainer:
    """Trains a state. It keeps no position: the state holds it.

    On several ranks, each runs this loop, and all make the same moves. If one rank is interrupted, the others learn it
    with the gradients of an update, and all leave after its event. The times of events are those of rank 0.

    Args:
        run: The facts that stay fixed during the run.
        step: Makes one update; on several ranks a `ReplicatedStep`.
        data: Returns the batches.
        reducer: The callbacks, composed.
        interpreter: Runs their effects. If it has an `interpret_stretch`, the trainer defers updates (see `Stretch`).
        evaluate_first: Whether to dispatch an evaluation before the first update of a new run.
        interrupted: Called between events; once it returns True, the trainer returns the state. Once data that
            callbacks iterate, or the training data, raises `DataInterrupt`, it returns the last settled state.
        finish: Called with the state that the trainer is about to return; not if it interrupts a new run before its
            first update, which then starts again.
        fail: Called with an exception before the trainer raises it, with the last settled state (None if it is lost,
            or if the run has to start again), and with the state and the event at which the exception was raised.
        clock: Where the trainer reads time.
        ranks: The processes that train the run.
    """

    run: Run
    step: Step | CompiledStep | ReplicatedStep
    data: TrainingData | StreamedData
    reducer: Reducer
    interpreter: Callable[[Effects, TrainState, Event], None]
    evaluate_first: bool = False
    interrupted: Callable[[], bool] = lambda: False
    finish: Callable[[TrainState], None] = lambda state: None  # noqa: ARG005  # names the argument
    fail: Callable[[BaseException, TrainState | None, TrainState, Event], None] = lambda *_: None
    clock: Clock = Clock()
    ranks: Ranks = ONE_PROCESS

    def __call__(self, state: TrainState, *, resumed: bool = False) -> TrainState:
        """Return the state at the end of the run, or where it was interrupted."""
        settled = state if resumed else None
        event: Event | None = None  # the one that is being dispatched
        stretch = Stretch(self.reducer, self.interpreter)
        try:  # all in one frame: another one would keep the tensors of the initial state alive until the end
            try:
                event = self._make_event(BeforeTraining, resumed=resumed)
                self._describe_model()
                state = dispatch(state, event, self.reducer, self.interpreter)
                if resumed:
                    event = self._make_event(AfterUpdate)
                    state = dispatch_pending(state, self.run, self.reducer, self.interpreter, event.time_s)
                elif self.evaluate_first:
                    event = self._make_event(AtEval)
                    state = dispatch(state, event, self.reducer, self.interpreter)
                settled, event = state, None
                since_s = self.clock.elapsed_s()
                _ = self._updates  # starts its clock
                while (move := next_move(state, self.run)) is not Move.NOTHING and not self._is_interrupted():
                    if move is Move.UPDATE:
                        state, event, since_s = self._update(state, since_s)
                        if stretch.defer(state, event):
                            settled, event = state, None
                            continue
                        state = stretch.call_callbacks(state)
                    else:
                        settled = state = stretch.call_callbacks(state)
                        state, event = self._end(move, state)
                    stretch.run_effects(state)
                    state = dispatch(state, event, self.reducer, self.interpreter)
                    settled, event = state, None
            except DataInterrupt:
                settled, event = _settle(settled, state, event), None
            if settled is not None:
                settled = stretch.call_callbacks(settled)
                stretch.run_effects(settled)
                self.finish(settled)
        except BaseException as error:
            self._report(error, settled, state, event, stretch)
            raise
        else:
            return state if settled is None else settled
        finally:
            self.data.close()

    @cached_property
    def _last_update(self) -> int:
        return self.run.final.update

    def _update(self, state: TrainState, since_s: float) -> tuple[TrainState, AfterUpdate, float]:
        """Return the state after one update, its event, and the time at which it was completed."""
        try:
            after, event, since_s = self._make_update(state, since_s)
        except DataInterrupt:
            raise
        except BaseException as error:
            error.add_note(f"in update {state.iteration.update + 1}")
            raise
        if event.samples != self.run.effective_batch_size:
            self._sample_counts.check(state.iteration.update, event.samples)
        if state.iteration.epoch != self._mode_watch.epoch or not self._model_watch.is_done:
            self._warn_of_changes(state.iteration.epoch)
        return after.advance(samples=event.samples), event, since_s

    def _end(self, move: Move, state: TrainState) -> tuple[TrainState, Event]:
        """Return the state after the end of the epoch or of training, and its event."""
        if move is Move.END_EPOCH:
            return state.next_epoch(), self._make_event(AfterEpoch, state)
        self._stop_together(state)
        return state.replace(ended=True), self._make_event(AfterTraining, state)

    def _make_update(self, state: TrainState, since_s: float) -> tuple[TrainState, AfterUpdate, float]:
        """Return the state after one update that is not counted yet, its event, and the time at its end."""
        observe = self._observe if self._is_observed else None
        if self._updates is not None:
            next_batches = partial(self.data.next_batches, last=self._last_update)
            state, event = self._updates.make(state, next_batches, observe)
            return state, event.complete(run=self.run), since_s
        waiting_s = self.clock.elapsed_s()
        state, batches = self.data.next_batches(state, last=self._last_update)
        loaded_s = self.clock.elapsed_s()
        state, event = self.step(state, batches, observe)
        stepped_s = self.clock.elapsed_s()
        event = event.complete(
            run=self.run,
            time_s=self.clock.wall_s(),
            duration_s=stepped_s - since_s,
            data_s=loaded_s - waiting_s,
            step_s=stepped_s - loaded_s,
        )
        return state, event, stepped_s

    @cached_property
    def _updates(self) -> ReplicatedUpdates | None:
        """Makes updates on several ranks; None for one process."""
        step = self.step
        return ReplicatedUpdates(step, self.clock, self.interrupted) if isinstance(step, ReplicatedStep) else None

    @cached_property
    def _sample_counts(self) -> SampleCounts:
        return SampleCounts(self.run)

    @cached_property
    def _is_interrupted(self) -> Callable[[], bool]:
        return self.interrupted if self._updates is None else self._updates.are_interrupted

    def _describe_model(self) -> None:
        """Log which parts are in evaluation mode, and begin to watch what updates change; rank 0 does it for all."""
        if self.ranks.is_first:
            _log_modes(self.step.model)
            _ = self._model_watch  # before an update makes modules

    def _warn_of_changes(self, epoch: int) -> None:
        """Name what updates changed of the model, and no checkpoint has; rank 0 does it for all."""
        if not self.ranks.is_first:
            return
        for changes in (self._model_watch.describe_changes(), self._mode_watch.describe_changes(epoch)):
            if changes is not None:
                _LOGGER.warning(changes)

    @cached_property
    def _model_watch(self) -> ModelWatch:
        return ModelWatch(self.step.model)

    @cached_property
    def _mode_watch(self) -> ModeWatch:
        return ModeWatch(self.step.model)

    @cached_property
    def _is_observed(self) -> bool:
        return listens_to(self.reducer, AfterAccumulationStep)

    def _observe(self, state: TrainState, event: AfterAccumulationStep) -> TrainState:
        event = event.complete(run=self.run, time_s=self.clock.wall_s())
        return dispatch(state, event, self.reducer, self.interpreter)

    def _report(
        self, error: BaseException, settled: TrainState | None, state: TrainState, event: Event | None, stretch: Stretch
    ) -> None:
        """Call `fail` for an error, after the callbacks and the logs of deferred updates."""
        at = AfterUpdate.of(run=self.run, time_s=self.clock.wall_s()) if event is None else event
        settled = _settle(settled, state, event)
        after = stretch.finish_after(error, state if settled is None else settled)  # logs, even if nothing is saved
        self.fail(error, None if settled is None else after, state, at)

    def _stop_together(self, state: TrainState) -> None:
        """Make sure that all ranks leave the loop, if a callback stops it."""
        if state.stop is not None and self._updates is not None:
            self._updates.stop(state, self._observe if self._is_observed else None)

    @cached_property
    def _agreement(self) -> StateAgreement:
        return StateAgreement(self.ranks)

    def _make_event(self, event_type: type[Event], state: TrainState | None = None, **fields: Any) -> Event:
        """Return an event at the time of rank 0; all ranks make it, and compare the state if it is given."""
        time_s = self.clock.wall_s()
        if self.ranks.are_several:
            name = f"time of {event_type.__name__}"
            if state is None:
                time_s = self.ranks.control.reduce(name, of_rank_0={"time_s": time_s})["time_s"]
            else:
                time_s = self._agreement.compare(name, state, time_s)
        return event_type.of(run=self.run, time_s=time_s, **fields)


def _log_modes(model: nn.Module) -> None:
    """Log that a model, or trained parts of it, are in evaluation mode as training begins."""
    if (described := describe_evaluation_mode(model)) is not None:
        _LOGGER.warning(described)
    elif parts := find_trained_parts_in_evaluation(model):
        _LOGGER.info("in evaluation mode, as the model was constructed, but trained: %s", ", ".join(parts))


def _settle(settled: TrainState | None, state: TrainState, event: Event | None) -> TrainState | None:
    """Return the state that a run resumes from if the dispatch of `event` at `state` is interrupted.

    Args:
        settled: The state after the event before; None if a new run has to start again.
        state: The state at the event.
        event: The event; None between two events.

    Returns:
        The state, or None if there is none or an update overwrote its tensors.
    """
    if isinstance(event, AfterUpdate) and state.pending is None and settled is not None:
        settled = set_pending(state, event)  # no state from before the update may exist any longer
    return None if settled is None or was_donated(settled) else settled
