"""The run directory: where effects go, and that nothing buffered is lost."""

import errno
import gc
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from faults import call_without_fsync
from log_files import at, read, update_at
from small_run import open_small_run, state_after, train

from noether import (
    AfterEpoch,
    AfterUpdate,
    LogScalars,
    LogText,
    MeasurePeakMemory,
    SaveCheckpoint,
    SaveTensors,
    SetSummary,
    TrainState,
)
from noether.effects import CheckpointError, LockedError, RunClosedError, open_run
from noether.effects.disk.calls import Disk
from noether.testing import same

ROOT = Path(__file__).parents[2]


def test_every_effect_reaches_its_destination(tmp_path, capsys):
    directory = open_run(tmp_path / "run")
    state = TrainState(params={"weight": torch.ones(2)}).advance(samples=4)
    effects = [
        LogText("hello"),
        LogScalars({"loss": 0.5}),
        SetSummary({"best": 1}),
        MeasurePeakMemory(key="memory"),
        SaveTensors(name="outputs/first", tensors={"x": torch.arange(3)}),
        SaveCheckpoint(pointers=("latest",)),
    ]
    directory.interpreter(effects, state, AfterUpdate(samples=4))
    directory.close()
    (line,) = read(tmp_path / "run/metrics.jsonl")  # one line per event, with measured and logged values
    assert line["metrics"].pop("memory") > 1_000_000
    assert line["metrics"] == {"loss": 0.5}
    assert json.loads((tmp_path / "run/summary.json").read_text()) == {"best": 1}
    assert (tmp_path / "run/tensors/outputs/first.safetensors").is_file()
    assert (tmp_path / "run/checkpoints/latest").read_text().split()[0] == "E0_U1_S4"
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in printed] == ["hello", "loss"]
    assert " memory " in printed[1]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_logs_are_not_truncated_for_checkpoints_that_are_gone(tmp_path, asynchronous):
    log, save = LogScalars({"loss": 0.5}), SaveCheckpoint(pointers=("latest",))
    path, state = tmp_path / "run", TrainState().advance(samples=4)
    for effects in ((log,), (log, save)):
        with open_run(path, asynchronous=asynchronous) as directory:
            assert directory.resume() is None
            directory.interpreter(effects, state, AfterUpdate(samples=4))
        assert (path / ".never-saved").exists() == (save not in effects)
    shutil.rmtree(path / "checkpoints")
    lines = (path / "metrics.jsonl").read_bytes()
    with (
        open_run(path) as directory,
        pytest.raises(CheckpointError, match=r"metrics.jsonl has 1 line up to E0_U1_S4: mount the disk"),
    ):
        directory.resume()
    assert (path / "metrics.jsonl").read_bytes() == lines != b""


def test_a_kill_before_the_marker_is_removed_does_no_harm(tmp_path):
    path = tmp_path / "run"
    with open_run(path) as directory:
        directory.interpreter([SaveCheckpoint()], TrainState().advance(samples=4), AfterUpdate(samples=4))
    (path / ".never-saved").touch()
    with open_run(path) as directory:
        assert directory.resume() is not None
    assert not (path / ".never-saved").exists()


def test_a_resumed_run_that_saves_before_it_logs_counts_the_existing_lines(tmp_path):
    save, update = SaveCheckpoint(pointers=("latest",)), AfterUpdate(samples=4)
    with open_run(tmp_path / "run") as directory:
        directory.interpreter([LogScalars({"x": 1}), save], at(1), update)
    with open_run(tmp_path / "run") as directory:
        directory.resume()
        directory.interpreter([save], at(2), update)
        newest = directory.checkpoints.find("latest")
    assert (newest.log_lines, newest.log_lines_lost) == (1, 0)


def test_only_rank_0_truncates_the_logs(tmp_path):
    with open_run(tmp_path / "run") as directory:
        directory.interpreter([LogScalars({"x": 1}), SaveCheckpoint()], at(1), AfterUpdate(samples=4))
        directory.interpreter([LogScalars({"x": 2})], at(2), AfterUpdate(samples=4))
        assert open_run(tmp_path / "run", rank=1).resume().iteration.update == 1
        assert [line["update"] for line in read(tmp_path / "run/metrics.jsonl")] == [1, 2]


def log_updates(interpreter, updates):
    for update in updates:
        interpreter([LogScalars({"x": update})], at(update), update_at(update / 1000))


@pytest.mark.parametrize("how", ["closed", "exited", "collected", "outlived"])
def test_no_buffered_line_is_lost_however_a_run_is_released(tmp_path, how):
    directory = open_small_run(tmp_path / "run")
    interpreter = directory.interpreter
    if how == "outlived":  # by its interpreter
        del directory
        gc.collect()
    log_updates(interpreter, range(5))
    assert len(read(tmp_path / "run/metrics.jsonl")) == 1
    if how == "closed":
        directory.close()
    elif how == "exited":
        directory.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    else:
        directory = None
        del interpreter
        gc.collect()
    assert [line["update"] for line in read(tmp_path / "run/metrics.jsonl")] == [*range(5)]


SCRIPT = """
import os, sys
from noether import AfterUpdate, LogScalars, TrainState
from noether.effects import open_run
directory = open_run(sys.argv[1])
for update in range(5):
    event = AfterUpdate(samples=1, time_s=1000.0)
    directory.interpreter([LogScalars({"x": 1})], TrainState().advance(samples=1), event)
if os.fork() == 0:
    sys.exit()
os.wait()
raise ValueError
"""


def test_no_buffered_line_is_lost_or_duplicated_when_a_process_ends(tmp_path):
    """By an uncaught error, or as a fork with a copy of the buffer."""
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT, tmp_path / "run"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert process.stderr.splitlines()[-1] == "ValueError"
    assert len(read(tmp_path / "run/metrics.jsonl")) == 5


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_log_error_during_a_save_is_reported_and_counted_in_the_manifest(tmp_path, caplog, asynchronous):
    full = []

    def call(function, *arguments):
        if function is os.write and full and b'"time_s"' in bytes(arguments[1]):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return call_without_fsync(function, *arguments)

    with open_small_run(tmp_path / "run", Disk(call), asynchronous=asynchronous) as directory:
        log_updates(directory.interpreter, range(1, 5))
        full.append(True)
        directory.interpreter([SaveCheckpoint()], at(4), update_at(0.005))
        directory.wait()
        full.clear()
        log_updates(directory.interpreter, range(5, 7))
        directory.interpreter([SaveCheckpoint()], at(6), update_at(0.007))
        directory.wait()
        counts = [(each.log_lines, each.log_lines_lost) for each in directory.checkpoints.manifests()]
    assert counts == [(1, 3), (3, 3)]
    assert [line["update"] for line in read(tmp_path / "run/metrics.jsonl")] == [1, 5, 6]
    assert caplog.text.count("metrics.jsonl failed and may have lost log entries") == 1


@pytest.mark.parametrize("end", ["close", "save", "collect"])
def test_no_buffered_entry_is_lost_however_a_run_ends(tmp_path, end):
    directory = open_run(tmp_path / "run")
    for time_s in (1.0, 1.1):
        directory.interpreter((SetSummary({"at": time_s}),), at(1), AfterEpoch(time_s=time_s))
    if end == "save":
        directory.interpreter((SaveCheckpoint(),), at(1), AfterEpoch(time_s=1.2))
    elif end == "close":
        directory.close()
    else:
        del directory
        gc.collect()
    assert json.loads((tmp_path / "run/summary.json").read_text()) == {"at": 1.1}


def test_an_event_without_effects_flushes_the_buffers(tmp_path):
    directory = open_run(tmp_path / "run")
    for update, time_s in enumerate((10.0, 10.5)):
        directory.interpreter((LogScalars({"x": update}), SetSummary({"x": update})), at(update), update_at(time_s))
    assert [line["update"] for line in read(tmp_path / "run/metrics.jsonl")] == [0]
    directory.interpreter((), at(2), update_at(10.9))
    assert [line["update"] for line in read(tmp_path / "run/metrics.jsonl")] == [0]
    directory.interpreter((), at(3), update_at(11.1))
    assert [line["update"] for line in read(tmp_path / "run/metrics.jsonl")] == [0, 1]
    assert json.loads((tmp_path / "run/summary.json").read_text()) == {"x": 1}
    directory.close()


def test_a_run_stays_locked_while_its_interpreter_can_write(tmp_path):
    first = open_run(tmp_path / "run")
    interpreter = first.interpreter
    for update in (1, 2, 3):
        interpreter((LogScalars({"x": update}), SetSummary({"x": update})), at(update), update_at(1 + update / 10))
    del first
    gc.collect()
    with pytest.raises(LockedError, match=f"is already open in this process, at {__file__}:"):
        open_run(tmp_path / "run")
    del interpreter
    gc.collect()
    assert [line["update"] for line in read(tmp_path / "run/metrics.jsonl")] == [1, 2, 3]
    with open_run(tmp_path / "run") as second:
        assert second.resume() is None
        for update in (1, 2):
            second.interpreter((LogScalars({"y": update}), SetSummary({"x": -1})), at(update), update_at(9 + update))
    assert [line["metrics"] for line in read(tmp_path / "run/metrics.jsonl")] == [{"y": 1}, {"y": 2}]
    assert json.loads((tmp_path / "run/summary.json").read_text()) == {"x": -1}


def test_a_second_open_run_of_one_directory_is_refused_and_harms_no_save(tmp_path):
    with open_small_run(tmp_path / "run") as directory:
        list(train(directory, (1,)))
        with pytest.raises(LockedError, match="is already open in this process"):
            open_small_run(tmp_path / "run")
        list(train(directory, (2,)))
        assert [each.iteration.update for each in directory.checkpoints.manifests()] == [1, 2]
    with open_small_run(tmp_path / "run") as directory:
        assert same(directory.resume(), state_after(2))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_closed_run_refuses_to_write(tmp_path, rank):
    directory = open_run(tmp_path / "run", rank=rank)
    record = directory.recording_interpreter(directory.interpreter, lambda *_: {})
    extended = directory.interpreter.with_handlers(LogText)
    assert directory.is_open
    directory.close()
    directory.close()  # a no-op
    assert not directory.is_open
    event, message = AfterUpdate(samples=4), re.escape("is closed: open it again with open_run(")
    for use in (
        lambda: directory.interpreter([], at(1), event),
        lambda: directory.interpreter([SaveCheckpoint()], at(1), event),
        lambda: extended([LogText("x")], at(1), event),
        lambda: record([], at(1), event),
        directory.resume,
        lambda: directory.truncate_logs(None),
        directory.check_location,
    ):
        with pytest.raises(RunClosedError, match=message):
            use()
    assert not (tmp_path / "run/events.jsonl").exists()


def test_a_path_is_resolved_when_the_run_is_opened(tmp_path, monkeypatch):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to("one")
    monkeypatch.chdir(tmp_path)
    with open_small_run("link/run") as directory:
        list(train(directory, (1,)))
        monkeypatch.chdir(tmp_path / "two")
        (tmp_path / "link").unlink()
        (tmp_path / "link").symlink_to("two")
        list(train(directory, (2,)))
    assert list((tmp_path / "two").iterdir()) == []
    assert [line["update"] for line in read(tmp_path / "one/run/metrics.jsonl")] == [1, 2]


def test_an_interrupted_close_leaves_the_run_open(tmp_path, monkeypatch):
    """Its last checkpoint may still be written, so nothing else may write there."""
    directory = open_run(tmp_path / "run", asynchronous=True)

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("noether.effects.checkpoints.saver.wait", interrupt)
        with pytest.raises(KeyboardInterrupt):
            directory.close()
    with pytest.raises(LockedError):
        open_run(tmp_path / "run")
    directory.close()
    open_run(tmp_path / "run").close()
