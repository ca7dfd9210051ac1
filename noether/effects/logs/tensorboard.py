"""Logging for TensorBoard, in event files that are truncated where a run resumes."""

from __future__ import annotations

import errno
import io
import logging
import os
import struct
import time
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final, final

from noether.core.iteration import TrainingIteration
from noether.effects.artifacts.png import png_size
from noether.effects.disk.calls import DISK
from noether.effects.disk.files import read_file
from noether.effects.logs.metrics import event_name
from noether.effects.logs.resumption import ResumePoint

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from noether.core.effect import LogScalars, LogText, SetSummary
    from noether.core.event import Event
    from noether.core.state import TrainState
    from noether.effects.artifacts.encoding import EncodedArtifact
    from noether.effects.disk.calls import Disk

_LOGGER: Final = logging.getLogger(__name__)
_PREFIX: Final = "events.out.tfevents."
_SUFFIX: Final = ".noether"
_LENGTH: Final = struct.Struct("<Q")
_CHECKSUM_BYTES: Final = 4
_FRAME_BYTES: Final = _LENGTH.size + 2 * _CHECKSUM_BYTES  # of a record: length, its checksum, content, its checksum


@final
class TensorBoard:
    """Writes scalars, texts and artifacts for TensorBoard, by update; a resumed run replaces what it logs again.

    Tables are shown as texts. An artifact and a metric with one name have one tag, of which TensorBoard shows one.

    TensorBoard has a record that discards everything from an update on. Where an epoch ends at the update of the
    checkpoint that a run resumes from, this discards too much or too little. So the files are truncated, as
    `metrics.jsonl` is: every logged event also writes its name and counters, in a record that TensorBoard does not
    show. Files of other writers are not changed.

    Args:
        directory: Where the files go, one per process.
        disk: The disk.

    Raises:
        ImportError: If TensorBoard is not installed.
    """

    name: Final = "tensorboard"

    def __init__(self, directory: Path, disk: Disk = DISK) -> None:
        # Not torch's writer: it writes in a thread that does not report errors, and TensorBoard may read two of its
        # files from the same second in the wrong order.
        from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # as the others, it has no types
        from tensorboard.compat.proto import event_pb2, summary_pb2  # type: ignore[import-untyped]  # tensorboard has no types
        from tensorboard.compat.proto.histogram_pb2 import HistogramProto  # type: ignore[import-untyped]  # tensorboard has no types
        from tensorboard.plugins.text.summary_v2 import text_pb  # type: ignore[import-untyped]  # tensorboard has no types
        from tensorboard.summary.writer.record_writer import RecordWriter  # type: ignore[import-untyped]  # tensorboard has no types

        self._event, self._session_log, self._summary = event_pb2.Event, event_pb2.SessionLog, summary_pb2.Summary
        self._text, self._record_writer, self._decode_error = text_pb, RecordWriter, DecodeError
        self._histogram = HistogramProto
        self._told: set[str] = set()  # kinds that cannot be shown, which was said
        self._directory = directory
        self._disk = disk
        self._file: int | None = None
        self._size = 0  # bytes of the whole records
        self._is_torn = False  # whether part of a record may follow them
        self._last_text: tuple[str, TrainingIteration, int] = ("", TrainingIteration(), 0)  # event, counters, number
        self._resume_point: ResumePoint | None = None  # where the next write truncates the files
        self._discard_from: int | None = None  # update from which a running TensorBoard has to discard

    def resume(self, state: TrainState | None) -> None:
        """Truncate the files after `state`, or completely for a new run, at the next event that logs.

        Not at once, because only a process that logs may truncate, and an error there is reported as a log error.
        """
        self._resume_point = ResumePoint.of(state)

    def log_scalars(self, effect: LogScalars, state: TrainState, event: Event) -> None:
        """Write scalars: a handler of `LogScalars`."""
        values = [self._summary.Value(tag=key, simple_value=float(value)) for key, value in effect.values.items()]
        self._write(self._summary(value=values), state, event)

    def log_text(self, effect: LogText, state: TrainState, event: Event) -> None:
        """Write a text: a handler of `LogText`."""
        # TensorBoard shows only the last of several texts with one tag at one update.
        name, iteration = event_name(event), state.iteration
        number = self._last_text[2] + 1 if self._last_text[:2] == (name, iteration) else 1
        self._last_text = (name, iteration, number)
        self._write(self._text(f"log/{name}" if number == 1 else f"log/{name}/{number}", effect.text), state, event)

    def log_artifact(self, artifact: EncodedArtifact, state: TrainState, event: Event) -> None:
        """Write an artifact; SVG and files cannot be shown, which is said once."""
        key, value = artifact.key, artifact.value
        if artifact.suffix == ".png":
            width, height = png_size(artifact.content)
            image = self._summary.Image(width=width, height=height, encoded_image_string=artifact.content)
            summary = self._summary(value=[self._summary.Value(tag=key, image=image)])
        elif artifact.kind == "histogram":
            summary = self._summary(value=[self._summary.Value(tag=key, histo=self._histogram(**_moments(value)))])
        elif artifact.kind == "table":
            summary = self._text(key, _to_markdown(value))
        elif artifact.kind == "text":
            summary = self._text(key, value)
        else:
            what = "files" if artifact.kind == "file" else "SVG figures"
            if what not in self._told:
                _LOGGER.warning("TensorBoard cannot show %s, such as %r: it is in artifacts/ of the run", what, key)
            self._told.add(what)
            return
        self._write(summary, state, event)

    def set_summary(self, effect: SetSummary, state: TrainState, event: Event) -> None:
        """Do nothing: TensorBoard has no summary."""

    def flush(self) -> None:
        """Do nothing: every event is written to the operating system at once."""

    def close(self) -> None:
        """Close the file; a later event starts another file."""
        file, self._file = self._file, None
        if file is not None:
            self._disk.close(file)

    def _write(self, summary: Any, state: TrainState, event: Event) -> None:
        # Falls back to the clock if the loop sets no time, because TensorBoard would show 1970.
        wall_time, step = event.time_s or time.time(), state.iteration.update
        position = self._session_log(msg=f"{event_name(event)} {state.iteration}")
        events = [self._event(step=step, session_log=position), self._event(step=step, summary=summary)]
        if self._resume_point is not None:
            self._truncate(self._resume_point)
        if self._file is None:
            self._file, self._size = self._open_new_file(int(wall_time)), 0
        if self._size == 0:
            events = [*self._header(), *events]
        content = io.BytesIO()
        records = self._record_writer(content)
        for each in events:
            each.wall_time = wall_time
            records.write(each.SerializeToString())
        self._append(self._file, content.getvalue())

    def _truncate(self, point: ResumePoint) -> None:
        """Remove the records that the resumed run logs again from all files."""
        self.close()
        for path in self._files():
            content = read_file(path, self._disk)
            size = self._size_before(content, point)
            if size < len(content):  # an empty file stays, because a running TensorBoard may read it
                file = self._disk.open_to_append(path)
                try:
                    self._disk.truncate(file, size)
                finally:
                    self._disk.close(file)
        self._discard_from = 0 if point.iteration is None else point.iteration.update + 1
        self._resume_point = None

    def _size_before(self, content: bytes, point: ResumePoint) -> int:
        """Return how many bytes of a file stay: up to the last intact value logged before the run resumes."""
        size = 0
        for end, record in _read_records(content):
            try:
                event = self._event.FromString(record)
            except self._decode_error:  # a power loss may leave zeros instead of a record
                break
            name, _, counts = event.session_log.msg.partition(" ")
            if name and not point.keeps(name, TrainingIteration.parse(counts)):
                break
            if event.HasField("summary"):
                size = end
        return size

    def _files(self) -> list[Path]:
        """Return the existing files in the order in which TensorBoard reads them."""
        names = self._disk.names(self._directory) if self._disk.kind(self._directory) is not None else []
        return [self._directory / name for name in names if name.startswith(_PREFIX) and name.endswith(_SUFFIX)]

    def _open_new_file(self, time_s: int) -> int:
        """Open a new file whose name sorts after the existing ones, even if the clock was set back."""
        if self._disk.kind(self._directory) is None:  # not its parents: a run directory that is gone is not made again
            self._disk.make_directory(self._directory)
        numbers = [int(path.name.removeprefix(_PREFIX).removesuffix(_SUFFIX)) for path in self._files()]
        if not numbers:
            self._discard_from = 0  # TensorBoard ignores the first discard record that it reads
        number = max([time_s, *(number + 1 for number in numbers)])
        return self._disk.open_to_append(self._directory / f"{_PREFIX}{number:010}{_SUFFIX}")

    def _header(self) -> list[Any]:
        """Return the first records of a file."""
        version = self._event(file_version="brain.Event:2")
        if self._discard_from is None:
            return [version]
        start = self._session_log(status=self._session_log.START)
        return [version, self._event(step=self._discard_from, session_log=start)]

    def _append(self, file: int, content: bytes) -> None:
        if self._is_torn:
            self._disk.truncate(file, self._size)  # TensorBoard stops reading at a partial record
        self._is_torn = True
        if (size := self._disk.write(file, content)) < len(content):
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {size} of {len(content)} bytes")
        self._is_torn = False
        self._size += len(content)
        self._discard_from = None


def _moments(histogram: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a histogram in TensorBoard; sums are those of values in the middle of their bins."""
    counts, edges = histogram["counts"], histogram["edges"]
    middles = [low / 2 + high / 2 for low, high in pairwise(edges)]
    return {
        "min": edges[0],
        "max": edges[-1],
        "num": sum(counts),
        "sum": sum(count * middle for count, middle in zip(counts, middles, strict=True)),
        "sum_squares": sum(count * middle * middle for count, middle in zip(counts, middles, strict=True)),
        "bucket_limit": edges[1:],
        "bucket": counts,
    }


def _to_markdown(table: dict[str, Any]) -> str:
    """Return a table in Markdown."""
    rows = [table["columns"], ["---"] * len(table["columns"]), *table["rows"]]
    cells = ([str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows)
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def _read_records(content: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the end position and the content of each whole record in a file."""
    end = 0
    while end + _FRAME_BYTES <= len(content):
        (length,) = _LENGTH.unpack_from(content, end)
        start, end = end + _LENGTH.size + _CHECKSUM_BYTES, end + _FRAME_BYTES + length
        if end <= len(content):
            yield end, content[start : start + length]
