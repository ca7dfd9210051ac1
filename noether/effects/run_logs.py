"""All logs of one run: its files, console and log services. An error in a log never stops training."""

from __future__ import annotations

import functools
import logging
from typing import TYPE_CHECKING, Final, ParamSpec, Protocol, final

from noether.core.artifacts import ARTIFACTS
from noether.core.effect import LogScalars, LogText, LogUpdates, LogUpdateText, SaveTensors, SetSummary, ShowProgress
from noether.core.file_names import escape_path
from noether.core.text import count_of, escape_controls
from noether.effects.artifacts.files import ArtifactFiles, artifact_handlers
from noether.effects.disk.files import make_directories, replace_file
from noether.effects.disk.finalizers import finalize
from noether.effects.disk.path_checks import RunMovedError
from noether.effects.disk.tensor_files import tensor_pieces
from noether.effects.logs.jsonl import UNKNOWN_COUNT, LinesFile, LogCount
from noether.effects.logs.metrics import metrics_file
from noether.effects.logs.summary import Summary
from noether.effects.run_files import EVENTS_FILE, METRICS_FILE, SUMMARY_FILE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from noether.core.effect import Effect
    from noether.core.event import Event
    from noether.core.state import TrainState
    from noether.effects.artifacts.encoding import EncodedArtifact
    from noether.effects.console.console import Console
    from noether.effects.console.run_panels import RunPanel
    from noether.effects.disk.calls import Disk
    from noether.effects.interpreter import Handler
    from noether.effects.run_access import RunAccess


LOG_EFFECTS: Final = (LogScalars, LogUpdates, LogText, LogUpdateText, SetSummary, ShowProgress, SaveTensors, *ARTIFACTS)
"""Types of effects that write logs: an error in one of their handlers does not stop training."""

_Arguments = ParamSpec("_Arguments")
_LOGGER: Final = logging.getLogger(__name__)


class LogService(Protocol):
    """Another destination of logs, such as TensorBoard."""

    @property
    def name(self) -> str:
        """Its name in error messages."""

    def resume(self, state: TrainState | None) -> None:
        """Prepare for logs after `state`, or for the logs of a new run if it is None."""

    def log_scalars(self, effect: LogScalars, state: TrainState, event: Event) -> None:
        """Handle `LogScalars`."""

    def log_text(self, effect: LogText, state: TrainState, event: Event) -> None:
        """Handle a `LogText` without a key."""

    def log_artifact(self, artifact: EncodedArtifact, state: TrainState, event: Event) -> None:
        """Show an artifact; of a kind that the service cannot show, say so once."""

    def set_summary(self, effect: SetSummary, state: TrainState, event: Event) -> None:
        """Handle `SetSummary`."""

    def flush(self) -> None:
        """Write buffered logs to the operating system, because a checkpoint follows."""

    def close(self) -> None:
        """Write buffered logs, and release the destination."""


@final
class LogGuard:
    """Catches the errors of logs: reports the first error of each log, and counts the others.

    Only `RunMovedError` passes, because it concerns everything that the run writes.

    Args:
        outcome: What continues although a log failed, for messages.

    Example:
        >>> def write(line):
        ...     raise OSError(28, "No space left on device")
        >>> guard = LogGuard()
        >>> guarded_write = guard.guard("metrics.jsonl", write)
        >>> guarded_write("a line"), guarded_write("another")
        (None, None)
        >>> guard.failures
        {'metrics.jsonl': 2}
    """

    def __init__(self, outcome: str = "training continues") -> None:
        self.failures: dict[str, int] = {}
        self._outcome = outcome

    def guard(self, name: str, write: Callable[_Arguments, None]) -> Callable[_Arguments, None]:
        """Return a function that calls `write` and raises nothing but `RunMovedError`.

        Args:
            name: Name of the log in the report.
            write: Writes to the log.
        """

        @functools.wraps(write)  # a handler may be marked as one that all ranks call
        def guarded(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> None:
            try:
                write(*args, **kwargs)
            except RunMovedError:
                raise
            except Exception as error:  # noqa: BLE001  # training continues whatever happens to a log
                self.failures[name] = self.failures.get(name, 0) + 1
                if self.failures[name] == 1:
                    reason = escape_controls(f"{type(error).__name__}: {error}", keep="\n")
                    _LOGGER.warning("%s failed and may have lost log entries; %s: %s", name, self._outcome, reason)

        return guarded

    def report_failures(self) -> None:
        """Report how often each log failed, if it failed again after its first report."""
        for name, count in self.failures.items():
            if count > 1:
                _LOGGER.warning("%s failed %d times in total", name, count)


@final
class RunLogs:
    """The log files of one run, its console and its log services.

    Args:
        access: The open directory of the run.
        run_id: Name of the run.
        console: Where lines for a person go.
        services: Other destinations.
        disk: The disk.
    """

    def __init__(
        self, access: RunAccess, run_id: str, *, console: Console, services: Sequence[LogService], disk: Disk
    ) -> None:
        self._access = access
        self._console = console
        self._services = services
        self._disk = disk
        self._guard = LogGuard()
        self._metrics = metrics_file(access.path / METRICS_FILE, run_id, disk, access.check)
        self._summary = Summary(access.path / SUMMARY_FILE, disk, access.check)
        self.events = LinesFile(access.path / EVENTS_FILE, lambda line, *_: line, disk, access.check)
        self.files: dict[str, LinesFile | Summary] = {
            METRICS_FILE: self._metrics,
            EVENTS_FILE: self.events,
            SUMMARY_FILE: self._summary,
        }
        self._file_flushes = [self.guard(name, file.flush) for name, file in self.files.items()]
        self._service_flushes = [self.guard(service.name, service.flush) for service in services]
        finalize(self, _close_files, self.files, access)

    def guard(self, name: str, write: Callable[_Arguments, None]) -> Callable[_Arguments, None]:
        """Return a function that calls `write`, and reports its errors under `name` instead of raising them."""
        return self._guard.guard(name, write)

    def handlers(self) -> dict[type[Effect], list[Handler]]:
        """Return the guarded handlers of each type of effect that writes logs."""
        guard, console, services = self.guard, self._console, self._services
        files = ArtifactFiles(self._access.path, self._access.check, self._metrics.write, self._disk)
        texts = [("console", console.write_text), *((service.name, service.log_text) for service in services)]
        artifacts = [("artifacts", files.write), *((service.name, service.log_artifact) for service in services)]
        log_scalars = [guard(service.name, service.log_scalars) for service in services]
        return {
            **artifact_handlers([guard(name, write) for name, write in texts], guard, artifacts),
            LogScalars: [
                guard(METRICS_FILE, self._metrics.write),
                guard("console", console.write_scalars),
                *log_scalars,
            ],
            LogUpdates: [
                guard(METRICS_FILE, self._metrics.write_updates),
                guard("console", console.write_updates),
                *map(_handle_each, log_scalars),
            ],
            SetSummary: [
                guard(SUMMARY_FILE, self._summary.set),
                *(guard(service.name, service.set_summary) for service in services),
            ],
            SaveTensors: [guard("tensors", self._save_tensors)],
            ShowProgress: [guard("console", console.show_progress)],
        }

    @property
    def services(self) -> dict[str, LogService]:
        """The other destinations, by name."""
        return {service.name: service for service in self._services}

    @property
    def shows_panels(self) -> bool:
        """Whether the console is a terminal or a notebook."""
        return self._console.shows_panels

    def write_panel(self, panel: RunPanel) -> None:
        """Write a panel to the console; errors are reported and counted."""
        self.guard("console", self._console.write_panel)(panel)

    def write_notice(self, text: str) -> None:
        """Write a line to the console at once, from any thread; likewise."""
        self.guard("console", self._console.write_notice)(text)

    def flush_files(self) -> None:
        """Write the buffers of all files to the operating system; errors are reported and counted.

        Raises:
            RunMovedError: If a file, or the run directory, is not where it was opened. All buffers are written.
        """
        _call_all(self._file_flushes)

    def check_location(self) -> None:
        """Raise an error if the run directory is not where it was opened.

        Raises:
            RunMovedError: If it was moved, removed or replaced.
        """
        self._access.check()

    def flush(self) -> tuple[LogCount, LogCount]:
        """Flush all files and services; return the line counts of `metrics.jsonl` and `events.jsonl`.

        Raises:
            RunMovedError: As `flush_files`.
        """
        _call_all([self.flush_files, *self._service_flushes, self._access.check])
        return self._metrics.counts, self.events.counts

    def fsync(self, counts: tuple[LogCount, LogCount]) -> LogCount:
        """Write the lines that `flush` counted to the disk; return how many metrics lines are there or lost.

        Raises:
            RunMovedError: If a file, or the run directory, is not where it was opened.
        """
        self._access.check()
        metrics, events = counts
        written = self._metrics.fsync(metrics)
        self.events.fsync(events)
        return written

    def truncate(self, state: TrainState | None, saved: LogCount) -> int:
        """Remove the lines that a run resumed at `state` logs again; return the number of metrics lines removed.

        Args:
            state: The state to resume from; None for a new run.
            saved: The counts of metrics lines when that state was saved.

        Raises:
            LogError: If a log file is damaged.
        """
        removed = self._metrics.truncate(state, UNKNOWN_COUNT if state is None else saved)
        self.events.truncate(state)
        if removed:
            _LOGGER.info(
                "removed %s of %s that the resumed run logs again",
                count_of(removed, "line"),
                self._access.path / METRICS_FILE,
            )
        for service in self._services:
            self.guard(service.name, service.resume)(state)
        return removed

    def close(self) -> None:
        """Flush and close everything; report how often each log failed.

        Raises:
            RunMovedError: If buffered lines were written to a file that is not at its path any more.
        """
        logs = (*self.files.items(), *((service.name, service) for service in self._services))
        closes = [self.guard(name, log.close) for name, log in (*logs, ("console", self._console))]
        _call_all([*closes, self._guard.report_failures])

    def _save_tensors(self, effect: SaveTensors, _state: TrainState, _event: Event) -> None:
        self._access.check()
        path = self._access.path / "tensors" / f"{escape_path(effect.name)}.safetensors"
        make_directories(path.parent, self._disk, within=self._access.path)
        replace_file(path, tensor_pieces(effect.tensors), self._disk)


def _handle_each(handle: Handler) -> Handler:
    """Return a handler of `LogUpdates` that calls a handler of `LogScalars` for each update."""

    def handle_updates(effect: LogUpdates, state: TrainState, _event: Event) -> None:
        for row in effect.rows:
            handle(effect.scalars_of(row), state.replace(iteration=row.iteration), row.event)

    return handle_updates


def _call_all(functions: Iterable[Callable[[], None]]) -> None:
    """Call every function, although some raise `RunMovedError`; then raise the first of these errors."""
    errors: list[RunMovedError] = []
    for function in functions:
        try:
            function()
        except RunMovedError as error:
            errors.append(error)
    if errors:
        raise errors[0]


def _close_files(files: Mapping[str, LinesFile | Summary], _access: RunAccess) -> None:
    """Close the files of a run that was not closed; it stays locked until then."""
    guard = LogGuard()
    for name, file in files.items():
        try:
            guard.guard(name, file.close)()
        except RunMovedError as error:  # nothing can be raised here
            _LOGGER.error("%s", error)  # noqa: TRY400  # a message, not a bug
