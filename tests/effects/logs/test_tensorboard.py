"""TensorBoard: its files, read back, after resumes, kills and errors."""

import errno
import math
import os
import subprocess
import sys
import weakref

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from service_runs import EVENT_KEYS, HISTORY, TIME_S, at, event_type_and_key, log, log_history, open_with
from tensorboard.backend.event_processing import plugin_event_accumulator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from noether import (
    AfterEpoch,
    AfterUpdate,
    LogScalars,
    LogText,
    SaveCheckpoint,
)
from noether.core.tensors.tree import freeze
from noether.effects.disk.calls import Disk
from noether.effects.logs.tensorboard import TensorBoard


def open_with_tensorboard(folder):
    return open_with(folder, TensorBoard(folder / "tensorboard"))


def read_tensorboard(folder):
    everything = {"scalars": 0, "tensors": 0}
    return EventAccumulator(str(folder / "tensorboard"), size_guidance=everything).Reload()


def scalars(read):
    return {tag: [(each.step, each.value) for each in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def texts(read):
    tags = sorted(read.Tags()["tensors"])
    return [(tag, each.step, *each.tensor_proto.string_val) for tag in tags for each in read.Tensors(tag)]


def test_tensorboard_shows_scalars_at_their_update_and_time(folder):
    values = {"loss": torch.tensor(0.5), "lr": 1e-3, "same": True, "a": math.nan, "b": math.inf, "c": -math.inf}
    with open_with_tensorboard(folder) as directory:
        log(directory, at(7, epoch=1), **values)
        log(directory, at(7, epoch=2), AfterEpoch, **{"val/accuracy": 0.25})
    read = read_tensorboard(folder)
    shown = scalars(read)
    assert math.isnan(shown.pop("a")[0][1])
    assert shown == {
        "loss": [(7, 0.5)],
        "lr": [(7, pytest.approx(1e-3))],
        "same": [(7, 1.0)],
        "b": [(7, math.inf)],
        "c": [(7, -math.inf)],
        "val/accuracy": [(7, 0.25)],
    }
    assert {each.wall_time for tag in read.Tags()["scalars"] for each in read.Scalars(tag)} == {TIME_S + 7}


def test_tensorboard_shows_every_text_of_an_event(folder):
    """Under different tags, because TensorBoard shows only the last text per tag and update."""
    with open_with_tensorboard(folder) as directory:
        directory.interpreter([LogText("first"), LogText("zweitens: ä")], at(1), AfterUpdate())
        directory.interpreter([LogText("third")], at(2), AfterUpdate())
        directory.interpreter([LogText("an epoch")], at(2, epoch=1), AfterEpoch())
    assert texts(read_tensorboard(folder)) == [
        ("log/after_epoch", 2, b"an epoch"),
        ("log/after_update", 1, b"first"),
        ("log/after_update", 2, b"third"),
        ("log/after_update/2", 1, "zweitens: ä".encode()),
    ]


def test_tensorboard_falls_back_to_the_clock_without_event_times(folder):
    with open_with_tensorboard(folder) as directory:
        directory.interpreter([LogScalars(freeze({"loss": 1}))], at(1), AfterUpdate())
    assert read_tensorboard(folder).Scalars("loss")[0].wall_time > TIME_S


@settings(suppress_health_check=[HealthCheck.too_slow], max_examples=30)
@given(ends=st.lists(st.tuples(st.integers(0, len(HISTORY)), st.integers(0, len(HISTORY))), min_size=1, max_size=4))
@example(ends=[(0, 9), (8, 10)])  # resumes after the last epoch, before the end of training
@example(ends=[(0, 9), (9, 10)])  # resumes after the end of training
def test_tensorboard_shows_every_event_once_after_any_resumes(tmp_path_factory, ends):
    """With its latest value, and with increasing steps."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    latest = []
    for value, (back_to, end) in enumerate(ends):
        resumed = min(back_to, len(latest))
        with open_with_tensorboard(folder) as directory:
            directory.truncate_logs(None if resumed == 0 else HISTORY[resumed - 1])
            log_history(directory, range(resumed, end), value)
        if resumed < end:  # only a process that logs truncates
            latest = [*latest[:resumed], *[value] * (end - resumed)]
    (folder / "tensorboard").mkdir(exist_ok=True)  # missing if nothing was logged
    read = read_tensorboard(folder)
    expected = {key: [] for _, key in EVENT_KEYS}
    for state, value in zip(HISTORY, latest, strict=False):
        expected[event_type_and_key(state)[1]].append((state.iteration.update, float(value)))
    assert scalars(read) == {key: values for key, values in expected.items() if values}
    assert sorted(int(text) for *_, text in texts(read)) == sorted(latest)


def test_tensorboard_replaces_values_that_a_resumed_run_logs_again(folder):
    """Including an epoch that had not ended at the checkpoint, but has the same update."""
    with open_with_tensorboard(folder) as directory:
        log_history(directory, range(3), 1.0)
        directory.interpreter([SaveCheckpoint()], HISTORY[2], AfterUpdate())
        log_history(directory, range(3, 6), 1.0)
    assert scalars(read_tensorboard(folder))["val"] == [(3, 1.0)]
    with open_with_tensorboard(folder) as directory:
        assert directory.resume().iteration == HISTORY[2].iteration
        log_history(directory, range(3, 6), 2.0)
    expected = {"loss": [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0), (5, 2.0)], "val": [(3, 2.0)]}
    assert scalars(read_tensorboard(folder)) == expected
    assert len(event_files(folder)) == 2


KILLED = """\
import os
from pathlib import Path
from noether import AfterUpdate, LogScalars, SaveCheckpoint, TrainState
from noether.core.tensors.tree import freeze
from noether.effects import open_run
from noether.effects.logs.tensorboard import TensorBoard
state, event = TrainState(), AfterUpdate(time_s=1.6e9)
directory = open_run({path!r}, services=[TensorBoard(Path({path!r}, "tensorboard"))])
for update in range(1, 6):
    state = state.advance(samples=4)
    directory.interpreter([LogScalars(freeze(dict(loss=1.0))), *[SaveCheckpoint()] * (update == 2)], state, event)
os._exit(9)
"""


def test_tensorboard_replaces_values_after_a_kill(folder):
    script = KILLED.format(path=str(folder))
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 9
    assert scalars(read_tensorboard(folder))["loss"] == [(update, 1.0) for update in (1, 2, 3, 4, 5)]
    with open_with_tensorboard(folder) as directory:
        assert directory.resume().iteration == HISTORY[1].iteration
        log_history(directory, range(2, 4), 2.0)
    assert scalars(read_tensorboard(folder)) == {"loss": [(1, 1.0), (2, 1.0), (3, 2.0)], "val": [(3, 2.0)]}


def event_files(folder):
    return sorted((folder / "tensorboard").iterdir())


TORN = {
    "a part is missing": lambda content: content[:-20],
    "a byte is missing": lambda content: content[:-1],
    "zeros for a part": lambda content: content[:-20] + bytes(20),
    "zeros after it": lambda content: content + bytes(64),
}


@pytest.mark.parametrize("tear", TORN.values(), ids=TORN)
def test_tensorboard_reads_records_after_a_partial_one_from_a_crash(folder, tear):
    with open_with_tensorboard(folder) as directory:
        log_history(directory, range(1), 1.0)
        (path,) = event_files(folder)
        intact = path.read_bytes()
        log(directory, HISTORY[0], torn=1.0)
    content = path.read_bytes()
    path.write_bytes(tear(content))
    lost = not tear(content).startswith(content)
    with open_with_tensorboard(folder) as directory:
        directory.truncate_logs(HISTORY[0])
        log_history(directory, range(1, 3), 2.0)
    shown = {"loss": [(1, 1.0), (2, 2.0), (3, 2.0)], "torn": [(1, 1.0)]}
    if lost:
        del shown["torn"]
    assert scalars(read_tensorboard(folder)) == shown
    assert path.read_bytes() == (intact if lost else content)


def test_tensorboard_shows_only_the_new_run_after_a_restart(folder):
    with open_with_tensorboard(folder) as directory:
        log_history(directory, range(6), 1.0)
    with open_with_tensorboard(folder) as directory:
        assert directory.resume() is None
        log(directory, at(2), other=2.0)
    read = read_tensorboard(folder)
    assert scalars(read) == {"other": [(2, 2.0)]}
    assert texts(read) == []


def test_files_of_other_writers_are_not_changed(folder):
    with open_with_tensorboard(folder) as directory:
        log_history(directory, range(2), 1.0)
    other = folder / "tensorboard/events.out.tfevents.1700000000.host.1.0"
    content = event_files(folder)[0].read_bytes()
    other.write_bytes(content)
    with open_with_tensorboard(folder) as directory:
        directory.truncate_logs(None)
        log_history(directory, range(1), 2.0)
    assert other.read_bytes() == content


def test_tensorboard_reads_files_in_order_after_the_clock_was_set_back(folder):
    with open_with_tensorboard(folder) as directory:
        directory.interpreter([LogScalars(freeze({"loss": 1.0}))], at(1), AfterUpdate(time_s=TIME_S))
    with open_with_tensorboard(folder) as directory:
        directory.truncate_logs(at(1))
        directory.interpreter([LogScalars(freeze({"loss": 2.0}))], at(2), AfterUpdate(time_s=TIME_S - 3600))
    assert scalars(read_tensorboard(folder)) == {"loss": [(1, 1.0), (2, 2.0)]}


def test_a_running_tensorboard_discards_truncated_values(folder):
    with open_with_tensorboard(folder) as directory:
        log_history(directory, range(6), 1.0)
    read = plugin_event_accumulator.EventAccumulator(str(folder / "tensorboard"))  # the data source of its pages

    def shown():
        read.Reload()
        return {
            tag: [(each.step, each.tensor_proto.float_val[0]) for each in read.Tensors(tag)] for tag in ("loss", "val")
        }

    assert shown() == {"loss": [(update, 1.0) for update in (1, 2, 3, 4, 5)], "val": [(3, 1.0)]}
    with open_with_tensorboard(folder) as directory:
        directory.truncate_logs(HISTORY[1])
        log_history(directory, range(2, 3), 2.0)
    assert shown() == {"loss": [(1, 1.0), (2, 1.0), (3, 2.0)], "val": []}
    with open_with_tensorboard(folder) as directory:
        directory.truncate_logs(None)
        log_history(directory, range(1), 3.0)
    assert shown() == {"loss": [(1, 3.0)], "val": []}


def test_values_logged_after_the_run_is_opened_again_are_added(folder):
    for place in (0, 1):
        with open_with_tensorboard(folder) as directory:
            log_history(directory, [place], 1.0)
    assert scalars(read_tensorboard(folder)) == {"loss": [(1, 1.0), (2, 1.0)]}


def test_a_process_that_does_not_log_does_not_truncate(folder):
    """Other ranks call `resume`, too, and close after rank 0 has logged more."""
    board = TensorBoard(folder / "tensorboard")
    board.resume(HISTORY[0])
    with open_with_tensorboard(folder) as directory:
        log_history(directory, range(6), 1.0)
    before = [path.read_bytes() for path in event_files(folder)]
    board.flush()
    board.close()
    assert [path.read_bytes() for path in event_files(folder)] == before


@pytest.mark.parametrize("taken", [0, 10])
def test_tensorboard_shows_values_logged_after_a_full_disk(folder, taken, caplog):
    full = []

    def call(function, *arguments):
        if function is os.write and full:
            if taken == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return function(arguments[0], arguments[1][:taken])
        return function(*arguments)

    directory = open_with(folder, TensorBoard(folder / "tensorboard", Disk(call)))
    full.append(True)
    log(directory, at(1), loss=1.0)
    full.clear()
    log(directory, at(2), loss=2.0)
    full.append(True)
    log(directory, at(3), loss=3.0)
    full.clear()
    log(directory, at(4), loss=4.0)
    directory.close()
    assert scalars(read_tensorboard(folder)) == {"loss": [(2, 2.0), (4, 4.0)]}
    first, total = caplog.messages
    assert first.startswith("tensorboard failed and may have lost log entries; training continues: OSError: [Errno 28]")
    assert total == "tensorboard failed 2 times in total"
    assert len(event_files(folder)) == 1


def test_the_state_of_a_resume_is_not_kept_alive(folder):
    params = {"weight": torch.ones(1)}
    kept = weakref.ref(params["weight"])
    with open_with_tensorboard(folder) as directory:
        directory.truncate_logs(at(1, params=params))
        del params
        assert kept() is None
