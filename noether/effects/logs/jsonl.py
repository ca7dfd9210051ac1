"""Files of lines that only grow, are never torn in the middle, and are cut where a run goes on."""

from __future__ import annotations

import errno
import functools
import json
import logging
import os
import re
import threading
from typing import TYPE_CHECKING, Any, Final, NamedTuple, final

from noether.core.errors import NoetherError
from noether.core.event import AfterUpdate
from noether.core.iteration import TrainingIteration
from noether.effects.disk.calls import DISK
from noether.effects.disk.encoding import to_plain
from noether.effects.disk.files import os_error_text, read_file, replace_file
from noether.effects.logs.flushing import Pace, forget_in_children

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from noether.core.event import Event
    from noether.core.state import TrainState
    from noether.effects.disk.calls import Disk

    ToLine = Callable[[Any, TrainState, Event], Mapping[str, Any]]

_LOGGER: Final = logging.getLogger(__name__)
_JSON: Final = json.JSONEncoder(allow_nan=False)
_WAITING: Final = 1000  # lines, so that a loop of very short updates does not collect without bounds


class LogError(NoetherError):
    """A log cannot be read."""


class LogCount(NamedTuple):
    """How many lines of a run's log are on the disk, and how many could not be written there."""

    lines: int | None = None
    lost: int = 0


UNKNOWN: Final = LogCount()


def event_name(event: Event) -> str:
    """Return the name of an event in logs, such as `after_update`."""
    return _in_snake_case(type(event).__name__)


@functools.cache
def _in_snake_case(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


def place(state: TrainState, event: Event) -> dict[str, Any]:
    """Return what every line of a log says of its event: which one it is, and where and when it was."""
    name, at = event_name(event), state.iteration
    return {"event": name, "epoch": at.epoch, "update": at.update, "sample": at.sample, "time_s": event.time_s}


@final
class LinesFile:
    """Appends one line of JSON for each event that there is something to say of.

    Lines of updates wait, and are handed to the operating system together: once a second by the time of their events,
    a thousand of them at most, and with the line of any other event. A process that is killed loses what waits, and
    nothing that a checkpoint counts: `written` counts what was handed over, and hands over before. All that waited is
    written in one call, so that a crash can tear the end of the file only. What was written is on the disk when `flush`
    says so; it may be called in another thread than `write`.

    Args:
        path: The file; made at the first line.
        to_line: `(what, state, event) -> line`, which holds at least what `place` returns. The line may wait, so it
            holds plain values only: a tensor in it would be kept, or be donated meanwhile.
        disk: The disk.
    """

    def __init__(self, path: Path, to_line: ToLine, disk: Disk = DISK) -> None:
        self._path = path
        self._to_line = to_line
        self._disk = disk
        self._lock = threading.Lock()
        self._waiting: list[Mapping[str, Any]] = []
        self._pace = Pace(AfterUpdate)
        self._file: int | None = None
        self._size = 0
        self._torn = False  # whether lines were begun that are not whole
        self._distrusted = False  # whether a flush failed, after which no other flush of that file is believed
        self._written = LogCount(0)
        self._flushed = 0
        forget_in_children(self)

    @property
    def written(self) -> LogCount:
        """How many lines the operating system took, those included that waited until now, and how many it did not.

        Raises:
            OSError: As `hand_over`, which nothing waits for once it was called.
        """
        self.hand_over()
        return self._written

    def write(self, what: Any, state: TrainState, event: Event) -> None:
        """Append the line of what is said of an event; that of an update may wait for others.

        Raises:
            OSError: As `hand_over`, where lines were handed over.
            Exception: What making the line raises; it is then counted as lost.
        """
        try:
            line = self._to_line(what, state, event)
        except Exception:
            with self._lock:
                self._count(lost=1)
            raise
        self._waiting.append(line)
        if self._pace.is_due(event) or len(self._waiting) >= _WAITING:
            self.hand_over()

    def forget(self) -> None:
        """Drop what waits."""
        self._waiting.clear()

    def hand_over(self) -> None:
        """Hand the lines that wait to the operating system.

        Raises:
            OSError: If they cannot be written; all of them are then counted as lost, and the file is as it was.
            ValueError: If JSON cannot hold one of them. It is counted as lost, and the others are written.
            TypeError: Likewise.
        """
        with self._lock:
            self._hand_over()

    def flush(self, written: LogCount) -> LogCount:
        """Bring the lines that were `written` so far to the disk; return how many are there and how many are lost."""
        lines, lost = written.lines or 0, written.lost
        with self._lock:
            if self._flushed < lines:
                try:
                    self._rewrite() if self._distrusted else self._disk.flush(self._opened())
                except OSError as error:
                    if not self._distrusted:
                        _LOGGER.warning("%s could not be flushed to the disk: %s", self._path, os_error_text(error))
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
        self._torn = False
        self._written, self._flushed = LogCount(len(kept), max(0, held + saved.lost - len(kept))), 0
        return len(lines) - len(kept)

    def close(self) -> None:
        """Hand over what waits, and close the file; a later line opens it again.

        Raises:
            OSError: As `hand_over`; the file is closed all the same.
        """
        with self._lock:
            try:
                self._hand_over()
            finally:
                self._let_go()

    def _hand_over(self) -> None:
        waiting = self._waiting[:]
        del self._waiting[: len(waiting)]  # in place: another thread may be adding to it
        if not waiting:
            return
        self._count(lost=len(waiting))  # until they are written, whatever comes between
        encoded, errors = _encoded(waiting)
        if encoded:
            self._append(b"".join(encoded))
            self._count(lines=len(encoded), lost=-len(encoded))
        if errors:
            raise errors[0]

    def _count(self, *, lines: int = 0, lost: int = 0) -> None:
        self._written = LogCount((self._written.lines or 0) + lines, self._written.lost + lost)

    def _append(self, lines: bytes) -> None:
        file = self._opened()
        if self._torn:
            self._disk.truncate(file, self._size)
        self._torn = True
        if (took := self._disk.write(file, lines)) < len(lines):
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {took} of {len(lines)} bytes", str(self._path))
        self._torn = False
        self._size += len(lines)

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
        # What is torn is of a process that died while it wrote, and the next line would be glued to it; or of this one,
        # where a disk took a part, which may hold whole lines that were counted as lost.
        whole = self._size if self._torn else content.rfind(b"\n") + 1
        self._torn, self._size = whole < len(content), whole
        self._written = self._written._replace(lines=content[:whole].count(b"\n"))

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


def _encoded(lines: Sequence[Mapping[str, Any]]) -> tuple[list[bytes], list[Exception]]:
    """Return lines as JSON, and what went wrong for those that it cannot hold."""
    encoded: list[bytes] = []
    errors: list[Exception] = []
    for line in lines:
        try:
            encoded.append((_json(line) + "\n").encode())
        except Exception as error:  # noqa: BLE001  # whatever it is, the other lines are none the worse
            errors.append(error)
    return encoded, errors


def _json(line: Mapping[str, Any]) -> str:
    try:
        return _JSON.encode(line)
    except (TypeError, ValueError):  # it holds more than strings and finite numbers, which few do
        return _JSON.encode(to_plain(line))


def _kept(lines: list[bytes], state: TrainState | None, saved: int, path: Path) -> list[bytes]:
    """Return the lines that a run that goes on at `state` has written already, at least `saved` of them."""
    read = [_measured(line) for line in lines]
    at, ended = (None, False) if state is None else (state.iteration, state.ended)
    stay = [index for index, each in enumerate(read) if each is not None and line_is_before(*each, at, ended=ended)]
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


def line_is_before(event: str, measured: TrainingIteration, at: TrainingIteration | None, *, ended: bool) -> bool:
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
