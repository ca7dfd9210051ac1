"""The state of a session beside its live objects, and the save that it makes when the loop ends before the run."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from threading import get_ident
from typing import TYPE_CHECKING, Any, Final, Literal

from noether.core.callback import listens_to
from noether.core.event import AfterAccumulationStep, AfterEpoch, AfterTraining, AfterUpdate
from noether.core.pending import set_pending
from noether.core.state import TrainState
from noether.core.stretch import Stretch
from noether.effects.checkpoints.listing import CheckpointError
from noether.effects.checkpoints.state_codec import decode_state, encode_state
from noether.effects.run_ending import record_failure, save_interrupted
from noether.session.errors import SessionError
from noether.session.generators import MEMORY, GeneratorStates, take_states, warn_without_states
from noether.session.loop_record import LoopRecord
from noether.session.rank_exchange import RankExchange
from noether.session.timing import Stopwatch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from noether.core.callback import Effects
    from noether.core.event import Event
    from noether.core.reducer import Reducer
    from noether.core.run import Run
    from noether.distributed.ranks import Ranks
    from noether.effects import RunDirectory
    from noether.effects.run_ending import Status
    from noether.session.live_state import LiveState
    from noether.session.losses import MicroBatch
    from noether.session.scaler import ScalerMemory
    from noether.session.scheduler import SchedulerMemory
    from noether.session.timing import Clock

_LOGGER: Final = logging.getLogger(__name__)


class SessionState:
    """Holds the state of a run beside live objects, and saves it when the loop ends before the run does.

    Args:
        run: What is fixed for the run.
        reducer: The callbacks, composed.
        live: The model and the optimizer.
        scheduler: The scheduler's memory, if the run has one.
        scaler: The gradient scaler's memory, if the run has one.
        interpreter: Runs effects.
        directory: The run on disk, if there is one.
        seed: The run's seed.
        clock: Reads the time.
        ranks: This process among those of the run.
    """

    def __init__(  # noqa: PLR0913  # every part of a run, by name
        self,
        *,
        run: Run,
        reducer: Reducer,
        live: LiveState,
        scheduler: SchedulerMemory | None,
        scaler: ScalerMemory | None,
        interpreter: Callable[[Effects, TrainState, Event], None],
        directory: RunDirectory | None,
        seed: int,
        clock: Clock,
        ranks: Ranks,
    ) -> None:
        self.run = self._given = run
        self.ranks = ranks
        """This process among those of the run."""
        self._exchange = RankExchange(ranks, live.model)
        self.readings = frozenset(reducer.readings)
        """Costly fields of `AfterUpdate` that a callback needs, such as `grad_norm`."""
        self.stopwatch = Stopwatch(clock.elapsed_s)
        self._reducer, self._live, self._optimizer = reducer, live, live.optimizer
        self._scheduler, self._scaler = scheduler, scaler
        self._live_memories = [memory for memory in (scheduler, scaler) if memory is not None]
        self._interpreter, self._directory, self._clock = interpreter, directory, clock
        self._record = LoopRecord(directory, clock)
        self._stretch = Stretch(reducer, interpreter)
        self._training_thread = get_ident()  # the one that deferred the last update
        self._listens_to_micro_batches = listens_to(reducer, AfterAccumulationStep)
        self._state = TrainState(seed=seed)
        self._remembers = False
        self.has_equal_batches = False
        """Whether all ranks certainly have batches of equal sizes, so that the samples of an update are known."""
        self.seeds_loop = False
        self._micro_batches: list[MicroBatch] = []
        self._settled = self._state  # as it was before the current update began
        self._steps_before = 0  # of the optimizer, at the last update
        self._model_status: Literal["settled", "in an update", "partly written"] = "settled"
        self._current_dispatch: tuple[TrainState, Event] | None = None  # the state and the event, until it is complete
        self._has_left = False  # whether the loop was left or stopped since `begin`
        self._has_begun = False  # whether `begin` has returned; before, there is nothing to save
        self._recorded_error: BaseException | None = None
        self._has_lost_updates = False  # whether a callback failed for deferred updates
        self._warned_of_empty_update = False
        self._epoch_batches = 0  # drawn in this epoch; `state.epoch_batches` are those that an update counted
        self._carries_gradients = False  # whether an epoch ended inside of an update
        self._trusts_lengths = True  # whether an epoch ends after the number of updates that the loader announced
        self._generators: GeneratorStates | None = None  # if a framework draws from them
        self._saved_generators: Mapping[str, Any] | None = None  # those of the state to resume, until they are restored
        self._epoch_generators: Mapping[str, Any] | None = None  # as the last epoch ended
        self.continue_after_end = "pass a later max_epochs, max_updates or max_samples"
        self.continue_after_stop = "change the setting of the callback that stopped it, in a new run"
        """What to write where a run has ended and is resumed: after its end, and after a callback stopped it."""
        self.resumes_within_epochs = False
        """Whether a resumed loop skips the batches of an epoch that are counted; not every framework does."""

    @property
    def state(self) -> TrainState:
        """The state; it views the live model and optimizer. To read it calls the callbacks for deferred updates.

        Another thread than the one that trains reads the state as it is: its counters are current, and its memories and
        metrics may lack the deferred updates.
        """
        return self._finish_stretch() if get_ident() == self._training_thread else self._state

    @property
    def stop(self) -> str | None:
        """Why a callback stopped the run, or None."""
        return self._state.stop

    @property
    def is_over(self) -> bool:
        """Whether a callback stopped the run, or its end is reached."""
        end = getattr(self.run, "end", None)
        return self._state.stop is not None or (end is not None and self._state.iteration.reached(end))

    @property
    def pending_micro_batches(self) -> int:
        """The number of micro-batches since the last update."""
        return len(self._micro_batches)

    @property
    def steps(self) -> int:
        """The number of steps that the optimizer made since the last update."""
        return self._count_steps() - self._steps_before

    def _count_steps(self) -> int:
        return 0 if self._optimizer is None else self._optimizer.steps

    @property
    def settled_state(self) -> TrainState | None:
        """The state from which a resumed run continues exactly as this one; None if there is none.

        Before the optimizer steps, it is the state before the current update. Between the optimizer's step and the
        report of the update there is none, and none within an epoch that a framework reads from its first batch after
        a resume. If the event of an update was cut short, the state has its readings as `pending`, and the resumed run
        dispatches it again. If Ctrl-C cut short the logs of deferred updates, there is none: it is unknown which of
        them are written. To read it calls the callbacks for deferred updates, unless an event was cut short.
        """
        if self._stretch.has_unfinished_effects:
            return None
        if self._current_dispatch is None:
            self._finish_stretch()
        state, event = self._current_dispatch or (self._state, None)
        between_epochs = (
            isinstance(event, (AfterEpoch, AfterTraining))
            or self._state.iteration.epoch != self._state.previous.epoch  # no update since the last epoch ended
        )
        if self._model_status == "partly written" or not (between_epochs or self.resumes_within_epochs):
            return None
        if isinstance(event, AfterUpdate):
            for memory in self._live_memories:
                state, _ = memory(state, event)
            return set_pending(state, event)
        if self._model_status == "settled":
            return self._with_generators(self._live.view(self._state))
        if self._optimizer is None or self.steps:
            return None
        before = self._settled if self._micro_batches else self._state
        return self._with_generators(self._live.view_before_update(before))

    def _finish_stretch(self) -> TrainState:
        """Call the callbacks for deferred updates, run their effects, and return the new state."""
        self._call_deferred_callbacks()
        with self._record_failures():
            self._stretch.run_effects(self._state)
        return self._state

    def _call_deferred_callbacks(self) -> None:
        """Call the callbacks for deferred updates; `run_effects` of the stretch has to follow."""
        with self._record_failures():
            self._set_state(self._stretch.call_callbacks(self._state))

    def _set_state(self, state: TrainState) -> None:
        """Set the state after the callbacks for deferred updates, which is also the state before the current update."""
        if state is not self._state:
            self._state = self._settled = state

    @contextmanager
    def _record_failures(self) -> Iterator[None]:
        """Return a context that records an exception of a callback or a handler."""
        try:
            yield
        except Exception as error:
            self.record_failure(error)
            raise

    def remember_generators(self, loader: Any = None, **of_framework: Any) -> None:
        """Save the states of random generators in every checkpoint: a framework's loop draws from them.

        Args:
            loader: The training data, which may hold generators.
            of_framework: `seed` and `counters` as for `GeneratorStates`.
        """
        self._generators = GeneratorStates(self._live.model, loader, **of_framework)

    @property
    def saved_seed(self) -> int | None:
        """The seed that the framework drew at the start of the run, which `load` may have read from a checkpoint."""
        given = None if self._generators is None else self._generators.seed
        seed: int | None = (self._saved_generators or {}).get("seed", given)
        return seed

    def restore_generators(self) -> None:
        """Restore the generators of the run that was resumed, once; a no-op in a new run.

        A framework's loop calls this where it continues exactly as it did after the checkpoint: at the end of an epoch,
        before it draws the order of the next one.
        """
        saved, self._saved_generators = self._saved_generators, None
        if saved is None or self._generators is None:
            return
        if saved:
            self._generators.restore(saved)
        else:
            warn_without_states()

    def _take_generators(self, saved: TrainState) -> TrainState:
        """Return a loaded state without the states of generators, which `restore_generators` restores."""
        saved, self._epoch_generators = take_states(saved)
        self._saved_generators = self._epoch_generators or {}
        return saved

    def _note_generators(self) -> None:
        """Read the states of generators at the end of an epoch, which a save before the next update needs."""
        self._epoch_generators = None if self._generators is None else self._generators.read()

    def _with_generators(self, state: TrainState) -> TrainState:
        """Return a state that is saved between epochs, with the generators as they were at the end of the last one."""
        return state if self._epoch_generators is None else state.remember(MEMORY, self._epoch_generators)

    def record_failure(self, error: Exception) -> None:
        """Save what an exception would lose, and add notes to it that say where; a no-op without an open directory.

        Of several ranks, rank 0 saves; the others end with a `RankError` that names the first rank that failed.
        The session does this for every exception that passes through it; a framework's loop does it for others.
        """
        if self._recorded_error is not error:
            self.ranks.failures.report(error)  # first of all: the other ranks wait
        if self._recorded_error is error or self.run.rank != 0:
            return
        self._recorded_error = error
        settled = self._finish_stretch_after(error)
        at = self._current_dispatch or (self._state, AfterUpdate.of(run=self.run, time_s=self._clock.wall_s()))
        if self._directory is None or not self._directory.is_open:
            return
        if self._has_begun:  # before, there is nothing to save
            record_failure(error, self._directory, settled, at, self._interpreter)
        reason = f"{type(error).__name__}: {error}".removesuffix(": ")
        self._record_end("failed", f"failed at {at[0].iteration}: {reason}", at[0])

    def _finish_stretch_after(self, error: Exception) -> TrainState | None:
        """Finish the stretch as an error ends the run, and return the settled state; None if there is none."""
        after = self._stretch.finish_after(error, self._state)
        if after is None:
            self._has_lost_updates = True
            return None
        self._set_state(after)
        return self.settled_state

    @contextmanager
    def save_where_it_ends(self) -> Iterator[None]:
        """Return a context for a loop: if the loop ends before the run, the session saves the run; then it closes."""
        try:
            yield
        except (GeneratorExit, KeyboardInterrupt, SystemExit):
            self.leave()
            raise
        except Exception as error:
            self.record_failure(error)
            raise
        finally:
            self.close()

    def record_stop(self, reason: str) -> None:
        """Record that a framework stopped its loop before the end of the run, which another loop may train further.

        Args:
            reason: What stopped the loop, as a sentence.
        """
        self._has_left = True
        self._record_end("stopped", f"ended at {self._state.iteration}: {reason}", self._finish_stretch())

    def _record_end(self, status: Status, ending: str, at: TrainState) -> None:
        """Write to `summary.json` and to the console how the run ended; a no-op without an open directory."""
        self._record.end(status, ending, at, self.run, self._reducer)

    def leave_directory(self, error: BaseException | None) -> None:
        """Record how the loop ended, as its directory is closed.

        Args:
            error: The exception that leaves the `with` block of the directory, or None. Python does not tell an
                iterator which exception ends the loop over it.
        """
        if not self._has_begun or self._state.ended:
            return
        if isinstance(error, Exception):
            self.record_failure(error)
        elif error is not None or self.seeds_loop:  # of a loop over `batches`, the iterator may be suspended
            self.leave()
        elif not self._has_left:  # the loop has not, or is that of a framework, which may train on in another process
            self._record_end("interrupted", f"interrupted at {self._state.iteration}", self._finish_stretch())

    def _warn_if_ended(self) -> None:
        """Say that a resumed run has nothing left to train, and how it would continue."""
        if not self.is_over or not self._state.ended:
            return
        _LOGGER.warning(
            "the run has ended at %s%s, so no batch is left: to continue it, %s; for a new run, pass another directory "
            "or, without one, make a new callback or session",
            self._state.iteration,
            "" if self.stop is None else f": {self.stop}",
            self.continue_after_end if self.stop is None else self.continue_after_stop,
        )

    def leave(self) -> None:
        """Save a run that the loop leaves before its end, if it can be resumed exactly; log what was done."""
        if not self._has_begun or self._state.ended or self._recorded_error is not None or self._has_left:
            return
        self._has_left = True
        settled, at = self.settled_state, self._state.iteration
        self._finish_stretch()  # for the logs, even if nothing is saved
        if self.ranks.are_several:
            self.ranks.failures.report(SessionError(f"the loop was left at {at}, before the end of the run"))
        if self.run.rank != 0:
            return
        try:
            self._save_where_left(settled)
        finally:
            self._record_end("interrupted", f"interrupted at {at}", self._state)

    def _save_where_left(self, settled: TrainState | None) -> None:
        at = self._state.iteration
        if settled is None:
            _LOGGER.warning(
                "the loop ended between two states that can be resumed, before update %d was complete: nothing is "
                "saved, and a resumed run continues from its last checkpoint",
                at.update + 1,
            )
        elif settled.iteration.update == 0:
            _LOGGER.warning("the loop ended before the first update: there is nothing to save")
        elif self._directory is None or not self._directory.is_open:
            _LOGGER.warning("the loop ended at %s, before the run; without an open directory, it is not saved", at)
        else:
            try:
                save_interrupted(self._directory, settled, self.run, self._clock.wall_s())
            except CheckpointError as error:  # raised here, it would hide why the loop is left
                _LOGGER.error("the loop ended at %s, which could not be saved: %s", settled.iteration, error)  # noqa: TRY400  # no traceback
                return
            _LOGGER.info(
                "the loop ended at %s, before the run, which is saved without AfterTraining; a new session in %s "
                "resumes it",
                settled.iteration,
                self._directory.path,
            )

    def close(self) -> None:
        """Stop watching the optimizer, and write where the time went."""
        try:
            self._record.pause(self._finish_stretch(), self.run)
        finally:
            if self._optimizer is not None:
                self._optimizer.release()

    def state_dict(self) -> dict[str, Any]:
        """Return what the run remembers beside model and optimizer, for a checkpoint of the framework.

        Inside of an update that is the state before it: its gradients are in no checkpoint.

        Returns:
            Plain values and tensors, which torch reads back with `weights_only=True`.
        """
        state = self._finish_stretch()
        state = self._live.view_before_update(self._settled) if self._micro_batches else state
        return encode_state(state if self._generators is None else state.remember(MEMORY, self._generators.read()))

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Recall what `state_dict` returned, before `begin`; the framework restores model, optimizer and scheduler.

        Raises:
            ValueError: If `saved` is not a result of `state_dict`.
        """
        self._finish_stretch()
        self._state = self._take_generators(decode_state(saved))
        self._remembers = True
