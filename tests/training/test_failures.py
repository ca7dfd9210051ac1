"""A run that fails, is interrupted or runs out of time anywhere resumes to the bits and the log of the uncut run."""

import contextlib
import json
import sys
from functools import partial

import pytest
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from law_examples import examples

from noether.session.timing import Clock
from noether.training.runs.execution import TimeLimitError
from noether.training.runs.interruption import Interruption
from noether.training.runs.train import train

CALLBACKS = "noether.core.callbacks"
MODULE = """
import os
import signal
from collections import Counter
from dataclasses import dataclass

import torch
from torch import nn

from noether import Effect, log
from noether.core.callbacks.base import CallbackBase

CUT = [None, 0]  # place, count
TIME_IS_OVER = False  # at CUT, in place of an exception or a signal
CALLS = Counter()
HOURS = [0.0]


def pass_by(place):
    CALLS[place] += 1
    if CUT == [place, CALLS[place]]:
        if TIME_IS_OVER:
            HOURS[0] += 10
        elif place == "evaluation":
            signal.raise_signal(signal.SIGTERM)
        else:
            raise ConnectionError(f"{place} failed")


class Points(torch.utils.data.Dataset):
    def __init__(self, length: int, place: str = ""):
        self._inputs = torch.randn(length, 3, generator=torch.Generator().manual_seed(length))
        self._place = place

    def __len__(self):
        return len(self._inputs)

    def __getitem__(self, index):
        if self._place:
            pass_by(self._place)
        return self._inputs[index] + 0.1 * torch.randn(3), (self._inputs[index].sum() > 0).long()


def make_net() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(0.2), nn.Linear(4, 2))


def loss(outputs, batch):
    if torch.is_grad_enabled():
        pass_by("step")
    return {"entropy": nn.functional.cross_entropy(outputs, batch[1])}


@dataclass(frozen=True)
class Ring(Effect):
    pass


def ring(effect, state, event):
    pass_by("handler")


class Act(CallbackBase):
    place: str = "callback"

    def act(self, state, event):
        pass_by(self.place)
        return log(state, event, {self.place: CALLS["none"]}) if self.place == "callback" else (state, (Ring(),))

    after_update = after_epoch = after_training = act
"""

PLACES = ("data", "step", "callback", "late", "handler", "evaluation")


def make_config(folder, *, donate):
    return {
        "run": {"name": "fails", "output": str(folder), "handlers": {"flaky.Ring": "flaky.ring"}},
        "model": {"kind": "flaky.make_net"},
        "data": {
            "train": {"kind": "flaky.Points", "length": 10, "place": "data"},
            "val": {"kind": "flaky.Points", "length": 4, "place": "evaluation"},
        },
        "optimizer": {"kind": "torch.optim.AdamW", "lr": 0.05},
        "trainer": {"effective_batch_size": 4, "max_batch_size": 2, "loss": "flaky.loss", "max_epochs": 2,
                    "max_hours": 9.5, "donate": donate, "evaluate": {"val": ["loss"], "every_n_updates": 2}},
        "callbacks": [
            {"kind": f"{CALLBACKS}.OnlineLossCallback", "every_n_updates": 1},
            {"kind": "flaky.Act", "place": "callback"},
            {"kind": f"{CALLBACKS}.EMACallback", "every_n_epochs": 2, "target_factors": [0.5]},
            {"kind": f"{CALLBACKS}.MetricCallback", "every_n_updates": 3, "dataset_key": "val", "metric": "accuracy"},
            {"kind": "flaky.Act", "place": "late"},
            {"kind": f"{CALLBACKS}.CheckpointCallback", "every_n_epochs": 2, "save_weights": True, "save_optim": True},
        ],
    }  # fmt: skip


@pytest.fixture(scope="module")
def flaky(tmp_path_factory):
    """The user's module, imported from a working directory."""
    folder = tmp_path_factory.mktemp("flaky")
    (folder / "flaky.py").write_text(MODULE)
    with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
        sys.path.insert(0, str(folder))
        import flaky

        clock = Clock(elapsed_s=lambda: 3600 * flaky.HOURS[0])
        patch.setattr("noether.training.runs.train.Interruption", partial(Interruption, clock=clock))
        yield flaky
    sys.path.remove(str(folder))
    del sys.modules["flaky"]


def results(run):
    """Return the bytes of the last checkpoint's tensors, and the log without times."""
    tag = (run.directory / "checkpoints/last").read_text().split()[0]
    tensors = {path.name: path.read_bytes() for path in (run.directory / "checkpoints" / tag).glob("*.safetensors")}
    log = [json.loads(line) for line in (run.directory / "metrics.jsonl").read_text().splitlines()]
    return tensors, [{key: value for key, value in line.items() if key not in ("run", "time_s")} for line in log]


@pytest.fixture(scope="module")
def uncut(flaky, tmp_path_factory):
    flaky.CUT = [None, 0]
    flaky.CALLS.clear()
    run = train(make_config(tmp_path_factory.mktemp("uncut"), donate=True))
    return results(run), dict(flaky.CALLS)


@given(
    st.lists(
        st.tuples(st.sampled_from(PLACES), st.floats(0, 1, exclude_max=True), st.booleans()), min_size=1, max_size=2
    ),
    st.booleans(),
)
@examples(45, quick=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_run_that_is_cut_anywhere_resumes_to_the_uncut_run(tmp_path_factory, flaky, uncut, cuts, donate):
    expected, calls = uncut
    folder = tmp_path_factory.mktemp("cut")
    start = {"config": make_config(folder, donate=donate)}
    for cut in [*((place, 1 + int(where * calls[place]), over) for place, where, over in cuts), (None, 0, False)]:
        *flaky.CUT, flaky.TIME_IS_OVER = cut
        flaky.CALLS.clear()
        with contextlib.suppress(ConnectionError, TimeLimitError):
            run = train(**start)
        start = {"resume": next((folder / "fails").iterdir())}
    assert run.finished
    assert results(run) == expected


def test_an_interrupt_that_no_signal_sent_is_saved_after_the_time_limit_too(tmp_path, flaky, uncut, monkeypatch):
    def act(state, event):
        if state.iteration.update == 3:
            flaky.HOURS[0] += 10
            raise KeyboardInterrupt
        return state, ()

    monkeypatch.setattr(flaky.Act, "act", lambda self, state, event: act(state, event))
    monkeypatch.setattr(flaky.Act, "after_update", flaky.Act.act)
    with pytest.raises(KeyboardInterrupt) as raised:
        train(make_config(tmp_path, donate=True))
    assert any(note.startswith("the state at E0_U3_S10 is saved in ") for note in raised.value.__notes__)


@pytest.mark.parametrize("place", PLACES[:-1])
def test_the_exception_is_raised_unchanged_with_notes(tmp_path, flaky, uncut, place):
    flaky.CUT, flaky.TIME_IS_OVER = [place, uncut[1][place]], False
    flaky.CALLS.clear()
    with pytest.raises(ConnectionError, match=f"{place} failed") as raised:
        train(make_config(tmp_path, donate=True))
    (run,) = (tmp_path / "fails").iterdir()
    *_, saved, traceback, resume = raised.value.__notes__
    assert saved.startswith("the state at ")
    assert saved.endswith(f" is saved in {run}")
    assert traceback == f"the traceback is in {run / 'traceback.txt'}"
    assert resume == f"resume with noether.train(resume={str(run)!r})"
    assert json.loads((run / "summary.json").read_text())["ending"].startswith("failed at ")
