"""Runs on any number of ranks that record which samples each update trains; they can be cut at any update."""

import contextlib
import os
import signal

import torch
from torch import nn

import noether
from noether import AfterUpdate
from noether.training.runs.ending import failure_of

CALLBACKS = "noether.core.callbacks"
SAMPLES = 24
UPDATES = 12
CUT = {"at": None, "how": None, "rank": None}
"""The update at which this process ends the run, and whether it raises or gets a signal, on one rank or on all."""
TRAINED = []
"""Of this process: the indices of samples in each call of the loss in training, and the number of each update after."""


class Fields(torch.utils.data.Dataset):
    """Inputs, targets, and the index of each sample."""

    def __init__(self, length: int = SAMPLES):
        generator = torch.Generator().manual_seed(1)
        self._inputs = torch.randn(length, 4, generator=generator)

    def __len__(self):
        return len(self._inputs)

    def __getitem__(self, index):
        return {"x": self._inputs[index], "index": torch.tensor(index)}


class Shares(Fields):
    """Another length on each rank."""

    def __len__(self):
        return super().__len__() - int(os.environ.get("RANK", "0"))


class Network(nn.Module):
    def __init__(self, dropout: float):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 1))

    def forward(self, x):
        return self.layers(x)


class UnseededNetwork(Network):
    """A model whose initial values differ between ranks."""

    def __init__(self, dropout: float):
        super().__init__(dropout)
        generator = torch.Generator().manual_seed(int(os.environ.get("RANK", "0")))
        nn.init.normal_(self.layers[3].weight, generator=generator)


def loss(outputs, batch):
    if torch.is_grad_enabled():
        TRAINED.append(batch["index"].tolist())
    target = batch["x"].sum(dim=1, keepdim=True)
    return {"square": (outputs - target).square().mean(), "size": 0.1 * outputs.square().mean()}


def error(outputs, batch):
    return (outputs - batch["x"].sum(dim=1, keepdim=True)).abs().squeeze(1)


@noether.on(AfterUpdate)
def cut(state, event):
    """End the run at the update and on the rank of `CUT`."""
    TRAINED.append(state.iteration.update)
    if state.iteration.update == CUT["at"] and CUT["rank"] in {None, int(os.environ["RANK"])}:
        if CUT["how"] == "raise":
            raise ValueError("cut here")
        signal.raise_signal(signal.SIGTERM)
    return state, ()


def make_config(*, dropout=0.0, **trainer):
    periodic = {"every_n_epochs": 1}
    metric = {"metric_key": "val/error", "mode": "lower"}
    return {
        "run": {"name": "fields", "output": "out"},
        "model": {"kind": "recorded_runs.Network", "dropout": dropout},
        "data": {"train": {"kind": "recorded_runs.Fields"}, "val": {"kind": "recorded_runs.Fields", "length": 7}},
        "optimizer": {"kind": "torch.optim.Adam", "lr": 0.01},
        "trainer": {
            "effective_batch_size": 7, "max_batch_size": 2, "max_updates": UPDATES, "loss": "recorded_runs.loss",
            "evaluate": {"val": ["loss", "recorded_runs.error"], **periodic}, "rank_timeout_s": 60, **trainer,
        },
        "callbacks": [
            {"kind": "recorded_runs.cut"},
            {"kind": f"{CALLBACKS}.OnlineLossCallback", "every_n_updates": 1},
            {"kind": f"{CALLBACKS}.EMACallback", "every_n_epochs": 1, "target_factors": [0.9]},
            {"kind": f"{CALLBACKS}.BestMetricCallback", **periodic, **metric},
            {"kind": f"{CALLBACKS}.BestCheckpointCallback", **periodic, **metric},
            {"kind": f"{CALLBACKS}.CheckpointCallback", **periodic, "save_weights": True, "save_optim": True},
        ],
    }  # fmt: skip


def train(folder, segments, first):
    """Train a run on the ranks of this process, cut and resumed at some updates; return what it recorded.

    Args:
        folder: The working directory.
        segments: Settings of `CUT` for each segment of the run on this number of ranks.
        first: Arguments of `noether.train` for the first segment; the others resume the run.
    """
    TRAINED.clear()
    directory, endings = first.get("resume"), []
    with contextlib.chdir(folder):
        for segment in segments:
            CUT.update({"at": None, "how": None, "rank": None} | segment)
            options = first if not endings else {"resume": directory}
            try:
                run = noether.train(**options, allow=["recorded_runs"])
            except ValueError as error:
                endings.append(str(error))
                directory = str(failure_of(error).directory)
            else:
                endings.append(run.ending)
                directory = str(run.directory)
    return {"directory": directory, "endings": endings, "trained": list(TRAINED)}


def samples_by_update(results):
    """Return each update that was made, and the indices that all ranks trained in it, in the order of ranks.

    An update whose event was only dispatched again is left out.

    Args:
        results: What `train` returned on each rank.
    """
    by_rank = []
    for result in results:
        updates, indices = [], []
        for entry in result["trained"]:
            if isinstance(entry, list):
                indices += entry
            else:
                updates.append((entry, indices))
                indices = []
        by_rank.append(updates)
    made = []
    for shares in zip(*by_rank, strict=True):
        (update,) = {update for update, _ in shares}
        if indices := [index for _, share in shares for index in share]:
            made.append((update, indices))
    return made
