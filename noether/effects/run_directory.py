"""A run on disk: its checkpoints, logs and summary below one directory, and the interpreter that writes them."""

from __future__ import annotations

import logging
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, ParamSpec, Protocol, Self, final

from noether.core.effect import (
    LogScalars,
    LogText,
    MeasurePeakMemory,
    SaveCheckpoint,
    SaveTensors,
    SetSummary,
    ShowProgress,
)
from noether.core.event import AfterEpoch, AfterUpdate
from noether.effects.checkpoints.listing import CheckpointError
from noether.effects.checkpoints.saver import Saver
from noether.effects.checkpoints.store import CheckpointStore
from noether.effects.disk.calls import DISK
from noether.effects.disk.files import make_directories, replace_file
from noether.effects.disk.lock import RunLock
from noether.effects.disk.tensor_files import tensor_pieces
from noether.effects.interpreter import Interpreter
from noether.effects.logs.console import Console
from noether.effects.logs.flushing import Pace
from noether.effects.logs.jsonl import UNKNOWN, LinesFile, LogCount
from noether.effects.logs.peak_memory import PeakMemory
from noether.effects.logs.sinks import Sinks
from noether.effects.logs.summary import Summary, metrics_file

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType

    from noether.core.callback import Effects
    from noether.core.effect import Effect
    from noether.core.event import Event
    from noether.core.state import TrainState
    from noether.effects.checkpoints.saver import OnError
    from noether.effects.disk.calls import Disk
    from noether.effects.interpreter import Handler
    from noether.effects.logs.jsonl import ToLine

    Interpret = Callable[[Effects, TrainState, Event], None]

CONFIG: Final = "config.yaml"
EVENTS: Final = "events.jsonl"
_Arguments = ParamSpec("_Arguments")
_LOGGER: Final = logging.getLogger(__name__)


class LogService(Protocol):
    """Somewhere else that logs go, such as TensorBoard."""

    @property
    def name(self) -> str:
        """What it is called where it fails."""

    def resume(self, state: TrainState | None) -> None:
        """Be told where the run goes on, or None where it begins anew."""

    def scalars(self, effect: LogScalars, state: TrainState, event: Event) -> None:
        """Handle `LogScalars`."""

    def text(self, effect: LogText, state: TrainState, event: Event) -> None:
        """Handle `LogText`."""

    def summary(self, effect: SetSummary, state: TrainState, event: Event) -> None:
        """Handle `SetSummary`."""

    def flush(self) -> None:
        """Hand everything to the operating system: a checkpoint is about to be written."""

    def close(self) -> None:
        """Write what is held back, and end."""


def open_run(
    directory: str | Path,
    console: Console | None = None,
    *,
    rank: int = 0,
    asynchronous: bool = False,
    borrowed: bool = True,
    on_error: OnError = "stop",
    services: Sequence[LogService] = (),
    disk: Disk = DISK,
) -> RunDirectory:
    """Return the run in `directory`, made if it does not exist, and locked: no other process can open it meanwhile.

    Args:
        directory: Where the run is written.
        console: Where lines for a person go; by default the standard output.
        rank: Index of this process; only 0 locks and writes.
        asynchronous: Whether checkpoints are written in a thread of their own while training goes on. Leave the run as
            a context manager, or `close` it, to learn whether the last one went well.
        borrowed: Whether states view live tensors, as those of `TrainState.from_module` do: an asynchronous save then
            copies them first.
        on_error: What a checkpoint that cannot be written does: `stop` raises, `warn` goes on.
        services: Where else logs go.
        disk: The disk.

    Raises:
        LockedError: If another process has it open.

    Example:
        >>> import tempfile
        >>> from noether import AfterTraining, SaveCheckpoint, TrainState
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     with open_run(directory) as run:
        ...         run.interpreter([SaveCheckpoint()], TrainState().advance(samples=4), AfterTraining())
        ...     str(open_run(directory).resume().iteration)
        'E0_U1_S4'
    """
    path = Path(directory)
    lock = None
    if rank == 0:
        make_directories(path, disk)
        lock = RunLock(path, disk)
    saving = {"asynchronous": asynchronous, "borrowed": borrowed, "on_error": on_error}
    return RunDirectory(path, console or Console(), lock, saving, services, disk)


@final
class RunDirectory:
    """One run on disk; made by `open_run`.

    Args:
        path: The directory.
        console: Where lines for a person go.
        lock: Its lock; None in a process that does not write.
        saving: Arguments of `Saver`.
        services: Where else logs go.
        disk: The disk.
    """

    def __init__(
        self,
        path: Path,
        console: Console,
        lock: RunLock | None,
        saving: dict[str, Any],
        services: Sequence[LogService],
        disk: Disk,
    ) -> None:
        self.path = path
        self.run_id = path.resolve().name
        self.checkpoints = CheckpointStore(path / "checkpoints", self.run_id, disk)
        self._console = console
        self._lock = lock
        self._services = services
        self._disk = disk
        self._logged = UNKNOWN  # with the state that was loaded
        self._metrics = metrics_file(path / "metrics.jsonl", self.run_id, disk)
        self._events = LinesFile(path / EVENTS, lambda line, *_: line, disk)
        self._summary = Summary(path / "summary.json", disk)
        self._logs: dict[str, LinesFile | Summary] = {
            "metrics.jsonl": self._metrics,
            EVENTS: self._events,
            "summary.json": self._summary,
        }
        self._sinks = Sinks()
        for name, log in self._logs.items():
            # Before another may open the run; and once more, for the interpreter, which has the sinks, may live longer.
            weakref.finalize(self, Sinks().guarded(name, log.hand_over))
            weakref.finalize(self._sinks, Sinks().guarded(name, log.close))
        self._saver = Saver(self.checkpoints, self._metrics, (self._events,), **saving)
        self.interpreter = self._interpreter()

    def resume(self) -> TrainState | None:
        """Return the newest state that is whole, or None; log lines beyond it are dropped, to be written again.

        Where nothing was ever saved all are dropped: the run begins anew.

        Raises:
            CheckpointError: If there are checkpoints, and none that the run can go on from.
            LogError: If the log is damaged.
        """
        state = self.load()
        self.cut_logs(state)
        return state

    def load(self) -> TrainState | None:
        """Return the newest state that is whole, or None where nothing was ever saved; and change nothing.

        Raises:
            CheckpointError: If there are checkpoints, and none that the run can go on from.
        """
        found = self.checkpoints.recover()
        if found is None:
            return None
        state, manifest = found
        self._logged = LogCount(manifest.log_lines, manifest.log_lines_lost)
        return state

    def cut_logs(self, state: TrainState | None) -> int:
        """Drop the log lines beyond `state`, or all where the run begins anew; return how many there were.

        Raises:
            LogError: If the log is damaged.
        """
        if self._lock is None:  # the process that writes cuts
            return 0
        dropped = self._metrics.cut(state, UNKNOWN if state is None else self._logged)
        self._events.cut(state)
        _LOGGER.info("%d lines of %s were dropped, to be written again", dropped, self.path / "metrics.jsonl")
        for service in self._services:
            self._sinks.guarded(service.name, service.resume)(state)
        return dropped

    def wait(self) -> None:
        """Return once no checkpoint is being written.

        Raises:
            CheckpointError: If one failed, and errors stop.
        """
        self._saver.wait()

    def close(self) -> None:
        """Wait for what is being written, and let go of everything; the run can be opened again.

        Raises:
            CheckpointError: If the last checkpoint failed, and errors stop.
        """
        try:
            self.wait()
        finally:
            for name, log in self._logs.items():
                self._sinks.guarded(name, log.close)()
            for service in self._services:
                self._sinks.guarded(service.name, service.close)()
            self._sinks.tell()
            self._console.close()
            if self._lock is not None:
                self._lock.release()

    def guarded(self, name: str, write: Callable[_Arguments, None]) -> Callable[_Arguments, None]:
        """Return a handler of logs that never stops training; what it loses is told of, and counted under `name`."""
        return self._sinks.guarded(name, write)

    def recording(self, interpreter: Interpret, to_line: ToLine) -> Interpret:
        """Return an interpreter that also appends a line to `events.jsonl` for each event, before it does anything.

        Args:
            interpreter: What carries the effects out.
            to_line: Makes the line of an event, as `event_line` does.
        """

        def write(effects: Effects, state: TrainState, event: Event) -> None:
            self._events.write(to_line(effects, state, event), state, event)

        record = self.guarded(EVENTS, write)

        def interpret(effects: Effects, state: TrainState, event: Event) -> None:
            if self._lock is not None:  # only the process that writes records
                record(effects, state, event)
            interpreter(effects, state, event)

        return interpret

    def _interpreter(self) -> Interpreter:
        summary, console = self._summary, self._console
        table: dict[type[Effect], list[tuple[str, Handler]]] = {
            LogText: [("console", console.text), *((each.name, each.text) for each in self._services)],
            LogScalars: [
                ("metrics.jsonl", self._metrics.write),
                ("console", console.scalars),
                *((each.name, each.scalars) for each in self._services),
            ],
            SetSummary: [("summary.json", summary.set), *((each.name, each.summary) for each in self._services)],
            SaveTensors: [("tensors", _tensors_in(self.path / "tensors", self._disk))],
            ShowProgress: [("console", console.progress)],
        }
        sinks = {kind: [self.guarded(name, write) for name, write in sinks] for kind, sinks in table.items()}
        flushing = [self.guarded(each.name, each.flush) for each in self._services]
        return Interpreter(
            {**sinks, SaveCheckpoint: [*map(_handler, [*self._handing_over(), *flushing]), self._saver.save]},
            measures={MeasurePeakMemory: PeakMemory().measure},
            check=self._check(),
        )

    def _check(self) -> Callable[[Event], None]:
        """Return what is called at every event: a save may have failed, and what waits may have waited long enough."""
        check, pace, handing_over = self._saver.check, Pace(AfterUpdate, AfterEpoch), self._handing_over()

        def at_event(event: Event) -> None:
            check()
            if pace.is_due(event):
                for hand_over in handing_over:
                    hand_over()

        return at_event

    def _handing_over(self) -> list[Callable[[], None]]:
        """Return what hands to the operating system all that was logged."""
        return [self.guarded(name, log.hand_over) for name, log in self._logs.items()]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.close()
        except CheckpointError as failed:
            if error is None:
                raise
            _LOGGER.error("%s", failed)  # noqa: TRY400  # beside the error that ends the run, it is a line


def _handler(call: Callable[[], None]) -> Handler:
    return lambda *_: call()


def _tensors_in(directory: Path, disk: Disk) -> Handler:
    def save(effect: SaveTensors, _state: TrainState, _event: Event) -> None:
        path = directory / f"{effect.name}.safetensors"
        make_directories(path.parent, disk)
        replace_file(path, tensor_pieces(effect.tensors), disk)

    return save
