"""Logs: `metrics.jsonl` that is cut where a run goes on, and the summary."""

import errno
import gc
import json
import math
import os
import subprocess
import sys
import threading
import weakref
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from faults import Faults, call_without_fsync
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_run import open_small_run

from noether import (
    AfterAccumulationStep,
    AfterEpoch,
    AfterTraining,
    AfterUpdate,
    LogScalars,
    LogText,
    MeasurePeakMemory,
    SaveCheckpoint,
    SaveTensors,
    SetSummary,
    TrainingIteration,
    TrainState,
)
from noether.core.tensors.tree import freeze
from noether.effects import LogError, open_run
from noether.effects.disk.calls import Disk, fsync
from noether.effects.disk.encoding import to_plain
from noether.effects.logs.jsonl import LinesFile, LogCount, event_name, metrics_file
from noether.effects.logs.summary import Summary

ROOT = Path(__file__).parents[2]
UNTIMED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def refuse(constant):
    raise AssertionError(f"{constant} is not JSON")


def read(path):
    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def at(update, epoch=0, **fields):
    return TrainState(iteration=TrainingIteration(epoch=epoch, update=update, sample=4 * update), **fields)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


def test_a_line_says_where_when_and_what(path):
    event = AfterUpdate(samples=4, time_s=12.5)
    metrics_file(path).write(LogScalars({"loss": torch.tensor(0.5), "lr": 1, "same": True}), at(3, epoch=1), event)
    values = {"loss": 0.5, "lr": 1, "same": True}
    assert read(path) == [
        {"run": "", "event": "after_update", "epoch": 1, "update": 3, "sample": 12, "time_s": 12.5, "metrics": values}
    ]
    assert path.read_text().endswith("}}\n")


def test_events_are_named_as_they_are_read():
    assert [event_name(event) for event in (AfterTraining(), AfterEpoch(), AfterUpdate(samples=1))] == [
        "after_training",
        "after_epoch",
        "after_update",
    ]
    step = AfterAccumulationStep(losses={}, outputs=None, samples=1, accumulation_step=0, accumulation_steps=1)
    assert event_name(step) == "after_accumulation_step"


def test_what_json_cannot_hold_is_written_by_name(path):
    values = {"a": math.nan, "b": torch.tensor(math.inf), "c": -math.inf, "d": torch.tensor(0.1, dtype=torch.float64)}
    metrics_file(path).write(LogScalars(values), at(1), AfterTraining())
    assert read(path)[0]["metrics"] == {"a": "NaN", "b": "Infinity", "c": "-Infinity", "d": 0.1}


def write_all(path, *lines):
    metrics = metrics_file(path)
    for state, event in lines:
        metrics.write(LogScalars({"x": state.iteration.update}), state, event)


def test_cut_drops_what_a_resumed_run_writes_again(path):
    write_all(path, *((at(update), AfterUpdate(samples=4)) for update in range(1, 6)))
    assert metrics_file(path).truncate(at(3)) == 2
    assert [line["update"] for line in read(path)] == [1, 2, 3]
    assert metrics_file(path).truncate(at(3)) == 0


def test_cut_drops_the_epoch_that_had_not_ended(path):
    update = (at(3), AfterUpdate(samples=4))
    write_all(path, update, (at(3, epoch=1), AfterEpoch()))
    whole = path.read_text()
    assert metrics_file(path).truncate(at(3, epoch=1)) == 0
    assert path.read_text() == whole
    assert metrics_file(path).truncate(at(3)) == 1
    assert [line["event"] for line in read(path)] == ["after_update"]


def test_the_end_of_training_is_cut_unless_the_state_saw_it(path):
    lines = [(at(3, epoch=1), AfterEpoch()), (at(3, epoch=1), AfterTraining())]
    write_all(path, *lines)
    assert metrics_file(path).truncate(at(3, epoch=1, ended=True)) == 0
    assert metrics_file(path).truncate(at(3, epoch=1)) == 1
    assert [line["event"] for line in read(path)] == ["after_epoch"]
    # An earlier end, of a run that was then made longer, stays.
    write_all(path, lines[1], (at(4, epoch=1), AfterUpdate(samples=4)))
    assert metrics_file(path).truncate(at(4, epoch=1)) == 0


def test_everything_is_cut_where_a_run_begins_anew(path):
    write_all(path, (at(0), AfterUpdate(samples=4)), (at(1), AfterUpdate(samples=4)))
    assert metrics_file(path).truncate(None) == 2
    assert path.read_text() == ""


@pytest.mark.parametrize("torn", ['{"event": "after', "{", "\x00\x00", "[]\n", '{"event": "after_update"}\n'])
def test_a_torn_last_line_is_dropped(path, torn):
    write_all(path, (at(1), AfterUpdate(samples=4)))
    whole = path.read_text()
    path.write_text(whole + torn)
    assert metrics_file(path).truncate(at(9)) == 1
    assert path.read_text() == whole


def test_a_whole_line_without_its_end_is_dropped_before_another_is_appended(path):
    write_all(path, (at(1), AfterUpdate(samples=4)), (at(2), AfterUpdate(samples=4)))
    path.write_text(path.read_text().rstrip("\n"))
    metrics_file(path).truncate(at(2))
    write_all(path, (at(3), AfterUpdate(samples=4)))
    assert [line["update"] for line in read(path)] == [1, 3]


def test_a_line_that_is_not_ours_is_named(path):
    write_all(path, (at(1), AfterUpdate(samples=4)))
    path.write_text("hello\n" + path.read_text())
    before = path.read_text()
    with pytest.raises(LogError) as error:
        metrics_file(path).truncate(at(1))
    assert str(error.value) == f"{path}:1: not a log line: 'hello\\n'; remove this line, and resume again"
    assert path.read_text() == before


@UNTIMED
@given(written=st.integers(1, 8), cut_at=st.integers(0, 8), torn=st.integers(0, 60))
def test_a_log_cut_anywhere_and_written_on_is_whole(tmp_path_factory, written, cut_at, torn):
    path = tmp_path_factory.mktemp("log") / "metrics.jsonl"
    events = [(at(update), AfterUpdate(samples=4)) for update in range(1, 10)]
    write_all(path, *events)
    whole = path.read_text()
    path.unlink()
    write_all(path, *events[:written])
    last_start = path.read_text()[:-1].rfind("\n") + 1
    kept = min(cut_at, written - 1)  # the last line may be torn, so the state is older
    path.write_text(path.read_text()[: last_start + torn])
    metrics_file(path).truncate(at(kept))
    write_all(path, *events[kept:])
    assert path.read_text() == whole


def test_cut_without_a_log_is_nothing(path):
    assert metrics_file(path).truncate(at(1)) == 0
    assert not path.exists()


def test_the_summary_keeps_what_was_set_before(tmp_path):
    path = tmp_path / "summary.json"
    Summary(path).set(SetSummary({"a": 1, "b": torch.tensor(2.0)}), at(1), AfterTraining())
    Summary(path).set(SetSummary({"b": math.nan, "c": "x"}), at(2), AfterTraining())
    assert json.loads(path.read_text(), parse_constant=refuse) == {"a": 1, "b": "NaN", "c": "x"}


def test_the_summary_takes_trees(tmp_path):
    """As a configuration is one, infinite limits in it included."""
    tree = {"config": {"limits": (math.inf, 1), "deep": [{"x": torch.tensor(3)}]}}
    Summary(tmp_path / "summary.json").set(SetSummary(freeze(tree)), at(1), AfterTraining())
    text = (tmp_path / "summary.json").read_text()
    assert json.loads(text, parse_constant=refuse) == {"config": {"limits": ["Infinity", 1], "deep": [{"x": 3}]}}


def test_plain_leaves_the_rest_alone():
    assert [to_plain(value) for value in (None, "x", True, 3)] == [None, "x", True, 3]


def test_a_run_directory_routes_every_effect(tmp_path, capsys):
    run = open_run(tmp_path / "run")
    state = TrainState(params={"weight": torch.ones(2)}).advance(samples=4)
    effects = [
        LogText("hello"),
        LogScalars({"loss": 0.5}),
        SetSummary({"best": 1}),
        MeasurePeakMemory(key="memory"),
        SaveTensors(name="outputs/first", tensors={"x": torch.arange(3)}),
        SaveCheckpoint(pointers=("latest",)),
    ]
    run.interpreter(effects, state, AfterUpdate(samples=4))
    run.close()
    (line,) = read(tmp_path / "run/metrics.jsonl")  # one for the event, what was measured with what was logged
    assert line["metrics"].pop("memory") > 1_000_000
    assert line["metrics"] == {"loss": 0.5}
    assert json.loads((tmp_path / "run/summary.json").read_text()) == {"best": 1}
    assert (tmp_path / "run/tensors/outputs/first.safetensors").is_file()
    assert (tmp_path / "run/checkpoints/latest").read_text().split()[0] == "E0_U1_S4"
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in said] == ["hello", "loss"]
    assert " memory " in said[1]


def test_a_line_that_was_on_the_disk_is_no_torn_one(path):
    write_all(path, *((at(update), AfterUpdate(samples=4)) for update in (1, 2)))
    damaged = path.read_text()[:-9] + "\n"
    path.write_text(damaged)
    with pytest.raises(LogError, match=f"^{path}:2: not a log line: "):
        metrics_file(path).truncate(at(2), LogCount(2))
    assert path.read_text() == damaged
    assert metrics_file(path).truncate(at(2), LogCount(1, lost=1)) == 1


def test_lines_that_somebody_took_away_are_told_of_and_counted(path, caplog):
    write_all(path, *((at(update), AfterUpdate(samples=4)) for update in (1, 3)))
    metrics = metrics_file(path)
    assert metrics.truncate(at(3), LogCount(4, lost=2)) == 0
    assert f"{path} misses 2 of its 4 saved lines" in caplog.text
    assert metrics.fsync(metrics.counts) == LogCount(2, lost=4)


def test_lines_counted_as_lost_that_are_there_after_all_are_counted_no_more(path):
    """As after a flush that failed and a power that stayed."""
    write_all(path, *((at(update), AfterUpdate(samples=4)) for update in (1, 2, 3)))
    metrics = metrics_file(path)
    assert metrics.truncate(at(3), LogCount(1, lost=2)) == 0
    assert metrics.fsync(metrics.counts) == LogCount(3, lost=0)


def test_a_resumed_run_that_saves_before_it_logs_counts_what_is_there(tmp_path):
    save, update = SaveCheckpoint(pointers=("latest",)), AfterUpdate(samples=4)
    with open_run(tmp_path / "run") as run:
        run.interpreter([LogScalars({"x": 1}), save], at(1), update)
    with open_run(tmp_path / "run") as run:
        run.resume()
        run.interpreter([save], at(2), update)
        newest = run.checkpoints.find("latest")
    assert (newest.log_lines, newest.log_lines_lost) == (1, 0)


def test_a_new_log_whose_name_may_not_be_on_the_disk_is_begun_again(path):
    faults = Faults()
    metrics = metrics_file(path, disk=Disk(faults))
    faults.arm(4, "EIO once")  # open, read it (open, fstat, close), then the directory
    with pytest.raises(OSError, match="Input/output error"):
        metrics.write(LogScalars({"x": 1}), at(1), AfterUpdate(samples=4))
    assert not path.exists()
    metrics.write(LogScalars({"x": 2}), at(2), AfterUpdate(samples=4))
    assert [line["update"] for line in read(path)] == [2]
    assert metrics.counts == LogCount(1, lost=1)


@pytest.mark.parametrize("kind", ["short", "ENOSPC once", "ENOSPC from then on"])
def test_a_line_that_is_not_taken_whole_leaves_nothing(path, kind):
    """The faults that a full disk shows: half of a line, or none of it."""
    faults = Faults()
    metrics = metrics_file(path, disk=Disk(faults))
    metrics.write(LogScalars({"x": 1}), at(1), AfterUpdate(samples=4))
    faults.arm(0, kind)
    with pytest.raises(OSError, match="No space left on device"):
        metrics.write(LogScalars({"x": 2}), at(2), AfterUpdate(samples=4))
    faults.armed = False
    metrics.write(LogScalars({"x": 3}), at(3), AfterUpdate(samples=4))
    assert [line["update"] for line in read(path)] == [1, 3]
    assert metrics.fsync(metrics.counts) == LogCount(2, lost=1)


def test_what_a_flush_failed_for_is_written_to_another_file(path, caplog):
    """A second flush of the first one would say that all is well, and nothing of it need be on the disk."""
    flushed = []

    def call(function, *arguments):
        if function is fsync:
            flushed.append(os.fstat(arguments[0]).st_ino)
            if len(flushed) == 2:  # the first is that of the directory
                raise OSError(errno.EIO, "Input/output error")
        return call_without_fsync(function, *arguments)

    metrics = metrics_file(path, disk=Disk(call))
    metrics.write(LogScalars({"x": 1}), at(1), AfterUpdate(samples=4))
    with path.open():  # so that the number of the file is not given again
        assert metrics.fsync(metrics.counts) == LogCount(0, lost=1)
        metrics.write(LogScalars({"x": 2}), at(2), AfterUpdate(samples=4))
        assert metrics.fsync(metrics.counts) == LogCount(2, lost=0)
    assert flushed.count(flushed[1]) == 1
    assert [line["update"] for line in read(path)] == [1, 2]
    assert caplog.text.count("could not be flushed to the disk") == 1


def test_only_the_process_that_writes_cuts(tmp_path):
    with open_run(tmp_path / "run") as run:
        run.interpreter([LogScalars({"x": 1}), SaveCheckpoint()], at(1), AfterUpdate(samples=4))
        run.interpreter([LogScalars({"x": 2})], at(2), AfterUpdate(samples=4))
        assert open_run(tmp_path / "run", rank=1).resume().iteration.update == 1
        assert [line["update"] for line in read(tmp_path / "run/metrics.jsonl")] == [1, 2]


# ------------------------------------------------------------------------------------------------ lines that wait

BEGIN_S = 1000.0


def update_at(seconds):
    return AfterUpdate(samples=4, time_s=BEGIN_S + seconds)


def counts(path, *events):
    """Write a line for each event; return how many are in the file after each of them."""
    metrics, found = metrics_file(path), []
    for update, event in enumerate(events, 1):
        metrics.write(LogScalars({"x": update}), at(update), event)
        found.append(path.read_bytes().count(b"\n"))
    return found


def test_lines_of_updates_are_handed_over_once_a_second(path):
    assert counts(path, *map(update_at, (0, 0.5, 0.99, 1.0, 1.5, 2.5))) == [1, 1, 1, 4, 4, 6]


def test_a_line_that_comes_long_after_the_last_does_not_wait(path):
    assert counts(path, *map(update_at, (0, 60, 120))) == [1, 2, 3]


@pytest.mark.parametrize("seconds", [-0.5, -100, 1e9])
def test_lines_do_not_wait_where_the_clock_was_set(path, seconds):
    assert counts(path, update_at(0), update_at(0.1), update_at(seconds)) == [1, 1, 3]


def test_without_a_time_no_line_waits(path):
    assert counts(path, *(AfterUpdate(samples=4) for _ in range(3))) == [1, 2, 3]


def test_any_other_event_hands_over_all_that_waits(path):
    step = AfterAccumulationStep(time_s=BEGIN_S + 0.3)
    for event in (AfterEpoch(time_s=BEGIN_S + 0.3), AfterTraining(time_s=BEGIN_S + 0.3), step):
        assert counts(path, update_at(0), update_at(0.1), update_at(0.2), event) == [1, 1, 1, 4]
        path.unlink()


def test_no_more_than_a_thousand_lines_wait(path):
    found = counts(path, *(update_at(number / 1e6) for number in range(2002)))
    assert {after for before, after in pairwise(found) if before != after} == {1001, 2001}


def test_what_waits_holds_no_tensors(path):
    metrics = metrics_file(path)
    metrics.write(LogScalars({"x": 0}), at(0), update_at(0))
    tensors = [torch.ones(2), torch.ones(2), torch.tensor(0.5)]
    weak = [weakref.ref(each) for each in tensors]
    event = AfterUpdate(samples=4, time_s=BEGIN_S + 0.1, outputs=tensors[0])
    metrics.write(LogScalars({"x": tensors[2]}), at(1, params={"w": tensors[1]}), event)
    del tensors, event
    gc.collect()
    assert [each() for each in weak] == [None, None, None]
    metrics.close()
    assert read(path)[1]["metrics"] == {"x": 0.5}


def test_what_waits_is_as_it_was_when_it_was_written(path):
    metrics, value, values = metrics_file(path), torch.tensor(0.5), {"x": [1]}
    metrics.write(LogScalars({"x": 0}), at(0), update_at(0))
    metrics.write(LogScalars({"x": value, **values}), at(1), update_at(0.1))
    metrics.write(LogScalars({"y": value}), at(2), update_at(0.2))
    value.zero_()  # as a donated buffer is
    values["x"].append(2)
    metrics.close()
    assert [line["metrics"] for line in read(path)] == [{"x": 0}, {"x": [1]}, {"y": 0.5}]


TIMES = st.one_of(st.just(0.0), st.floats(-2, 2, allow_nan=False).map(lambda seconds: BEGIN_S + seconds))
DOINGS = st.lists(
    st.one_of(
        st.builds(lambda time_s: AfterUpdate(samples=4, time_s=time_s), TIMES),
        st.builds(lambda time_s: AfterUpdate(samples=4, time_s=time_s), TIMES),
        st.builds(lambda time_s: AfterEpoch(time_s=time_s), TIMES),
        st.sampled_from(["flush", "fsync", "close", "another"]),
    ),
    max_size=40,
)


def line_of(update, event):
    """Return a line as it would be written alone."""
    place = {"event": event_name(event), "epoch": 0, "update": update, "sample": 4 * update, "time_s": event.time_s}
    return (json.dumps({"run": "r", **place, "metrics": {"x": update / 3}}, allow_nan=False) + "\n").encode()


@UNTIMED
@given(DOINGS)
def test_whatever_is_done_the_file_is_the_one_written_a_line_at_a_time(tmp_path_factory, doings):
    path = tmp_path_factory.mktemp("log") / "metrics.jsonl"
    disk, expected = Disk(call_without_fsync), b""
    metrics = metrics_file(path, "r", disk)
    for update, doing in enumerate(doings):
        if isinstance(doing, (AfterUpdate, AfterEpoch)):
            metrics.write(LogScalars({"x": update / 3}), at(update), doing)
            expected += line_of(update, doing)
        elif doing == "another":
            metrics.close()
            metrics = metrics_file(path, "r", disk)
            metrics.truncate(at(len(doings)))
        elif doing == "close":
            metrics.close()
        else:
            metrics.flush()
            assert metrics.counts == LogCount(expected.count(b"\n"))
            assert (path.read_bytes() if path.exists() else b"") == expected
            assert doing == "flush" or metrics.fsync(metrics.counts) == metrics.counts
        there = path.read_bytes() if path.exists() else b""
        assert expected.startswith(there)
        assert there.endswith(b"\n") or not there
    metrics.close()
    assert (path.read_bytes() if path.exists() else b"") == expected


@UNTIMED
@given(st.lists(st.tuples(TIMES, st.sampled_from(["well", "well", "ENOSPC once", "short", "no JSON"])), max_size=30))
def test_whatever_fails_each_line_is_in_the_file_or_counted_as_lost(tmp_path_factory, doings):
    path = tmp_path_factory.mktemp("log") / "metrics.jsonl"
    failing = []

    def call(function, *arguments):
        if function is os.write and failing:
            if failing.pop() == "short":
                return call_without_fsync(function, arguments[0], arguments[1][: len(arguments[1]) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return call_without_fsync(function, *arguments)

    metrics = metrics_file(path, disk=Disk(call))
    for update, (time_s, how) in enumerate(doings):
        failing[:] = [how] if how in ("ENOSPC once", "short") else []
        values = {"x": object() if how == "no JSON" else update}
        with suppress(OSError, TypeError):
            metrics.write(LogScalars(values), at(update), AfterUpdate(samples=4, time_s=time_s))
    failing.clear()
    with suppress(TypeError):
        metrics.close()
    lines, lost = metrics.counts
    assert lines + lost == len(doings)
    metrics.write(LogScalars({"x": -1}), at(len(doings)), AfterTraining())  # what is torn goes first
    found = [line["update"] for line in read(path)]
    assert found == sorted(set(found))
    assert len(found) == lines + 1
    assert not {update for update, (_, how) in enumerate(doings) if how == "no JSON"} & set(found)


@pytest.mark.parametrize("kind", ["short", "ENOSPC once"])
def test_lines_that_are_not_taken_whole_are_all_lost_and_no_others(path, kind):
    faults = Faults()
    metrics = metrics_file(path, disk=Disk(faults))
    for update, seconds in enumerate((0, 0.1, 0.2)):
        metrics.write(LogScalars({"x": 1}), at(update), update_at(seconds))
    faults.arm(0, kind)
    with pytest.raises(OSError, match="No space left on device"):
        metrics.write(LogScalars({"x": 1}), at(3), AfterEpoch(time_s=BEGIN_S + 0.3))
    faults.armed = False
    assert metrics.counts == LogCount(1, lost=3)
    metrics.write(LogScalars({"x": 1}), at(4), AfterEpoch(time_s=BEGIN_S + 0.4))
    assert [line["update"] for line in read(path)] == [0, 4]
    assert metrics.fsync(metrics.counts) == LogCount(2, lost=3)


def test_a_line_that_cannot_be_encoded_takes_no_other_with_it(path):
    lines = LinesFile(path, lambda line, *_: line)
    for update, each in enumerate((0, 1, object(), 3)):
        lines.write({"x": each}, at(update), update_at(update / 10))
    with pytest.raises((TypeError, ValueError), match="not JSON"):
        lines.close()
    assert read(path) == [{"x": 0}, {"x": 1}, {"x": 3}]
    assert lines.counts == LogCount(3, lost=1)


def test_a_line_that_cannot_be_made_is_lost_at_once(path):
    lines = LinesFile(path, lambda line, *_: 1 / line)
    with pytest.raises(ZeroDivisionError):
        lines.write(0, at(1), update_at(0))
    assert lines.counts == LogCount(0, lost=1)


@pytest.fixture
def flushing(path):
    """A log with a line whose flush is under way in another thread until it is let go on."""
    begun, go_on = threading.Event(), threading.Event()

    def call(function, *arguments):
        if function is fsync and threading.current_thread() is not threading.main_thread():
            begun.set()
            go_on.wait()
        return call_without_fsync(function, *arguments)

    metrics = metrics_file(path, disk=Disk(call))
    metrics.write(LogScalars({"x": 0}), at(0), update_at(0))
    thread = threading.Thread(target=metrics.fsync, args=[metrics.counts], daemon=True)
    thread.start()
    begun.wait()
    yield metrics
    go_on.set()
    thread.join()


def test_a_line_that_waits_does_not_wait_for_a_flush(path, flushing):
    flushing.write(LogScalars({"x": 1}), at(1), update_at(0.1))  # else the test would not end
    assert len(read(path)) == 1


def test_flushes_in_another_thread_disturb_no_line(path):
    metrics, done = metrics_file(path, disk=Disk(call_without_fsync)), threading.Event()

    def flush():
        while not done.is_set():
            metrics.flush()
            metrics.fsync(metrics.counts)

    thread = threading.Thread(target=flush)
    thread.start()
    for update in range(3000):
        metrics.write(LogScalars({"x": 1}), at(update), update_at(update / 100))
    done.set()
    thread.join()
    metrics.flush()
    assert metrics.counts == LogCount(3000)
    assert [line["update"] for line in read(path)] == [*range(3000)]


def test_what_waits_is_cut_as_if_it_had_been_written(path):
    metrics = metrics_file(path)
    for update in range(6):
        metrics.write(LogScalars({"x": 1}), at(update), update_at(update / 10))
    assert metrics.truncate(at(3)) == 2
    assert [line["update"] for line in read(path)] == [0, 1, 2, 3]


def logging(interpreter, updates):
    for update in updates:
        interpreter([LogScalars({"x": update})], at(update), update_at(update / 1000))


@pytest.mark.parametrize("how", ["closed", "left", "collected", "outlived"])
def test_nothing_that_waits_is_lost_where_a_run_is_let_go(tmp_path, how):
    run = open_small_run(tmp_path / "run")
    interpreter = run.interpreter
    if how == "outlived":  # by its interpreter
        del run
        gc.collect()
    logging(interpreter, range(5))
    assert len(read(tmp_path / "run/metrics.jsonl")) == 1
    if how == "closed":
        run.close()
    elif how == "left":
        run.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    else:
        run = None
        del interpreter
        gc.collect()
    assert [line["update"] for line in read(tmp_path / "run/metrics.jsonl")] == [*range(5)]


ENDS = """
import os, sys
from noether import AfterUpdate, LogScalars, TrainState
from noether.effects import open_run
run = open_run(sys.argv[1])
for update in range(5):
    run.interpreter([LogScalars({"x": 1})], TrainState().advance(samples=1), AfterUpdate(samples=1, time_s=1000.0))
if os.fork() == 0:
    sys.exit()
os.wait()
raise ValueError
"""


def test_nothing_that_waits_is_lost_or_doubled_where_a_process_ends(tmp_path):
    """Whether by an error that nobody caught, or as a fork that has a copy of all."""
    done = subprocess.run(
        [sys.executable, "-c", ENDS, tmp_path / "run"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stderr.splitlines()[-1] == "ValueError"
    assert len(read(tmp_path / "run/metrics.jsonl")) == 5


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_log_that_fails_where_a_save_hands_it_over_is_told_of_and_counted(tmp_path, caplog, asynchronous):
    full = []

    def call(function, *arguments):
        if function is os.write and full and b'"time_s"' in bytes(arguments[1]):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return call_without_fsync(function, *arguments)

    with open_small_run(tmp_path / "run", Disk(call), asynchronous=asynchronous) as run:
        logging(run.interpreter, range(1, 5))
        full.append(True)
        run.interpreter([SaveCheckpoint()], at(4), update_at(0.005))
        run.wait()
        full.clear()
        logging(run.interpreter, range(5, 7))
        run.interpreter([SaveCheckpoint()], at(6), update_at(0.007))
        run.wait()
        found = [(each.log_lines, each.log_lines_lost) for each in run.checkpoints.manifests()]
    assert found == [(1, 3), (3, 3)]
    assert [line["update"] for line in read(tmp_path / "run/metrics.jsonl")] == [1, 5, 6]
    assert caplog.text.count("metrics.jsonl failed and may have lost log entries") == 1


# ------------------------------------------------------------------------------------------------ the summary


def setting(summary, **values):
    summary.set(SetSummary(values), at(1), AfterTraining())


def test_the_summary_is_read_once(tmp_path):
    path, calls = tmp_path / "summary.json", []

    def call(function, *arguments):
        calls.append(function.__name__)
        return call_without_fsync(function, *arguments)

    setting(Summary(path), a=1)
    summary = Summary(path, Disk(call))
    setting(summary, a=1)
    assert "read" in calls
    calls.clear()
    setting(summary, a=1)
    assert calls == []
    setting(summary, b=2)
    assert "read" not in calls
    assert json.loads(path.read_text()) == {"a": 1, "b": 2}


def test_what_could_not_be_written_to_the_summary_is_written_the_next_time(tmp_path):
    path, faults = tmp_path / "summary.json", Faults()
    summary = Summary(path, Disk(faults))
    setting(summary, a=1)
    faults.arm(0, "ENOSPC from then on")
    with pytest.raises(OSError, match="No space left on device"):
        setting(summary, b=2)
    faults.armed = False
    assert json.loads(path.read_text()) == {"a": 1}
    setting(summary, b=2)
    assert json.loads(path.read_text()) == {"a": 1, "b": 2}


def test_a_summary_that_was_damaged_is_written_anew_once_it_is_gone(tmp_path):
    path = tmp_path / "summary.json"
    path.write_text("{")
    summary = Summary(path)
    with pytest.raises(LogError, match="is damaged"):
        setting(summary, a=1)
    path.unlink()
    setting(summary, a=1)
    assert json.loads(path.read_text()) == {"a": 1}


def test_what_is_set_at_updates_and_epochs_waits_for_a_second(tmp_path):
    path = tmp_path / "summary.json"
    summary = Summary(path)
    for time_s, written in ((10.0, 10.0), (10.5, 10.0), (10.9, 10.0), (11.0, 11.0), (11.2, 11.0), (9.0, 9.0)):
        summary.set(SetSummary({"at": time_s}), at(1), AfterEpoch(time_s=time_s))
        assert json.loads(path.read_text()) == {"at": written}
    summary.set(SetSummary({"at": 9.5}), at(1), AfterUpdate(time_s=9.5))
    assert json.loads(path.read_text()) == {"at": 9.0}
    summary.flush()
    assert json.loads(path.read_text()) == {"at": 9.5}
    summary.set(SetSummary({"ended": "epochs"}), at(1), AfterTraining(time_s=9.6))
    assert json.loads(path.read_text()) == {"at": 9.5, "ended": "epochs"}


@pytest.mark.parametrize("end", ["close", "save", "forget"])
def test_no_end_of_a_run_loses_what_waits_for_the_summary(tmp_path, end):
    run = open_run(tmp_path / "run")
    for time_s in (1.0, 1.1):
        run.interpreter((SetSummary({"at": time_s}),), at(1), AfterEpoch(time_s=time_s))
    if end == "save":
        run.interpreter((SaveCheckpoint(),), at(1), AfterEpoch(time_s=1.2))
    elif end == "close":
        run.close()
    else:
        del run
        gc.collect()
    assert json.loads((tmp_path / "run/summary.json").read_text()) == {"at": 1.1}


def test_what_waits_is_handed_over_at_an_event_of_which_there_is_nothing_to_say(tmp_path):
    run = open_run(tmp_path / "run")
    for update, time_s in enumerate((10.0, 10.5)):
        run.interpreter((LogScalars({"x": update}), SetSummary({"x": update})), at(update), update_at(time_s))
    assert [line["update"] for line in read(tmp_path / "run/metrics.jsonl")] == [0]
    run.interpreter((), at(2), update_at(10.9))
    assert [line["update"] for line in read(tmp_path / "run/metrics.jsonl")] == [0]
    run.interpreter((), at(3), update_at(11.1))
    assert [line["update"] for line in read(tmp_path / "run/metrics.jsonl")] == [0, 1]
    assert json.loads((tmp_path / "run/summary.json").read_text()) == {"x": 1}
    run.close()


def test_what_waits_is_in_the_file_before_another_opens_the_run(tmp_path):
    """Though the interpreter of the run that was let go is still there."""
    first = open_run(tmp_path / "run")
    interpreter = first.interpreter
    for update in (1, 2, 3):
        interpreter((LogScalars({"x": update}), SetSummary({"x": update})), at(update), update_at(1 + update / 10))
    del first
    gc.collect()
    with open_run(tmp_path / "run") as second:
        assert second.resume() is None
        for update in (1, 2):
            second.interpreter((LogScalars({"y": update}), SetSummary({"x": -1})), at(update), update_at(9 + update))
    del interpreter
    gc.collect()
    assert [line["metrics"] for line in read(tmp_path / "run/metrics.jsonl")] == [{"y": 1}, {"y": 2}]
    assert json.loads((tmp_path / "run/summary.json").read_text()) == {"x": -1}


FORKED = """
import os, sys
from noether import AfterEpoch, SetSummary, TrainState
from noether.effects import open_run
run = open_run(sys.argv[1])
for number, time_s in enumerate((1.0, 1.1)):
    run.interpreter((SetSummary({"best": number}),), TrainState(), AfterEpoch(time_s=time_s))
child = os.fork()
if child == 0:
    sys.exit()
run.interpreter((SetSummary({"best": 2}),), TrainState(), AfterEpoch(time_s=3.0))
os.waitpid(child, 0)
os._exit(0)
"""


def test_a_forked_process_writes_nothing_of_what_waits_for_the_summary(tmp_path):
    program = tmp_path / "forked.py"
    program.write_text(FORKED)
    subprocess.run([sys.executable, str(program), str(tmp_path / "run")], check=True)
    assert json.loads((tmp_path / "run/summary.json").read_text()) == {"best": 2}


def test_a_closed_run_knows_nothing_of_its_summary_any_more(tmp_path):
    first = open_run(tmp_path / "run")
    first.interpreter((SetSummary({"a": 1}),), at(1), AfterTraining())
    first.close()
    with open_run(tmp_path / "run") as second:
        second.interpreter((SetSummary({"b": 2}),), at(1), AfterTraining())
    first.interpreter((SetSummary({"c": 3}),), at(1), AfterTraining())
    assert json.loads((tmp_path / "run/summary.json").read_text()) == {"a": 1, "b": 2, "c": 3}


def test_what_could_not_be_written_to_the_summary_waits_on(tmp_path):
    path, faults = tmp_path / "summary.json", Faults()
    summary = Summary(path, Disk(faults))
    faults.arm(0, "ENOSPC from then on")
    with pytest.raises(OSError, match="No space left on device"):
        setting(summary, a=1)
    faults.armed = False
    setting(summary, b=2)
    assert json.loads(path.read_text()) == {"a": 1, "b": 2}
