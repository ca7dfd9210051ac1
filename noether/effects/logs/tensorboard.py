"""Metrics for TensorBoard, in files that are cut where a run goes on."""

from __future__ import annotations

import errno
import io
import os
import struct
import time
from typing import TYPE_CHECKING, Any, Final, NamedTuple, final

from noether.core.iteration import TrainingIteration
from noether.effects.disk.calls import DISK
from noether.effects.disk.files import make_directories, read_file
from noether.effects.logs.jsonl import event_name, is_kept_on_resume

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from noether.core.effect import LogScalars, LogText, SetSummary
    from noether.core.event import Event
    from noether.core.state import TrainState
    from noether.effects.disk.calls import Disk

_PREFIX: Final = "events.out.tfevents."
_SUFFIX: Final = ".noether"
_LENGTH: Final = struct.Struct("<Q")
_CHECKSUM_BYTES: Final = 4
_FRAME_BYTES: Final = _LENGTH.size + 2 * _CHECKSUM_BYTES  # of a record: length, its checksum, content, its checksum


class _Cut(NamedTuple):
    """Where a run goes on. Not its state, because that would keep the tensors alive."""

    iteration: TrainingIteration | None  # None where it begins anew
    ended: bool

    def takes(self, place: str) -> bool:
        """Return whether the run will be at a place, such as `after_update E0_U1_S4`, again."""
        event, _, counts = place.partition(" ")
        return not is_kept_on_resume(event, TrainingIteration.parse(counts), self.iteration, ended=self.ended)


@final
class TensorBoard:
    """Writes scalars and texts for TensorBoard, by update; a run that goes on replaces what it writes again.

    TensorBoard can be told to forget everything from an update on. Where an epoch ends at the very update of the
    checkpoint that a run goes on from, that is too much or too little. So the files themselves are cut, as
    `metrics.jsonl` is: every event that logs also writes which one it is, and TensorBoard does not show that. The files
    of other writers are left alone.

    Args:
        directory: Where the files go, one of each process.
        disk: The disk.

    Raises:
        ImportError: If TensorBoard is not installed.
    """

    name: Final = "tensorboard"

    def __init__(self, directory: Path, disk: Disk = DISK) -> None:
        # Not torch's writer: it writes in a thread, where nobody counts the errors, and of two of its files from one
        # second TensorBoard may read the later first.
        from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # as the others, it has no types
        from tensorboard.compat.proto import event_pb2, summary_pb2  # type: ignore[import-untyped]
        from tensorboard.plugins.text.summary_v2 import text_pb  # type: ignore[import-untyped]
        from tensorboard.summary.writer.record_writer import RecordWriter  # type: ignore[import-untyped]

        self._event, self._session_log, self._summary = event_pb2.Event, event_pb2.SessionLog, summary_pb2.Summary
        self._text, self._record_writer, self._decode_error = text_pb, RecordWriter, DecodeError
        self._directory = directory
        self._disk = disk
        self._file: int | None = None
        self._size = 0
        self._torn = False  # whether a record was begun that is not whole
        self._texts: tuple[str, TrainingIteration, int] = ("", TrainingIteration(), 0)  # of the last event that had any
        self._cut: _Cut | None = None  # that is still to be made
        self._forget: int | None = None  # the update from which on a TensorBoard that is open is still to be told to

    def resume(self, state: TrainState | None) -> None:
        """Have what was logged beyond `state` cut, or everything where a run begins anew, at the next event that logs.

        Not at once: only a process that logs may cut, and what fails then is told of and stops nothing.
        """
        self._cut = _Cut(None, ended=False) if state is None else _Cut(state.iteration, state.ended)

    def log_scalars(self, effect: LogScalars, state: TrainState, event: Event) -> None:
        """Write scalars: a handler of `LogScalars`."""
        values = [self._summary.Value(tag=key, simple_value=float(value)) for key, value in effect.values.items()]
        self._write(self._summary(value=values), state, event)

    def log_text(self, effect: LogText, state: TrainState, event: Event) -> None:
        """Write a text: a handler of `LogText`."""
        # Of several texts with one tag at one update TensorBoard shows the last.
        at = event_name(event), state.iteration
        self._texts = (*at, self._texts[-1] + 1 if self._texts[:-1] == at else 1)
        tag = f"log/{at[0]}" if self._texts[-1] == 1 else f"log/{at[0]}/{self._texts[-1]}"
        self._write(self._text(tag, effect.text), state, event)

    def set_summary(self, effect: SetSummary, state: TrainState, event: Event) -> None:
        """Do nothing: TensorBoard has no summary."""

    def flush(self) -> None:
        """Do nothing: the operating system is given every event at once."""

    def close(self) -> None:
        """End the file; what is logged later begins another."""
        file, self._file = self._file, None
        if file is not None:
            self._disk.close(file)

    def _write(self, summary: Any, state: TrainState, event: Event) -> None:
        # A loop that tells no time gets the clock's, because TensorBoard would show 1970.
        wall_time, step = event.time_s or time.time(), state.iteration.update
        place = self._session_log(msg=f"{event_name(event)} {state.iteration}")
        events = [self._event(step=step, session_log=place), self._event(step=step, summary=summary)]
        if self._cut is not None:
            self._go_on(self._cut)
        if self._file is None:
            self._file, self._size = self._begun(int(wall_time)), 0
        if self._size == 0:
            events = [*self._head(), *events]
        content = io.BytesIO()
        records = self._record_writer(content)
        for each in events:
            each.wall_time = wall_time
            records.write(each.SerializeToString())
        self._append(self._file, content.getvalue())

    def _go_on(self, cut: _Cut) -> None:
        self.close()
        for path in self._files():
            content = read_file(path, self._disk)
            kept = self._kept(content, cut)
            if kept < len(content):  # to nothing perhaps: a TensorBoard that reads a file may not miss it
                file = self._disk.open_to_append(path)
                try:
                    self._disk.truncate(file, kept)
                finally:
                    self._disk.close(file)
        self._forget = 0 if cut.iteration is None else cut.iteration.update + 1
        self._cut = None

    def _kept(self, content: bytes, cut: _Cut) -> int:
        """Return how many bytes of a file stay: up to what is cut or torn; 0 where nothing that was logged does."""
        kept = 0
        for end, record in _records(content):
            try:
                event = self._event.FromString(record)
            except self._decode_error:  # a power loss may leave zeros where a record was
                break
            if event.session_log.msg and cut.takes(event.session_log.msg):
                break
            if event.HasField("summary"):
                kept = end
        return kept

    def _files(self) -> list[Path]:
        """Return the files that are there already, as TensorBoard reads them one after the other."""
        names = self._disk.names(self._directory) if self._disk.kind(self._directory) is not None else []
        return [self._directory / name for name in names if name.startswith(_PREFIX) and name.endswith(_SUFFIX)]

    def _begun(self, time_s: int) -> int:
        """Return a file, open, that is read after those that are there already, even if the clock went back."""
        make_directories(self._directory, self._disk)
        numbers = [int(path.name.removeprefix(_PREFIX).removesuffix(_SUFFIX)) for path in self._files()]
        if not numbers:
            self._forget = 0  # it listens from the second time on that it is told to forget
        number = max([time_s, *(number + 1 for number in numbers)])
        return self._disk.open_to_append(self._directory / f"{_PREFIX}{number:010}{_SUFFIX}")

    def _head(self) -> list[Any]:
        """Return what a file begins with."""
        version = self._event(file_version="brain.Event:2")
        if self._forget is None:
            return [version]
        start = self._session_log(status=self._session_log.START)
        return [version, self._event(step=self._forget, session_log=start)]

    def _append(self, file: int, content: bytes) -> None:
        if self._torn:
            self._disk.truncate(file, self._size)  # behind a torn record nothing is read
        self._torn = True
        if (took := self._disk.write(file, content)) < len(content):
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {took} of {len(content)} bytes")
        self._torn = False
        self._size += len(content)
        self._forget = None


def _records(content: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield where each whole record of a file ends, and what it holds."""
    at = 0
    while at + _FRAME_BYTES <= len(content):
        (length,) = _LENGTH.unpack_from(content, at)
        begin, at = at + _LENGTH.size + _CHECKSUM_BYTES, at + _FRAME_BYTES + length
        if at <= len(content):
            yield at, content[begin : begin + length]
