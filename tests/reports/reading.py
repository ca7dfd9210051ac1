"""Helpers of tests that read logs back."""

import tempfile
from pathlib import Path

import numpy as np
from hypothesis import strategies as st

from noether import AfterUpdate, LogScalars, TrainState
from noether.effects.logs.metrics import metrics_file
from noether.reports.reading.log_lines import LogLines
from noether.reports.reading.metrics_log import parse_metrics


def write_lines(path, lines):
    """Write a line of metrics for each mapping; the update counts the lines, with three samples each."""
    file, state = metrics_file(path), TrainState()
    for line in lines:
        state = state.advance(samples=3)
        file.write(LogScalars(line), state, AfterUpdate(time_s=0.25))
    file.close()


def read_lines(lines, block_bytes=1 << 17):
    """Return the metrics after writing them and reading them in blocks."""
    with tempfile.TemporaryDirectory() as folder:
        write_lines(Path(folder) / "metrics.jsonl", lines)
        return parse_metrics(LogLines(path=Path(folder) / "metrics.jsonl", block_bytes=block_bytes)).metrics


NUMBERS = st.floats() | st.integers(-(2**70), 2**70) | st.booleans()


def expected_column(values):
    """Return the array of values that the docstring of `Series` describes."""
    if all(type(value) in {int, bool} and -(2**63) <= value < 2**63 for value in values):
        return np.array([int(value) for value in values], np.int64)
    return np.array([float(value) for value in values], np.float64)


def quiet(values):
    """Return values in which every NaN has the same bits, because a log has neither its sign nor its payload."""
    return np.where(np.isnan(values), np.nan, values) if values.dtype == np.float64 else values
