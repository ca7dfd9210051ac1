"""Runs of a tiny model that train in milliseconds, from a module of the user's in the working directory."""

from pathlib import Path

CALLBACKS = "noether.core.callbacks"
SAVE = {"kind": f"{CALLBACKS}.CheckpointCallback", "every_n_epochs": 1, "save_weights": True, "save_optim": True}
LOSS = {"kind": f"{CALLBACKS}.OnlineLossCallback", "every_n_updates": 1}
MODULE = """
import torch
from torch import nn

class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return torch.tensor([float(index), 1.0]) / 8

def make_model() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 1))

def make_half() -> nn.Module:
    return make_model().half()

def loss(outputs, batch):
    return {"square": outputs.square().mean()}

def steep_loss(outputs, batch):
    return {"square": 1000 * outputs.square().mean()}

def nan_loss(outputs, batch):
    return {"square": outputs.square().mean() * float("nan")}

def kill(state, event):
    import os
    if os.environ.get("KILL_AT") == str(state.iteration.update):
        os.kill(os.getpid(), 9)
    return state, ()

def stop(state, event):
    if state.iteration.update == 3:
        state = state.request_stop("three is enough")
    return state, ()
"""


def make_config(*callbacks, optimizer=None, **trainer):
    return {
        "run": {"name": "tiny", "output": "out"},
        "model": {"kind": "torch.nn.Linear", "in_features": 2, "out_features": 1},
        "data": {"train": {"kind": "tiny.Data"}},
        "optimizer": {"kind": "torch.optim.SGD", "lr": 0.1, **(optimizer or {})},
        "trainer": {"effective_batch_size": 4, "loss": "tiny.loss", "max_epochs": 4, **trainer},
        "callbacks": [SAVE, LOSS, *callbacks],
    }


def contents(folder):
    """Return the bytes of every file below a folder, by path."""
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}
