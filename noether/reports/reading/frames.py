"""Metrics as wide frames of pandas and polars: one row per line of the log, one column per key."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from noether.core.errors import NoetherError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

    import pandas as pd
    import polars as pl
    from numpy.typing import NDArray

    from noether.reports.reading.metric_series import Metrics, Points

_POSITION: Final = ("event", "epoch", "update", "sample", "time_s")


class MissingLibraryError(NoetherError, ImportError):
    """An optional library is not installed; the message says how to install it."""


def to_pandas(metrics: Metrics) -> pd.DataFrame:
    """Return the metrics as a frame of pandas, exact to the last bit.

    Args:
        metrics: The metrics.

    Returns:
        The columns `event`, `epoch`, `update`, `sample` and `time_s`, then one for each key, and a row for each line of
        the log that has metrics. A column that has a value on every row is float64 or int64. Another one is `Float64`
        or `Int64`, where `<NA>` stands for a value that was not logged, and NaN for one that was logged as NaN:
        `frame["loss"].isna()` is true for the first only. A key that is the name of an earlier column has
        `metrics/` before it.

    Raises:
        MissingLibraryError: If pandas is not installed.

    Example:
        >>> import noether, tempfile
        >>> with noether.open_run(tempfile.mkdtemp()) as directory:
        ...     for values in ({"loss": 0.5, "epoch": 1}, {"loss": float("nan")}):
        ...         state = noether.TrainState()
        ...         directory.interpreter([noether.LogScalars(values)], state, noether.AfterUpdate(time_s=0.0))
        E0_U0_S0  ...
        >>> print(to_pandas(noether.read_run(directory.path).metrics).drop(columns=["sample", "time_s"]))
                  event  epoch  update  loss  metrics/epoch
        0  after_update      0       0   0.5              1
        1  after_update      0       0   NaN           <NA>
    """
    pandas = import_optional("pandas", "pip install pandas")
    arrays = {np.dtype(np.float64): pandas.arrays.FloatingArray, np.dtype(np.int64): pandas.arrays.IntegerArray}
    columns = {
        name: values if missing is None else arrays[values.dtype](values, missing)
        for name, values, missing in _columns(metrics)
    }
    frame: pd.DataFrame = pandas.DataFrame(columns)
    return frame


def to_polars(metrics: Metrics) -> pl.DataFrame:
    """Return the metrics as a frame of polars, exact to the last bit.

    Args:
        metrics: The metrics.

    Returns:
        The rows and columns of `to_pandas`, of Float64 and Int64. A value that was not logged is null; NaN was logged.

    Raises:
        MissingLibraryError: If polars is not installed.

    Example:
        >>> import noether, tempfile
        >>> with noether.open_run(tempfile.mkdtemp()) as directory:
        ...     for values in ({"loss": 0.5, "step": 1}, {"loss": float("nan")}):
        ...         state = noether.TrainState()
        ...         directory.interpreter([noether.LogScalars(values)], state, noether.AfterUpdate(time_s=0.0))
        E0_U0_S0  ...
        >>> to_polars(noether.read_run(directory.path).metrics).select("loss", "step").rows()
        [(0.5, 1), (nan, None)]
    """
    polars = import_optional("polars", "pip install polars")
    columns = []
    for name, values, missing in _columns(metrics):
        series = polars.Series(name, values)
        columns.append(series if missing is None else series.set(polars.Series(missing), None))
    frame: pl.DataFrame = polars.DataFrame(columns)
    return frame


def _columns(metrics: Metrics) -> Iterator[tuple[str, NDArray[Any], NDArray[np.bool_] | None]]:
    """Yield the name and the values of each column, and a mask of missing values; None if no value is missing."""
    logged = np.zeros(len(metrics.points), bool)
    for series in metrics.values():
        logged[series.lines] = True
    rows = np.cumsum(logged) - 1
    points: Points = metrics.points.take(np.flatnonzero(logged))
    for name in _POSITION:
        yield name, getattr(points, name), None
    names = set(_POSITION)
    for key, series in metrics.items():
        name = key
        while name in names:
            name = f"metrics/{name}"
        names.add(name)
        found = series.values  # noqa: PD011  # an array of numpy
        if len(series) == len(points):
            yield name, found, None
            continue
        values, missing = np.zeros(len(points), found.dtype), np.ones(len(points), bool)
        values[rows[series.lines]], missing[rows[series.lines]] = found, False
        yield name, values, missing


def import_optional(name: str, fix: str) -> ModuleType:
    """Return a library that is not required.

    Args:
        name: Its module.
        fix: The command that installs it.

    Raises:
        MissingLibraryError: If it is not installed; the message has the command.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingLibraryError(f"{name} is not installed: {fix}") from error
