"""Carries out save requests: before training continues, or in a background thread."""

from __future__ import annotations

import logging
import time
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Final, Literal, final

from noether.core.tensors.donation import lease
from noether.core.tensors.tree import clone_tensors
from noether.effects.checkpoints.converter import error_text
from noether.effects.checkpoints.listing import CheckpointError
from noether.effects.disk.finalizers import finalize
from noether.effects.disk.path_checks import RunMovedError
from noether.effects.disk.tensor_files import is_panic
from noether.effects.interpreter import on_all_ranks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from concurrent.futures import Future

    from noether.core.effect import SaveCheckpoint
    from noether.core.event import Event
    from noether.core.iteration import TrainingIteration
    from noether.core.state import TrainState
    from noether.effects.checkpoints.manifest import Manifest
    from noether.effects.checkpoints.store import CheckpointStore
    from noether.effects.logs.jsonl import LogCount
    from noether.effects.run_logs import RunLogs

    OnError = Literal["stop", "warn"]

_LOGGER: Final = logging.getLogger(__name__)
_TREES: Final = (
    "params",
    "buffers",
    "non_persistent",
    "extra_state",
    "tied_names",
    "opt_state",
    "hyperparams",
    "callback_states",
    "pending",
)


@final
class Saver:
    """The handler of `SaveCheckpoint`.

    The saves of one event are written one after the other, and the next event that saves waits for them, so that at
    most one older state is kept in memory.

    Args:
        store: Where checkpoints go.
        logs: The logs of the run; their lines up to a checkpoint are written to the disk before it is committed.
        asynchronous: Whether a background thread writes checkpoints. Nothing is copied for that, because states are
            immutable; a state whose tensors may be donated is leased.
        borrowed: Whether states view live tensors, as those of `TrainState.from_module` do; a background save copies
            them first.
        on_error: What a save does that fails for any reason, such as a full disk or memory that cannot be saved: `stop`
            raises, for a background save at the next event; `warn` tries again, then logs a warning, and training
            continues. Later saves set the pointers and make the saves that failed beside a checkpoint to resume from.
        after_first: Called after a save of this process until it returns True.
        is_first: Whether this is rank 0, which saves. Other ranks write their parts of a state with shards; `on_error`
            and what is logged is decided by rank 0.
    """

    def __init__(
        self,
        store: CheckpointStore,
        logs: RunLogs,
        *,
        asynchronous: bool = False,
        borrowed: bool = True,
        on_error: OnError = "stop",
        after_first: Callable[[], bool] = lambda: True,
        is_first: bool = True,
    ) -> None:
        self._store = store
        self._logs = logs
        self._copies = borrowed
        self._on_error = on_error
        self._after_first = after_first
        self._first_is_saved = False
        self._is_first = is_first
        self._is_joint = False  # whether all ranks take part in the saves that are running
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="noether-save") if asynchronous else None
        self.running: list[Future[None]] = []
        """Background saves whose end `check` has not seen; the list is changed in place and never replaced."""
        self._running_for: tuple[Event, TrainingIteration] | None = None
        self.waited_s = 0.0
        """Seconds for which training waited for saves."""
        self.background_s = 0.0
        """Seconds in which a background thread wrote checkpoints."""
        # At exit Python waits for the thread, but does not report its errors.
        finalize(self, _log_errors, self.running)

    @on_all_ranks
    def save(self, effect: SaveCheckpoint, state: TrainState, event: Event) -> None:
        """Save a checkpoint, or start a background save.

        Raises:
            CheckpointError: If `on_error` is `stop` and this save, or an earlier one in the background, failed.
            RunMovedError: If the run directory is not where it was opened, even if `on_error` is `warn`: nothing that
                the run writes would be found.
        """
        with self._count_waiting():
            self._save(effect, state, event)

    def _save(self, effect: SaveCheckpoint, state: TrainState, event: Event) -> None:
        self._is_joint = self._store.needs_all_ranks(state)
        if self._is_first:
            write = partial(self._write, effect, event=event, fsync_logs=partial(self._logs.fsync, self._logs.flush()))
        elif self._is_joint:
            write = partial(self._store.save, effect, event=event)
        else:
            return
        if self._worker is None:
            write(state=state)
            return
        # Identity of the event alone is not enough: a user's loop may dispatch one event object again and again.
        if self._running_for is None or self._running_for[0] is not event or self._running_for[1] != state.iteration:
            self._wait()
        self._running_for = (event, state.iteration)
        with self._report_failures(state):
            if self._copies:
                copied = state.replace(**{name: clone_tensors(getattr(state, name)) for name in _TREES})
            else:
                copied = lease(state)
            try:
                self.running.append(self._worker.submit(self._write_in_background, partial(write, state=copied)))
            except RuntimeError:  # no thread can be started: Python exits
                write(state=copied)

    def complete(self, manifest: Manifest) -> None:
        """Carry out what the event of the checkpoint that a run resumes from requested and a crash prevented.

        A failure is only a warning: the next save tries again, and a request may fail for good, such as one for a
        sub-module that does not exist.
        """
        try:
            self._store.complete(manifest)
        except CheckpointError as error:
            _LOGGER.warning("%s; the run resumes without it", error)

    def check(self) -> None:
        """Raise the error of a background save that has ended; called at every event.

        An error of a save in which all ranks take part is raised by the next save or `wait`, at the same event on each.
        If several failed for different reasons, the first error is raised and the others are logged.

        Raises:
            CheckpointError: If a save failed and `on_error` is `stop`.
        """
        if not self._is_joint:
            self._raise_ended()

    def _raise_ended(self) -> None:
        errors: list[BaseException] = []
        while self.running and self.running[0].done():
            error = self.running.pop(0).exception()
            if error is not None and str(error) not in map(str, errors):
                errors.append(error)
        for other in errors[1:]:
            _LOGGER.error("%s", other)
        if errors:
            raise errors[0]

    def wait(self) -> None:
        """Wait for all background saves, even if one failed.

        Raises:
            CheckpointError: If a save failed and `on_error` is `stop`.
        """
        with self._count_waiting():
            self._wait()

    def _wait(self) -> None:
        wait(self.running)
        self._running_for = None
        self._raise_ended()

    @contextmanager
    def _count_waiting(self) -> Iterator[None]:
        since_s = time.perf_counter()
        try:
            yield
        finally:
            self.waited_s += time.perf_counter() - since_s

    def _write_in_background(self, write: Callable[[], None]) -> None:
        since_s = time.perf_counter()
        try:
            write()
        finally:
            self.background_s += time.perf_counter() - since_s

    def _write(
        self, effect: SaveCheckpoint, state: TrainState, event: Event, fsync_logs: Callable[[], LogCount]
    ) -> None:
        save = partial(self._store.save, effect, state, event, fsync_logs)
        with self._store.lead(state), self._report_failures(state):
            self._logs.check_location()
            try:
                save()
            except Exception:
                if self._on_error == "stop":
                    raise
                self._logs.check_location()  # a second try would create directories at the path of a moved run
                save()  # again: the error may be over, and the next save has another state
            self._logs.check_location()
            self._first_is_saved = self._first_is_saved or self._after_first()

    @contextmanager
    def _report_failures(self, state: TrainState) -> Iterator[None]:
        """Raise whatever goes wrong in a save as a `CheckpointError`, or log it as a warning, as `on_error` says.

        Raises:
            RunMovedError: If the run directory is not where it was opened, whatever `on_error` says.
            Exception: If ranks cannot exchange anything any more, likewise.
        """
        try:
            yield
        except RunMovedError:
            raise
        except BaseException as error:
            if (not isinstance(error, Exception) and not is_panic(error)) or self._store.has_lost_ranks:
                raise  # Ctrl-C, the end of the process, or of another one
            self._logs.check_location()  # in a directory that was moved every later save would fail, too
            failure = error
            if not isinstance(error, CheckpointError):
                failure = CheckpointError(f"the state at {state.iteration} could not be saved: {error_text(error)}")
            if self._on_error == "stop":
                raise failure from (error if failure is not error else error.__cause__)
            _LOGGER.warning("%s; training continues without it", failure)


def _log_errors(running: list[Future[None]]) -> None:
    for future in running:
        if (error := future.exception()) is not None:
            _LOGGER.error("%s", error)
