"""A run that is small enough to be saved a thousand times, on any disk."""

import functools
import io

import torch
from faults import call_without_fsync
from rich.console import Console as RichConsole

from noether import AfterUpdate, LogScalars, SaveCheckpoint, SetSummary, TrainState
from noether.effects import Console, open_run
from noether.effects.disk.calls import Disk

NO_FSYNC = Disk(call_without_fsync)
BEST = 1  # the update at which the pointer `best` is set


@functools.cache
def state_after(update):
    """Return the state after an update; it fills every file that a checkpoint can have."""
    state = TrainState(
        params={"w": torch.full((3,), float(update))},
        opt_state={"state": {"w": {"exp_avg": torch.full((3,), -float(update))}}},
        callback_states={"ema": {"w": torch.full((2,), update / 2)}, "seen": update},
    )
    for _ in range(update):
        state = state.advance(samples=4)
    return state


def open_small_run(directory, disk=NO_FSYNC, **settings):
    """Open a run whose console writes to memory."""
    return open_run(directory, Console(RichConsole(file=io.StringIO())), disk=disk, **settings)


def train(directory, updates, keep=2):
    """Log and save at each of `updates`; yield each update once its checkpoint is reported as saved."""
    for update in updates:
        effects = [
            LogScalars({"loss": 1 / update}),
            SetSummary({"last": update}),
            SaveCheckpoint(pointers=("latest", "best") if update == BEST else ("latest",), retention={"c": keep}),
        ]
        directory.interpreter(effects, state_after(update), AfterUpdate(samples=4))
        yield update
