"""The HTML of the sections of a report; the charts are tested in a browser."""

import math
from html.parser import HTMLParser

import pytest
from example_runs import HOSTILE, write_evaluation, write_run
from hypothesis import given
from hypothesis import strategies as st

from noether.reports.html.report import render_report
from noether.reports.html.tables import html_table

PHASES = {"total_s": 10.0, "data_s": 1.0, "step_s": 6.0, "evaluation_s": 2.0, "saving_s": 0.5, "updates": 40}
CONFIG = "run: {name: mine}\nmodel: {kind: my.Model}\noptimizer: {lr: 0.1}\n"
SUMMARY = {"status": "finished", "ending": "ended at E2_U4_S16: no progress", "params/trainable": 1234}


class Document(HTMLParser):
    """Elements of a page by name, its ids, and the text of each table row."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.ids, self.rows, self.text, self._open = [], [], [], "", []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.ids += [value for name, value in attributes if name == "id"]
        self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in {"td", "th"}:
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data):
        if not {"script", "style"} & set(self._open):
            self.text += data
        if {"td", "th"} & set(self._open):
            self.rows[-1][-1] += data


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    process = {
        "command": "noether train <b>.yaml",
        "host": "here",
        "git": {"commit": "abc", "diff": "artifacts/a.diff"},
    }
    values = [{"val/accuracy": value, HOSTILE: 1.0} for value in (0.1, 0.5, math.nan, 0.4)]
    summary = {**SUMMARY, "phases": {"E0_U0_S0": PHASES}, "processes": {"E0_U0_S0": process}}
    first = write_run(folder / "first", values, config=CONFIG, summary=summary)
    (folder / "first" / "artifacts").mkdir()
    (folder / "first" / "artifacts" / "a.diff").write_text("+ <i>changed</i>")
    write_evaluation(first, "E1_U2_S8", {"test/accuracy": 0.45})
    failed = {
        "status": "failed",
        "ending": "failed at E2_U4_S16",
        "processes": {"E0_U0_S0": {**process, "host": "there"}},
    }
    second = write_run(folder / "second", values[:1] * 4, config=CONFIG.replace("0.1", "0.2"), summary=failed)
    (folder / "second" / "traceback.txt").write_text("ValueError: <wrong>")
    return [first, second]


@pytest.fixture(scope="module")
def document(runs):
    return Document(render_report(runs))


def test_ids_are_unique_and_tables_have_captions(document):
    assert len(document.ids) == len(set(document.ids))
    assert document.tags.count("table") == document.tags.count("caption") > 4
    assert "img" not in document.tags


def test_names_and_files_of_a_run_are_text(document):
    for text in (HOSTILE, "+ <i>changed</i>", "ValueError: <wrong>", "noether train <b>.yaml"):
        assert text in document.text


def test_the_overview_has_status_and_results_of_each_run(document):
    assert (
        "first is finished: ended at E2_U4_S16: no progress. The best val/accuracy is 0.5, at update 2."
        in document.text
    )
    assert ["val/accuracy", "first", "0.5", "E0_U2_S8", "E1_U2_S8", "0.4"] in document.rows
    assert ["trainable parameters", "1,234", ""] in document.rows
    assert not any(row[0] == "frozen parameters" for row in document.rows), "a fact of no run is left out"


def test_the_section_of_times_has_each_phase(document):
    row = next(row for row in document.rows if row[0] == "first" and "10.0 s" in row)
    assert row[1:7] == [
        "10.0 s",
        *("60.0% (6.0 s)", "10.0% (1.0 s)", "20.0% (2.0 s)", "5.0% (0.50 s)"),
        row[6],
    ]
    assert row[6].startswith("5.0%")
    assert row[7:9] == ["40", "4"]


def test_the_problems_name_values_that_are_not_finite(document):
    assert "val/accuracy: 1 of 4 values are not finite, the first at update 3" in document.text


def test_tables_show_the_differences_between_runs(document):
    assert ["optimizer.lr", "0.1", "0.2"] in document.rows
    assert ["host", "here", "there"] in document.rows
    assert ["git.commit", "abc"] in document.rows


def test_tables_list_checkpoints_and_evaluations(document):
    assert any(row[:3] == ["E2_U4_S16", "first", "latest"] for row in document.rows)
    tags = {row[0]: row[5:] for row in document.rows if row[1:2] == ["first"] and row[0].startswith("E")}
    assert tags["E1_U2_S8"] == ["0.5", "1"]
    assert tags["E2_U4_S16"] == ["0.4", "1"]
    assert ["test/accuracy", "first", "E1_U2_S8", "0.45"] in document.rows


@given(text=st.text(st.sampled_from("<>&'\"/! -[]`$a"), min_size=1, max_size=12).map(lambda text: f"<script>{text}"))
def test_text_of_a_run_adds_no_element(text):
    table = html_table(text, ["", text], [[text, text], [text, 1.5]])
    expected = html_table("x", ["", "x"], [["x", "x"], ["x", 1.5]])
    assert Document(table).tags == Document(expected).tags
    assert Document(table).rows == [["", text], [text, text], [text, "1.5"]]


def test_a_run_without_anything_has_a_report(tmp_path):
    run = write_run(tmp_path / "empty", [], config=None)
    assert "No metric was logged." in Document(render_report([run])).text


def test_control_characters_of_a_run_are_visible_escapes(tmp_path):
    run = write_run(
        tmp_path / "a\x1bb", [{"loss\u202e/\x07": 1.0}], config='run: {name: "mine\\x1b\\u202E"}\n', epochs=1
    )
    page = render_report([run])
    assert not {"\x07", "\x1b", "\u202e"} & set(page)
    assert r"loss\u202e/\x07" in Document(page).text


def test_damaged_lines_of_the_log_are_a_problem(tmp_path):
    run = write_run(tmp_path / "a", [{"loss": 1.0}], epochs=1)
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"cut\n{"metrics": 3}\n')
    text = Document(render_report([run.reread()])).text
    assert "metrics.jsonl has 2 damaged lines, which the curves leave out: line 2: it is not JSON" in text
