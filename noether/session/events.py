"""The events of a session, as a framework's loop dispatches them one by one."""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING, Any, Final, cast

from noether.core.callback import leaves_of
from noether.core.event import AfterAccumulationStep, AfterEpoch, AfterTraining, AfterUpdate, BeforeTraining
from noether.core.loop import dispatch, updates_in_epoch
from noether.core.pending import take_pending
from noether.core.progress import show_progress_on
from noether.core.run import Run
from noether.core.stretch import Stretch
from noether.core.tensors.module import move_to_model
from noether.core.tensors.tree import FrozenDict
from noether.effects.run_ending import save_end
from noether.session.errors import SessionError
from noether.session.lengths import (
    Contradiction,
    compare_epoch_lengths,
    compare_saved_lengths,
    known_lengths,
    lengths_of_ranks,
    without_fields,
)
from noether.session.loader import epoch_lengths, has_equal_batches
from noether.session.losses import EMPTY_UPDATE
from noether.session.panels.session import describe_start
from noether.session.processes import ProcessesError
from noether.session.randomness import derive, seed_all
from noether.session.rank_exchange import check_joined
from noether.session.session_state import SessionState
from noether.session.settings import fill_run

if TYPE_CHECKING:
    from noether.core.event import Event
    from noether.core.iteration import TrainingIteration
    from noether.core.state import TrainState
    from noether.effects import RunDirectory

_LOGGER: Final = logging.getLogger(__name__)


class SessionEvents(SessionState):
    """Dispatches the events of a session; `Session` reports the updates."""

    def load(self, saved: TrainState | None = None) -> bool:
        """Take up the state to resume, without an event; `begin` does it if it was not called before.

        That is `saved`; by default the state that this session has or that `load_state_dict` gave it, else the newest
        checkpoint of the directory. It is written into model, optimizer and scheduler; after `load_state_dict` the
        framework does that.

        Args:
            saved: A loaded state.

        Returns:
            Whether a state was written, so that a framework's loop has to be moved to `state.iteration`.

        Raises:
            KeyError: If the model does not have the parameters of the saved state.
            CheckpointError: If the directory holds checkpoints, and none of them can be resumed.
        """
        self._finish_stretch()
        if saved is None and self._directory is not None and not self._remembers:
            saved = self._exchange.load(self._directory)
        if saved is None:
            return False
        saved = self._take_generators(saved)
        self._live.load(saved)
        for memory in self._live_memories:
            memory.restore(saved)
            memory.note_from(saved)
        self._state, self._remembers = saved, True
        return True

    def begin(
        self,
        *,
        end: TrainingIteration | None = None,
        updates_per_epoch: int | None = None,
        samples_per_epoch: int | None = None,
        effective_batch_size: int | None = None,
        epoch_is_full: bool = False,
    ) -> bool:
        """Dispatch `BeforeTraining`, and the end of an epoch whose updates are all counted; watch the optimizer.

        Log lines in the directory beyond the state are dropped, to be written again. An argument that is None is
        unknown, and one that `run=` holds stands.

        Args:
            end: Where the framework ends.
            updates_per_epoch: Updates in one epoch.
            samples_per_epoch: Samples in one epoch.
            effective_batch_size: Samples of every update but an epoch's last.
            epoch_is_full: Whether the framework knows that the state counts all batches of the epoch.

        Returns:
            What `load` returns.

        Raises:
            ProcessesError: If the ranks do not begin the same run, or have no common group.
            SessionError: If a callback failed for deferred updates of this session.
            LogError: If the log in the directory is damaged.
        """
        if self._has_lost_updates:
            raise SessionError(
                "a callback failed for the last updates of this session, so its state lacks them: make a new Session; "
                "with a directory, it resumes from the newest checkpoint"
            )
        check_joined(self.ranks, launched=self.seeds_loop)
        if self._directory is not None and self.ranks.is_first and not self._directory.writes:
            raise ProcessesError(
                f"the run in {self._directory.path} was opened for another rank than 0, and this loop trains alone, so "
                "nothing would be logged or saved: train on all processes that torchrun started, or give each its own "
                "directory with open_run(path, rank=0)"
            )
        self.run = fill_run(
            self._given,
            end=end,
            updates_per_epoch=updates_per_epoch,
            samples_per_epoch=samples_per_epoch,
            effective_batch_size=effective_batch_size,
        )
        self._finish_stretch()
        if self._micro_batches:  # an exception ended the loop inside of an update
            self._state, self._micro_batches = self._settled, []
        self._model_status, self._current_dispatch, self._recorded_error = "settled", None, None
        self._has_begun = self._has_left = False
        loaded, resumed = self.load(), self._remembers
        time_s = self._exchange.begin(self._clock.wall_s(), self._state, self.run, self._reducer)
        self._check_live_memories(resumed=resumed)
        if self._directory is not None:
            self._begin_in(self._directory, self._state if resumed else None)
        was_full = self._position is not None and self._position == self._state.lengths.get("updates_per_epoch")
        self._forget_lengths(compare_saved_lengths(self._state, self.run) if resumed else None)
        names = ("callback_states", "pending")
        moved = {name: move_to_model(self._live.model, getattr(self._state, name)) for name in names}
        self._state = self._state.replace(**moved)
        if self._remembers:
            self._live.load_non_persistent(self._state)
        self._remembers = True
        if self._optimizer is not None:
            self._optimizer.watch(self.readings)
            self._steps_before = self._optimizer.steps
        self._state = self._state.replace(lengths=FrozenDict(known_lengths(self.run)))
        self._live.apply_lr_scale(self._state)
        self._stretch = Stretch(self._reducer, self._record.count_time(self._interpreter))
        self._dispatch(self._state, BeforeTraining, resumed=resumed, time_s=time_s)
        if self._state.pending is not None:
            state, readings = take_pending(self._state)
            self._dispatch(state, AfterUpdate, **readings, time_s=time_s)
        self._epoch_batches = self._state.epoch_batches
        if epoch_is_full or (self._trusts_lengths and (was_full or self._is_full())):
            self._dispatch_epoch_end()
        self._has_begun = True
        self._warn_if_ended()
        self.stopwatch.read()
        return loaded

    def _check_live_memories(self, *, resumed: bool) -> None:
        """Note what the state remembers; in a resumed run, check the scheduler and restore a scaler that differs."""
        for memory in self._live_memories:
            memory.note_from(self._state)
        if resumed and self._scheduler is not None:
            self._scheduler.check_groups()
        if resumed and self._scaler is not None and not self._scaler.is_current():
            self._scaler.restore(self._state)  # not every framework restores it

    def _begin_in(self, directory: RunDirectory, saved: TrainState | None) -> None:
        directory.exit.add(self.leave_directory)
        directory.console.watch(leaves_of(self._reducer), self._state)
        directory.truncate_logs(saved)
        directory.complete_saves(saved)
        if not (self.is_over and self._state.ended):
            state = self._live.view(self._state)
            describe = partial(describe_start, directory.path, self._live, state, self.run, self._reducer.members)
            self._record.begin(state, self.run, self._interpreter, describe)

    def batch_arrived(self) -> None:
        """Start the time of the step; the time since the last mark was spent waiting for data."""
        if self._model_status == "settled":
            self._live.copy_buffers()
            self._model_status = "in an update"
        self.stopwatch.data_arrived()

    def end_epoch(self, *, cut_short: bool = False) -> None:
        """Dispatch `AfterEpoch`; a no-op if that was done for this epoch.

        An epoch may have another length than the ones before it. It may end inside of an update, whose gradients the
        loop then carries into the next epoch.

        Args:
            cut_short: Whether the loop left the epoch before its last batch; then it is not counted.
        """
        is_empty = self._position == 0 and not self._micro_batches
        if is_empty or (cut_short and not self._is_full()):
            return
        if self._micro_batches and not self._carries_gradients:
            self._carries_gradients = True
            _LOGGER.warning(
                "epoch %d ended inside of an update: the next epoch completes it with the gradients of the last %d "
                "micro-batches, which a run that resumes at the end of such an epoch does not have",
                self._state.iteration.epoch,
                self.pending_micro_batches,
            )
        self._dispatch_epoch_end()
        self._settled = self._state

    def lengths_of_epoch(self, loader: Any, batches: int | None, accumulation: int) -> dict[str, int]:
        """Return the arguments of `begin` that describe an epoch, over all ranks, as far as a loader tells them.

        Args:
            loader: The loader of this rank.
            batches: Batches of one epoch; None if unknown.
            accumulation: Micro-batches of an update.
        """
        lengths = epoch_lengths(loader, batches, accumulation, self.run.count_samples)
        self.has_equal_batches = has_equal_batches(loader, self.run.batch_size)
        if not self.ranks.are_several:
            return lengths
        return lengths_of_ranks(lengths, self.ranks.world_size if self.has_equal_batches else None)

    def count_batches(
        self, updates_per_epoch: int | None, accumulation: int, effective_batch_size: int | None = None
    ) -> int:
        """Return the number of completed batches of the epoch; called before `begin`.

        Args:
            updates_per_epoch: Used for a state of an earlier version, which counts only updates.
            accumulation: Micro-batches of an update, likewise.
            effective_batch_size: Samples of an update of all ranks. If it is not that of the saved run, for example
                because there are other ranks, the batches that have the same samples are counted.

        Raises:
            SessionError: If the saved run is between two updates of this size.
        """
        state = self._state
        if not state.epoch_batches and updates_per_epoch is not None:
            updates = updates_in_epoch(state, Run(updates_per_epoch=updates_per_epoch))
            self._state = state.replace(epoch_batches=updates * accumulation)
        saved = state.lengths.get("effective_batch_size")
        if state.epoch_batches and None not in (saved, effective_batch_size) and saved != effective_batch_size:
            read = state.iteration.sample - state.epoch_start.sample
            updates, rest = divmod(read, cast("int", effective_batch_size))
            if rest:
                raise SessionError(
                    f"the saved run is at {state.iteration}, within an epoch with updates of {saved} samples, and this "
                    f"run has {effective_batch_size} per update, on all ranks: {read} samples are no whole number of "
                    "these; pass the batch size and the ranks with which it was begun, or resume at the end of an epoch"
                )
            self._state = state.replace(epoch_batches=updates * accumulation)
        return self._state.epoch_batches

    def compare_batches(self, count: int, *, has_more: bool) -> None:
        """Refuse ranks of which some have another batch in this epoch, and some have not.

        Args:
            count: Batches of the epoch so far.
            has_more: Whether this rank has another one.

        Raises:
            ProcessesError: On all ranks.
        """
        self._exchange.compare_batches(self._state.iteration.epoch, count, has_more=has_more)

    def expect_updates(self, updates: int | None) -> None:
        """Take the number of updates in the epoch that begins, which may differ from earlier ones; None if unknown."""
        expected = self._updates_per_epoch
        if expected is not None and updates not in (None, expected):
            reason = f"epoch {self._state.iteration.epoch} has {updates} updates, not updates_per_epoch={expected}"
            self._forget_lengths(Contradiction(reason))

    def end(self, *, stopped: str | None = None) -> None:
        """Dispatch `AfterTraining`, once; return when every checkpoint is written. The optimizer is watched no longer.

        Args:
            stopped: What stopped the loop, if a framework did before the end of the run, as a sentence.

        Raises:
            CheckpointError: If the last checkpoint failed.
        """
        self._end_full_epoch()
        if not self._state.ended:
            self._seed_event("end of training")
            time_s = self._exchange.sync_ranks("after training", self._clock.wall_s())
            self._dispatch(self._finish_stretch().replace(ended=True), AfterTraining, time_s=time_s)
        if self._directory is not None:
            self._directory.wait()
            final = self._live.view(self._state)
            saves = self.run.rank == 0 or self._directory.checkpoints.needs_all_ranks(final)
            if self.resumes_within_epochs and self._directory.is_open and saves:
                # Where a framework has the loop, it saves what it wants.
                event = AfterTraining(run=self.run, time_s=self._clock.wall_s())
                save_end(self._directory, self._directory.interpreter, final, event)
            reason = self.stop or (None if self.is_over else stopped)
            ending = f"ended at {self._state.iteration}{'' if reason is None else f': {reason}'}"
            self._record_end("finished" if reason is None else "stopped", ending, final)
        self._exchange.wait("the end of the run, which is saved")
        self.close()

    def check_scheduler_position(self) -> None:
        """Refuse a scheduler or scaler that was stepped after `update`, where no checkpoint sees it.

        Raises:
            SessionError: If it was.
        """
        if self._scheduler is not None and not self._micro_batches and not self._scheduler.is_current():
            raise SessionError("the scheduler was stepped after session.update(...): call scheduler.step() before it")
        if self._scaler is not None and not self._micro_batches and not self._scaler.is_current():
            raise SessionError("the scaler was updated after session.update(...): call scaler.update() before it")

    @property
    def _updates_per_epoch(self) -> int | None:
        return getattr(self.run, "updates_per_epoch", None)

    @property
    def _position(self) -> int | None:
        """The number of updates counted in this epoch, all of them until its end is dispatched; None if unknown."""
        # Checkpoints of earlier versions do not say where the epoch began.
        is_known = self._state.epoch_start.epoch == self._state.iteration.epoch or self._updates_per_epoch is not None
        return updates_in_epoch(self._state, self.run) if is_known else None

    def _end_full_epoch(self) -> None:
        """Dispatch the end of an epoch whose updates are all counted."""
        if self._is_full():
            self._dispatch_epoch_end()

    def _warn_of_empty_update(self) -> None:
        if not self._warned_of_empty_update:
            self._warned_of_empty_update = True
            _LOGGER.warning(EMPTY_UPDATE, self._state.iteration.update + 1)

    def _is_full(self) -> bool:
        """Return whether all updates of the epoch are counted, as far as its length is known."""
        return self._updates_per_epoch is not None and self._position == self._updates_per_epoch

    def _forget_lengths(self, found: Contradiction | None) -> None:
        """Remove lengths that the run contradicts, so that no callback counts on them; log a warning."""
        if found is None:
            return
        _LOGGER.warning(
            "%s: the session ignores %s from now on, and counts epochs as the loop reports them; forecasts are wrong",
            found.reason,
            ", ".join(found.fields),
        )
        self.run = without_fields(self.run, found.fields)
        self._state = self._state.replace(lengths=FrozenDict(known_lengths(self.run)))

    def _dispatch_epoch_end(self) -> None:
        self._forget_lengths(compare_epoch_lengths(self._state, self.run))
        self._epoch_batches = 0
        self._seed_event("end of epoch")
        self._note_generators()
        time_s = self._exchange.sync_ranks(f"after epoch {self._state.iteration.epoch + 1}", self._clock.wall_s())
        self._dispatch(self._finish_stretch().next_epoch(), AfterEpoch, time_s=time_s)
        self._note_generators()

    def _seed_event(self, purpose: str) -> None:
        """Seed the global generators, if the loop is the session's: a resumed run then evaluates as the uncut one."""
        if self.seeds_loop:
            seed_all(derive(self._state.seed, purpose, self._state.iteration.epoch))

    def _dispatch(
        self, state: TrainState, event_type: type[Event], *, time_s: float | None = None, **readings: Any
    ) -> None:
        time_s = self._clock.wall_s() if time_s is None else time_s
        self._dispatch_event(state, event_type.of(run=self.run, time_s=time_s, **readings))

    def _dispatch_event(self, state: TrainState, event: Event) -> None:
        before = self._live.view(state)
        self._current_dispatch = before, event
        with self._record_failures():
            self._stretch.run_effects(before)
            interpreter = self._record.count_time(self._interpreter)
            if self._generators is not None:
                interpreter = self._generators.with_states(interpreter)
            with show_progress_on(self._record):
                after = dispatch(before, event, self._reducer, interpreter)
            model_status, self._model_status = self._model_status, "partly written"
            after = self._live.write_changes(before, after)
        self._state, self._current_dispatch = after, None
        self._model_status = model_status if type(event) is AfterAccumulationStep else "settled"
        self.stopwatch.wait_begins()  # the time of the callbacks was no wait for data
