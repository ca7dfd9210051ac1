"""`metrics.jsonl`: a line of metrics for each event that logs, encoded as it is written."""

from __future__ import annotations

import functools
import json
import math
import re
from typing import TYPE_CHECKING, Any, final

from noether.core.event import Event, kind_of
from noether.core.tensors.tree import FrozenDict
from noether.effects.disk.calls import DISK
from noether.effects.disk.json_numbers import NUMBER_TYPES, to_plain
from noether.effects.logs.jsonl import LinesFile, do_nothing, encode_json

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from noether.core.effect import LogScalars, UpdateScalars
    from noether.core.iteration import TrainingIteration
    from noether.effects.disk.calls import Disk

    Line = tuple[Mapping[str, Any], TrainingIteration, str, float]  # metrics, and iteration, name and time of an event


def event_name(event: Event) -> str:
    """Return the name of an event in logs, such as `after_update`."""
    return _name_of(type(event))  # type: ignore[arg-type]  # mypy asks for the hash of an instance


@functools.cache
def _name_of(event_type: type[Event]) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", kind_of(event_type).__name__).lower()


def position_fields(iteration: TrainingIteration, event: Event) -> dict[str, Any]:
    """Return the fields that every log line begins with: the event's name, the counters and the time."""
    return {
        "event": event_name(event),
        "epoch": iteration.epoch,
        "update": iteration.update,
        "sample": iteration.sample,
        "time_s": event.time_s,
    }


def metrics_file(
    path: Path, run_id: str = "", disk: Disk = DISK, check_location: Callable[[], None] = do_nothing
) -> LinesFile:
    """Return the metrics file of a run; its `write` is a handler of `LogScalars` and writes one line.

    It also writes the entries of artifacts by key, in lines that have no metrics.

    Args:
        path: The file; created with its first line.
        run_id: Name of the run, on every line.
        disk: The disk.
        check_location: As in `LinesFile`.
    """
    encoder = _Encoder(run_id)
    return LinesFile(path, encoder.to_line, disk, check_location, encode=encoder.encode)


@final
class _Encoder:
    """Makes the lines of a run, and encodes them.

    If consecutive lines have the same object as metrics, it encodes the metrics once. So only one thread at a time may
    call `encode`, as `LinesFile` ensures; other threads may call `to_line` meanwhile.
    """

    def __init__(self, run_id: str) -> None:
        self._run_id = run_id
        self._begin = f'{{"run": {json.dumps(run_id)}, "event": '
        self._values: Mapping[str, Any] | None = None
        self._values_text = ""

    def to_line(
        self, content: LogScalars | UpdateScalars | dict[str, Any], iteration: TrainingIteration, event: Event
    ) -> Line | dict[str, Any]:
        """Return the line of an event: a tuple for its metrics, a dict for the entries of artifacts."""
        if isinstance(content, dict):
            return {"run": self._run_id, **position_fields(iteration, event), "metrics": {}, "artifacts": content}
        # Without tensors, and copied unless they cannot change, because the line may be buffered.
        values = content.values
        if not NUMBER_TYPES.issuperset(map(type, values.values())):
            values = to_plain(values)
        elif type(values) is not FrozenDict:
            values = dict(values)
        return values, iteration, event_name(event), event.time_s

    def encode(self, line: Line | dict[str, Any]) -> str:
        """Return the JSON of a line."""
        if isinstance(line, dict):
            return encode_json(line)
        values, iteration, event, time_s = line
        if values is not self._values:
            self._values_text = _encode_values(values)
            self._values = values
        return (
            f'{self._begin}{_encode_name(event)}, "epoch": {iteration.epoch}, "update": {iteration.update}, '
            f'"sample": {iteration.sample}, "time_s": {encode_json(time_s)}, "metrics": {self._values_text}}}'
        )


def _encode_values(values: Mapping[str, Any]) -> str:
    """Return the JSON of metrics; finite numbers need no encoder, which takes three times as long."""
    parts = []
    for key, value in values.items():
        if type(key) is not str or not (type(value) is int or (type(value) is float and math.isfinite(value))):
            return encode_json(values)
        parts.append(f"{_encode_name(key)}: {value!r}")
    return f"{{{', '.join(parts)}}}"


@functools.lru_cache(1000)
def _encode_name(name: str) -> str:
    return json.dumps(name)
