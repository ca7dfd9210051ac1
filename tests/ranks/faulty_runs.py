"""Runs of the command line in which one rank fails, at a phase of the training."""

import contextlib
import errno
import os
import re
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from torch import nn

import noether
from noether import AfterUpdate
from noether.cli.main import main
from noether.distributed.ranks import current_ranks, join
from noether.effects.disk.calls import Disk

AT = 5
"""The fault is in the next phase of its kind after this update."""
ALL = -1
"""In place of a rank: all of them."""
FAULT = {"phase": None, "how": None, "update": 0, "is_armed": False}
"""Of this process."""


def meet(phase):
    """Fail if this is the phase of the fault, once."""
    is_early = FAULT["how"] == "exit"  # in a smoke test, which makes one update
    if FAULT["is_armed"] and phase == FAULT["phase"] and (FAULT["update"] >= AT or is_early):
        FAULT["is_armed"] = False
        fail(FAULT["how"])


def fail(how):
    if how == "raise":
        raise LookupError("no such file")
    if how == "exit":
        sys.exit(0)
    if how == "full":
        raise OSError(errno.ENOSPC, "No space left on device")
    if how == "signal":
        os.kill(os.getpid(), signal.SIGTERM)
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "hang":
        while current_ranks().failures.first() is None:
            time.sleep(0.02)
        os._exit(3)  # a launcher kills it


@dataclass(frozen=True)
class Numbers(torch.utils.data.Dataset):
    """Random inputs."""

    length: int = 24

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        meet("data")
        return {"x": torch.randn(4, generator=torch.Generator().manual_seed(index))}


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def forward(self, x):
        return self.layer(x)


def loss(outputs, batch):
    meet("step" if torch.is_grad_enabled() else "evaluation")
    return (outputs - batch["x"].sum(dim=1, keepdim=True)).square().mean()


@noether.on(AfterUpdate)
def count(state, event):
    FAULT["update"] = state.iteration.update
    if state.iteration.update % 3 == 0:  # where rank 0 saves
        meet("other save")
    return state, ()


@dataclass(frozen=True)
class KillOnce:
    """Kills one rank before the first restart; without a rank, waits on all ranks for a signal."""

    at: int
    rank: int | None

    def __call__(self, state, event):
        if isinstance(event, AfterUpdate) and state.iteration.update == self.at:
            if self.rank is None:
                Path("paused").touch()
                received = signal.getsignal(signal.SIGTERM).__self__
                while not received.is_signal:
                    time.sleep(0.02)
            elif int(os.environ["RANK"]) == self.rank and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
                fail("kill")
        return state, ()


CONFIG = {
    "run": {"name": "numbers", "output": "runs"},
    "model": {"kind": "faulty_runs.Network"},
    "data": {"train": {"kind": "faulty_runs.Numbers"}, "val": {"kind": "faulty_runs.Numbers", "length": 21}},
    "optimizer": {"kind": "torch.optim.Adam", "lr": 0.01},
    "trainer": {
        "effective_batch_size": 8, "max_updates": 12, "loss": "faulty_runs.loss", "rank_timeout_s": 60,
        "evaluate": {"val": ["loss"], "every_n_updates": 4},
    },
    "callbacks": [
        {"kind": "faulty_runs.count"},
        {"kind": "noether.CheckpointCallback", "every_n_updates": 3},
    ],
}  # fmt: skip


def patch_disk():
    """Meet the faults of a save: `save` as a file of a checkpoint is written, `commit` as the checkpoint is renamed."""
    create, rename = Disk.create, Disk.rename

    def create_or_fail(disk, path):
        if "checkpoints" in path.parts:
            meet("save")
        return create(disk, path)

    def rename_or_fail(disk, path, target):
        if "checkpoints" in path.parts and re.fullmatch(r"E\d+_U\d+_S\d+", target.name):
            meet("commit")
        return rename(disk, path, target)

    Disk.create, Disk.rename = create_or_fail, rename_or_fail


def command(folder, words, rank=None, phase=None, how=None, *, joins=True):
    """Run the command line in a folder, with a fault on one rank, or on `ALL`; return the exit code.

    What each rank prints is in `RANK.txt`. Unless it `joins` before, a rank meets the others only in the command. A
    process that ends at once, as after a failure, returns nothing.
    """
    own = int(os.environ["RANK"])
    with Path(folder, f"{own}.txt").open("wb") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    sys.stdout, sys.stderr = (os.fdopen(stream, "w", buffering=1, closefd=False) for stream in (1, 2))
    FAULT.update({"phase": phase, "how": how, "update": 0, "is_armed": rank in {own, ALL}})
    patch_disk()
    if joins:
        join(timeout_s=60)
    with contextlib.chdir(folder), contextlib.suppress(SystemExit):
        try:
            main([*words, "--allow", "faulty_runs"], prog_name="noether")
        except SystemExit as end:
            return end.code


def different_commands(folder, first, second):
    """Run a command on rank 0 and another one on the other ranks, before they have joined; return the exit code."""
    return command(folder, second if int(os.environ["RANK"]) else first, joins=False)


def write_config(folder, **trainer):
    config = {**CONFIG, "trainer": {**CONFIG["trainer"], **trainer}}
    (folder / "numbers.yaml").write_text(yaml.safe_dump(config))
