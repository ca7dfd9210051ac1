"""Carries out save requests: before training continues, or in a background thread."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Final, Literal, final

from noether.core.tensors.donation import lease
from noether.core.tensors.tree import clone_tensors
from noether.effects.checkpoints.listing import CheckpointError
from noether.effects.checkpoints.state_codec import error_text
from noether.effects.disk.finalizers import finalize
from noether.effects.disk.path_checks import RunMovedError
from noether.effects.disk.tensor_files import is_panic

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
    ) -> None:
        self._store = store
        self._logs = logs
        self._copies = borrowed
        self._on_error = on_error
        self._after_first = after_first
        self._first_is_saved = False
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="noether-save") if asynchronous else None
        self._running: list[Future[None]] = []
        self._running_for: tuple[Event, TrainingIteration] | None = None
        # At exit Python waits for the thread, but does not report its errors.
        finalize(self, _log_errors, self._running)

    def save(self, effect: SaveCheckpoint, state: TrainState, event: Event) -> None:
        """Save a checkpoint, or start a background save.

        Raises:
            CheckpointError: If `on_error` is `stop` and this save, or an earlier one in the background, failed.
            RunMovedError: If the run directory is not where it was opened, even if `on_error` is `warn`: nothing that
                the run writes would be found.
        """
        fsync_logs = partial(self._logs.fsync, self._logs.flush())
        if self._worker is None:
            self._write(effect, state, event, fsync_logs)
            return
        # Identity of the event alone is not enough: a user's loop may dispatch one event object again and again.
        if self._running_for is None or self._running_for[0] is not event or self._running_for[1] != state.iteration:
            self.wait()
        self._running_for = (event, state.iteration)
        with self._report_failures(state):
            if self._copies:
                copied = state.replace(**{name: clone_tensors(getattr(state, name)) for name in _TREES})
            else:
                copied = lease(state)
            self._running.append(self._worker.submit(self._write, effect, copied, event, fsync_logs))

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

        If several failed for different reasons, the first error is raised and the others are logged.

        Raises:
            CheckpointError: If a save failed and `on_error` is `stop`.
        """
        errors: list[BaseException] = []
        while self._running and self._running[0].done():
            error = self._running.pop(0).exception()
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
        wait(self._running)
        self._running_for = None
        self.check()

    def _write(
        self, effect: SaveCheckpoint, state: TrainState, event: Event, fsync_logs: Callable[[], LogCount]
    ) -> None:
        self._logs.check_location()
        save = partial(self._store.save, effect, state, event, fsync_logs)
        with self._report_failures(state):
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
        """
        try:
            yield
        except RunMovedError:
            raise
        except BaseException as error:
            if not isinstance(error, Exception) and not is_panic(error):
                raise  # Ctrl-C, or the end of the process
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
