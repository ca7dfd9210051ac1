"""The metrics of a run as arrays: one series per key, read from `metrics.jsonl` exactly to the last bit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, final

import numpy as np
import orjson

from noether.core.errors import suggest
from noether.effects.disk.encoding import NUMBERS

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

_BLOCK_LINES: Final = 1 << 16  # bounds the memory of Python numbers, which take four times that of an array


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class Points:
    """Where the values of a series were logged; arrays of one length, in the order of the log.

    Args:
        epoch: Completed epochs, int64.
        update: Completed updates, int64.
        sample: Completed samples, int64.
        time_s: Wall-clock time in seconds since 1970, float64.
        event: Name of the event, such as `after_update`.
    """

    epoch: NDArray[np.int64]
    update: NDArray[np.int64]
    sample: NDArray[np.int64]
    time_s: NDArray[np.float64]
    event: NDArray[np.str_]

    def __len__(self) -> int:
        return len(self.update)

    def take(self, lines: NDArray[np.int64]) -> Points:
        """Return the points of some lines."""
        return Points(
            epoch=self.epoch[lines],
            update=self.update[lines],
            sample=self.sample[lines],
            time_s=self.time_s[lines],
            event=self.event[lines],
        )


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class Series:
    """All values of one metric.

    Args:
        key: The metric key.
        values: Its values, float64; int64 if all are whole numbers. NaN and infinities are as they were logged.
        lines: Index of the line of each value among all lines of the log, int64.
        points: Where each value was logged.
    """

    key: str
    values: NDArray[Any]
    lines: NDArray[np.int64]
    points: Points

    def __len__(self) -> int:
        return len(self.values)

    @property
    def last(self) -> float | int:
        """The last value."""
        value: float | int = self.values[-1].item()
        return value


@final
class Metrics(Mapping[str, Series]):
    """The metrics of a run by key, in the order in which they were first logged.

    Args:
        points: All lines of the log.
        columns: Line numbers and values by key.
    """

    def __init__(self, points: Points, columns: Mapping[str, tuple[NDArray[np.int64], NDArray[Any]]]) -> None:
        self.points = points
        self._columns = columns

    def __getitem__(self, key: str) -> Series:
        if key not in self._columns:
            raise KeyError(f"the run logged no metric {key!r}{suggest(key, self._columns)}")
        lines, values = self._columns[key]
        return Series(key=key, values=values, lines=lines, points=self.points.take(lines))

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __len__(self) -> int:
        return len(self._columns)


def read_metrics(lines: Iterable[bytes]) -> Metrics:
    """Return the metrics in lines of `metrics.jsonl`.

    Args:
        lines: The lines, each a whole JSON object.

    Raises:
        ValueError: If a line is not JSON.

    Example:
        >>> point = b'"event": "after_update", "epoch": 0, "update": 3, "sample": 6, "time_s": 0.5'
        >>> metrics = read_metrics([b'{' + point + b', "metrics": {"a": "NaN"}}'])
        >>> metrics["a"].values, metrics["a"].points.update
        (array([nan]), array([3]))
    """
    blocks = _Blocks()
    for line in lines:
        blocks.add(orjson.loads(line))
    return blocks.finish()


class _Blocks:
    """Collects lines; consecutive lines with the same keys are converted together."""

    def __init__(self) -> None:
        self._points: list[tuple[Points, int]] = []
        self._positions: list[tuple[int, int, int, float, str]] = []
        self._parts: dict[str, list[tuple[NDArray[np.int64], NDArray[Any]]]] = {}
        self._keys: tuple[str, ...] = ()
        self._rows: list[Any] = []
        self._first = 0
        self._count = 0

    def add(self, line: Mapping[str, Any]) -> None:
        metrics = line["metrics"]
        keys = tuple(metrics)
        if keys != self._keys or len(self._rows) >= _BLOCK_LINES:
            self._close_rows()
            self._keys, self._first = keys, self._count
        self._rows.append(metrics.values())
        self._positions.append((line["epoch"], line["update"], line["sample"], line["time_s"], line["event"]))
        self._count += 1
        if len(self._positions) >= _BLOCK_LINES:
            self._close_positions()

    def finish(self) -> Metrics:
        self._close_rows()
        self._close_positions()
        points = [each for each, _ in self._points]
        joined = Points(
            **{
                name: np.concatenate([getattr(each, name) for each in points]) if points else np.zeros(0, dtype)
                for name, dtype in _DTYPES.items()
            }
        )
        columns = {
            key: (np.concatenate([lines for lines, _ in parts]), _join([values for _, values in parts]))
            for key, parts in self._parts.items()
        }
        return Metrics(joined, columns)

    def _close_rows(self) -> None:
        if self._rows and self._keys:
            lines = np.arange(self._first, self._first + len(self._rows))
            for key, values in zip(self._keys, zip(*self._rows, strict=True), strict=True):
                self._parts.setdefault(key, []).append((lines, _to_array(values)))
        self._rows = []

    def _close_positions(self) -> None:
        if self._positions:
            columns = zip(*self._positions, strict=True)
            fields: dict[str, Any] = {
                name: np.array(column, dtype) for (name, dtype), column in zip(_DTYPES.items(), columns, strict=True)
            }
            self._points.append((Points(**fields), len(self._positions)))
        self._positions = []


_DTYPES: Final = {"epoch": np.int64, "update": np.int64, "sample": np.int64, "time_s": np.float64, "event": np.str_}


def _to_array(values: Sequence[Any]) -> NDArray[Any]:
    """Return numbers as an array; names such as `NaN` become the numbers that they stand for."""
    if any(type(value) is str for value in values):
        values = [NUMBERS[value] if type(value) is str else value for value in values]
    array = np.array(values)
    return array if array.dtype in (np.int64, np.float64) else array.astype(np.float64)


def _join(parts: Sequence[NDArray[Any]]) -> NDArray[Any]:
    return np.concatenate(parts)  # whole numbers become floats if one part has fractions
