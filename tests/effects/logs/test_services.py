"""TensorBoard and Weights & Biases: their files, read back, after resumes and errors."""

import errno
import json
import math
import os
import socket
import struct
import subprocess
import sys
import weakref

import pytest
import torch
import wandb
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing import plugin_event_accumulator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto.wandb_internal_pb2 import Record

from noether import (
    AfterEpoch,
    AfterTraining,
    AfterUpdate,
    LogScalars,
    LogText,
    Run,
    SaveCheckpoint,
    SetSummary,
    TrainingIteration,
    TrainState,
)
from noether.core.tensors.tree import freeze
from noether.effects import open_run
from noether.effects.disk.calls import Disk
from noether.effects.logs.tensorboard import TensorBoard
from noether.effects.logs.wandb import WeightsAndBiases

TIME_S = 1.6e9  # the same in every process, as for processes that start within one second


def at(update, epoch=0, **fields):
    return TrainState(iteration=TrainingIteration(epoch=epoch, update=update, sample=4 * update), **fields)


def log(run, state, event_type=AfterUpdate, **values):
    run.interpreter([LogScalars(freeze(values))], state, event_type(time_s=TIME_S + state.iteration.update))


@pytest.fixture
def directory(tmp_path):
    return tmp_path / "run"


def open_with(directory, *services):
    return open_run(directory, services=services)


def open_with_tensorboard(directory):
    return open_with(directory, TensorBoard(directory / "tensorboard"))


def read_tensorboard(directory):
    everything = {"scalars": 0, "tensors": 0}
    return EventAccumulator(str(directory / "tensorboard"), size_guidance=everything).Reload()


def scalars(read):
    return {tag: [(each.step, each.value) for each in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def texts(read):
    tags = sorted(read.Tags()["tensors"])
    return [(tag, each.step, *each.tensor_proto.string_val) for tag in tags for each in read.Tensors(tag)]


def test_tensorboard_shows_scalars_at_their_update_and_time(directory):
    values = {"loss": torch.tensor(0.5), "lr": 1e-3, "same": True, "a": math.nan, "b": math.inf, "c": -math.inf}
    with open_with_tensorboard(directory) as run:
        log(run, at(7, epoch=1), **values)
        log(run, at(7, epoch=2), AfterEpoch, **{"val/accuracy": 0.25})
    read = read_tensorboard(directory)
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


def test_tensorboard_shows_every_text_of_an_event(directory):
    """Under different tags, because TensorBoard shows only the last text per tag and update."""
    with open_with_tensorboard(directory) as run:
        run.interpreter([LogText("first"), LogText("zweitens: ä")], at(1), AfterUpdate())
        run.interpreter([LogText("third")], at(2), AfterUpdate())
        run.interpreter([LogText("an epoch")], at(2, epoch=1), AfterEpoch())
    assert texts(read_tensorboard(directory)) == [
        ("log/after_epoch", 2, b"an epoch"),
        ("log/after_update", 1, b"first"),
        ("log/after_update", 2, b"third"),
        ("log/after_update/2", 1, "zweitens: ä".encode()),
    ]


def test_tensorboard_falls_back_to_the_clock_without_event_times(directory):
    with open_with_tensorboard(directory) as run:
        run.interpreter([LogScalars(freeze({"loss": 1}))], at(1), AfterUpdate())
    assert read_tensorboard(directory).Scalars("loss")[0].wall_time > TIME_S


# Two epochs of three updates, the end of training at the last update, and an update of the extended run.
HISTORY = [
    *(at(update) for update in (1, 2, 3)),
    at(3, epoch=1),
    *(at(update, epoch=1) for update in (4, 5, 6)),
    at(6, epoch=2),
    at(6, epoch=2, ended=True),
    at(7, epoch=2),
]
KINDS = [(AfterUpdate, "loss"), (AfterEpoch, "val"), (AfterTraining, "test")]


def event_type_and_key(state):
    return KINDS[2 if state.ended else int(state.iteration.update == 3 * state.iteration.epoch)]


def log_history(run, places, value):
    for place in places:
        event_type, key = event_type_and_key(HISTORY[place])
        log(run, HISTORY[place], event_type, **{key: value})
        run.interpreter([LogText(str(value))], HISTORY[place], event_type(time_s=TIME_S))


@settings(suppress_health_check=[HealthCheck.too_slow], max_examples=30)
@given(ends=st.lists(st.tuples(st.integers(0, len(HISTORY)), st.integers(0, len(HISTORY))), min_size=1, max_size=4))
@example(ends=[(0, 9), (8, 10)])  # resumes after the last epoch, before the end of training
@example(ends=[(0, 9), (9, 10)])  # resumes after the end of training
def test_tensorboard_shows_every_event_once_after_any_resumes(tmp_path_factory, ends):
    """With its latest value, and with increasing steps."""
    directory = tmp_path_factory.mktemp("runs") / "run"
    latest = []
    for value, (back_to, end) in enumerate(ends):
        resumed = min(back_to, len(latest))
        with open_with_tensorboard(directory) as run:
            run.truncate_logs(None if resumed == 0 else HISTORY[resumed - 1])
            log_history(run, range(resumed, end), value)
        if resumed < end:  # only a process that logs truncates
            latest = [*latest[:resumed], *[value] * (end - resumed)]
    (directory / "tensorboard").mkdir(exist_ok=True)  # missing if nothing was logged
    read = read_tensorboard(directory)
    expected = {key: [] for _, key in KINDS}
    for state, value in zip(HISTORY, latest, strict=False):
        expected[event_type_and_key(state)[1]].append((state.iteration.update, float(value)))
    assert scalars(read) == {key: values for key, values in expected.items() if values}
    assert sorted(int(text) for *_, text in texts(read)) == sorted(latest)


def test_tensorboard_replaces_values_that_a_resumed_run_logs_again(directory):
    """Including an epoch that had not ended at the checkpoint, but has the same update."""
    with open_with_tensorboard(directory) as run:
        log_history(run, range(3), 1.0)
        run.interpreter([SaveCheckpoint()], HISTORY[2], AfterUpdate())
        log_history(run, range(3, 6), 1.0)
    assert scalars(read_tensorboard(directory))["val"] == [(3, 1.0)]
    with open_with_tensorboard(directory) as run:
        assert run.resume().iteration == HISTORY[2].iteration
        log_history(run, range(3, 6), 2.0)
    expected = {"loss": [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0), (5, 2.0)], "val": [(3, 2.0)]}
    assert scalars(read_tensorboard(directory)) == expected
    assert len(event_files(directory)) == 2


KILLED = """\
import os
from pathlib import Path
from noether import AfterUpdate, LogScalars, SaveCheckpoint, TrainState
from noether.core.tensors.tree import freeze
from noether.effects import open_run
from noether.effects.logs.tensorboard import TensorBoard
state, event = TrainState(), AfterUpdate(time_s=1.6e9)
run = open_run({path!r}, services=[TensorBoard(Path({path!r}, "tensorboard"))])
for update in range(1, 6):
    state = state.advance(samples=4)
    run.interpreter([LogScalars(freeze(dict(loss=1.0))), *[SaveCheckpoint()] * (update == 2)], state, event)
os._exit(9)
"""


def test_tensorboard_replaces_values_after_a_kill(directory):
    script = KILLED.format(path=str(directory))
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 9
    assert scalars(read_tensorboard(directory))["loss"] == [(update, 1.0) for update in (1, 2, 3, 4, 5)]
    with open_with_tensorboard(directory) as run:
        assert run.resume().iteration == HISTORY[1].iteration
        log_history(run, range(2, 4), 2.0)
    assert scalars(read_tensorboard(directory)) == {"loss": [(1, 1.0), (2, 1.0), (3, 2.0)], "val": [(3, 2.0)]}


def event_files(directory):
    return sorted((directory / "tensorboard").iterdir())


TORN = {
    "a part is missing": lambda content: content[:-20],
    "a byte is missing": lambda content: content[:-1],
    "zeros for a part": lambda content: content[:-20] + bytes(20),
    "zeros after it": lambda content: content + bytes(64),
}


@pytest.mark.parametrize("tear", TORN.values(), ids=TORN)
def test_tensorboard_reads_records_after_a_partial_one_from_a_crash(directory, tear):
    with open_with_tensorboard(directory) as run:
        log_history(run, range(1), 1.0)
        (path,) = event_files(directory)
        intact = path.read_bytes()
        log(run, HISTORY[0], torn=1.0)
    content = path.read_bytes()
    path.write_bytes(tear(content))
    lost = not tear(content).startswith(content)
    with open_with_tensorboard(directory) as run:
        run.truncate_logs(HISTORY[0])
        log_history(run, range(1, 3), 2.0)
    shown = {"loss": [(1, 1.0), (2, 2.0), (3, 2.0)], "torn": [(1, 1.0)]}
    if lost:
        del shown["torn"]
    assert scalars(read_tensorboard(directory)) == shown
    assert path.read_bytes() == (intact if lost else content)


def test_tensorboard_shows_only_the_new_run_after_a_restart(directory):
    with open_with_tensorboard(directory) as run:
        log_history(run, range(6), 1.0)
    with open_with_tensorboard(directory) as run:
        assert run.resume() is None
        log(run, at(2), other=2.0)
    read = read_tensorboard(directory)
    assert scalars(read) == {"other": [(2, 2.0)]}
    assert texts(read) == []


def test_files_of_other_writers_are_not_changed(directory):
    with open_with_tensorboard(directory) as run:
        log_history(run, range(2), 1.0)
    other = directory / "tensorboard/events.out.tfevents.1700000000.host.1.0"
    content = event_files(directory)[0].read_bytes()
    other.write_bytes(content)
    with open_with_tensorboard(directory) as run:
        run.truncate_logs(None)
        log_history(run, range(1), 2.0)
    assert other.read_bytes() == content


def test_tensorboard_reads_files_in_order_after_the_clock_was_set_back(directory):
    with open_with_tensorboard(directory) as run:
        run.interpreter([LogScalars(freeze({"loss": 1.0}))], at(1), AfterUpdate(time_s=TIME_S))
    with open_with_tensorboard(directory) as run:
        run.truncate_logs(at(1))
        run.interpreter([LogScalars(freeze({"loss": 2.0}))], at(2), AfterUpdate(time_s=TIME_S - 3600))
    assert scalars(read_tensorboard(directory)) == {"loss": [(1, 1.0), (2, 2.0)]}


def test_a_running_tensorboard_discards_truncated_values(directory):
    with open_with_tensorboard(directory) as run:
        log_history(run, range(6), 1.0)
    read = plugin_event_accumulator.EventAccumulator(str(directory / "tensorboard"))  # the data source of its pages

    def shown():
        read.Reload()
        return {
            tag: [(each.step, each.tensor_proto.float_val[0]) for each in read.Tensors(tag)] for tag in ("loss", "val")
        }

    assert shown() == {"loss": [(update, 1.0) for update in (1, 2, 3, 4, 5)], "val": [(3, 1.0)]}
    with open_with_tensorboard(directory) as run:
        run.truncate_logs(HISTORY[1])
        log_history(run, range(2, 3), 2.0)
    assert shown() == {"loss": [(1, 1.0), (2, 1.0), (3, 2.0)], "val": []}
    with open_with_tensorboard(directory) as run:
        run.truncate_logs(None)
        log_history(run, range(1), 3.0)
    assert shown() == {"loss": [(1, 3.0)], "val": []}


def test_values_logged_after_close_are_added(directory):
    run = open_with_tensorboard(directory)
    run.truncate_logs(None)
    log_history(run, range(1), 1.0)
    run.close()
    log_history(run, range(1, 2), 1.0)
    run.close()
    assert scalars(read_tensorboard(directory)) == {"loss": [(1, 1.0), (2, 1.0)]}


def test_a_process_that_does_not_log_does_not_truncate(directory):
    """Other ranks call `resume`, too, and close after rank 0 has logged more."""
    board = TensorBoard(directory / "tensorboard")
    board.resume(HISTORY[0])
    with open_with_tensorboard(directory) as run:
        log_history(run, range(6), 1.0)
    before = [path.read_bytes() for path in event_files(directory)]
    board.flush()
    board.close()
    assert [path.read_bytes() for path in event_files(directory)] == before


@pytest.mark.parametrize("taken", [0, 10])
def test_tensorboard_shows_values_logged_after_a_full_disk(directory, taken, caplog):
    full = []

    def call(function, *arguments):
        if function is os.write and full:
            if taken == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return function(arguments[0], arguments[1][:taken])
        return function(*arguments)

    run = open_with(directory, TensorBoard(directory / "tensorboard", Disk(call)))
    full.append(True)
    log(run, at(1), loss=1.0)
    full.clear()
    log(run, at(2), loss=2.0)
    full.append(True)
    log(run, at(3), loss=3.0)
    full.clear()
    log(run, at(4), loss=4.0)
    run.close()
    assert scalars(read_tensorboard(directory)) == {"loss": [(2, 2.0), (4, 4.0)]}
    first, total = caplog.messages
    assert first.startswith("tensorboard failed and may have lost log entries; training continues: OSError: [Errno 28]")
    assert total == "tensorboard failed 2 times in total"
    assert len(event_files(directory)) == 1


@pytest.fixture
def logged_out(monkeypatch, tmp_path):
    """Without a login; requests to the service would reach a local socket, and there must be none."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "settings"))
        monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
        monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
        monkeypatch.setenv("WANDB_SILENT", "true")
        monkeypatch.delenv("WANDB_API_KEY", raising=False)
        yield
        wandb.teardown()  # ends the process of wandb
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()


def open_with_wandb(directory, run_id="digits-1", **options):
    return open_with(directory, WeightsAndBiases(directory / "wandb", run_id, mode="offline", **options))


def offline_records(directory):
    """Return the records that each process left for `wandb sync`, in order."""
    paths = sorted((directory / "wandb").rglob("run-*.wandb"), key=lambda path: path.stat().st_mtime_ns)
    return [list(decode_records(path.read_bytes())) for path in paths]


def decode_records(content):
    """Yield the records of an offline run in the log format of LevelDB: parts of records in 32 KiB blocks."""
    position, parts = 7, b""
    while position < len(content):
        if (left := -position % 32768) in range(1, 7):
            position += left
            continue
        size, part = struct.unpack_from("<HB", content, position + 4)
        parts += content[position + 7 : position + 7 + size]
        position += 7 + size
        if part in {1, 4}:  # a whole record, or the last part of one
            yield Record.FromString(parts)
            parts = b""


def by_name(items):
    return {each.key or "/".join(each.nested_key): json.loads(each.value_json) for each in items}


def select_records(content, name):
    return [getattr(each, name) for each in content if each.WhichOneof("record_type") == name]


def rows(directory):
    """Return the rows of the history, without the columns that wandb adds."""
    read = [by_name(each.item) for content in offline_records(directory) for each in select_records(content, "history")]
    return [{key: value for key, value in row.items() if not key.startswith("_")} for row in read]


def test_wandb_stores_scalars_summary_and_configuration_offline(directory, logged_out):
    run_info = Run(config=freeze({"optimizer": {"lr": 0.1, "betas": [0.9, 0.99]}}))
    with open_with_wandb(directory, project="digits") as run:
        entries = {"best": torch.tensor(0.75), "worst": math.nan, "limits": (1, math.inf), "config": {"lr": 0.1}}
        run.interpreter([SetSummary(freeze(entries)), LogText("hello")], at(0), AfterUpdate(run=run_info))
        log(run, at(7, epoch=1), **{"loss/total": torch.tensor(0.5), "a": math.nan, "b": -math.inf})
        log(run, at(7, epoch=2), AfterEpoch, **{"val/accuracy": 0.25})
    (content,) = offline_records(directory)
    (start,) = select_records(content, "run")
    assert (start.run_id, start.display_name, start.project) == ("digits-1", "digits-1", "digits")
    assert by_name(start.config.update)["optimizer"] == {"lr": 0.1, "betas": [0.9, 0.99]}
    (charts,) = select_records(content, "metric")
    assert (charts.glob_name, charts.step_metric, charts.options.step_sync) == ("*", "update", True)
    first, second = rows(directory)
    assert math.isnan(first.pop("a"))
    assert first == {"loss/total": 0.5, "b": -math.inf, "epoch": 1, "update": 7, "sample": 28}
    assert second == {"val/accuracy": 0.25, "epoch": 2, "update": 7, "sample": 28}
    kept = {key: value for each in select_records(content, "summary") for key, value in by_name(each.update).items()}
    assert {key: kept[key] for key in entries} == {
        "best": 0.75,
        "worst": "NaN",  # as a string, because the service does not accept NaN
        "limits": [1, "Infinity"],
        "config": {"lr": 0.1},
    }


def test_wandb_has_the_right_updates_after_a_resume(directory, logged_out):
    """Values measured again appear twice, at the same update of the same run."""
    with open_with_wandb(directory) as run:
        log_history(run, range(2), 1.0)
        run.interpreter([SaveCheckpoint()], HISTORY[1], AfterUpdate())
        log_history(run, range(2, 6), 1.0)
    with open_with_wandb(directory) as run:
        run.resume()
        log_history(run, range(2, 5), 2.0)
    shown = [(row["update"], row.get("loss", row.get("val"))) for row in rows(directory)]
    before = [(1, 1.0), (2, 1.0), (3, 1.0), (3, 1.0), (4, 1.0), (5, 1.0)]
    assert shown == [*before, (3, 2.0), (3, 2.0), (4, 2.0)]
    starts = [each for content in offline_records(directory) for each in select_records(content, "run")]
    assert [(each.run_id, each.resume) for each in starts] == [("digits-1", True)] * 2


def test_wandb_separates_runs_that_are_open_at_the_same_time(tmp_path, logged_out):
    with open_with_wandb(tmp_path / "one", "one") as one, open_with_wandb(tmp_path / "two", "two") as two:
        log(one, at(1), loss=1.0)
        log(two, at(2), loss=2.0)
        log(one, at(3), loss=3.0)
    losses = {name: [row["loss"] for row in rows(tmp_path / name)] for name in ("one", "two")}
    assert losses == {"one": [1.0, 3.0], "two": [2.0]}


def test_values_that_users_log_to_wandb_appear_in_the_run(directory, logged_out):
    with open_with_wandb(directory) as run:
        log(run, at(1), loss=1.0)
        wandb.log({"mine": 2.0})
    assert rows(directory)[1] == {"mine": 2.0, "update": 1}


class Broken:
    """A service whose methods all fail."""

    name = "broken"

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        def fail(*_):
            self.calls.append(name)
            raise ConnectionError(f"no route to host for {name}")

        return fail


def log_and_save(run, state):
    """Log every effect that goes to a service, and save a checkpoint."""
    effects = [LogText("hello"), LogScalars(freeze({"loss": 0.5})), SetSummary(freeze({"best": 1})), SaveCheckpoint()]
    run.interpreter(effects, state, AfterUpdate(time_s=TIME_S))


def test_a_failing_service_stops_neither_training_nor_a_save(directory, caplog):
    broken = Broken()
    with open_with(directory, broken) as run:
        for update in (1, 2, 3):
            log_and_save(run, at(update))
        assert caplog.messages == [
            (
                "broken failed and may have lost log entries; training continues: "
                "ConnectionError: no route to host for log_text"
            )
        ]
    assert broken.calls == ["log_text", "log_scalars", "set_summary", "flush"] * 3 + ["close"]
    assert caplog.messages[1:] == ["broken failed 13 times in total"]
    with open_with(directory) as run:
        assert run.load().iteration == at(3).iteration
    assert len((directory / "metrics.jsonl").read_text().splitlines()) == 3


def test_a_service_that_fails_to_resume_does_not_stop_the_run(directory, caplog):
    with open_with(directory) as run:
        log_and_save(run, at(1))
    with open_with(directory, Broken()) as run:
        assert run.resume().iteration == at(1).iteration
        log_and_save(run, at(2))
    assert caplog.messages[-1] == "broken failed 6 times in total"


SERVICES = {
    "tensorboard": TensorBoard,
    "wandb": lambda path: WeightsAndBiases(path, "digits-1", mode="offline"),
}


@pytest.mark.parametrize("name", SERVICES)
@pytest.mark.parametrize("blocked_path", ["the directory", "above it"])
def test_an_unwritable_directory_stops_neither_training_nor_a_save(directory, name, blocked_path, logged_out, caplog):
    """Blocked by a file, because permissions do not apply to root."""
    path = directory / name if blocked_path == "the directory" else directory / "file" / name
    file = path if blocked_path == "the directory" else path.parent
    file.parent.mkdir(parents=True)
    file.touch()
    with open_with(directory, SERVICES[name](path)) as run:
        run.truncate_logs(None)
        for update in (1, 2, 3):
            log_and_save(run, at(update))
    first, total = caplog.messages
    assert first.startswith(f"{name} failed and may have lost log entries; training continues: ")
    assert str(path) in first or str(file) in first
    assert total == f"{name} failed 6 times in total"
    with open_with(directory) as run:
        assert run.load().iteration == at(3).iteration
    assert file.read_bytes() == b""


def test_a_failed_service_keeps_no_state_alive(directory, logged_out):
    """Otherwise the params of every logged update would stay in memory."""
    directory.mkdir()
    (directory / "wandb").touch()
    run, kept = open_with_wandb(directory), []
    for update in (1, 2, 3):
        params = {"weight": torch.ones(1)}
        kept.append(weakref.ref(params["weight"]))
        log(run, at(update, params=params), loss=1.0)
        del params
        (directory / "wandb").unlink(missing_ok=True)
    assert [each() for each in kept] == [None] * 3
    assert not (directory / "wandb").exists()  # it is not tried again, which may take a minute and a half each time
    run.close()


def test_the_state_of_a_resume_is_not_kept_alive(directory):
    params = {"weight": torch.ones(1)}
    kept = weakref.ref(params["weight"])
    with open_with_tensorboard(directory) as run:
        run.truncate_logs(at(1, params=params))
        del params
        assert kept() is None
