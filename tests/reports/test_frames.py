"""Frames of pandas and polars have the bits that were logged, and tell NaN from a value that was not logged."""

import sys

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from reading import NUMBERS, expected_column, quiet, read_lines

from noether.reports.reading.frames import MissingLibraryError, to_pandas, to_polars

pytest.importorskip("pandas")
pytest.importorskip("polars")

LINES = st.lists(st.dictionaries(st.sampled_from(["a", "b", "epoch", "metrics/epoch", "'\"é"]), NUMBERS), max_size=8)
EDGES = [{"a": -0.0, "b": 5e-324}, {"a": float("nan")}, {"b": float("-inf"), "epoch": 2**63 - 1}, {}]


def rows_of(lines):
    """Key and value of each line that has values, with the bits of the column that Series describes."""
    lines = [line for line in lines if line]
    keys = dict.fromkeys(key for line in lines for key in line)
    return lines, {key: expected_column([line[key] for line in lines if key in line]) for key in keys}


def check(lines, names, column):
    """Compare each column, given as values without missing ones, and where values are missing."""
    lines, expected = rows_of(lines)
    for name, (key, values) in zip(names[5:], expected.items(), strict=True):
        found, missing = column(name)
        assert list(missing) == [key not in line for line in lines]
        assert found.dtype == values.dtype
        assert quiet(found).tobytes() == quiet(values).tobytes()
    assert list(names[:5]) == ["event", "epoch", "update", "sample", "time_s"]
    assert len(set(names)) == len(names)


@given(LINES)
@example(EDGES)
def test_pandas_frame_has_the_bits_that_were_logged(lines):
    frame = to_pandas(read_lines(lines))

    def column(name):
        missing = frame[name].isna().to_numpy()
        if frame[name].dtype in (np.float64, np.int64):
            return frame[name].to_numpy(), np.zeros(len(frame), bool)
        kept = frame[name][~missing].array
        return kept.to_numpy(kept.dtype.numpy_dtype), missing

    check(lines, frame.columns, column)
    assert frame["update"].tolist() == [update for update, line in enumerate(lines, 1) if line]


@given(LINES)
@example(EDGES)
def test_polars_frame_has_the_bits_that_were_logged(lines):
    frame = to_polars(read_lines(lines))
    check(lines, frame.columns, lambda name: (frame[name].drop_nulls().to_numpy(), frame[name].is_null()))
    assert frame["update"].to_list() == [update for update, line in enumerate(lines, 1) if line]


def test_a_library_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "polars", None)
    with pytest.raises(MissingLibraryError, match="polars is not installed: pip install polars"):
        to_polars(read_lines([]))
