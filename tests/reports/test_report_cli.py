"""`noether report` on the command line."""

import os
from pathlib import Path

import pytest
from click.testing import CliRunner

import noether
from noether.cli.main import main


def run_report(*arguments):
    return CliRunner().invoke(main, ["report", *map(str, arguments)])


def make_run(path, values=(1.0, 0.5)):
    with noether.open_run(path) as directory:
        (path / "config.yaml").write_text("run: {name: mine}\n")
        state = noether.TrainState()
        for value in values:
            state = state.advance(samples=4)
            directory.interpreter([noether.LogScalars({"loss": value})], state, noether.AfterUpdate(time_s=1.0))
    return path


def test_the_report_of_a_run_is_one_file_in_its_directory(tmp_path):
    run = make_run(tmp_path / "run")
    result = run_report(run)
    assert result.stdout.startswith(f"{run / 'report.html'}: 1.3 MB")
    page = (run / "report.html").read_text()
    assert "from 1 at update 1 to 0.5 at update 2" in page


def test_a_file_that_is_not_a_report_stays(tmp_path):
    run, target = make_run(tmp_path / "run"), tmp_path / "thesis.html"
    target.write_text("<p>my thesis</p>")
    result = run_report(run, "--to", target)
    assert result.exit_code == 2
    assert "the file exists and is not a report" in result.stderr
    assert target.read_text() == "<p>my thesis</p>"


@pytest.mark.parametrize(
    ("option", "name", "fix"),
    [
        ("--to", "page.pdf", "page.html"),
        ("--to", "page", "page.html"),
        ("--png", "curves.jpg", "curves.png"),
        ("--png", "curves", "curves.png"),
    ],
)
def test_a_name_without_the_right_suffix_is_refused(tmp_path, option, name, fix):
    run = make_run(tmp_path / "run")
    before = sorted(tmp_path.rglob("*"))
    result = run_report(run, option, tmp_path / name)
    assert result.exit_code == 2
    assert f"the name must end in {Path(fix).suffix}; write {fix}" in result.stderr
    assert result.stderr.endswith(f"write {fix}\n")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_run_without_a_configuration_is_named_once(tmp_path):
    run = make_run(tmp_path / "run")
    (run / "config.yaml").unlink()
    assert run_report(run).exit_code == 0
    assert "<title>run</title>" in (run / "report.html").read_text()


def test_a_log_that_cannot_be_read_is_not_taken_for_a_report_that_cannot_be_written(tmp_path):
    run = make_run(tmp_path / "run")
    (run / "summary.json").write_text("{}")
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").mkdir()
    result = run_report(run)
    assert str(run / "metrics.jsonl") in result.stderr
    assert "could not be written" not in result.stderr


def test_a_pipe_is_not_a_report(tmp_path):
    run, target = make_run(tmp_path / "run"), tmp_path / "pipe.html"
    os.mkfifo(target)
    result = run_report(run, "--to", target)
    assert result.exit_code == 2
    assert "the file exists and is not a report" in result.stderr


def test_a_closed_output_is_not_taken_for_a_file_that_cannot_be_written(tmp_path, monkeypatch):
    def fail(*_):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("noether.cli.commands.report.echo", fail)
    run, target = make_run(tmp_path / "run"), tmp_path / "report.html"
    result = run_report(run, "--to", target)
    assert "could not be written" not in result.stderr
    assert target.is_file()
