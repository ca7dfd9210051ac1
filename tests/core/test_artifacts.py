"""Artifacts are checked where they are made, and histograms count every value once."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from noether import LogFigure, LogFile, LogHistogram, LogImages, LogTable, TrainState, compose, on
from noether.core.errors import SettingsError
from noether.core.event import AfterTraining
from noether.core.overwrites import OverwriteError
from noether.core.tensors import histograms
from noether.core.tensors.histograms import count_values

REFUSED = {
    "key": (lambda: LogTable("", ["a"], []), "key: '' is not a name: write a text"),
    "figure": (lambda: LogFigure("f", 3), "figure: int is not a figure: give a Figure of matplotlib"),
    "pixels": (lambda: LogFigure("f", np.ones((2, 2))), "return LogImages for an array of pixels"),
    "jpeg": (lambda: LogFigure("f", b"\xff\xd8\xff\xe0"), "are not a PNG or SVG file"),
    "one image": (lambda: LogImages("i", torch.ones(8, 8)), "of one image write image[None]"),
    "channels last": (lambda: LogImages("i", torch.ones(2, 8, 8, 3)), "write images.permute(0, 3, 1, 2)"),
    "integers": (lambda: LogImages("i", torch.ones(2, 8, 8).long()), "dtype int64 is neither uint8 nor floating"),
    "no image": (lambda: LogImages("i", torch.ones(0, 8, 8)), "images: shape (0, 8, 8) is neither"),
    "list of images": (lambda: LogImages("i", [[[1.0]]]), "images: list is not a tensor"),
    "captions": (lambda: LogImages("i", torch.ones(2, 8, 8), ["a"]), "captions: there are 1 for 2 images"),
    "one caption": (lambda: LogImages("i", torch.ones(2, 8, 8), "ab"), "captions: 'ab' is not a sequence of texts"),
    "nothing": (lambda: LogHistogram("h"), "values: give either values, or counts and edges"),
    "both": (lambda: LogHistogram("h", [1], [1], [0, 1]), "values: give either values, or counts and edges"),
    "counts alone": (lambda: LogHistogram("h", counts=[1]), "values: give either values, or counts and edges"),
    "edges": (lambda: LogHistogram("h", counts=[1, 2], edges=[0, 1]), "edges: there are 2 for 2 counts"),
    "complex": (lambda: LogHistogram("h", torch.ones(2, dtype=torch.cfloat)), "dtype complex64 is not one of real"),
    "texts": (lambda: LogHistogram("h", ["a"]), "is not one of real numbers"),
    "bins": (lambda: LogHistogram("h", [1], bins=0), "bins: 0 is not a number of bins"),
    "column twice": (lambda: LogTable("t", ["a", "a"], []), "columns: ['a', 'a'] are not names of columns"),
    "columns": (lambda: LogTable("t", "ab", []), "columns: 'ab' are not names of columns"),
    "short row": (lambda: LogTable("t", ["a", "b"], [[1, 2], [1]]), "rows[1]: it has 1 values for 2 columns"),
    "no row": (lambda: LogTable("t", ["a"], ["x"]), "rows[0]: 'x' is not a row"),
    "cell": (lambda: LogTable("t", ["a"], [[[1]]]), "rows[0]: column 'a' holds a list: write a text"),
    "content": (lambda: LogFile("f", 3), "content: int is neither bytes nor a path"),
    "name": (lambda: LogFile("f", b"x"), "name: '' is not the name of a file"),
    "folder": (lambda: LogFile("f", b"x", "../a"), "name: '../a' is not the name of a file"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_artifact_that_cannot_be_written_is_refused_at_construction(name):
    make, message = REFUSED[name]
    with pytest.raises(SettingsError, match=re.escape(message)):
        make()


def test_two_callbacks_that_write_one_artifact_are_refused():
    write = on(AfterTraining)(lambda state, event: (state, (LogTable("worst", ["a"], [[1]]),)))
    also = on(AfterTraining)(lambda state, event: (state, (LogHistogram("worst", [1.0]),)))
    with pytest.raises(OverwriteError, match="both write the artifact 'worst' at one AfterTraining"):
        compose(write, also)(TrainState(), AfterTraining())


FLOATS = st.floats(width=32)


@given(st.lists(FLOATS, max_size=40), st.integers(1, 9), st.integers(1, 5))
def test_each_value_is_counted_once_whatever_the_size_of_chunks(numbers, bins, chunk):
    values = torch.tensor(numbers, dtype=torch.float32)
    found = count_values(values, bins)
    finite = values[values.isfinite()].double()
    assert (found.nan, found.infinite) == (int(values.isnan().sum()), int(values.isinf().sum()))
    assert int(found.counts.sum()) == len(finite)
    assert found.counts.shape == (bins,)
    assert found.edges.shape == (bins + 1,)
    for number in range(bins):  # a bin has its lower edge; the last has both
        low, high = found.edges[number], found.edges[number + 1]
        inside = (finite >= low if number else finite >= -torch.inf) & (finite < high if number < bins - 1 else True)
        assert found.counts[number] == inside.sum()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(histograms, "_CHUNK", chunk)
        again = count_values(values, bins)
    assert all(torch.equal(one, other) for one, other in zip(found[:2], again[:2], strict=True))
    assert found[2:] == again[2:]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.float64])
def test_all_real_dtypes_are_counted(dtype):
    assert count_values(torch.tensor([0, 1, 1, 1]).to(dtype), 2).counts.tolist() == [1, 3]


def test_a_constant_is_in_the_middle_and_the_largest_numbers_do_not_overflow():
    assert count_values(torch.full((5,), 3.0), 4).counts.tolist() == [0, 0, 5, 0]
    assert count_values(torch.full((5,), 1e30), 3).counts.tolist() == [0, 5, 0]
    edges = count_values(torch.tensor([-1.7e308, 1.7e308], dtype=torch.float64), 2).edges
    assert edges.tolist() == [-1.7e308, 0.0, 1.7e308]
