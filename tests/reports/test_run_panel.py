"""The panel of one run, which `noether show` prints."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reading import write_lines
from rich.console import Console

from noether import open_run, read_run
from noether.effects.console.run_panels import layout_panel, plain_lines
from noether.reports.run_panel import describe_run, draw_trend, to_values


def write_run(path, lines, summary=None, config=None):
    path.mkdir(parents=True, exist_ok=True)
    write_lines(path / "metrics.jsonl", lines)
    (path / "summary.json").write_text(json.dumps({"status": "finished", **(summary or {})}))
    if config is not None:
        (path / "config.yaml").write_text(json.dumps(config))
    return read_run(path)


def text_of(run):
    return "\n".join(plain_lines(describe_run(run)))


def rows_of(run):
    return {row[0]: row[1:] for row in describe_run(run).table.rows}


def test_last_and_best_values(tmp_path):
    run = write_run(tmp_path / "a", [{"val/accuracy": value, "size": 1} for value in (0.25, 0.75, 0.4)])
    rows = rows_of(run)
    assert rows["val/accuracy"] == ("0.4", "0.75", "E0_U2_S6", "▁█▃")
    assert rows["size"][:3] == ("1", "", "")


def test_progress_is_a_share_of_the_configured_end(tmp_path):
    config = {"run": {"name": "mine"}, "trainer": {"max_updates": 4}}
    run = write_run(tmp_path / "a", [{"loss": 1.0}] * 3, config=config)
    assert describe_run(run).title == "mine: finished"
    assert "0 epochs, 3 of 4 updates (75 %), 9 samples" in text_of(run)


def test_a_run_without_metrics_or_configuration(tmp_path):
    open_run(tmp_path / "session").close()
    run = read_run(tmp_path / "session")
    panel = describe_run(run)
    assert not panel.table.rows
    assert "0 updates" in text_of(run)
    assert "train" not in dict(panel.commands)


def test_a_killed_run_can_be_resumed(tmp_path):
    open_run(tmp_path / "a").close()
    run = write_run(tmp_path / "a", [{"loss": 1.0}], {"status": "running"}, {"run": {"name": "a"}})
    assert describe_run(run).title == "a: killed"
    assert dict(describe_run(run).commands)["resume"] == f"noether train --resume {tmp_path / 'a'}"


def test_a_failed_run_shows_its_error(tmp_path):
    run = write_run(tmp_path / "a", [], {"status": "failed", "ending": "failed at E0_U7_S21: ValueError: no"})
    (run.path / "traceback.txt").write_text("2026-01-02 03:04:05, at E0_U7_S21\n\nTraceback\n  x()\nValueError: no\n")
    text = text_of(run)
    assert "2026-01-02 03:04:05, at E0_U7_S21, in traceback.txt; Traceback; x(); ValueError: no" in text
    assert "7 updates" in text


def test_seconds_of_all_processes_are_added(tmp_path):
    times = {"total_s": 30.0, "step_s": 15.0, "peak_bytes": 1000}
    process = {"started_s": 0.0, "host": "h", "devices": {"cpu": "x"}, "git": {"commit": "c" * 40, "dirty": True}}
    entries = dict.fromkeys(("E0_U0_S0", "E1_U2_S6"), times)
    run = write_run(tmp_path / "a", [], {"phases": entries, "processes": dict.fromkeys(entries, process)})
    text = text_of(run)
    assert "trained for 0:01:00; peak memory 1 kB" in text
    assert "steps 30.0 s (50 %)" in text
    assert "h, cpu, commit cccccccccc with changes, from E1_U2_S6" in text


@pytest.mark.parametrize("width", [40, 80, 200])
def test_many_long_names_fit_the_terminal_and_no_value_is_cut(tmp_path, width):
    keys = [f"loss/{'part/' * 15}{number}" for number in range(60)]
    run = write_run(tmp_path / "a", [{key: number + 0.123456 for number, key in enumerate(keys)}] * 3)
    lines = ["".join(text for text, _ in line) for line in layout_panel(describe_run(run), width)]
    assert max(map(len, lines)) <= width
    words = " ".join(lines).replace(",", " ").split()
    assert {f"{number + 0.123456:.6g}" for number in range(60)} <= set(words)


@given(st.lists(st.floats(), max_size=100), st.integers(1, 20))
def test_a_trend_has_the_extremes_of_finite_values_of_few_points(values, width):
    values = np.array(values)
    text = draw_trend(values, width)
    assert len(text) <= min(width, len(values))
    finite = values[np.isfinite(values)]
    assert bool(text) == bool(len(finite))
    if len(values) <= width and len(finite):
        assert "▁" in text


def test_values_for_programs(tmp_path):
    values = to_values(write_run(tmp_path / "a", [{"loss": 2.0}, {"loss": 1.0}]))
    assert values["metrics"]["loss"] == {"last": 1.0, "best": 1.0, "best_at": "E0_U2_S6", "count": 2}
    assert values["iteration"] == {"epoch": 0, "update": 2, "sample": 6}


@pytest.mark.parametrize("height", [5, 12, 40, 100])
def test_a_panel_that_is_higher_than_the_terminal_says_how_many_lines_are_left_out(tmp_path, height):
    panel = describe_run(write_run(tmp_path / "a", [{f"metric/{number}": 1.0 for number in range(60)}]))
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(panel)
    whole = console.export_text().splitlines()
    console.print(replace(panel, max_lines=height))
    lines = console.export_text().splitlines()
    assert len(lines) == min(height, len(whole))
    if height < len(whole):
        assert f"and {len(whole) - height + 1} more lines: make the terminal taller" in lines[-2]
        assert lines[: height - 2] == whole[: height - 2]
