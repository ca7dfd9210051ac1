"""Impure callbacks are caught with a message that says why; pure ones pass."""

import os
import random
import socket
import subprocess
import time
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter

import numpy as np
import pytest
import torch

from noether import AfterUpdate, LogText, TrainState, every_n_updates, log
from noether.testing import ImpureError, call_purely

EVENT = AfterUpdate(samples=4)
CALLS = []


def start():
    return TrainState(params={"w": torch.ones(2)}).remember("sum", torch.zeros(2)).advance(samples=4)


def opens_a_file(state, event):
    Path(__file__).read_text()
    return state, ()


def lists_a_directory(state, event):
    os.listdir()  # noqa: PTH208  # the fault under test
    return state, ()


def starts_a_process(state, event):
    subprocess.run(["true"], check=False)  # noqa: S607  # never started
    return state, ()


def connects(state, event):
    socket.socket().close()
    return state, ()


def reads_the_time(state, event):
    return state, (LogText(str(time.time())),)


def reads_the_time_by_name(state, event):
    return state, (LogText(str(perf_counter())),)


def reads_the_date(state, event):
    return state, (LogText(str(datetime.now(UTC))),)


def sleeps(state, event):
    time.sleep(0)
    return state, ()


def draws(state, event):
    return log(state, event, {"x": torch.rand(())})


def draws_from_numpy(state, event):
    np.random.rand()  # noqa: NPY002  # the fault under test
    return state, ()


def draws_from_python(state, event):
    random.random()  # noqa: S311  # no cryptography
    return state, ()


def seeds(state, event):
    torch.manual_seed(len(CALLS))
    CALLS.append(0)
    return state, ()


def counts_outside(state, event):
    CALLS.append(0)
    return log(state, event, {"calls": len(CALLS)})


def writes_to_params(state, event):
    state.params["w"].add_(1)
    return state, ()


def writes_to_memory(state, event):
    state.memory("sum").add_(state.params["w"])
    return state, ()


def writes_zero(state, event):
    state.params["w"].add_(0)
    return state, ()


MUTANTS = {
    opens_a_file: "does I/O: open",
    lists_a_directory: "does I/O: os.listdir",
    starts_a_process: "does I/O: subprocess.Popen",
    connects: "does I/O: socket",
    reads_the_time: r"reads the clock: time.time\(\)",
    reads_the_time_by_name: r"reads the clock: time.perf_counter\(\)",
    reads_the_date: r"reads the clock: datetime.now\(\)",
    sleeps: r"reads the clock: time.sleep\(\)",
    draws: "draws from a global random generator",
    draws_from_numpy: "draws from a global random generator",
    draws_from_python: "draws from a global random generator",
    seeds: "draws from a global random generator",
    counts_outside: "returns another result when called again",
    writes_to_params: "writes to its arguments",
    writes_to_memory: "writes to its arguments",
    writes_zero: "writes to its arguments",
}


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_an_impure_callback_is_caught(mutant):
    with pytest.raises(ImpureError, match=f"^{mutant.__name__} {MUTANTS[mutant]}"):
        call_purely(mutant, start(), EVENT)


def test_a_pure_callback_passes():
    @every_n_updates(1)
    def norm(state, event):
        late = torch.rand(3, generator=torch.Generator().manual_seed(state.seed))
        day = datetime.fromtimestamp(event.time_s, tz=UTC)
        state, effects = log(state, event, {"norm": state.params["w"].norm() + late.sum()})
        return state.remember("sum", state.memory("sum") + state.params["w"]), (*effects, LogText(f"{day:%Y}"))

    state, effects = call_purely(norm, start(), EVENT)
    assert state.memory("sum").tolist() == [1.0, 1.0]
    assert effects[1] == LogText("1970")


def test_a_clock_is_caught_behind_decorators():
    with pytest.raises(ImpureError, match=r"reads the clock: time.perf_counter\(\)"):
        call_purely(every_n_updates(1)(reads_the_time_by_name), start(), EVENT)


def test_clocks_and_files_work_again_afterwards():
    with pytest.raises(ImpureError):
        call_purely(reads_the_time, start(), EVENT)
    assert time.time() > 0
    assert datetime.now(UTC).year > 2000
    assert Path(__file__).read_text()
    assert perf_counter() > 0


def test_writing_to_a_tensor_of_the_event_is_caught():
    def clamps(state, event):
        event.outputs["field"].clamp_(0, 1)
        return state, ()

    with pytest.raises(ImpureError, match="clamps writes to its arguments"):
        call_purely(clamps, start(), AfterUpdate(outputs={"field": torch.ones(2)}))
