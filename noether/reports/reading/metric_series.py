"""The metrics of a run as arrays: one series per key, exact to the last bit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, final

import numpy as np

from noether.core.errors import check_choice, raise_problems, suggest
from noether.core.iteration import TrainingIteration
from noether.core.metric_keys import MODES, direction_of

if TYPE_CHECKING:
    import pandas as pd
    import polars as pl
    from numpy.typing import NDArray

    from noether.core.metric_keys import Mode


class Point(NamedTuple):
    """Where a run logged something; the fields are those of `Points`."""

    epoch: int
    update: int
    sample: int
    time_s: float
    event: str

    @property
    def iteration(self) -> TrainingIteration:
        """The counters, whose text is the tag of a checkpoint saved there."""
        return TrainingIteration(self.epoch, self.update, self.sample)


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

    def __getitem__(self, index: int) -> Point:
        return Point(**{name: array[index].item() for name, array in vars(self).items()})

    def take(self, lines: NDArray[np.int64]) -> Points:
        """Return the points of some lines, given in ascending order."""
        if len(lines) == len(self):
            return self
        return Points(**{name: array[lines] for name, array in vars(self).items()})


def is_derived(key: str) -> bool:
    """Return whether a callback makes the metric of another one, such as `val/accuracy/best` of `val/accuracy`.

    Example:
        >>> [is_derived(key) for key in ("val/accuracy", "val/accuracy/best_update", "loss/val/at_best/val/accuracy")]
        [False, True, True]
    """
    return key.endswith(("/best", "/best_update")) or "/at_best/" in key


class Best(NamedTuple):
    """The best value of a series.

    Args:
        value: The value.
        point: Where it was logged first.
    """

    value: float
    point: Point


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class Series:
    """All values of one metric.

    Args:
        key: The metric key.
        values: Its values, float64; int64 if all are whole numbers or booleans. NaN and infinities are as they were
            logged. Whole numbers that the array cannot hold, those beyond 64 bits or beyond 2**53 among fractions, are
            rounded to the nearest float64.
        lines: Index of the line of each value among the lines of the log, int64.
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

    def best(self, mode: Mode | None = None) -> Best | None:
        """Return the best value and where it was logged first, by the rules of `BestMetricCallback`.

        Args:
            mode: Whether `higher` or `lower` is better; None derives it from the words of the key.

        Returns:
            The best finite value; None if there is none, or if the key implies no direction.

        Raises:
            SettingsError: If `mode` is another text.

        Example:
            >>> import numpy as np
            >>> counts, times = np.arange(3), np.zeros(3)
            >>> events = np.full(3, "after_epoch")
            >>> points = Points(epoch=counts, update=counts, sample=counts, time_s=times, event=events)
            >>> series = Series(key="loss", values=np.array([0.5, 0.25, np.nan]), lines=counts, points=points)
            >>> series.best().value, series.best().point.update
            (0.25, 1)
        """
        if mode is not None:
            raise_problems(filter(None, [check_choice("mode", mode, MODES)]))
        mode = mode or direction_of(self.key)
        is_finite = np.isfinite(self.values)
        if mode is None or not is_finite.any():
            return None
        worst = -np.inf if mode == "higher" else np.inf
        values = self.values if is_finite.all() else np.where(is_finite, self.values, worst)
        index = int(values.argmax() if mode == "higher" else values.argmin())
        return Best(self.values[index].item(), self.points[index])


@final
class Metrics(Mapping[str, Series]):
    """The metrics of a run by key, in the order in which they were first logged.

    Args:
        points: All lines of the log.
        columns: Line indices and values by key.
    """

    def __init__(self, points: Points, columns: Mapping[str, tuple[NDArray[np.int64], NDArray[Any]]]) -> None:
        self.points = points
        self._columns = columns

    def __getitem__(self, key: str) -> Series:
        if key not in self._columns:
            raise KeyError(f"the run logged no metric {key!r}{suggest(key, self._columns)}")
        lines, values = self._columns[key]
        return Series(key=key, values=values, lines=lines, points=self.points.take(lines))

    def __contains__(self, key: object) -> bool:
        return key in self._columns

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __len__(self) -> int:
        return len(self._columns)

    def to_pandas(self) -> pd.DataFrame:
        """Return a wide frame of pandas: see `noether.reports.reading.frames.to_pandas`."""
        from noether.reports.reading.frames import to_pandas

        return to_pandas(self)

    def to_polars(self) -> pl.DataFrame:
        """Return a wide frame of polars: see `noether.reports.reading.frames.to_polars`."""
        from noether.reports.reading.frames import to_polars

        return to_polars(self)
