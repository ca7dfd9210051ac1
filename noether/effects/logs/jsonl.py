"""JSON Lines files of a run: `metrics.jsonl` and `events.jsonl`, buffered, and truncated where a run resumes."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import threading
from typing import TYPE_CHECKING, Any, Final, NamedTuple, final

from noether.core.event import AfterEpoch, AfterUpdate
from noether.effects.disk.calls import DISK
from noether.effects.disk.files import os_error_text, read_file, replace_file
from noether.effects.disk.json_numbers import to_plain
from noether.effects.disk.path_checks import RunMovedError, require_in_place
from noether.effects.logs.buffers import EPOCH_FLUSH_INTERVAL_S, FLUSH_INTERVAL_S, FlushInterval, discard_after_fork
from noether.effects.logs.resumption import ResumePoint, lines_before_resume

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from noether.core.effect import LogUpdates
    from noether.core.event import Event
    from noether.core.iteration import TrainingIteration
    from noether.core.state import TrainState
    from noether.effects.disk.calls import Disk

    ToLine = Callable[[Any, TrainingIteration, Event], Any]

_LOGGER: Final = logging.getLogger(__name__)
_JSON: Final = json.JSONEncoder(allow_nan=False)
_BUFFER_LINES: Final = 1000  # bounds the memory of a loop with very short updates


class LogCount(NamedTuple):
    """Numbers of lines of a log file.

    Args:
        lines: Lines in the file; None if unknown.
        lost: Lines that could not be written.
    """

    lines: int | None = None
    lost: int = 0


UNKNOWN_COUNT: Final = LogCount()


def do_nothing() -> None:
    """Check nothing: the check of a file that belongs to no run."""


def encode_json(value: Any) -> str:
    """Return the JSON of plain values; tensors, NaN and the infinities are written as `to_plain` returns them.

    Raises:
        TypeError: If there are other objects.
        ValueError: If an integer is too long.

    Example:
        >>> encode_json({"loss": 0.5, "grad_norm": float("nan")})
        '{"loss": 0.5, "grad_norm": "NaN"}'
    """
    if type(value) is float and math.isfinite(value):  # such as the time of an event; the encoder takes longer
        return repr(value)
    try:
        return _JSON.encode(value)
    except (TypeError, ValueError):  # rare: not only strings and finite numbers
        return _JSON.encode(to_plain(value))


@final
class LinesFile:
    """Appends one line of JSON per logged event, through a buffer.

    Lines of updates are buffered. They are written once a second by the time of their events, when a thousand are
    buffered, and together with the line of any other event; the line of an epoch that takes less than 0.05 seconds is
    buffered, too. A killed process loses the buffered lines, but no line that a checkpoint counts: a save flushes
    before it reads `counts`. One flush is one call to the operating system, so a crash can only leave a partial line at
    the end of the file. Lines are on the disk once `fsync` returns; it may run in another thread than `write`.

    If the file was moved or removed, a flush still writes to the open file, so that no line is lost, and then raises.

    Args:
        path: The file; created with its first line.
        to_line: `(content, iteration, event) -> line`, a line with at least the fields of `position_fields`. `content`
            is one effect, one row of `LogUpdates`, or all effects of the event. The line must hold plain values: the
            buffer would keep a tensor alive, or donation would overwrite it.
        disk: The disk.
        check_location: Raises `RunMovedError` if the directory of the run was moved; called before the file is created.
        encode: Returns the JSON of a line; called where lines are written, in their order, by one thread at a time.
    """

    def __init__(
        self,
        path: Path,
        to_line: ToLine,
        disk: Disk = DISK,
        check_location: Callable[[], None] = do_nothing,
        encode: Callable[[Any], str] = encode_json,
    ) -> None:
        self._path = path
        self._to_line = to_line
        self._encode = encode
        self._disk = disk
        self._check_location = check_location
        self._lock = threading.Lock()
        self._buffer: list[Any] = []
        self._updates = FlushInterval({AfterUpdate: FLUSH_INTERVAL_S})
        self._epochs = FlushInterval({AfterEpoch: EPOCH_FLUSH_INTERVAL_S})  # an epoch ends right after an update
        self._file: int | None = None
        self._size = 0  # bytes of the whole lines
        self._is_torn = False  # whether part of a line may follow them
        self._is_moved = False  # whether another file or none is at the path, which was reported
        self._fsync_failed = False  # then a later fsync of the same file proves nothing
        self._counts = LogCount(0)
        self._lines_on_disk = 0
        discard_after_fork(self)

    @property
    def counts(self) -> LogCount:
        """Numbers of lines that were flushed and that were lost; buffered lines are not counted."""
        lines, lost = self._counts
        return LogCount(0, lost + (lines or 0)) if self._is_moved else self._counts

    def write(self, content: Any, state: TrainState, event: Event) -> None:
        """Append the line of an event; the line of an update may stay in the buffer.

        Raises:
            OSError: As `flush`.
            Exception: The error of `to_line`; the line is counted as lost.
        """
        try:
            line = self._to_line(content, state.iteration, event)
        except Exception:
            with self._lock:
                self._add_counts(lost=1)
            raise
        self._buffer.append(line)
        if (self._updates.is_due(event) and self._epochs.is_due(event)) or len(self._buffer) >= _BUFFER_LINES:
            self.flush()

    def write_updates(self, effect: LogUpdates, state: TrainState, event: Event) -> None:  # noqa: ARG002  # a handler
        """Append a line for each row, as `write` at its update would; they are flushed together.

        Raises:
            OSError: As `flush`.
            Exception: The first error of `to_line`; such a row is counted as lost, and the other rows have their lines.
        """
        errors: list[Exception] = []
        is_due = False
        for row in effect.rows:
            try:
                self._buffer.append(self._to_line(row, row.iteration, row.event))
            except Exception as error:  # noqa: BLE001  # one bad row must not affect the others
                errors.append(error)
            is_due = self._updates.is_due(row.event) or is_due
        if errors:
            with self._lock:
                self._add_counts(lost=len(errors))
        if is_due or len(self._buffer) >= _BUFFER_LINES:
            self.flush()
        if errors:
            raise errors[0]

    def discard_buffer(self) -> None:
        """Discard the buffered lines."""
        self._buffer.clear()

    def flush(self) -> None:
        """Write the buffered lines to the operating system.

        Raises:
            RunMovedError: If the file is not at its path any more. The lines are in the open file. A file that was
                moved alone is reported once; its lines count as lost from then on.
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

        Raises:
            RunMovedError: If the file is not at its path any more.
        """
        lines, lost = counts.lines or 0, counts.lost
        with self._lock:
            self._require_in_place()
            if self._is_moved:
                return self.counts
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

        A file that was cut off, even within the saved lines, is no error: the run continues without the rest.

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
        remaining, repeated = lines_before_resume(lines, ResumePoint.of(state), saved_lines, self._path)
        missing = saved_lines - repeated - len(remaining)
        is_cut_off = bool(lines) and not lines[-1].endswith(b"\n")
        removed = "; its last line was cut off, and is removed" if is_cut_off else ""
        if missing > 0:
            _LOGGER.warning("%s misses %d of its %d saved lines%s", self._path, missing, saved_lines, removed)
        elif is_cut_off and state is not None and saved.lines is None:
            _LOGGER.warning("%s has %d whole lines%s", self._path, len(lines) - 1, removed)
        if len(remaining) < len(lines):
            replace_file(self._path, remaining, self._disk)
        self._is_torn = False
        self._counts, self._lines_on_disk = LogCount(len(remaining), max(0, missing + saved.lost)), 0
        if remaining:
            self._open_file()  # and keep it open, to notice if it is moved
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
        encoded, errors = self._encode_lines(lines)
        if encoded:
            self._append(b"".join(encoded))
            self._add_counts(lines=len(encoded), lost=-len(encoded))
            self._require_in_place()
        if errors:
            raise errors[0]

    def _encode_lines(self, lines: Sequence[Any]) -> tuple[list[bytes], list[Exception]]:
        """Return lines as JSON, and the errors of the lines that are not JSON."""
        encoded: list[bytes] = []
        errors: list[Exception] = []
        for line in lines:
            try:
                encoded.append(f"{self._encode(line)}\n".encode())
            except Exception as error:  # noqa: BLE001  # one bad line must not affect the others
                errors.append(error)
        return encoded, errors

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

    def _require_in_place(self) -> None:
        """Raise an error if the open file is not at its path; only once, unless the directory was moved."""
        if self._file is None or self._is_moved:
            return
        try:
            require_in_place(self._file, self._path, "Put it back and resume the run.", self._disk)
        except RunMovedError:
            self._check_location()  # raises the error of the directory
            self._is_moved = True
            raise

    def _open_file(self) -> int:
        if self._file is None:
            self._check_location()
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
        self._open_file()
