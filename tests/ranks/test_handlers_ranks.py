"""Handlers of the user's that are marked with `on_all_ranks` run on every rank, however a configuration names them."""

import os
from pathlib import Path

from processes import run_on_ranks

import noether

MODULE = """
from pathlib import Path

import torch

from noether import AfterEpoch, Effect, LogText, on
from noether.effects.interpreter import on_all_ranks


class Points(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return torch.tensor([index / 7.0, 1.0])


def loss(outputs, batch):
    return {"square": outputs.square().mean()}


class Plain(Effect): pass
class WithSetting(Effect): pass
class WithDirectory(Effect): pass
class Unmarked(Effect): pass
class ByClass(Effect): pass


@on(AfterEpoch)
def ring(state, event):
    return state, (Plain(), WithSetting(), WithDirectory(), Unmarked(), ByClass(), LogText("end of an epoch"))


def note(effect, event, sound):
    Path(f"{type(effect).__name__}-{sound}-{event.run.rank}").touch()


@on_all_ranks
def ring_everywhere(effect, state, event, *, sound="ding"):
    note(effect, event, sound)


@on_all_ranks
def ring_in_folder(effect, state, event, *, directory, sound):
    note(effect, event, f"{sound} in {directory.parent.name}")


def ring_once(effect, state, event, *, sound):
    note(effect, event, sound)


class Bell:
    def __init__(self, sound):
        self.sound = sound

    @on_all_ranks
    def __call__(self, effect, state, event):
        note(effect, event, self.sound)
"""
HANDLERS = {
    "ringing.Plain": "ringing.ring_everywhere",
    "ringing.WithSetting": {"kind": "ringing.ring_everywhere", "sound": "dong"},
    "ringing.WithDirectory": {"kind": "ringing.ring_in_folder", "sound": "dong"},
    "ringing.Unmarked": {"kind": "ringing.ring_once", "sound": "dong"},
    "ringing.ByClass": {"kind": "ringing.Bell", "sound": "dong"},
    "noether.LogText": {"kind": "ringing.ring_everywhere", "sound": "dong"},
}
CONFIG = {
    "run": {"name": "tiny", "output": "out", "handlers": HANDLERS},
    "model": {"kind": "torch.nn.Linear", "in_features": 2, "out_features": 1},
    "data": {"train": {"kind": "ringing.Points"}},
    "optimizer": {"kind": "torch.optim.SGD", "lr": 0.1},
    "trainer": {"effective_batch_size": 4, "loss": "ringing.loss", "max_epochs": 1},
    "callbacks": [{"kind": "ringing.ring"}],
}


def train(folder):
    os.chdir(folder)
    return noether.train(CONFIG).rank


def test_a_marked_handler_runs_on_every_rank(tmp_path):
    Path(tmp_path / "ringing.py").write_text(MODULE)
    assert run_on_ranks(train, 2, tmp_path) == [0, 1]
    everywhere = ["Plain-ding", "WithSetting-dong", "WithDirectory-dong in tiny", "ByClass-dong", "LogText-dong"]
    expected = {f"{name}-{rank}" for name in everywhere for rank in (0, 1)} | {"Unmarked-dong-0"}
    assert {each.name for each in tmp_path.glob("*-*")} == expected
