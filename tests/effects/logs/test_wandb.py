"""Weights & Biases: its offline files, read back, after resumes."""

import json
import math
import struct
from contextlib import suppress
from time import sleep

import torch
import wandb
from google.protobuf.message import DecodeError
from service_runs import HISTORY, at, log, log_history, open_with_wandb
from wandb.proto.wandb_internal_pb2 import Record

from noether import (
    AfterEpoch,
    AfterUpdate,
    LogText,
    Run,
    SaveCheckpoint,
    SetSummary,
)
from noether.core.tensors.tree import freeze


def offline_records(folder, processes=1):
    """Return the records that each process left for `wandb sync`, in order.

    The service of wandb writes them, and on a busy machine it may end a file after `finish` has returned.
    """
    for _ in range(600):
        paths = sorted((folder / "wandb").rglob("run-*.wandb"), key=lambda path: path.stat().st_mtime_ns)
        with suppress(struct.error, DecodeError):  # of a record that is being written
            records = [list(decode_records(path.read_bytes())) for path in paths]
            if len(records) == processes and all(select_records(each, "exit") for each in records):
                return records
        sleep(0.1)
    raise AssertionError(f"wandb has not ended its files: {paths}")


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


def rows(folder, processes=1):
    """Return the rows of the history, without the columns that wandb adds."""
    contents = offline_records(folder, processes)
    read = [by_name(each.item) for content in contents for each in select_records(content, "history")]
    return [{key: value for key, value in row.items() if not key.startswith("_")} for row in read]


def test_wandb_stores_scalars_summary_and_configuration_offline(folder, logged_out):
    run_info = Run(config=freeze({"optimizer": {"lr": 0.1, "betas": [0.9, 0.99]}}))
    with open_with_wandb(folder, project="digits") as directory:
        entries = {"best": torch.tensor(0.75), "worst": math.nan, "limits": (1, math.inf), "config": {"lr": 0.1}}
        directory.interpreter([SetSummary(freeze(entries)), LogText("hello")], at(0), AfterUpdate(run=run_info))
        log(directory, at(7, epoch=1), **{"loss/total": torch.tensor(0.5), "a": math.nan, "b": -math.inf})
        log(directory, at(7, epoch=2), AfterEpoch, **{"val/accuracy": 0.25})
    (content,) = offline_records(folder)
    (start,) = select_records(content, "run")
    assert (start.run_id, start.display_name, start.project) == ("digits-1", "digits-1", "digits")
    assert by_name(start.config.update)["optimizer"] == {"lr": 0.1, "betas": [0.9, 0.99]}
    (charts,) = select_records(content, "metric")
    assert (charts.glob_name, charts.step_metric, charts.options.step_sync) == ("*", "update", True)
    first, second = rows(folder)
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


def test_wandb_has_the_right_updates_after_a_resume(folder, logged_out):
    """Values measured again appear twice, at the same update of the same run."""
    with open_with_wandb(folder) as directory:
        log_history(directory, range(2), 1.0)
        directory.interpreter([SaveCheckpoint()], HISTORY[1], AfterUpdate())
        log_history(directory, range(2, 6), 1.0)
    with open_with_wandb(folder) as directory:
        directory.resume()
        log_history(directory, range(2, 5), 2.0)
    shown = [(row["update"], row.get("loss", row.get("val"))) for row in rows(folder, processes=2)]
    before = [(1, 1.0), (2, 1.0), (3, 1.0), (3, 1.0), (4, 1.0), (5, 1.0)]
    assert shown == [*before, (3, 2.0), (3, 2.0), (4, 2.0)]
    starts = [each for content in offline_records(folder, processes=2) for each in select_records(content, "run")]
    assert [(each.run_id, each.resume) for each in starts] == [("digits-1", True)] * 2


def test_wandb_separates_runs_that_are_open_at_the_same_time(tmp_path, logged_out):
    with open_with_wandb(tmp_path / "one", "one") as one, open_with_wandb(tmp_path / "two", "two") as two:
        log(one, at(1), loss=1.0)
        log(two, at(2), loss=2.0)
        log(one, at(3), loss=3.0)
    losses = {name: [row["loss"] for row in rows(tmp_path / name)] for name in ("one", "two")}
    assert losses == {"one": [1.0, 3.0], "two": [2.0]}


def test_values_that_users_log_to_wandb_appear_in_the_run(folder, logged_out):
    with open_with_wandb(folder) as directory:
        log(directory, at(1), loss=1.0)
        wandb.log({"mine": 2.0})
    assert rows(folder)[1] == {"mine": 2.0, "update": 1}
