"""`read_run`: every kind of run directory, also while it is written, moved, copied or damaged."""

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from reading import NUMBERS, expected_column, quiet, read_lines

import noether
from noether import AfterUpdate, LogScalars, SetSummary, TrainState, open_run
from noether.config import ConfigError
from noether.effects.disk.lock import LOCK, find_lock_use


def log(directory, state, **values):
    directory.interpreter([LogScalars(values)], state, AfterUpdate(time_s=0.0))


def write_run(path, values=(1.0, 0.5), summary=None):
    with open_run(path) as directory:
        state = TrainState()
        for value in values:
            state = state.advance(samples=4)
            log(directory, state, loss=value)
        if summary:
            directory.interpreter([SetSummary(summary)], state, AfterUpdate(time_s=0.0))
    return path


def test_a_run_that_is_being_written_can_be_read(tmp_path):
    path = tmp_path / "run"
    values = [0.1, math.nan, math.inf, 1e-300]
    with open_run(path) as directory:
        (path / "config.yaml").write_text("run: {name: mine}\n")
        state = TrainState()
        for value in values:
            state = state.advance(samples=4)
            directory.interpreter([LogScalars({"loss": value, "step": state.iteration.update})], state, AfterUpdate())
        with (path / "metrics.jsonl").open("ab") as file:
            file.write(b'{"run": "run", "event": "after_up')
        run = noether.read_run(path)
        assert repr(run.metrics["loss"].values.tolist()) == repr(values)
        assert run.metrics["step"].values.dtype == "int64"
        assert run.metrics["loss"].points.sample.tolist() == [4, 8, 12, 16]
        assert run.config == {"run": {"name": "mine"}}
        assert (run.name, run.run_id, run.status) == ("mine", "run", "running")


LINES = st.dictionaries(st.sampled_from("abc") | st.text(max_size=3), NUMBERS, max_size=4)
ALIKE = st.fixed_dictionaries({"a": st.floats(), "b": st.floats() | st.integers(0, 3)})  # as most lines of a log are


@given(
    lines=st.lists(LINES, max_size=12) | st.lists(ALIKE | LINES, max_size=12),
    block_bytes=st.sampled_from([1, 400, 10**6]),
)
def test_read_metrics_have_the_bits_of_the_logged_ones(lines, block_bytes):
    metrics = read_lines(lines, block_bytes)
    logged = {}
    for update, line in enumerate(lines, 1):
        for key, value in line.items():
            logged.setdefault(key, []).append((update, value))
    assert list(metrics) == list(logged)
    for key, pairs in logged.items():
        series = metrics[key]
        expected = expected_column([value for _, value in pairs])
        assert series.values.dtype == expected.dtype
        assert quiet(series.values).tobytes() == quiet(expected).tobytes()
        assert series.points.update.tolist() == [update for update, _ in pairs]
        assert series.points.sample.tolist() == [3 * update for update, _ in pairs]
        assert series.lines.tolist() == [update - 1 for update, _ in pairs]


@pytest.mark.parametrize(
    "damage",
    [b"", b"{", b'{"run": "r"}', b"[1]", b"null", b'"x"', b"\xff\xfe", b'{"metrics": 3}'],
    ids=["blank", "cut", "no-metrics", "list", "null", "text", "bytes", "number"],
)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_damaged_line_is_named_and_the_others_are_read(tmp_path, caplog, damage, place):
    path = write_run(tmp_path / "run")
    lines = (path / "metrics.jsonl").read_bytes().splitlines()
    lines.insert(place, damage)
    (path / "metrics.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    assert noether.read_run(path).metrics["loss"].values.tolist() == [1.0, 0.5]
    (record,) = caplog.records
    assert f"metrics.jsonl: left out 1 damaged line (line {place + 1}: it is" in record.getMessage()


@pytest.mark.parametrize("value", ["null", '"text"', "[1]", "{}"])
def test_a_line_with_a_metric_that_is_not_a_number_is_damaged(tmp_path, caplog, value):
    path = write_run(tmp_path / "run")
    text = (path / "metrics.jsonl").read_text().replace('"loss": 1.0', f'"loss": {value}')
    (path / "metrics.jsonl").write_text(text)
    assert noether.read_run(path).metrics["loss"].values.tolist() == [0.5]
    assert "line 1" in caplog.text


def test_artifacts_are_listed_with_their_points(tmp_path):
    path = write_run(tmp_path / "run")
    point = {"event": "after_epoch", "epoch": 1, "update": 2, "sample": 8, "time_s": 3.5}
    entry = {"kind": "figure", "file": "artifacts/ab/abc.png", "bytes": 7, "caption": "a curve"}
    with (path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"run": "run", **point, "metrics": {}, "artifacts": {"fig": entry}}) + "\n")
    run = noether.read_run(path)
    (artifact,) = run.artifacts
    assert artifact[:5] == ("fig", "figure", path / "artifacts/ab/abc.png", "a curve", 7)
    assert str(artifact.point.iteration) == "E1_U2_S8"
    assert list(run.metrics) == ["loss"]
    assert len(run.metrics["loss"].points) == 2


def test_a_run_without_configuration_logs_and_checkpoints_is_empty(tmp_path):
    with open_run(tmp_path / "run"):
        pass
    run = noether.read_run(tmp_path / "run")
    assert (run.config, run.summary, run.checkpoints, run.pointers, run.artifacts, list(run.metrics)) == (
        ({}, {}, (), {}, (), [])
    )
    assert (run.provenance, run.phases, run.evaluations, list(run.events()), run.started_s) == ({}, {}, {}, [], None)


def test_entries_by_iteration_are_in_order(tmp_path):
    summary = {"phases": {"E10_U100_S800": {"total_s": 2.0}, "E2_U20_S160": {"total_s": 1.0}}, "processes": 3}
    run = noether.read_run(write_run(tmp_path / "run", summary=summary))
    assert list(run.phases) == ["E2_U20_S160", "E10_U100_S800"]
    assert run.provenance == {}


@pytest.mark.parametrize(
    ("summary", "status"),
    [
        ({"status": "finished"}, "finished"),
        ({"status": "stopped"}, "stopped"),
        ({"status": "interrupted"}, "interrupted"),
        ({"status": "failed"}, "failed"),
        ({"status": "running"}, "killed"),
        ({"ending": "ended at E1_U2_S8"}, "finished"),
        ({"ending": "ended at E1_U2_S8: no improvement"}, "stopped"),
        ({"ending": "interrupted at E1_U2_S8: SIGTERM"}, "interrupted"),
        ({"ending": "failed at E1_U2_S8: ValueError: x"}, "failed"),
        ({"ending": 3}, "unknown"),
        ({}, "unknown"),
    ],
    ids=str,
)
def test_status_of_a_run_that_nothing_writes(tmp_path, summary, status):
    assert noether.read_run(write_run(tmp_path / "run", summary=summary)).status == status


KILLED = """\
import os, signal, sys
from noether import open_run
directory = open_run(sys.argv[1])
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_status_of_a_killed_run_and_of_its_copy_from_another_host(tmp_path):
    process = subprocess.run([sys.executable, "-c", KILLED, tmp_path / "run"], check=False, timeout=120)
    assert process.returncode == -signal.SIGKILL
    assert find_lock_use(tmp_path / "run") == "abandoned"
    assert noether.read_run(tmp_path / "run").status == "killed"
    holder = json.loads((tmp_path / "run" / LOCK).read_text())
    (tmp_path / "run" / LOCK).write_text(json.dumps({**holder, "host": "another"}))
    (tmp_path / "run" / "summary.json").write_text('{"status": "running"}')
    assert noether.read_run(tmp_path / "run").status == "unknown"
    open_run(tmp_path / "run").close()


def test_checking_the_lock_changes_nothing_and_blocks_no_writer(tmp_path):
    write_run(tmp_path / "run")
    files = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert find_lock_use(tmp_path / "run") == "free"
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == files
    (tmp_path / "run" / LOCK).write_text("")
    with (tmp_path / "run" / LOCK).open() as reader:
        import fcntl

        fcntl.flock(reader, fcntl.LOCK_SH)
        calls = []

        def call(function, *arguments):
            calls.append(function)
            if len(calls) > 1 and function is os.open:  # the reader closes the file while the writer tries again
                fcntl.flock(reader, fcntl.LOCK_UN)
            return function(*arguments)

        from noether.effects.disk.calls import Disk
        from noether.effects.disk.lock import RunLock

        RunLock(tmp_path / "run", Disk(call)).release()


def test_runs_of_a_folder(tmp_path, caplog):
    for name in ("b/1", "a/2", "a/10"):
        write_run(tmp_path / "runs" / name)
    copy = tmp_path / "runs" / "c" / "copied"
    copy.mkdir(parents=True)
    shutil.copy(tmp_path / "runs/a/2/metrics.jsonl", copy)
    (tmp_path / "runs" / "config.yaml").write_text("run: {name: a configuration beside the runs}\n")
    damaged = write_run(tmp_path / "runs" / "d/1")
    (damaged / "config.yaml").write_text("a: [")
    ids = [run.path.relative_to(tmp_path / "runs").as_posix() for run in noether.read_runs(tmp_path / "runs")]
    assert ids == ["a/10", "a/2", "b/1", "c/copied"]
    assert "left out a run: " in caplog.text
    assert f"{damaged / 'config.yaml'}: is damaged: " in caplog.text
    assert [run.run_id for run in noether.read_runs(copy)] == ["copied"]


def test_runs_that_cannot_be_read_are_left_out_and_not_called_damaged(tmp_path, caplog, monkeypatch):
    write_run(tmp_path / "runs/mine")
    refused = write_run(tmp_path / "runs/of_another_user")
    no_log, no_summary = write_run(tmp_path / "runs/no_log"), write_run(tmp_path / "runs/no_summary", summary={"a": 1})
    for file in (no_log / "metrics.jsonl", no_summary / "summary.json"):
        file.unlink()
        file.mkdir()
    (no_log / "summary.json").write_text("{}")
    is_file = Path.is_file

    def refuse(path):
        if path.parent == refused:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return is_file(path)

    monkeypatch.setattr(Path, "is_file", refuse)
    assert [run.run_id for run in noether.read_runs(tmp_path / "runs")] == ["mine"]
    assert f"left out {refused}: it cannot be read: Permission denied" in caplog.text
    assert f"{no_summary / 'summary.json'}: cannot be read: Is a directory" in caplog.text
    assert str(no_log / "metrics.jsonl") in caplog.text
    assert "damaged" not in caplog.text


def test_a_run_that_links_lead_to_is_there_once(tmp_path):
    runs = tmp_path / "runs"
    write_run(runs / "mine/1")
    (runs / "mine/0_latest").symlink_to("1")
    (runs / "again").symlink_to("mine")
    (runs / "loop").symlink_to(runs)
    (runs / "z").symlink_to(write_run(tmp_path / "elsewhere"))
    (tmp_path / "link").symlink_to(runs)
    for folder in (runs, tmp_path / "link"):
        assert [run.path for run in noether.read_runs(folder)] == [folder / "mine/1", folder / "z"]


def test_paths_without_a_run_say_what_to_give(tmp_path):
    run = write_run(tmp_path / "runs" / "a" / "1")
    for path, text in (
        (tmp_path / "runs", f"is not the directory of a run; the run in it is {run}"),
        (tmp_path / "nothing", "does not exist; give one like runs/NAME/RUN_ID"),
        (run / "checkpoints", f"lies in the directory of a run; give {run}"),
    ):
        with pytest.raises(ConfigError) as error:
            noether.read_run(path)
        assert text in str(error.value)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="has no run in it; give a run such as"):
        noether.read_runs(tmp_path / "empty")


def test_the_best_value_is_the_first_of_the_best_finite_ones(tmp_path):
    path = write_run(tmp_path / "run", [math.nan, 0.5, -math.inf, 0.25, 0.25])
    with open_run(path) as directory:
        log(directory, TrainState(), dice=1.0)
        log(directory, TrainState(), dice=2.0)
        log(directory, TrainState(), accuracy=math.nan)
    run = noether.read_run(path)
    assert run.best("loss").value == 0.25
    assert str(run.best("loss").point.iteration) == "E0_U4_S16"
    assert run.best("dice") is None
    assert run.best("accuracy") is None
    assert run.metrics["dice"].best("lower").value == 1.0
    (path / "config.yaml").write_text("callbacks: [{kind: BestMetric, metric_key: dice, mode: higher}]\n")
    assert noether.read_run(path).best("dice").value == 2.0
    with pytest.raises(KeyError, match="the run logged no metric 'los'; did you mean 'loss'"):
        run.best("los")
