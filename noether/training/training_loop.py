"""The loop of one training run: it asks the state for the next move, makes it, and dispatches the event."""

from __future__ import annotations

import logging
from functools import partial
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
from noether.core.tensors.modes import describe_evaluation_mode, find_trained_parts_in_evaluation
from noether.session.model_changes import ModelChanges
from noether.training.data.interruptible import DataInterrupt
from noether.training.data.sample_counts import SampleCounts
from noether.training.local_updates import LocalUpdates
from noether.training.replicated.agreement import StateAgreement
from noether.training.replicated.loop import ReplicatedUpdates
from noether.training.replicated.step import ReplicatedStep

if TYPE_CHECKING:
    from torch import nn

    from noether.core.state import TrainState
    from noether.training.trainer import Trainer

_LOGGER: Final = logging.getLogger(__name__)


@final
class TrainingLoop:
    """Trains a state with the parts of a trainer, once.

    Args:
        trainer: The parts.
        state: The state to train; the loop drops it at the first update, so that its tensors can be freed.
        resumed: Whether it is the state of a saved run.
    """

    def __init__(self, trainer: Trainer, state: TrainState, *, resumed: bool) -> None:
        self._trainer, self._run, self._resumed = trainer, trainer.run, resumed
        self._state = state
        self._settled = state if resumed else None  # from which a resumed run continues; None if it has to start again
        self._event: Event | None = None  # the one that is being dispatched
        self._stretch = Stretch(trainer.reducer, trainer.interpreter)
        self._observe = self._dispatch_micro_batch if listens_to(trainer.reducer, AfterAccumulationStep) else None
        self._next_batches = partial(trainer.data.next_batches, last=self._run.final.update)
        self._sample_counts = SampleCounts(self._run)
        self._agreement = StateAgreement(trainer.ranks)

    def run(self) -> TrainState:
        """Return the state at the end of the run, or where it was interrupted."""
        try:
            try:
                self._begin()
                while (move := next_move(self._state, self._run)) is not Move.NOTHING and not self._is_interrupted():
                    self._make_move(move)
            except DataInterrupt:
                self._settled, self._event = self._find_settled(), None
            if self._settled is not None:
                self._settled = self._stretch.call_callbacks(self._settled)
                self._stretch.run_effects(self._settled)
                self._trainer.finish(self._settled)
        except BaseException as error:
            self._report(error)
            raise
        return self._state if self._settled is None else self._settled

    def _begin(self) -> None:
        """Dispatch the events before the first update of this process."""
        trainer = self._trainer
        # Rank 0 watches for all ranks, and begins before the first update, which may create modules.
        self._changes = ModelChanges(trainer.step.model) if trainer.ranks.is_first else None
        if trainer.ranks.is_first:
            _log_modes(trainer.step.model)
        self._dispatch(self._make_event(BeforeTraining, resumed=self._resumed))
        if self._resumed:
            self._event = event = self._make_event(AfterUpdate)
            self._state = dispatch_pending(self._state, self._run, trainer.reducer, trainer.interpreter, event.time_s)
        elif trainer.evaluate_first:
            self._dispatch(self._make_event(AtEval))
        self._settled, self._event = self._state, None
        self._updates = self._start_updates()

    def _start_updates(self) -> LocalUpdates | ReplicatedUpdates:
        step, clock, interrupted = self._trainer.step, self._trainer.clock, self._trainer.interrupted
        if isinstance(step, ReplicatedStep):
            return ReplicatedUpdates(step, clock, interrupted)
        return LocalUpdates(step, clock, interrupted)

    def _is_interrupted(self) -> bool:
        return self._updates.are_interrupted()

    def _make_move(self, move: Move) -> None:
        """Make a move, and dispatch its event or defer it."""
        event: Event
        if move is Move.UPDATE:
            state, event = self._make_update()
            self._state, self._event = state, event
            if self._stretch.defer(state, event):
                self._settled, self._event = state, None
                return
            self._state = self._stretch.call_callbacks(state)
        else:
            self._settled = self._state = self._stretch.call_callbacks(self._state)
            self._state, event = self._end_epoch() if move is Move.END_EPOCH else self._end_training()
            self._event = event
        self._stretch.run_effects(self._state)
        self._dispatch(event)
        self._settled, self._event = self._state, None

    def _dispatch(self, event: Event) -> None:
        """Send an event through the callbacks."""
        self._event = event
        self._state = dispatch(self._state, event, self._trainer.reducer, self._trainer.interpreter)

    def _make_update(self) -> tuple[TrainState, AfterUpdate]:
        """Return the state after one update, and its event."""
        at = self._state.iteration
        try:
            state, event = self._updates.make(self._state, self._next_batches, self._observe)
        except DataInterrupt:
            raise
        except BaseException as error:
            error.add_note(f"in update {at.update + 1}")
            raise
        event.complete(run=self._run)
        if event.samples != self._run.effective_batch_size:
            self._sample_counts.check(at.update, event.samples)
        for change in self._changes.describe(at.epoch) if self._changes is not None else ():
            _LOGGER.warning(change)
        return state.advance(samples=event.samples), event

    def _end_epoch(self) -> tuple[TrainState, Event]:
        """Return the state after the end of the epoch, and its event."""
        return self._state.next_epoch(), self._make_event(AfterEpoch, self._state)

    def _end_training(self) -> tuple[TrainState, Event]:
        """Return the state after the end of training, and its event; all ranks leave the loop there."""
        if self._state.stop is not None:
            self._updates.stop(self._state, self._observe)
        return self._state.replace(ended=True), self._make_event(AfterTraining, self._state)

    def _dispatch_micro_batch(self, state: TrainState, event: AfterAccumulationStep) -> TrainState:
        event.complete(run=self._run, time_s=self._trainer.clock.wall_s())
        return dispatch(state, event, self._trainer.reducer, self._trainer.interpreter)

    def _make_event(self, event_type: type[Event], state: TrainState | None = None, **fields: Any) -> Event:
        """Return an event at the time of rank 0; all ranks make it, and compare the state if it is given."""
        ranks, time_s = self._trainer.ranks, self._trainer.clock.wall_s()
        if ranks.are_several:
            name = f"time of {event_type.__name__}"
            if state is None:
                time_s = ranks.control.reduce(name, of_rank_0={"time_s": time_s})["time_s"]
            else:
                time_s = self._agreement.compare(name, state, time_s)
        return event_type.of(run=self._run, time_s=time_s, **fields)

    def _report(self, error: BaseException) -> None:
        """Call `fail` for an error, after the callbacks and the logs of deferred updates."""
        event = self._event or AfterUpdate.of(run=self._run, time_s=self._trainer.clock.wall_s())
        settled = self._find_settled()
        # For the logs, even if nothing is saved.
        after = self._stretch.finish_after(error, self._state if settled is None else settled)
        self._trainer.fail(error, None if settled is None else after, self._state, event)

    def _find_settled(self) -> TrainState | None:
        """Return the state from which a resumed run continues if the loop ends here.

        It is None if a new run has to start again, or if an update has overwritten its tensors.
        """
        settled = self._settled
        if isinstance(self._event, AfterUpdate) and self._state.pending is None and settled is not None:
            settled = set_pending(self._state, self._event)  # the update may have overwritten the old state
        return None if settled is None or was_donated(settled) else settled


def _log_modes(model: nn.Module) -> None:
    """Log that a model, or trained parts of it, are in evaluation mode as training begins."""
    if (described := describe_evaluation_mode(model)) is not None:
        _LOGGER.warning(described)
    elif parts := find_trained_parts_in_evaluation(model):
        _LOGGER.info("in evaluation mode, as the model was constructed, but trained: %s", ", ".join(parts))
