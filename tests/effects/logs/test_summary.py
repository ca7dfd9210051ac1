"""`summary.json`: entries are buffered, merged with the file, and never lost."""

import json
import math
import subprocess
import sys

import pytest
import torch
from faults import Faults, call_without_fsync
from log_files import at, refuse

from noether import (
    AfterEpoch,
    AfterTraining,
    AfterUpdate,
    SetSummary,
)
from noether.core.tensors.tree import freeze
from noether.effects import open_run
from noether.effects.disk.calls import Disk
from noether.effects.logs.summary import Summary


def test_earlier_entries_stay_in_the_summary(tmp_path):
    path = tmp_path / "summary.json"
    Summary(path).set(SetSummary({"a": 1, "b": torch.tensor(2.0)}), at(1), AfterTraining())
    Summary(path).set(SetSummary({"b": math.nan, "c": "x"}), at(2), AfterTraining())
    assert json.loads(path.read_text(), parse_constant=refuse) == {"a": 1, "b": "NaN", "c": "x"}


def test_the_summary_accepts_nested_values(tmp_path):
    """Such as a configuration, including infinite limits."""
    tree = {"config": {"limits": (math.inf, 1), "deep": [{"x": torch.tensor(3)}]}}
    Summary(tmp_path / "summary.json").set(SetSummary(freeze(tree)), at(1), AfterTraining())
    text = (tmp_path / "summary.json").read_text()
    assert json.loads(text, parse_constant=refuse) == {"config": {"limits": ["Infinity", 1], "deep": [{"x": 3}]}}


def set_entries(summary, **values):
    summary.set(SetSummary(values), at(1), AfterTraining())


def test_the_summary_file_is_read_once(tmp_path):
    path, calls = tmp_path / "summary.json", []

    def call(function, *arguments):
        calls.append(function.__name__)
        return call_without_fsync(function, *arguments)

    set_entries(Summary(path), a=1)
    summary = Summary(path, Disk(call))
    set_entries(summary, a=1)
    assert "read" in calls
    calls.clear()
    set_entries(summary, a=1)
    assert calls == []
    set_entries(summary, b=2)
    assert "read" not in calls
    assert json.loads(path.read_text()) == {"a": 1, "b": 2}


def test_an_entry_that_could_not_be_written_is_written_the_next_time(tmp_path):
    path, faults = tmp_path / "summary.json", Faults()
    summary = Summary(path, Disk(faults))
    set_entries(summary, a=1)
    faults.arm(0, "ENOSPC from then on")
    with pytest.raises(OSError, match="No space left on device"):
        set_entries(summary, b=2)
    faults.armed = False
    assert json.loads(path.read_text()) == {"a": 1}
    set_entries(summary, b=2)
    assert json.loads(path.read_text()) == {"a": 1, "b": 2}


def test_entries_that_could_not_be_written_stay_buffered(tmp_path):
    path, faults = tmp_path / "summary.json", Faults()
    summary = Summary(path, Disk(faults))
    faults.arm(0, "ENOSPC from then on")
    with pytest.raises(OSError, match="No space left on device"):
        set_entries(summary, a=1)
    faults.armed = False
    set_entries(summary, b=2)
    assert json.loads(path.read_text()) == {"a": 1, "b": 2}


@pytest.mark.parametrize("content", ["{", "[]", '[["a", 1]]', "\x00" * 40, "\udcff", "[" * 100_000])
def test_a_damaged_summary_is_renamed_and_a_new_one_written(tmp_path, caplog, content):
    path = tmp_path / "summary.json"
    damaged = content.encode(errors="surrogateescape")
    for name in ("summary.json.damaged", "summary.json.damaged1"):
        path.write_bytes(damaged)
        set_entries(Summary(path), a=1)
        assert json.loads(path.read_text()) == {"a": 1}
        assert (tmp_path / name).read_bytes() == damaged
        assert f"it is {tmp_path / name} now, and the run writes a new one" in caplog.text
    assert len(caplog.records) == 2


def test_entries_of_updates_and_epochs_are_written_once_a_second(tmp_path):
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


FORKED = """
import os, sys
from noether import AfterEpoch, SetSummary, TrainState
from noether.effects import open_run
directory = open_run(sys.argv[1])
for number, time_s in enumerate((1.0, 1.1)):
    directory.interpreter((SetSummary({"best": number}),), TrainState(), AfterEpoch(time_s=time_s))
child = os.fork()
if child == 0:
    sys.exit()
directory.interpreter((SetSummary({"best": 2}),), TrainState(), AfterEpoch(time_s=3.0))
os.waitpid(child, 0)
os._exit(0)
"""


def test_a_forked_process_writes_no_buffered_entry(tmp_path):
    program = tmp_path / "forked.py"
    program.write_text(FORKED)
    subprocess.run([sys.executable, str(program), str(tmp_path / "run")], check=True)
    assert json.loads((tmp_path / "run/summary.json").read_text()) == {"best": 2}


def test_a_run_that_is_opened_again_reads_the_summary_again(tmp_path):
    for entry in ("a", "b", "a"):
        with open_run(tmp_path / "run") as directory:
            directory.interpreter((SetSummary({entry: 1}),), at(1), AfterTraining())
    assert json.loads((tmp_path / "run/summary.json").read_text()) == {"a": 1, "b": 1}
