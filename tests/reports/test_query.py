"""`noether query`: exact values, readable errors, and nothing written."""

import csv
import io
import json
import math
import os

import pytest
from click.testing import CliRunner
from hypothesis import example, given, settings
from hypothesis import strategies as st
from reading import NUMBERS, write_lines

from noether import AfterUpdate, SaveCheckpoint, TrainState, open_run
from noether.cli.main import main
from noether.reports.query import VIEWS, query_runs
from noether.reports.reading.metrics_tail import MetricsTail
from noether.reports.reading.run_record import RunRecord, read_run

pytest.importorskip("duckdb")


def run_query(*arguments):
    result = CliRunner().invoke(main, ["query", *map(str, arguments)])
    return result.exit_code, result.stdout, result.stderr


def record_of(path, lines):
    path.mkdir(parents=True, exist_ok=True)
    (path / "summary.json").write_text("{}")
    write_lines(path / "metrics.jsonl", lines)
    return read_run(path)


LINES = st.lists(st.dictionaries(st.sampled_from(["a", 'it\'s "é"', "'; drop"]), NUMBERS), max_size=6)


@settings(max_examples=8)  # a connection of duckdb takes a third of a second
@given(st.lists(LINES, min_size=2, max_size=6))
@example([[{"a": -0.0}, {"a": math.nan}], [{"a": -math.inf}, {"a": 5e-324}, {"a": 1}]])
def test_values_have_the_bits_that_were_logged(tmp_path_factory, logs):
    folder = tmp_path_factory.mktemp("runs")
    records = {f"run {index}": record_of(folder / str(index), lines) for index, lines in enumerate(logs)}
    result = query_runs(records, "select run, key, update, sample, value from metrics")
    expected = [
        (run, key, update, 3 * update, float(value))
        for run, lines in zip(records, logs, strict=True)
        for update, line in enumerate(lines, 1)
        for key, value in line.items()
    ]
    assert sorted(map(repr, result.rows)) == sorted(map(repr, expected))


def test_a_key_with_quotes_is_found(tmp_path):
    record = record_of(tmp_path / "run", [{'it\'s "é"': 1.5, "its": 2.5}])
    rows = query_runs({"run": record}, "select value from metrics where key = 'it''s \"é\"'").rows
    assert rows == [(1.5,)]


def test_a_log_is_read_only_for_a_statement_that_names_its_tables(tmp_path, monkeypatch):
    record = record_of(tmp_path / "run", [{"loss": 1.5}])
    monkeypatch.setattr(MetricsTail, "read_all", lambda self: pytest.fail("the log was read"))
    assert query_runs({"mine": record}, "select run, epoch(started) from runs").rows == [("mine", 0.25)]
    assert query_runs({"mine": record}, "select count(*) from checkpoints").rows == [(0,)]
    monkeypatch.undo()
    for statement in ("select value from METRICS", "from query('select value from met' || 'rics')"):
        assert query_runs({"mine": record}, statement).rows == [(1.5,)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with two runs of a name, one of them without metrics, and one in another folder."""
    folder = tmp_path_factory.mktemp("runs")
    record_of(folder / "a/1", [{"loss": 0.5, "lr": 1e-3}, {"loss": math.nan}])
    (folder / "a/1/config.yaml").write_text("run: {name: digits, tags: [x, 2]}\ndata: null\n")
    record_of(folder / "a/2", [])
    with open_run(folder / "b/1") as directory:
        state = TrainState().replace(iteration=TrainState().iteration).advance(samples=8)
        directory.interpreter([SaveCheckpoint(pointers=("latest",))], state, AfterUpdate(time_s=0.0))
    return folder


def test_tables_of_a_folder_of_runs(runs):
    code, output, _ = run_query(runs, "select run, name, status from runs order by run", "--csv")
    assert code == 0
    assert output.splitlines() == ["run,name,status", "a/1,digits,unknown", "a/2,2,unknown", "b/1,1,unknown"]
    _, output, _ = run_query(runs / "a/1", "select * from config order by key", "--json")
    assert [tuple(row.values()) for row in json.loads(output)] == [
        ("1", "data", None),
        ("1", "run.name", "digits"),
        ("1", "run.tags.0", "x"),
        ("1", "run.tags.1", "2"),
    ]
    _, output, _ = run_query(runs, "select run, tag, update, sample, pointers from checkpoints", "--csv")
    assert output.splitlines()[1:] == ["b/1,E0_U1_S8,1,8,latest"]


def test_several_folders_with_runs_of_one_name(runs):
    _, output, _ = run_query(runs / "a", runs / "b", "select run from runs", "--csv")
    assert output.splitlines()[1:] == [str(runs / "a/1"), "2", str(runs / "b/1")]


def test_forms_of_the_output(runs):
    statement = "select update, value, value from metrics where key = 'loss' order by update"
    _, output, _ = run_query(runs, statement)
    assert output.splitlines() == ["update  value  value_2", "     1    0.5      0.5", "     2    nan      nan"]
    _, output, _ = run_query(runs, statement, "--csv")
    assert list(csv.reader(io.StringIO(output)))[1:] == [["1", "0.5", "0.5"], ["2", "nan", "nan"]]
    _, output, _ = run_query(runs, statement, "--json")
    assert json.loads(output)[1] == {"update": 2, "value": "NaN", "value_2": "NaN"}
    assert run_query(runs, "select run from runs where false") == (0, "run\n", "no rows\n")


@pytest.mark.parametrize(
    ("statement", "text"),
    [
        ("select * from metric", 'Table with name metric does not exist! Did you mean "metrics"'),
        ("select losss from metrics", "losss"),
        ("selec 1", "syntax error"),
        ("", "it is empty; write one that begins with select"),
        (";", "it is empty; write one that begins with select"),
        ("select 1; drop table runs", "there are 2 statements, separated by `;`; write one"),
        ("drop table runs", "DROP is not possible, because tables are only read; begin with select"),
        ("update runs set name = 'a'", "UPDATE is not possible"),
        ("insert into runs select * from runs returning *", "INSERT is not possible"),
    ],
)
def test_a_wrong_statement_gets_one_line_and_the_tables(runs, statement, text):
    code, output, errors = run_query(runs, statement)
    assert (code, output) == (2, "")
    first, *others = errors.splitlines()
    assert first.startswith("Error: the statement: ")
    assert text in first
    assert "LINE" not in errors
    assert [line.split("(")[0].strip() for line in others] == ["the tables are:", *VIEWS]
    assert "metrics(run, event, epoch, update, sample, time_s, key, value)" in errors


@pytest.mark.parametrize(
    "statement",
    [
        "copy metrics to '{path}/out.csv'",
        "explain analyze copy metrics to '{path}/out.csv'",
        "export database '{path}/out'",
        "attach '{path}/out.db'",
        "install httpfs",
        "load httpfs",
        "select * from read_csv('{path}/run/summary.json')",
        "from '{path}/run/summary.json'",
        "set enable_external_access = true",
        "pragma temp_directory = '{path}'",
        "select * from runs_of_python",
    ],
)
def test_a_statement_reads_and_writes_no_file(tmp_path, monkeypatch, statement):
    record_of(tmp_path / "run", [{"loss": 1.0}])
    monkeypatch.chdir(tmp_path)
    before = sorted(os.walk(tmp_path))
    code, _, errors = run_query(tmp_path / "run", statement.format(path=tmp_path))
    assert code == 2
    assert errors.startswith("Error: the statement: ")
    assert sorted(os.walk(tmp_path)) == before


@pytest.mark.parametrize("statement", ["show tables", "SHOW  ALL TABLES ;"])
def test_the_list_of_tables_has_those_of_the_reference_only(runs, statement):
    assert {row["name"] for row in json.loads(run_query(runs, statement, "--json")[1])} == {*VIEWS}


@pytest.mark.parametrize(
    "statement",
    ["from runs;", "values (';')", "select ';' -- ;", "describe metrics", "pivot runs on status", "explain from runs"],
)
def test_one_statement_that_reads_returns_rows(runs, statement):
    assert json.loads(run_query(runs / "a", statement, "--json")[1])


def test_every_listed_column_exists(runs):
    for name, columns in VIEWS.items():
        result = query_runs({"b": RunRecord(runs / "b/1")}, f"from {name} limit 0")
        assert list(result.columns) == [column.split()[0] for column in columns.split(", ")]


def test_a_folder_without_runs_is_named(tmp_path):
    code, _, errors = run_query(tmp_path, "select 1")
    assert (code, errors) == (
        2,
        f"Error: {tmp_path}: has no run in it; give a run such as runs/NAME/RUN_ID, or a folder of runs\n",
    )


def test_a_missing_duckdb_is_named(runs, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "duckdb", None)
    code, _, errors = run_query(runs, "select 1")
    assert (code, errors) == (1, "Error: duckdb is not installed: pip install 'noether[query]'\n")


@pytest.mark.parametrize("form", ["--csv", "--json", "--table"])
@pytest.mark.parametrize("charset", ["ascii", "latin-1"])
def test_a_stream_without_unicode(tmp_path, charset, form):
    record_of(tmp_path / "run", [])
    arguments = ["query", str(tmp_path), "select '\u4e00\U0001f600' as x", *([] if form == "--table" else [form])]
    result = CliRunner(charset=charset).invoke(main, arguments)
    assert result.exit_code == 0, result.output
    text = result.stdout_bytes.decode("ascii")
    if form == "--json":
        assert json.loads(text) == [{"x": "\u4e00\U0001f600"}]
    else:
        assert text.splitlines() == ["x", r"\u4e00\U0001f600"]


def test_a_run_in_several_folders_is_counted_once(tmp_path):
    record_of(tmp_path / "runs/mine/1", [])
    _, output, _ = run_query(tmp_path / "runs", tmp_path / "runs/mine", "select run from runs", "--csv")
    assert output.splitlines() == ["run", "mine/1"]
