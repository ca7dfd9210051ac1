"""Files of lines that only grow, are never torn in the middle, and are cut where a run goes on."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import threading
from typing import TYPE_CHECKING, Any, Final, NamedTuple, final

from noether.core.iteration import TrainingIteration
from noether.effects.disk import DISK
from noether.effects.files import read_file, reason, replace_file

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from noether.core.event import Event
    from noether.core.state import TrainState
    from noether.effects.disk import Disk

    ToLine = Callable[[Any, TrainState, Event], Mapping[str, Any]]

_LOGGER: Final = logging.getLogger(__name__)


class LogError(Exception):
    """A log cannot be read."""


class LogCount(NamedTuple):
    """How many lines of a run's log are on the disk, and how many could not be written there."""

    lines: int | None = None
    lost: int = 0


UNKNOWN: Final = LogCount()


def event_name(event: Event) -> str:
    """Return the name of an event in logs, such as `after_update`."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", type(event).__name__).lower()


def place(state: TrainState, event: Event) -> dict[str, Any]:
    """Return what every line of a log says of its event: which one it is, and where and when it was."""
    at = state.iteration
    counters = {"epoch": at.epoch, "update": at.update, "sample": at.sample}
    return {"event": event_name(event), **counters, "time_s": event.time_s}


@final
class LinesFile:
    """Appends one line of JSON for each event that there is something to say of.

    A line is written in one call, so that a crash can tear the last one only. What was written is on the disk when
    `flush` says so; it may be called in another thread than `write`.

    Args:
        path: The file; made at the first line.
        to_line: `(what, state, event) -> line`, which holds at least what `place` returns.
        disk: The disk.
    """

    def __init__(self, path: Path, to_line: ToLine, disk: Disk = DISK) -> None:
        self._path = path
        self._to_line = to_line
        self._disk = disk
        self._lock = threading.Lock()
        self._file: int | None = None
        self._size = 0
        self._torn = False  # whether a line was begun that is not whole
        self._distrusted = False  # whether a flush failed, after which no other flush of that file is believed
        self._written = LogCount(0)
        self._flushed = 0

    @property
    def written(self) -> LogCount:
        """How many lines were handed to the operating system, and how many it did not take."""
        return self._written

    def write(self, what: Any, state: TrainState, event: Event) -> None:
        """Append the line of what is said of an event.

        Raises:
            OSError: If it cannot be written; it is then counted as lost, and the file is as it was.
        """
        with self._lock:
            try:
                self._append((json.dumps(self._to_line(what, state, event), allow_nan=False) + "\n").encode())
            except Exception:
                self._written = self._written._replace(lost=self._written.lost + 1)
                raise
            self._written = self._written._replace(lines=(self._written.lines or 0) + 1)

    def flush(self, written: LogCount) -> LogCount:
        """Bring the lines that were `written` so far to the disk; return how many are there and how many are lost."""
        lines, lost = written.lines or 0, written.lost
        with self._lock:
            if self._flushed < lines:
                try:
                    self._rewrite() if self._distrusted else self._disk.flush(self._opened())
                except OSError as error:
                    if not self._distrusted:
                        _LOGGER.warning("%s could not be flushed to the disk: %s", self._path, reason(error))
                    self._distrusted = True
                else:
                    self._flushed = lines
        return LogCount(self._flushed, lost + lines - self._flushed)

    def cut(self, state: TrainState | None, saved: LogCount = UNKNOWN) -> int:
        """Drop the lines beyond `state`, which a resumed run will write again, and a torn one; return how many.

        Args:
            state: Where the run goes on, or None if it starts anew.
            saved: The lines that were on the disk when that state was saved; a missing one is told of and counted.

        Raises:
            LogError: If one of those lines, or a line before one that stays, is not one of ours.
        """
        self.close()
        there = self._disk.kind(self._path) is not None
        lines = read_file(self._path, self._disk).splitlines(keepends=True) if there else []
        kept = _kept(lines, state, saved.lines or 0, self._path)
        held = saved.lines or 0
        if len(kept) < held:
            _LOGGER.warning("%s misses %d of the %d lines that it held", self._path, held - len(kept), held)
        if len(kept) < len(lines):
            replace_file(self._path, kept, self._disk)
        self._written, self._flushed = LogCount(len(kept), max(0, held + saved.lost - len(kept))), 0
        return len(lines) - len(kept)

    def close(self) -> None:
        """Close the file; a later line opens it again."""
        with self._lock:
            self._let_go()

    def _append(self, line: bytes) -> None:
        file = self._opened()
        if self._torn:
            self._disk.truncate(file, self._size)
        self._torn = True
        if (took := self._disk.write(file, line)) < len(line):
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {took} of {len(line)} bytes", str(self._path))
        self._torn = False
        self._size += len(line)

    def _opened(self) -> int:
        if self._file is None:
            self._file = self._disk.open_to_append(self._path)
            try:
                self._begin()
            except OSError:
                self._let_go()
                raise
        return self._file

    def _let_go(self) -> None:
        file, self._file = self._file, None  # a close that fails has closed all the same
        if file is not None:
            self._disk.close(file)

    def _begin(self) -> None:
        content = read_file(self._path, self._disk)
        if not content:
            self._enter()
        whole = content.rfind(b"\n") + 1
        # A line of a process that died while it wrote; without the cut, the next one would be glued to it.
        self._torn, self._size = whole < len(content), whole
        self._written = self._written._replace(lines=content.count(b"\n"))

    def _enter(self) -> None:
        """Bring the name of the new file to the disk."""
        try:
            self._disk.flush_directory(self._path.parent)
        except OSError:
            self._disk.remove(self._path)  # a second flush would not tell of the first: the next file is another
            raise

    def _rewrite(self) -> None:
        """Write what the file holds to a new one, and put that in its place."""
        content = read_file(self._path, self._disk)[: self._size]
        if len(content) < self._size or not content.endswith(b"\n"):
            raise OSError(errno.EIO, "does not hold what was written to it", str(self._path))
        replace_file(self._path, [content], self._disk)
        self._distrusted = False
        self._let_go()


def _kept(lines: list[bytes], state: TrainState | None, saved: int, path: Path) -> list[bytes]:
    """Return the lines that a run that goes on at `state` has written already, at least `saved` of them."""
    read = [_measured(line) for line in lines]
    at, ended = (None, False) if state is None else (state.iteration, state.ended)
    stay = [index for index, each in enumerate(read) if each is not None and belongs(*each, at, ended=ended)]
    # What comes later may be torn, or what a power loss left of it.
    sure = max(saved, stay[-1] if stay else 0)
    for index, line in enumerate(lines[:sure]):
        if read[index] is None:
            text = line[:80].decode(errors="replace")
            raise LogError(f"{path}:{index + 1}: not a line of a log: {text!r}; remove it, and the run can go on")
    return [lines[index] for index in stay]


def _measured(line: bytes) -> tuple[str, TrainingIteration] | None:
    """Return the event and the counters of a line, or None if it is not a whole one of ours."""
    try:
        read = json.loads(line)
        if not line.endswith(b"\n"):
            return None
        return read["event"], TrainingIteration(read["epoch"], read["update"], read["sample"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def belongs(event: str, measured: TrainingIteration, at: TrainingIteration | None, *, ended: bool) -> bool:
    """Return whether what was logged stays where a run goes on, because it is not dispatched again.

    Args:
        event: Name of the event, such as `after_update`.
        measured: Where it was logged.
        at: Where the run goes on; None where it begins anew.
        ended: Whether it had ended there.
    """
    if at is None or not at.reached(measured):
        return False
    # These are dispatched where the last update or epoch was, and after it: the counters do not tell them from that.
    if event == "after_accumulation_step" and measured == at:
        return False
    return ended or event != "after_training" or measured != at
