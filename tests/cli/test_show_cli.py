"""`noether show`: one run, tables of runs, differences, and a run that is followed."""

import json

import pytest
from click.testing import CliRunner

from noether import AfterUpdate, LogScalars, SetSummary, TrainState, open_run
from noether.cli.main import main
from noether.core.tensors.tree import FrozenDict


def show(*arguments, code=0):
    result = CliRunner().invoke(main, ["show", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result.output


def write_run(path, values, summary=None, config=None):
    with open_run(path) as directory:
        state = TrainState()
        for value in values:
            state = state.advance(samples=4)
            directory.interpreter([LogScalars({"val/accuracy": value})], state, AfterUpdate(time_s=0.0))
        entries = {"status": "finished", **(summary or {})}
        directory.interpreter([SetSummary(FrozenDict(entries))], state, AfterUpdate(time_s=0.0))
    (path / "config.yaml").write_text(json.dumps({"run": {"name": path.name}, **(config or {})}))


@pytest.fixture
def folder(tmp_path, capsys):
    for name, values in {"a": [0.5, 0.25], "b": [0.75], "c": [float("nan")]}.items():
        process = {"seed": 0, "packages": {"torch": f"2.{len(values)}"}}
        config = {"optimizer": {"lr": len(values)}, "data": {"train": {"kind": "mine.Data"}}}
        write_run(tmp_path / "runs" / name, values, {"processes": {"E0_U0_S0": process}}, config)
    return tmp_path / "runs"


def order(output, folder):
    return [line.split()[0].removeprefix(f"{folder}/") for line in output.splitlines() if str(folder) in line]


def test_one_run(folder):
    output = show(folder / "a")
    assert output.splitlines()[0] == "a: finished"
    assert output.splitlines()[-1].split() == ["report", "noether", "report", str(folder / "a")]
    assert json.loads(show(folder / "a", "--json"))["metrics"]["val/accuracy"]["best"] == 0.5


@pytest.mark.parametrize(
    ("sort", "expected"),
    [("val/accuracy", "bac"), ("-val/accuracy", "abc"), ("update", "bca"), ("-update", "abc"), ("-run", "cba")],
)
def test_runs_are_sorted(folder, sort, expected):
    assert "".join(order(show(folder, "--sort", sort), folder)) == expected


def test_a_table_has_the_best_of_a_metric(folder):
    rows = json.loads(show(folder / "a", folder / "b", "--metric", "val/accuracy", "--json"))
    assert [row["metrics"]["val/accuracy"] for row in rows] == [0.5, 0.75]


def test_differences(folder):
    output = show(folder, "--diff")
    assert "optimizer.lr" in output
    assert "packages.torch" in output
    assert "data.train.kind" not in output
    found = json.loads(show(folder, "--diff", "--json"))
    assert list(found["optimizer.lr"].values()) == [2, 1, 1]
    assert "give a second one" in show(folder / "a", folder / "a", "--diff", code=2)


def test_equal_runs_do_not_differ(tmp_path):
    for name in ("x/same", "y/same"):
        write_run(tmp_path / name, [0.5])
    assert show(tmp_path, "--diff") == "2 runs do not differ in configuration, code, machine or packages\n"


def test_wrong_input(folder):
    assert "no run has this metric; did you mean 'val/accuracy'" in show(folder, "--metric", "val/acuracy", code=2)
    assert "does not exist" in show(folder / "x", code=2)
    assert "need several runs" in show(folder / "a", "--diff", code=2)
    assert "--follow needs one RUN_DIR" in show(folder, "--follow", code=2)


def test_a_run_is_followed_until_it_ends(tmp_path, monkeypatch):
    directory = open_run(tmp_path / "a")
    status = SetSummary(FrozenDict(status="running"))
    directory.interpreter([status], TrainState(), AfterUpdate(time_s=0.0))
    states = iter([TrainState().advance(samples=4), TrainState().advance(samples=4).advance(samples=4)])

    def log_or_end(_):
        state = next(states, None)
        if state is None:
            directory.close()
        else:
            directory.interpreter([LogScalars({"loss": 0.5})], state, AfterUpdate(time_s=state.iteration.update * 10.0))

    monkeypatch.setattr("noether.cli.commands.show.time.sleep", log_or_end)
    lines = show(tmp_path / "a", "--follow").splitlines()
    assert [line for line in lines if "  loss  0.5" in line and "   " not in line] == [
        "E0_U1_S4  loss  0.5",
        "E0_U2_S8  loss  0.5",
    ]
    assert "a: killed" in lines


def test_ctrl_c_ends_following(tmp_path, monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("noether.cli.commands.show.time.sleep", interrupt)
    with open_run(tmp_path / "a"):
        assert "a: running" in show(tmp_path / "a", "--follow")


def test_entries_of_a_summary_that_are_not_as_noether_writes_them_are_left_out(tmp_path):
    at = "E0_U0_S0"
    summaries = [
        {"processes": {at: None}, "phases": {at: 3}},
        {
            "status": "running",
            "processes": {at: {"started_s": "soon", "devices": 1}},
            "phases": {at: {"total_s": None}},
        },
        {"ending": 5, "processes": {at: {"git": "main", "devices": [1]}}, "phases": {at: {"step_s": 1.0}}},
    ]
    for number, summary in enumerate(summaries):
        write_run(tmp_path / str(number), [0.5], summary)
        assert "val/accuracy" in show(tmp_path / str(number))
    assert show(tmp_path).startswith("3 runs")
    assert show(tmp_path / "0", "--json")
    assert show(tmp_path, "--diff")


def test_a_path_in_a_run_is_refused_with_the_path_of_the_run(folder):
    (folder / "a/checkpoints").mkdir(exist_ok=True)
    assert f"lies in the directory of a run; give {folder / 'a'}" in show(folder / "a/checkpoints", code=2)


@pytest.mark.parametrize("charset", ["ascii", "latin-1"])
@pytest.mark.parametrize("width", [None, "80"])
def test_a_stream_without_unicode(folder, charset, width):
    write_run(folder / "\u4e00", [1.0, 2.0, 3.0])
    terminal = {} if width is None else {"FORCE_COLOR": "1", "TERM": "xterm", "COLUMNS": width}
    result = CliRunner(charset=charset, env=terminal).invoke(main, ["show", str(folder / "\u4e00")])
    assert result.exit_code == 0, result.output
    text = result.stdout_bytes.decode("ascii")
    assert r"\u4e00: finished" in text
    assert "_-#" in text
