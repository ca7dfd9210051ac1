"""Parses `metrics.jsonl`: points, values by key, and references to artifacts; or its first or last line only."""

from __future__ import annotations

import os
from dataclasses import dataclass
from itertools import chain, islice
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Final, NamedTuple, final

import numpy as np

from noether.effects.disk.json_numbers import NUMBERS
from noether.reports.reading.log_lines import LogLines
from noether.reports.reading.metric_series import Metrics, Points

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from noether.reports.reading.metric_series import Point

_DTYPES: Final = {"epoch": np.int64, "update": np.int64, "sample": np.int64, "time_s": np.float64, "event": np.str_}
_POINT_OF: Final = itemgetter(*_DTYPES)
_END_BYTES: Final = 1 << 16
_ARTIFACTS: Final = "artifacts"
_FLOATS: Final = frozenset({float})
_WHOLE: Final = frozenset({int, bool})
_NUMBERS: Final = frozenset({int, bool, float, str})


@final
@dataclass(frozen=True, kw_only=True)
class MetricsLog:
    """The content of `metrics.jsonl`.

    Args:
        metrics: The metrics.
        artifacts: Index of the line, key and entry of each artifact.
    """

    metrics: Metrics
    artifacts: Sequence[tuple[int, str, Mapping[str, Any]]]


def parse_metrics(
    lines: LogLines, blocks: Iterable[list[Any]] | None = None, columns: Columns | None = None
) -> MetricsLog:
    r"""Return the metrics in a log file; a line that is damaged is left out and recorded in `lines`.

    Args:
        lines: The file.
        blocks: Some of its blocks; None for all.
        columns: The lines that were read before, to which these are added; None for none.

    Example:
        >>> import tempfile, pathlib
        >>> from noether.reports.reading.log_lines import LogLines
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "metrics.jsonl"
        >>> point = '"event": "after_update", "epoch": 0, "update": 3, "sample": 6, "time_s": 0.5'
        >>> _ = path.write_text('{' + point + ', "metrics": {"a": "NaN"}}\n')
        >>> metrics = parse_metrics(LogLines(path=path)).metrics
        >>> metrics["a"].values, metrics["a"].points.update
        (array([nan]), array([3]))
    """
    columns = Columns() if columns is None else columns
    for block in lines.blocks() if blocks is None else blocks:
        try:
            columns.add(block)
        except _DAMAGE:
            for number, line in enumerate(block, lines.count + 1):
                try:
                    columns.add([line])
                except _DAMAGE as error:
                    if number not in lines.damaged:
                        lines.add_damage(number, f"it is no line of metrics: {type(error).__name__}: {error}")
    return columns.finish()


_DAMAGE: Final = (KeyError, TypeError, ValueError, AttributeError, OverflowError)


def read_first_point(path: Path) -> Point | None:
    """Return the point of the first intact line in the first block of a log; None if that block has none."""
    lines = LogLines(path=path)
    points = parse_metrics(lines, islice(lines.blocks(), 1)).metrics.points
    return points[0] if len(points) else None


def read_last_point(path: Path) -> Point | None:
    """Return the point of the last intact line of a log; None if the log has none."""
    lines = LogLines(path=path)
    if path.exists():
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _END_BYTES))
            if file.tell():
                file.readline()  # the rest of a line
            points = parse_metrics(lines, lines.blocks_of(file)).metrics.points
        if len(points) or size <= _END_BYTES:
            return points[-1] if len(points) else None
        points = parse_metrics(LogLines(path=path)).metrics.points  # a very long last line
        return points[-1] if len(points) else None
    return None


class _Part(NamedTuple):
    """Values of one metric on some lines."""

    lines: NDArray[np.int64]
    values: NDArray[Any]


class _Table(NamedTuple):
    """Values of metrics that were logged together on some lines of a block."""

    lines: NDArray[np.int64]
    columns: NDArray[np.float64] | list[NDArray[Any]]  # one array of shape (metrics, lines) if all values are fractions


class Columns:
    """Collects blocks of lines as arrays, also after `finish`."""

    def __init__(self) -> None:
        self._points: list[Points] = []
        self._parts: dict[str, list[_Part]] = {}
        self._tables: dict[tuple[str, ...], list[_Table]] = {}
        self._artifacts: list[tuple[int, str, Mapping[str, Any]]] = []
        self._count = 0

    def add(self, block: list[Any]) -> None:
        """Add all lines of a block, or none if one is damaged."""
        if not block:
            return
        fields = zip(*map(_POINT_OF, block), strict=True)
        points: dict[str, Any] = {
            name: np.array(each, dtype) for each, (name, dtype) in zip(fields, _DTYPES.items(), strict=True)
        }
        tables = {
            keys: _make_table(np.array(indices) + self._count, metrics)
            for keys, (indices, metrics) in _group_by_keys([line["metrics"] for line in block]).items()
        }
        artifacts = [
            (self._count + index, key, dict(entry))
            for index, line in enumerate(block)
            if _ARTIFACTS in line
            for key, entry in line[_ARTIFACTS].items()
        ]
        self._points.append(Points(**points))
        self._artifacts += artifacts
        for keys, table in tables.items():
            self._tables.setdefault(keys, []).append(table)
            for key in keys:
                self._parts.setdefault(key, [])  # in the order in which they were first logged
        self._count += len(block)

    def finish(self) -> MetricsLog:
        """Return all that was added."""
        points = Points(
            **{
                name: np.concatenate([np.zeros(0, dtype), *(getattr(each, name) for each in self._points)])
                for name, dtype in _DTYPES.items()
            }
        )
        for keys, tables in self._tables.items():
            lines = np.concatenate([table.lines for table in tables])
            for key, values in zip(keys, _join_columns(tables, len(keys)), strict=True):
                self._parts[key].append(_Part(lines, values))
        joined: dict[tuple[int, ...], NDArray[np.int64]] = {}  # keys that were logged together share their lines
        columns = {}
        for key, parts in self._parts.items():
            identity = tuple(id(part.lines) for part in parts)
            if identity not in joined:
                joined[identity] = parts[0].lines if len(parts) == 1 else np.concatenate([part.lines for part in parts])
            lines = joined[identity]
            values = parts[0].values if len(parts) == 1 else np.concatenate([part.values for part in parts])
            if np.any(lines[1:] < lines[:-1]):  # other keys were logged with it on some lines
                order = np.argsort(lines)
                lines, values = lines[order], values[order]
            columns[key] = (lines, values)
        self._points = [points]
        self._parts = {key: [_Part(*each)] for key, each in columns.items()}
        self._tables = {}
        return MetricsLog(metrics=Metrics(points, columns), artifacts=tuple(self._artifacts))


def _group_by_keys(metrics: list[dict[str, Any]]) -> dict[tuple[str, ...], tuple[Sequence[int], list[dict[str, Any]]]]:
    """Return indices and metrics of lines, grouped by their keys."""
    first = tuple(metrics[0])
    # All lines have the same keys, as usual; comparing two lists needs no object for each line.
    if {len(first)}.issuperset(map(len, metrics)) and [*chain.from_iterable(metrics)] == [*first] * len(metrics):
        return {first: (range(len(metrics)), metrics)}
    groups: dict[tuple[str, ...], tuple[list[int], list[dict[str, Any]]]] = {}
    for index, each in enumerate(metrics):
        indices, members = groups.setdefault(tuple(each), ([], []))
        indices.append(index)
        members.append(each)
    return {**groups}


def _make_table(lines: NDArray[np.int64], metrics: list[dict[str, Any]]) -> _Table:
    values = list(chain.from_iterable(map(dict.values, metrics)))
    if _FLOATS.issuperset(map(type, values)):
        return _Table(lines, np.array(values, np.float64).reshape(len(lines), -1).T)
    return _Table(lines, list(map(_to_array, zip(*map(dict.values, metrics), strict=True))))


def _join_columns(tables: Sequence[_Table], count: int) -> Sequence[NDArray[Any]]:
    """Return the values of each of `count` metrics, joined over the blocks of a log."""
    columns = [table.columns for table in tables]
    if any(isinstance(each, list) for each in columns):
        return [np.concatenate(parts) for parts in zip(*columns, strict=True)]
    joined = np.empty((count, sum(len(table.lines) for table in tables)))  # quicker than one list of parts per metric
    return list(np.concatenate(columns, axis=1, out=joined))


def _to_array(values: Sequence[Any]) -> NDArray[Any]:
    """Return numbers as an array; names such as `NaN` become the numbers that they stand for."""
    types = set(map(type, values))
    if not types <= _NUMBERS:
        raise TypeError(f"a metric is a {next(iter(types - _NUMBERS)).__name__} and not a number")
    if types <= _WHOLE:
        try:
            return np.array(values, np.int64)
        except OverflowError:
            return np.array(values, np.float64)
    if str in types:
        values = [NUMBERS[value] if type(value) is str else value for value in values]
    return np.array(values, np.float64)
