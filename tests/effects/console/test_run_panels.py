"""Panels fit the terminal, show every fact, and break only words that are longer than a line."""

import io
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console as RichConsole

from noether.effects.console.console import Console
from noether.effects.console.run_panels import RunPanel, layout_panel, plain_lines
from noether.effects.console.tables import Table, table_lines, wrap_words

WORDS = st.text(st.characters(categories=["L", "N", "P", "S"]), min_size=1, max_size=30)
TEXTS = st.lists(WORDS, min_size=1, max_size=4).map(" ".join)
NAMES = st.text("abc ", min_size=1, max_size=14)
FACTS = st.lists(st.tuples(NAMES, st.lists(TEXTS, min_size=1, max_size=4)), max_size=3)
TABLES = st.builds(
    lambda rows, right: Table(("metric", "last", "best"), rows, right),
    st.lists(st.tuples(WORDS, st.text("0123.", max_size=9), st.text("0123.", max_size=9)), max_size=3),
    st.sets(st.sampled_from(["last", "best"])),
)
PANELS = st.builds(
    lambda title, facts, table: RunPanel(title=title, facts=facts, table=table),
    TEXTS,
    FACTS,
    st.one_of(st.none(), TABLES),
)
WIDTHS = st.integers(4, 120)


def remove_spaces(text):
    return "".join(text.split())


@given(text=TEXTS, width=st.integers(2, 100))
def test_wrapped_lines_fit_and_only_longer_words_are_broken(text, width):
    lines = wrap_words(text, width)
    assert all(cell_len(line) <= width for line in lines)
    assert remove_spaces("".join(lines)) == remove_spaces(text)
    whole = [word for word in text.split() if cell_len(word) <= width]
    remaining = " ".join(lines).split()
    for word in whole:
        assert word in remaining
        remaining.remove(word)


def layout_text(panel, width):
    return ["".join(part for part, _ in line) for line in layout_panel(panel, width)]


@given(panel=PANELS, width=WIDTHS)
def test_no_line_of_a_panel_is_wider_than_the_terminal(panel, width):
    assert all(cell_len(line) <= width for line in layout_text(panel, width))


@given(panel=PANELS, width=WIDTHS)
def test_a_panel_shows_every_fact_and_value(panel, width):
    rows = [] if panel.table is None else panel.table.rows
    values = [text for texts in (*(entries for _, entries in panel.facts), *rows) for text in texts]
    assert Counter(remove_spaces("".join(values))) <= Counter(remove_spaces("".join(layout_text(panel, width))))


@given(panel=PANELS, width=st.integers(12, 120))
def test_a_panel_with_its_border_fits_the_terminal(panel, width):
    console = RichConsole(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    console.print(panel)
    assert all(cell_len(line) <= width for line in console.file.getvalue().splitlines())


@given(panel=PANELS)
def test_without_a_terminal_each_fact_is_one_line(panel):
    lines = plain_lines(panel)
    rows = 0 if panel.table is None or not panel.table.rows else len(panel.table.rows) + 1
    assert len(lines) == len(panel.facts) + rows


PANEL = RunPanel(
    title="run digits",
    facts=[("directory", ["runs/digits/[bold]1"]), ("data", ["train 1 sample", "val\x1b[2J 2 samples"])],
    table=Table(("metric", "last", "best"), [("val/accuracy", "nan", "")]),
    commands=[("show", f"noether show {'runs/' * 30}")],
)


@pytest.mark.parametrize("is_terminal", [True, False])
def test_markup_and_controls_are_shown_as_text_and_words_of_commands_stay_whole(is_terminal):
    file = io.StringIO()
    rich = RichConsole(file=file, width=60, force_terminal=is_terminal, color_system=None, soft_wrap=not is_terminal)
    Console(rich).write_panel(PANEL)
    shown = file.getvalue()
    assert "runs/digits/[bold]1" in shown
    assert r"val\x1b[2J 2 samples" in shown
    begin = "show  noether show \\\n        " if is_terminal else "show       noether show "
    assert f"{begin}{'runs/' * 30}\n" in shown
    assert ("╭─ run digits" in shown) == is_terminal
    assert "best" not in shown  # a column without entries
    assert shown.count("nan") == 1


def test_names_of_columns_are_wrapped_before_rows_become_paragraphs():
    columns = ("run", "status", "started", "duration", "update", "best val/accuracy")
    rows = [("runs/digits/20261129-082202", "finished", "2026-11-29 08:22:02", "1.2 s", "152", "0.969595")]
    lines = [
        "".join(text for text, _ in line) for line in layout_panel(RunPanel(title="", table=Table(columns, rows)), 76)
    ]
    assert [line.split() for line in lines] == [
        ["run", "status", "started", "duration", "update", "best"],
        ["val/"],
        ["accuracy"],
        ["runs/digits/", "finished", "2026-11-29", "08:22:02", "1.2", "s", "152", "0.969595"],
        ["20261129-082202"],
    ]
    assert len({line.index(word) for line, word in zip(lines, ("best", "val/", "accuracy", "0.9"), strict=False)}) == 1


def test_wide_entries_are_wrapped_before_rows_become_paragraphs():
    rows = [("model.kind", "noether.examples.digits.ConvNet", "noether.examples.heat.FourierNet"), ("lr", "0.1", "0.2")]
    lines = table_lines(Table(("setting", "20261129-094458", "20261129-094505"), rows), 64)
    assert [line.split() for line in lines] == [
        ["setting", "20261129-094458", "20261129-094505"],
        ["model.kind", "noether.examples.digits.", "noether.examples.heat."],
        ["ConvNet", "FourierNet"],
        ["lr", "0.1", "0.2"],
    ]
