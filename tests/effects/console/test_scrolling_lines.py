"""One line of metrics above the live display: it fits the terminal, is aligned, and has the most important metrics."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from noether import TrainingIteration
from noether.effects.console.live.live_region import TerminalStyle
from noether.effects.console.live.live_view import RunView
from noether.effects.console.scrolling_lines import ChangedMetrics, wrap_texts

KEYS = st.text(st.characters(categories=["L", "N", "P"]), min_size=1, max_size=80)
METRICS = st.dictionaries(KEYS, st.floats(), min_size=1, max_size=20)
WIDTHS = st.integers(40, 200)


def make_changed_metrics(*, has_unicode=True):
    view = RunView()
    return view, ChangedMetrics(view, TerminalStyle(has_colors=False, has_unicode=has_unicode))


@given(METRICS, WIDTHS)
def test_a_line_fits_and_counts_the_metrics_that_it_leaves_out(metrics, width):
    _, changed = make_changed_metrics()
    line = changed.describe(metrics, width)
    left = int(line.rpartition("+")[2].removesuffix(" more")) if line.endswith(" more") else 0
    shown = sum(not key.endswith(("/best", "/best_update")) for key in metrics)
    assert cell_len(line) <= width
    assert left < max(shown, 1)


def test_lines_of_the_same_metrics_are_aligned():
    view, changed = make_changed_metrics()
    lines = []
    for update, value in enumerate([0.5, 0.0069584, math.nan, -12345.678, 1e-5]):
        metrics = {"loss/a": value, "loss/b": value}
        view.log(metrics, TrainingIteration(update=update))
        lines.append(changed.describe(metrics, 100))
    assert len({line.index("loss/b") for line in lines}) == 1
    assert lines[1] == "loss/a 0.0069584 ★  loss/b 0.0069584 ★"


@pytest.mark.parametrize(("has_unicode", "ellipsis"), [(True, "…"), (False, "~")])
def test_a_long_name_is_shortened_and_its_value_is_not(has_unicode, ellipsis):
    _, changed = make_changed_metrics(has_unicode=has_unicode)
    line = changed.describe({"extra/" * 12 + "metric": 0.25}, 60)
    assert line.endswith(" 0.25")
    assert ellipsis in line


def test_unchanged_metrics_are_left_out():
    _, changed = make_changed_metrics()
    assert changed.describe({"optim/lr": 0.1, "size": 1}, 80) == "optim/lr 0.1          size 1"
    assert changed.describe({"optim/lr": 0.1, "size": 2}, 80) == "size 2"
    assert not changed.describe({"optim/lr": 0.1}, 80)


@given(st.text("ab \n", max_size=200), st.integers(2, 100), st.integers(0, 30))
def test_wrapped_texts_keep_their_words(text, width, indent):
    assert wrap_texts(text, width, indent).split() == text.split()
