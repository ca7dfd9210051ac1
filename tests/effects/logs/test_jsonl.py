"""JSON Lines files: lines are buffered, and each is on the disk or counted as lost."""

import errno
import gc
import json
import math
import os
import threading
import weakref
from contextlib import suppress
from itertools import pairwise

import pytest
import torch
from faults import Faults, call_without_fsync
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from log_files import BEGIN_S, at, read, update_at

from noether import (
    AfterAccumulationStep,
    AfterEpoch,
    AfterTraining,
    AfterUpdate,
    LogScalars,
)
from noether.effects.disk.calls import Disk, fsync
from noether.effects.disk.json_numbers import to_plain
from noether.effects.logs.jsonl import LinesFile, LogCount
from noether.effects.logs.metrics import event_name, metrics_file

UNTIMED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


def test_a_line_holds_position_time_and_metrics(path):
    event = AfterUpdate(samples=4, time_s=12.5)
    metrics_file(path).write(LogScalars({"loss": torch.tensor(0.5), "lr": 1, "same": True}), at(3, epoch=1), event)
    values = {"loss": 0.5, "lr": 1, "same": True}
    assert read(path) == [
        {"run": "", "event": "after_update", "epoch": 1, "update": 3, "sample": 12, "time_s": 12.5, "metrics": values}
    ]
    assert path.read_text().endswith("}}\n")


def test_event_names_are_in_snake_case():
    assert [event_name(event) for event in (AfterTraining(), AfterEpoch(), AfterUpdate(samples=1))] == [
        "after_training",
        "after_epoch",
        "after_update",
    ]
    step = AfterAccumulationStep(losses={}, outputs=None, samples=1, accumulation_step=0, accumulation_steps=1)
    assert event_name(step) == "after_accumulation_step"


def test_nan_and_infinities_are_written_as_strings(path):
    values = {"a": math.nan, "b": torch.tensor(math.inf), "c": -math.inf, "d": torch.tensor(0.1, dtype=torch.float64)}
    metrics_file(path).write(LogScalars(values), at(1), AfterTraining())
    assert read(path)[0]["metrics"] == {"a": "NaN", "b": "Infinity", "c": "-Infinity", "d": 0.1}


def test_to_plain_does_not_change_json_scalars():
    assert [to_plain(value) for value in (None, "x", True, 3)] == [None, "x", True, 3]


def test_a_new_file_whose_directory_entry_may_be_lost_is_created_again(path):
    faults = Faults()
    metrics = metrics_file(path, disk=Disk(faults))
    faults.arm(4, "EIO once")  # the fifth call: open, read (open, fstat, close), flush the directory
    with pytest.raises(OSError, match="Input/output error"):
        metrics.write(LogScalars({"x": 1}), at(1), AfterUpdate(samples=4))
    assert not path.exists()
    metrics.write(LogScalars({"x": 2}), at(2), AfterUpdate(samples=4))
    assert [line["update"] for line in read(path)] == [2]
    assert metrics.counts == LogCount(1, lost=1)


@pytest.mark.parametrize("kind", ["short", "ENOSPC once", "ENOSPC from then on"])
def test_a_partly_written_line_is_removed(path, kind):
    """The faults of a full disk: half of a line is written, or nothing."""
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


def test_after_a_failed_fsync_the_lines_are_written_to_another_file(path, caplog):
    """A second fsync of the first file would succeed, although its content may not be on the disk."""
    flushed = []

    def call(function, *arguments):
        if function is fsync:
            flushed.append(os.fstat(arguments[0]).st_ino)
            if len(flushed) == 2:  # the first is that of the directory
                raise OSError(errno.EIO, "Input/output error")
        return call_without_fsync(function, *arguments)

    metrics = metrics_file(path, disk=Disk(call))
    metrics.write(LogScalars({"x": 1}), at(1), AfterUpdate(samples=4))
    with path.open():  # so that the inode number is not used again
        assert metrics.fsync(metrics.counts) == LogCount(0, lost=1)
        metrics.write(LogScalars({"x": 2}), at(2), AfterUpdate(samples=4))
        assert metrics.fsync(metrics.counts) == LogCount(2, lost=0)
    assert flushed.count(flushed[1]) == 1
    assert [line["update"] for line in read(path)] == [1, 2]
    assert caplog.text.count("could not be flushed to the disk") == 1


def line_counts(path, *events):
    """Write a line per event; return the number of lines in the file after each event."""
    metrics, numbers = metrics_file(path), []
    for update, event in enumerate(events, 1):
        metrics.write(LogScalars({"x": update}), at(update), event)
        numbers.append(path.read_bytes().count(b"\n"))
    return numbers


def test_lines_of_updates_are_flushed_once_a_second(path):
    assert line_counts(path, *map(update_at, (0, 0.5, 0.99, 1.0, 1.5, 2.5))) == [1, 1, 1, 4, 4, 6]


def test_a_line_long_after_the_last_flush_is_flushed_at_once(path):
    assert line_counts(path, *map(update_at, (0, 60, 120))) == [1, 2, 3]


@pytest.mark.parametrize("seconds", [-0.5, -100, 1e9])
def test_a_changed_clock_flushes_at_once(path, seconds):
    assert line_counts(path, update_at(0), update_at(0.1), update_at(seconds)) == [1, 1, 3]


def test_events_without_a_time_flush_at_once(path):
    assert line_counts(path, *(AfterUpdate(samples=4) for _ in range(3))) == [1, 2, 3]


def test_any_other_event_flushes_the_buffer(path):
    step = AfterAccumulationStep(time_s=BEGIN_S + 0.3)
    for event in (AfterEpoch(time_s=BEGIN_S + 0.3), AfterTraining(time_s=BEGIN_S + 0.3), step):
        assert line_counts(path, update_at(0), update_at(0.1), update_at(0.2), event) == [1, 1, 1, 4]
        path.unlink()


def epoch_at(seconds):
    return AfterEpoch(time_s=BEGIN_S + seconds)


def test_lines_of_very_short_epochs_are_flushed_together(path):
    assert line_counts(path, *map(epoch_at, (0, 0.02, 0.04, 0.06, 5.0))) == [1, 1, 1, 4, 5]


def test_the_line_of_an_epoch_is_flushed_although_its_last_update_was_just_before(path):
    events = update_at(0), update_at(10), epoch_at(10.001), update_at(20), update_at(30), epoch_at(30.001)
    assert line_counts(path, *events) == [1, 2, 3, 4, 5, 6]


def test_the_buffer_holds_at_most_a_thousand_lines(path):
    numbers = line_counts(path, *(update_at(number / 1e6) for number in range(2002)))
    assert {after for before, after in pairwise(numbers) if before != after} == {1001, 2001}


def test_buffered_lines_hold_no_tensors(path):
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


def test_buffered_lines_keep_the_values_of_their_event(path):
    metrics, value, values = metrics_file(path), torch.tensor(0.5), {"x": [1]}
    metrics.write(LogScalars({"x": 0}), at(0), update_at(0))
    metrics.write(LogScalars({"x": value, **values}), at(1), update_at(0.1))
    metrics.write(LogScalars({"y": value}), at(2), update_at(0.2))
    value.zero_()  # as in a donated buffer
    values["x"].append(2)
    metrics.close()
    assert [line["metrics"] for line in read(path)] == [{"x": 0}, {"x": [1]}, {"y": 0.5}]


TIMES = st.one_of(st.just(0.0), st.floats(-2, 2, allow_nan=False).map(lambda seconds: BEGIN_S + seconds))

ACTIONS = st.lists(
    st.one_of(
        st.builds(lambda time_s: AfterUpdate(samples=4, time_s=time_s), TIMES),
        st.builds(lambda time_s: AfterUpdate(samples=4, time_s=time_s), TIMES),
        st.builds(lambda time_s: AfterEpoch(time_s=time_s), TIMES),
        st.sampled_from(["flush", "fsync", "close", "another"]),
    ),
    max_size=40,
)


def line_of(update, event):
    """Return the line of an event as an unbuffered write gives it."""
    place = {"event": event_name(event), "epoch": 0, "update": update, "sample": 4 * update, "time_s": event.time_s}
    return (json.dumps({"run": "r", **place, "metrics": {"x": update / 3}}, allow_nan=False) + "\n").encode()


@UNTIMED
@given(ACTIONS)
def test_any_sequence_of_calls_gives_the_same_file_as_unbuffered_writes(tmp_path_factory, actions):
    path = tmp_path_factory.mktemp("log") / "metrics.jsonl"
    disk, expected = Disk(call_without_fsync), b""
    metrics = metrics_file(path, "r", disk)
    for update, action in enumerate(actions):
        if isinstance(action, (AfterUpdate, AfterEpoch)):
            metrics.write(LogScalars({"x": update / 3}), at(update), action)
            expected += line_of(update, action)
        elif action == "another":
            metrics.close()
            metrics = metrics_file(path, "r", disk)
            metrics.truncate(at(len(actions)))
        elif action == "close":
            metrics.close()
        else:
            metrics.flush()
            assert metrics.counts == LogCount(expected.count(b"\n"))
            assert (path.read_bytes() if path.exists() else b"") == expected
            assert action == "flush" or metrics.fsync(metrics.counts) == metrics.counts
        content = path.read_bytes() if path.exists() else b""
        assert expected.startswith(content)
        assert content.endswith(b"\n") or not content
    metrics.close()
    assert (path.read_bytes() if path.exists() else b"") == expected


@UNTIMED
@given(
    st.lists(
        st.tuples(TIMES, st.sampled_from(["no fault", "no fault", "ENOSPC once", "short", "no JSON"])), max_size=30
    )
)
def test_every_line_is_in_the_file_or_counted_as_lost_after_any_faults(tmp_path_factory, actions):
    path = tmp_path_factory.mktemp("log") / "metrics.jsonl"
    failing = []

    def call(function, *arguments):
        if function is os.write and failing:
            if failing.pop() == "short":
                return call_without_fsync(function, arguments[0], arguments[1][: len(arguments[1]) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return call_without_fsync(function, *arguments)

    metrics = metrics_file(path, disk=Disk(call))
    for update, (time_s, fault) in enumerate(actions):
        failing[:] = [fault] if fault in ("ENOSPC once", "short") else []
        values = {"x": object() if fault == "no JSON" else update}
        with suppress(OSError, TypeError):
            metrics.write(LogScalars(values), at(update), AfterUpdate(samples=4, time_s=time_s))
    failing.clear()
    with suppress(TypeError):
        metrics.close()
    lines, lost = metrics.counts
    assert lines + lost == len(actions)
    metrics.write(LogScalars({"x": -1}), at(len(actions)), AfterTraining())  # removes a partial line first
    updates = [line["update"] for line in read(path)]
    assert updates == sorted(set(updates))
    assert len(updates) == lines + 1
    assert not {update for update, (_, fault) in enumerate(actions) if fault == "no JSON"} & set(updates)


@pytest.mark.parametrize("kind", ["short", "ENOSPC once"])
def test_a_failed_flush_loses_all_of_its_lines_and_no_others(path, kind):
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


def test_a_line_that_is_not_json_does_not_affect_other_lines(path):
    lines = LinesFile(path, lambda line, *_: line)
    for update, each in enumerate((0, 1, object(), 3)):
        lines.write({"x": each}, at(update), update_at(update / 10))
    with pytest.raises((TypeError, ValueError), match="not JSON"):
        lines.close()
    assert read(path) == [{"x": 0}, {"x": 1}, {"x": 3}]
    assert lines.counts == LogCount(3, lost=1)


def test_an_error_of_to_line_counts_the_line_as_lost(path):
    lines = LinesFile(path, lambda line, *_: 1 / line)
    with pytest.raises(ZeroDivisionError):
        lines.write(0, at(1), update_at(0))
    assert lines.counts == LogCount(0, lost=1)


@pytest.fixture
def fsync_in_progress(path):
    """A log with a line whose fsync is blocked in another thread until the test ends."""
    has_started, may_finish = threading.Event(), threading.Event()

    def call(function, *arguments):
        if function is fsync and threading.current_thread() is not threading.main_thread():
            has_started.set()
            may_finish.wait()
        return call_without_fsync(function, *arguments)

    metrics = metrics_file(path, disk=Disk(call))
    metrics.write(LogScalars({"x": 0}), at(0), update_at(0))
    thread = threading.Thread(target=metrics.fsync, args=[metrics.counts], daemon=True)
    thread.start()
    has_started.wait()
    yield metrics
    may_finish.set()
    thread.join()


def test_buffering_a_line_does_not_wait_for_a_running_fsync(path, fsync_in_progress):
    fsync_in_progress.write(LogScalars({"x": 1}), at(1), update_at(0.1))  # would block forever
    assert len(read(path)) == 1


def test_flushes_in_another_thread_lose_no_line(path):
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
