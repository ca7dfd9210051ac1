"""The status of a run in `summary.json`, while it trains and after each kind of end."""

import json
from contextlib import suppress
from pathlib import Path

import pytest
from tiny_runs import make_config

from noether.training.runs.train import train

MODULE = """
import json
import signal
from pathlib import Path

from noether import BeforeTraining

SEEN = []

def look(state, event):
    if isinstance(event, BeforeTraining):
        return state, ()
    (run,) = Path("out/tiny").iterdir()
    summary = json.loads((run / "summary.json").read_text())
    SEEN.append((summary["status"], summary["ending"]))
    return state, ()

def fail(state, event):
    if state.iteration.update == 3:
        raise ValueError("three is too many")
    return state, ()

def fail_at_once(state, event):
    if isinstance(event, BeforeTraining):
        raise ValueError("none is too many")
    return state, ()

def interrupt(state, event):
    if state.iteration.update == 3:
        signal.raise_signal(signal.SIGINT)
    return state, ()

def interrupt_twice(state, event):
    return interrupt(*interrupt(state, event)[:1], event)
"""


@pytest.fixture
def module(tiny_module):
    Path("tiny.py").write_text(Path("tiny.py").read_text() + MODULE)


def summary():
    (run,) = Path("out/tiny").iterdir()
    return json.loads((run / "summary.json").read_text())


ENDS = {
    None: ("finished", "ended at E4_U8_S32"),
    "tiny.stop": ("stopped", "ended at E1_U3_S12: three is enough"),
    "tiny.interrupt": ("interrupted", "interrupted at E1_U3_S12"),
    "tiny.interrupt_twice": ("interrupted", "interrupted at E1_U3_S12 by a second signal"),
    "tiny.fail": ("failed", "failed at E1_U3_S12: ValueError: three is too many"),
    "tiny.fail_at_once": ("failed", "failed at E0_U0_S0: ValueError: none is too many"),
}


@pytest.mark.parametrize(("kind", "end"), ENDS.items(), ids=map(str, ENDS))
def test_the_summary_has_status_and_reason_of_each_end(module, kind, end):
    with suppress(ValueError, KeyboardInterrupt):
        train(make_config(*([] if kind is None else [{"kind": kind}])))
    assert (summary()["status"], summary()["ending"]) == end
    (times,) = summary()["phases"].values()
    assert times["updates"] <= 8
    assert (times["updates"] == 0) == (times["step_s"] == 0)
    assert sum(times[name] for name in ("data_s", "step_s", "evaluation_s", "saving_s")) <= times["total_s"]


def test_the_status_is_running_until_a_run_or_its_resume_ends(module):
    run = train(make_config({"kind": "tiny.look"}))
    import tiny

    assert set(tiny.SEEN) == {("running", None)}
    tiny.SEEN.clear()
    train(resume=run.directory, overrides=["trainer.max_epochs=5"])
    assert set(tiny.SEEN) == {("running", None)}
    assert summary()["status"] == "finished"
    assert list(summary()["phases"]) == ["E0_U0_S0", "E4_U8_S32"]


def test_resuming_a_finished_run_keeps_its_status(module):
    run = train(make_config())
    before = summary()
    train(resume=run.directory)
    assert summary() == before
