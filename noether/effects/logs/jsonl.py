"""JSON Lines files of a run: `metrics.jsonl` and `events.jsonl`, buffered, and truncated where a run resumes."""

from __future__ import annotations

import errno
import functools
import json
import logging
import os
import re
import threading
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple, final

from noether.core.errors import NoetherError
from noether.core.event import AfterUpdate
from noether.core.iteration import TrainingIteration
from noether.effects.disk.calls import DISK
from noether.effects.disk.encoding import NUMBER_TYPES, to_plain
from noether.effects.disk.files import os_error_text, read_file, replace_file
from noether.effects.logs.buffers import FlushInterval, discard_after_fork

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from noether.core.effect import LogScalars
    from noether.core.event import Event
    from noether.core.state import TrainState
    from noether.effects.disk.calls import Disk

    ToLine = Callable[[Any, TrainState, Event], Mapping[str, Any]]

_LOGGER: Final = logging.getLogger(__name__)
_JSON: Final = json.JSONEncoder(allow_nan=False)
_BUFFER_LINES: Final = 1000  # bounds the memory of a loop with very short updates


class LogError(NoetherError):
    """A log file is damaged."""


class LogCount(NamedTuple):
    """Numbers of lines of a log file.

    Args:
        lines: Lines in the file; None if unknown.
        lost: Lines that could not be written.
    """

    lines: int | None = None
    lost: int = 0


UNKNOWN_COUNT: Final = LogCount()


def event_name(event: Event) -> str:
    """Return the name of an event in logs, such as `after_update`."""
    return _snake_case(type(event).__name__)


@functools.cache
def _snake_case(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


def position_fields(state: TrainState, event: Event) -> dict[str, Any]:
    """Return the fields that every log line begins with: the event's name, the counters and the time."""
    name, iteration = event_name(event), state.iteration
    return {
        "event": name,
        "epoch": iteration.epoch,
        "update": iteration.update,
        "sample": iteration.sample,
        "time_s": event.time_s,
    }


def metrics_file(path: Path, run_id: str = "", disk: Disk = DISK) -> LinesFile:
    """Return the metrics file of a run; its `write` is a handler of `LogScalars` and writes one line per event.

    Args:
        path: The file; created with its first line.
        run_id: Name of the run, on every line.
        disk: The disk.
    """
    return LinesFile(path, partial(_metrics_line, run_id), disk)


def _metrics_line(run_id: str, effect: LogScalars, state: TrainState, event: Event) -> dict[str, Any]:
    # Copied, and without tensors, because the line may be buffered.
    values = dict(effect.values)
    if not NUMBER_TYPES.issuperset(map(type, values.values())):
        values = to_plain(values)
    return {"run": run_id, **position_fields(state, event), "metrics": values}


@final
class LinesFile:
    """Appends one line of JSON per logged event, through a buffer.

    Lines of updates are buffered. They are written once a second by the time of their events, when a thousand are
    buffered, and together with the line of any other event. A killed process loses the buffered lines, but no line
    that a checkpoint counts: a save flushes before it reads `counts`. One flush is one call to the operating system,
    so a crash can only leave a partial line at the end of the file. Lines are on the disk once `fsync` returns; it may
    run in another thread than `write`.

    Args:
        path: The file; created with its first line.
        to_line: `(content, state, event) -> line`, a line with at least the fields of `position_fields`. `content`
            is one effect, or all effects of the event. The line must hold plain values: the buffer would keep a tensor
            alive, or donation would overwrite it.
        disk: The disk.
    """

    def __init__(self, path: Path, to_line: ToLine, disk: Disk = DISK) -> None:
        self._path = path
        self._to_line = to_line
        self._disk = disk
        self._lock = threading.Lock()
        self._buffer: list[Mapping[str, Any]] = []
        self._interval = FlushInterval(AfterUpdate)
        self._file: int | None = None
        self._size = 0  # bytes of the whole lines
        self._is_torn = False  # whether part of a line may follow them
        self._fsync_failed = False  # then a later fsync of the same file proves nothing
        self._counts = LogCount(0)
        self._lines_on_disk = 0
        discard_after_fork(self)

    @property
    def counts(self) -> LogCount:
        """Numbers of lines that were flushed and that were lost; buffered lines are not counted."""
        return self._counts

    def write(self, content: Any, state: TrainState, event: Event) -> None:
        """Append the line of an event; the line of an update may stay in the buffer.

        Raises:
            OSError: As `flush`.
            Exception: The error of `to_line`; the line is counted as lost.
        """
        try:
            line = self._to_line(content, state, event)
        except Exception:
            with self._lock:
                self._add_counts(lost=1)
            raise
        self._buffer.append(line)
        if self._interval.is_due(event) or len(self._buffer) >= _BUFFER_LINES:
            self.flush()

    def discard_buffer(self) -> None:
        """Discard the buffered lines."""
        self._buffer.clear()

    def flush(self) -> None:
        """Write the buffered lines to the operating system.

        Raises:
            OSError: If they cannot be written; all of them are counted as lost, and the file keeps its old content.
            ValueError: If a line is not JSON; it is counted as lost, and the other lines are written.
            TypeError: Likewise.
        """
        with self._lock:
            self._flush()

    def fsync(self, counts: LogCount) -> LogCount:
        """Write flushed lines to the disk; return how many are there and how many are lost.

        Args:
            counts: The value of `counts` after the flush of these lines.
        """
        lines, lost = counts.lines or 0, counts.lost
        with self._lock:
            if self._lines_on_disk < lines:
                try:
                    self._rewrite() if self._fsync_failed else self._disk.fsync(self._open_file())
                except OSError as error:
                    if not self._fsync_failed:
                        _LOGGER.warning("%s could not be flushed to the disk: %s", self._path, os_error_text(error))
                    self._fsync_failed = True
                else:
                    self._lines_on_disk = lines
        return LogCount(self._lines_on_disk, lost + lines - self._lines_on_disk)

    def truncate(self, state: TrainState | None, saved: LogCount = UNKNOWN_COUNT) -> int:
        """Remove the lines that a run resumed at `state` logs again, and a partial line; return their number.

        Args:
            state: The state to resume from; None for a new run.
            saved: The counts when that state was saved. Missing lines are reported and counted as lost.

        Raises:
            LogError: If a line that has to stay is damaged.
        """
        self.close()
        exists = self._disk.kind(self._path) is not None
        lines = read_file(self._path, self._disk).splitlines(keepends=True) if exists else []
        saved_lines = saved.lines or 0
        remaining = _lines_before_resume(lines, state, saved_lines, self._path)
        missing = saved_lines - len(remaining)
        if missing > 0:
            _LOGGER.warning("%s misses %d of its %d saved lines", self._path, missing, saved_lines)
        if len(remaining) < len(lines):
            replace_file(self._path, remaining, self._disk)
        self._is_torn = False
        self._counts, self._lines_on_disk = LogCount(len(remaining), max(0, missing + saved.lost)), 0
        return len(lines) - len(remaining)

    def close(self) -> None:
        """Flush and close the file; a later line opens it again.

        Raises:
            OSError: As `flush`; the file is closed all the same.
        """
        with self._lock:
            try:
                self._flush()
            finally:
                self._close_file()

    def _flush(self) -> None:
        lines = self._buffer[:]
        del self._buffer[: len(lines)]  # in place: another thread may append meanwhile
        if not lines:
            return
        self._add_counts(lost=len(lines))  # until they are written, in case of an error
        encoded, errors = _encode_lines(lines)
        if encoded:
            self._append(b"".join(encoded))
            self._add_counts(lines=len(encoded), lost=-len(encoded))
        if errors:
            raise errors[0]

    def _add_counts(self, *, lines: int = 0, lost: int = 0) -> None:
        self._counts = LogCount((self._counts.lines or 0) + lines, self._counts.lost + lost)

    def _append(self, content: bytes) -> None:
        file = self._open_file()
        if self._is_torn:
            self._disk.truncate(file, self._size)
        self._is_torn = True
        if (size := self._disk.write(file, content)) < len(content):
            message = f"{os.strerror(errno.ENOSPC)}: {size} of {len(content)} bytes"
            raise OSError(errno.ENOSPC, message, str(self._path))
        self._is_torn = False
        self._size += len(content)

    def _open_file(self) -> int:
        if self._file is None:
            self._file = self._disk.open_to_append(self._path)
            try:
                self._read_end()
            except OSError:
                self._close_file()
                raise
        return self._file

    def _close_file(self) -> None:
        file, self._file = self._file, None  # even if closing raises, the descriptor is closed
        if file is not None:
            self._disk.close(file)

    def _read_end(self) -> None:
        """Find where the whole lines of the opened file end; a new file gets its directory entry on the disk."""
        content = read_file(self._path, self._disk)
        if not content:
            try:
                self._disk.fsync_directory(self._path.parent)
            except OSError:
                self._disk.remove(self._path)  # a second fsync would not report the error: start with another file
                raise
        # A partial line was left by a crashed process, and the next line would be glued to it. One of this process, on
        # a full disk, may hold whole lines that were counted as lost.
        size = self._size if self._is_torn else content.rfind(b"\n") + 1
        self._is_torn, self._size = size < len(content), size
        self._counts = self._counts._replace(lines=content[:size].count(b"\n"))

    def _rewrite(self) -> None:
        """Replace the file by a new one with the same lines."""
        content = read_file(self._path, self._disk)[: self._size]
        if len(content) < self._size or not content.endswith(b"\n"):
            raise OSError(errno.EIO, "does not hold what was written to it", str(self._path))
        replace_file(self._path, [content], self._disk)
        self._fsync_failed = False
        self._close_file()


def _encode_lines(lines: Sequence[Mapping[str, Any]]) -> tuple[list[bytes], list[Exception]]:
    """Return lines as JSON, and the errors of the lines that are not JSON."""
    encoded: list[bytes] = []
    errors: list[Exception] = []
    for line in lines:
        try:
            try:
                text = _JSON.encode(line)
            except (TypeError, ValueError):  # rare: not only strings and finite numbers
                text = _JSON.encode(to_plain(line))
            encoded.append((text + "\n").encode())
        except Exception as error:  # noqa: BLE001  # one bad line must not affect the others
            errors.append(error)
    return encoded, errors


def _lines_before_resume(lines: list[bytes], state: TrainState | None, saved: int, path: Path) -> list[bytes]:
    """Return the lines logged before the point where a run resumes.

    Raises:
        LogError: If one of the first `saved` lines, or a line before another that stays, is damaged.
    """
    positions = [_parse_position(line) for line in lines]
    resumed_at, ended = (None, False) if state is None else (state.iteration, state.ended)
    remaining = [
        index
        for index, position in enumerate(positions)
        if position is not None and is_kept_on_resume(*position, resumed_at, ended=ended)
    ]
    # Later lines may be partial, or damaged by a power loss.
    intact = max(saved, remaining[-1] if remaining else 0)
    for index, line in enumerate(lines[:intact]):
        if positions[index] is None:
            text = line[:80].decode(errors="replace")
            raise LogError(f"{path}:{index + 1}: not a log line: {text!r}; remove this line, and resume again")
    return [lines[index] for index in remaining]


def _parse_position(line: bytes) -> tuple[str, TrainingIteration] | None:
    """Return the event name and the counters of a log line, or None if it is damaged."""
    try:
        fields = json.loads(line)
        if not line.endswith(b"\n"):
            return None
        return fields["event"], TrainingIteration(fields["epoch"], fields["update"], fields["sample"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def is_kept_on_resume(
    event: str, logged_at: TrainingIteration, resumed_at: TrainingIteration | None, *, ended: bool
) -> bool:
    """Return whether a resumed run keeps a log line, because it does not dispatch that event again.

    Args:
        event: Name of the event, such as `after_update`.
        logged_at: Counters at the event.
        resumed_at: Counters where the run resumes; None for a new run.
        ended: Whether training had ended there.
    """
    if resumed_at is None or not resumed_at.reached(logged_at):
        return False
    # These events follow an update or epoch whose counters they share.
    if event == "after_accumulation_step" and logged_at == resumed_at:
        return False
    return ended or event != "after_training" or logged_at != resumed_at
