"""A run on disk: its checkpoints, logs and summary in one directory, and the interpreter that writes them."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, ParamSpec, Self, final

from noether.core.effect import MeasurePeakMemory, SaveCheckpoint
from noether.core.errors import NoetherError
from noether.core.event import AfterEpoch, AfterUpdate
from noether.effects.checkpoints.joint_saves import ALONE
from noether.effects.checkpoints.listing import CheckpointError
from noether.effects.checkpoints.saver import Saver
from noether.effects.checkpoints.store import CheckpointStore
from noether.effects.console.console import Console
from noether.effects.disk.calls import DISK
from noether.effects.disk.files import make_directories
from noether.effects.disk.finalizers import finalize
from noether.effects.interpreter import Interpreter
from noether.effects.logs.buffers import FLUSH_INTERVAL_S, FlushInterval
from noether.effects.logs.jsonl import UNKNOWN_COUNT, LogCount
from noether.effects.logs.peak_memory import PeakMemory
from noether.effects.never_saved import find_progress, mark_new_run, mark_saved_run
from noether.effects.run_access import RunAccess, rank_of_process
from noether.effects.run_exit import RunExit
from noether.effects.run_files import CHECKPOINTS, CONFIG_FILE, EVENTS_FILE
from noether.effects.run_logs import RunLogs

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from types import TracebackType

    from noether.core.callback import Effects
    from noether.core.event import Event
    from noether.core.state import TrainState
    from noether.effects.checkpoints.joint_saves import SavingRanks
    from noether.effects.checkpoints.manifest import Manifest
    from noether.effects.checkpoints.saver import OnError
    from noether.effects.console.run_panels import RunPanel
    from noether.effects.disk.calls import Disk
    from noether.effects.run_logs import LogService

    Interpret = Callable[[Effects, TrainState, Event], None]
    BuildLine = Callable[[Effects, TrainState, Event], Mapping[str, Any]]

_Arguments = ParamSpec("_Arguments")
_LOGGER: Final = logging.getLogger(__name__)


def open_run(  # noqa: PLR0913  # every setting, by name
    directory: str | Path,
    console: Console | None = None,
    *,
    rank: int | None = None,
    ranks: SavingRanks = ALONE,
    asynchronous: bool = False,
    borrowed: bool = True,
    on_error: OnError = "stop",
    services: Sequence[LogService] = (),
    drop_memory: Sequence[str] = (),
    disk: Disk = DISK,
) -> RunDirectory:
    """Open a run directory, created if it does not exist, and lock it against other processes and other open runs.

    The path is resolved now: the run stays where it is if the working directory or a link in the path changes. If the
    directory itself is moved, removed or replaced, the next save or flush of logs raises `RunMovedError`.

    Args:
        directory: The run directory.
        console: Where lines for a person go; by default the standard output.
        rank: Rank of this process if `ranks` is not given; only rank 0 locks and writes. By default that in
            `torch.distributed`, or that which a launcher such as torchrun gave it.
        ranks: The ranks of the run, from `noether.distributed.ranks.join`: all of them write their parts of a state
            with shards, such as that of a module of `fully_shard`.
        asynchronous: Whether a background thread writes checkpoints while training continues. Use the result as a
            context manager, or `close` it: this raises the error of the last checkpoint.
        borrowed: Whether states view live tensors, as those of `TrainState.from_module` do: an asynchronous save then
            copies them first.
        on_error: What to do if a checkpoint cannot be written: `stop` raises, `warn` continues without it.
        services: Other destinations of logs.
        drop_memory: Names of memories that a saved state may have, and that are left out as it is loaded, such as that
            of a callback that the run no longer has.
        disk: The disk.

    Raises:
        LockedError: If the run is open already, in another process or in this one.

    Example:
        >>> import tempfile
        >>> from noether import AfterTraining, SaveCheckpoint, TrainState
        >>> with tempfile.TemporaryDirectory() as path:
        ...     with open_run(path) as directory:
        ...         directory.interpreter([SaveCheckpoint()], TrainState().advance(samples=4), AfterTraining())
        ...     str(open_run(path).resume().iteration)
        'E0_U1_S4'
    """
    path = Path(directory).resolve()
    if ranks is not ALONE:
        rank = ranks.rank
    elif rank is None:
        rank = rank_of_process()
    if rank == 0:
        make_directories(path, disk)
    access = RunAccess(path, path / CHECKPOINTS, disk, locks=rank == 0)
    if rank == 0:
        mark_new_run(path, disk)
    return RunDirectory(
        Path(directory),
        access,
        ranks=ranks,
        console=console or Console(),
        asynchronous=asynchronous,
        borrowed=borrowed,
        on_error=on_error,
        services=services,
        drop_memory=drop_memory,
        disk=disk,
    )


@final
class RunDirectory:
    """One run on disk; returned by `open_run`.

    Attributes:
        path: The directory as it was given to `open_run`.
        run_id: Name of the run, which is the name of the directory.
        checkpoints: Its checkpoints.
        interpreter: Runs effects: writes the logs and checkpoints of this run.
        console: Where lines for a person go.
        exit: What happens where the run is closed.

    Args:
        path: The directory as it was given.
        access: The open directory of the run.
        ranks: As in `open_run`.
        console: Where lines for a person go.
        asynchronous: As in `open_run`.
        borrowed: As in `open_run`.
        on_error: As in `open_run`.
        services: Other destinations of logs.
        drop_memory: As in `open_run`.
        disk: The disk.
    """

    def __init__(  # noqa: PLR0913  # every setting, by name
        self,
        path: Path,
        access: RunAccess,
        *,
        ranks: SavingRanks,
        console: Console,
        asynchronous: bool,
        borrowed: bool,
        on_error: OnError,
        services: Sequence[LogService],
        drop_memory: Sequence[str],
        disk: Disk,
    ) -> None:
        self.path = path
        self.run_id = access.path.name
        self.checkpoints = CheckpointStore(access.path / CHECKPOINTS, self.run_id, disk, ranks)
        self._access = access
        self._disk = disk
        self._drop_memory = (drop_memory,) if isinstance(drop_memory, str) else tuple(drop_memory)
        self._loaded: Manifest | None = None  # the checkpoint of the loaded state
        self._saved_lines = UNKNOWN_COUNT  # metrics lines when the loaded state was saved
        # The interpreter has the logs and the access, and may outlive this object: the run stays locked meanwhile.
        self.console = console
        self._logs = RunLogs(access, self.run_id, console=console, services=services, disk=disk)
        self._saver = Saver(
            self.checkpoints,
            self._logs,
            asynchronous=asynchronous,
            borrowed=borrowed,
            on_error=on_error,
            after_first=partial(mark_saved_run, access.path, disk),
            is_first=access.writes,
        )
        self.exit = RunExit(self._logs.write_panel)
        self._peak_memory = PeakMemory()
        self.interpreter = Interpreter(
            {**self._logs.handlers(), SaveCheckpoint: [self._saver.save]},
            measures={MeasurePeakMemory: self._peak_memory.measure},
            check=_event_check(access, self._saver, self._logs, self.console),
        )
        # Where Python exits without a `close`, loops save before the logs close, and the interpreter is still whole.
        finalize(self, self._logs.guard("end of the run", self.exit), None)

    @property
    def is_open(self) -> bool:
        """Whether this process can write to the run: it opened the run, and did not close it."""
        return self._access.refusal is None

    @property
    def writes(self) -> bool:
        """Whether this process writes to the run: of several ranks only rank 0 does."""
        return self._access.writes

    @property
    def services(self) -> Mapping[str, LogService]:
        """The log services in use, by name, such as `tensorboard`; none on ranks other than 0."""
        return self._logs.services

    @property
    def loaded(self) -> Manifest | None:
        """The checkpoint that `load` or `resume` loaded; None before, and for a new run."""
        return self._loaded

    @property
    def saving_s(self) -> float:
        """Seconds for which training waited for saves, since the run was opened."""
        return self._saver.waited_s

    @property
    def background_saving_s(self) -> float:
        """Seconds in which a background thread wrote checkpoints, since the run was opened."""
        return self._saver.background_s

    def peak_bytes(self, state: TrainState) -> int:
        """Return the peak memory of the device of a state, or of this process, since it started."""
        return self._peak_memory.read(state)

    @property
    def shows_panels(self) -> bool:
        """Whether the console is a terminal or a notebook."""
        return self._logs.shows_panels

    def show_panel(self, describe: Callable[[], RunPanel], *, at_exit: bool = False) -> None:
        """Write a panel to the console, without an error; a no-op on ranks other than 0.

        Args:
            describe: Returns the panel; called now. An error in it is reported, and the run continues.
            at_exit: Whether the panel waits until the `with` block of the run ends, if there is one.
        """
        if self.writes:
            self.guard_log("panel", self.exit.show)(describe, at_exit=at_exit)

    def write_notice(self, text: str) -> None:
        """Write a line to the console at once, from any thread; a no-op on ranks other than 0."""
        if self.writes:
            self._logs.write_notice(text)

    def check_location(self) -> None:
        """Raise an error if the run is closed, or its directory is not where it was opened.

        Raises:
            RunClosedError: If the run is closed.
            RunMovedError: If the directory was moved, removed or replaced.
        """
        self._access.require_open()
        self._access.check()

    def resume(self) -> TrainState | None:
        """Return the newest intact state, or None for a new run; remove log lines that the run logs again.

        What the last event before a crash requested and the crash prevented is carried out: see `complete_saves`.

        Raises:
            CheckpointError: As `load`.
            LogError: If a log file is damaged.
            RunClosedError: If the run is closed.
            RunMovedError: If the directory was moved, removed or replaced.
        """
        self._access.require_open()
        state = self.load()
        self.truncate_logs(state)
        self.complete_saves(state)
        return state

    def load(self) -> TrainState | None:
        """Return the newest intact state, or None if nothing was saved; change nothing.

        Raises:
            CheckpointError: If there are checkpoints, and the run can resume from none of them; or if the logs prove
                that there were some.
        """
        found = self.checkpoints.recover()
        if found is None:
            self._refuse_to_start_over()
            return None
        state, manifest = found
        self._loaded = manifest
        self._saved_lines = LogCount(manifest.log_lines, manifest.log_lines_lost)
        return state.forget(*self._drop_memory)

    def truncate_logs(self, state: TrainState | None) -> int:
        """Remove the log lines after `state`, or all lines for a new run; return the number of metrics lines removed.

        Raises:
            LogError: If a log file is damaged.
            RunClosedError: If the run is closed.
            RunMovedError: If the directory was moved, removed or replaced.
        """
        self.check_location()
        if not self._access.writes:
            return 0
        if state is not None:  # a kill may have come between its commit and the removal of the marker
            mark_saved_run(self._access.path, self._disk)
        return self._logs.truncate(state, self._saved_lines)

    def complete_saves(self, state: TrainState | None) -> None:
        """Move pointers and make saves that the event of the loaded checkpoint requested and a crash prevented.

        Args:
            state: The state from which the run resumes; nothing happens if it is not of the loaded checkpoint.
        """
        loaded = self._loaded
        is_loaded = loaded is not None and state is not None and state.iteration == loaded.iteration
        if loaded is not None and is_loaded and self._access.writes:
            self._saver.complete(loaded)

    def wait(self) -> None:
        """Wait until no checkpoint is being written; a no-op in a forked child process.

        Raises:
            CheckpointError: If one failed, and `on_error` is `stop`.
            RunMovedError: If the directory was moved, removed or replaced.
        """
        if self.is_open:  # a background save never ends in a forked child
            self._saver.wait()

    def close(self) -> None:
        """Wait for checkpoints, write buffered logs, and release the lock; the run can be opened again.

        A second call is a no-op, and so is a call in a forked child process. If Ctrl-C interrupts the wait, the run
        stays open, because a checkpoint may still be written.

        Raises:
            CheckpointError: If the last checkpoint failed, and `on_error` is `stop`.
            RunMovedError: If buffered logs were written to a directory that is not at its path any more.
        """
        self._close(None)

    def _close(self, error: BaseException | None) -> None:
        if not self.is_open:
            return
        try:
            self.guard_log("end of the run", self.exit)(error)
            self.wait()
        except Exception:
            self._release()
            raise
        self._release()

    def _release(self) -> None:
        try:
            self._logs.close()
        finally:
            self._access.close()

    def guard_log(self, name: str, write: Callable[_Arguments, None]) -> Callable[_Arguments, None]:
        """Return a log handler that never stops training: its errors are reported and counted under `name`."""
        return self._logs.guard(name, write)

    def recording_interpreter(self, interpreter: Interpret, build_line: BuildLine) -> Interpret:
        """Return an interpreter that writes a line to `events.jsonl` at each event, and then runs the effects.

        Args:
            interpreter: Runs the effects.
            build_line: Returns the line of an event, such as the result of `event_line_builder`.
        """

        def write(effects: Effects, state: TrainState, event: Event) -> None:
            self._logs.events.write(build_line(effects, state, event), state, event)

        record = self.guard_log(EVENTS_FILE, write)

        def interpret(effects: Effects, state: TrainState, event: Event) -> None:
            self._access.require_open()
            if self._access.writes:
                record(effects, state, event)
            interpreter(effects, state, event)

        return interpret

    def _refuse_to_start_over(self) -> None:
        progress = find_progress(self._access.path, self._disk)
        if progress is not None:
            config = self.path / CONFIG_FILE
            new = f": noether train {config}" if self._disk.kind(config) == "file" else " in another directory"
            raise CheckpointError(
                f"{self.path}/checkpoints is empty, but {progress}: mount the disk of its checkpoints, or restore "
                f"them, and resume again; or start a new run{new}"
            )

    def __enter__(self) -> Self:
        self.exit.has_with_block = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self._close(error)
        except NoetherError as close_error:
            if error is None:
                raise
            if str(close_error) not in "\n".join([str(error), *getattr(error, "__notes__", ())]):
                _LOGGER.error("%s", close_error)  # noqa: TRY400  # the run's own error has the traceback


def _event_check(
    access: RunAccess, saver: Saver, logs: RunLogs, console: Console
) -> Callable[[TrainState, Event], None]:
    """Return a function that refuses a closed run, raises the error of a failed save, and flushes once a second.

    On rank 0 it also shows the state on the live display, if there is one.
    """
    interval, running = FlushInterval({AfterUpdate: FLUSH_INTERVAL_S, AfterEpoch: FLUSH_INTERVAL_S}), saver.running
    observe = console.observe if access.writes and console.has_display else None

    def check(state: TrainState, event: Event) -> None:
        if observe is not None:
            observe(state, event)
        if access.refusal is not None:
            access.require_open()
        if running:  # a test of the list costs less than the call, at every event
            saver.check()
        if interval.is_due(event):
            logs.flush_files()

    return check
