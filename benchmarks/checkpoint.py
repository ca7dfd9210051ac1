"""How long does a checkpoint hold up training, and how long until it is safe?

Run as `python -m benchmarks.checkpoint`. 25 million parameters with the two moments of Adam are 300 MB. "Blocked" is
the time until training can go on; "durable" is the time until the checkpoint is on the disk, as far as the row sees to
that: only rows that say fsync do, and noether, which also hashes what it writes, flushes the directories, and can tell
later whether a byte has changed. "Durable, training" is the same while the thread of training makes updates of a small
network. All rows take turns; a ratio is taken within each round, and the table shows medians over rounds with
quartiles.

Goals: blocked for less than 1/20 of what `async_save` blocks, durable within 1.5 times `torch.save` + fsync + sha256.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import threading
import time
import warnings
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from benchmarks.measuring import Table, markdown_option, quartiles, show
from noether import AfterUpdate, SaveCheckpoint, TrainState
from noether.core.tensors.tree import tensors
from noether.effects import open_run

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    Begin = Callable[[TrainState], None]
    Wait = Callable[[], object]

_ASYNC = "distributed.checkpoint.async_save"
_SAFE = "torch.save + fsync + sha256"


class Times(NamedTuple):
    """What one checkpoint took, in seconds."""

    blocked_s: float
    durable_s: float


def make_state(params: int) -> TrainState:
    """Return a state of about `params` parameters, in square matrices, with the moments of Adam."""
    side = min(1000, params)
    names = [f"layers.{index}.weight" for index in range(max(1, params // side**2))]
    generator = torch.Generator().manual_seed(0)

    def matrices() -> dict[str, torch.Tensor]:
        return {name: torch.randn(side, side, generator=generator) for name in names}

    weights, first, second = matrices(), matrices(), matrices()
    memory = {name: {"step": torch.tensor(1.0), "exp_avg": first[name], "exp_avg_sq": second[name]} for name in names}
    return TrainState(params=weights, opt_state={"state": memory, "groups": {}}).advance(samples=1)


def torch_save(folder: Path, *, fsync: bool = False, sha256: bool = False) -> tuple[Begin, Wait]:
    """Return how `torch.save` saves into `folder`, and how to wait for it."""

    def begin(state: TrainState) -> None:
        with (folder / "checkpoint.pt").open("w+b") as file:
            torch.save(_tree(state), file)
            if fsync:
                file.flush()
                os.fsync(file.fileno())
            if sha256:
                file.seek(0)
                hashlib.file_digest(file, "sha256")

    return begin, lambda: None


def dcp_save(folder: Path) -> tuple[Begin, Wait]:
    """Return how `torch.distributed.checkpoint` saves in the thread that asks."""

    def begin(state: TrainState) -> None:
        dcp.save(_tree(state), checkpoint_id=folder / "dcp", no_dist=True)

    return begin, lambda: None


def dcp_async_save(folder: Path) -> tuple[Begin, Wait]:
    """Return how `torch.distributed.checkpoint` saves in a thread of its own."""
    futures: list[Any] = []

    def begin(state: TrainState) -> None:
        futures.append(dcp.async_save(_tree(state), checkpoint_id=folder / "dcp", no_dist=True))

    return begin, lambda: futures[-1].result()  # noqa: PLW0108  # there is none yet


def noether(folder: Path, *, asynchronous: bool) -> tuple[Begin, Wait]:
    """Return how noether saves, in a thread of its own or in the one that asks."""
    run = open_run(folder / "run", asynchronous=asynchronous, borrowed=False)
    effects, event = [SaveCheckpoint(pointers=("latest",))], AfterUpdate(samples=1)
    return lambda state: run.interpreter(effects, state, event), run.close


_ROWS: Mapping[str, Callable[[Path], tuple[Begin, Wait]]] = {
    "torch.save": torch_save,
    "torch.save + fsync": partial(torch_save, fsync=True),
    _SAFE: partial(torch_save, fsync=True, sha256=True),
    "distributed.checkpoint.save": dcp_save,
    _ASYNC: dcp_async_save,
    "noether": partial(noether, asynchronous=False),
    "noether, async": partial(noether, asynchronous=True),
}


def _tree(state: TrainState) -> dict[str, torch.Tensor]:
    return {**dict(tensors({"params": state.params})), **dict(tensors(state.opt_state))}


def timed(row: Callable[[Path], tuple[Begin, Wait]], state: TrainState, folder: Path, *, training: bool) -> Times:
    """Return what a checkpoint of `state` took, made in an empty folder."""
    os.sync()  # what others wrote is not to be waited for here
    with tempfile.TemporaryDirectory(dir=folder) as own, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about what it does without a process group
        begin, wait = row(Path(own))
        start_s = time.perf_counter()
        begin(state)
        blocked_s = time.perf_counter() - start_s
        if training:
            waiting = threading.Thread(target=wait)
            waiting.start()
            step = small_training()
            while waiting.is_alive():
                step()
        else:
            wait()
        return Times(blocked_s, time.perf_counter() - start_s)


def small_training() -> Callable[[], None]:
    """Return a function that makes one update of a small network."""
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer, inputs = torch.optim.AdamW(model.parameters(), fused=True), torch.randn(64, 64)

    def step() -> None:
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()

    return step


def measure(state: TrainState, folder: Path, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Return by column and row what was measured in each round: seconds, and ratios within the round."""
    columns = ("blocked_s", "blocked", "durable_s", "durable", "training")
    found: dict[str, dict[str, list[float]]] = {column: {name: [] for name in _ROWS} for column in columns}
    for number in range(rounds + 1):
        idle = {name: timed(row, state, folder, training=False) for name, row in _ROWS.items()}
        busy = {name: timed(row, state, folder, training=True) for name, row in _ROWS.items()}
        for name in _ROWS if number else ():  # the first round warms up
            found["blocked_s"][name].append(busy[name].blocked_s)
            found["blocked"][name].append(busy[name].blocked_s / busy[_ASYNC].blocked_s)
            found["durable_s"][name].append(idle[name].durable_s)
            found["durable"][name].append(idle[name].durable_s / idle[_SAFE].durable_s)
            found["training"][name].append(busy[name].durable_s / busy[_SAFE].durable_s)
    return found


@click.command(help=__doc__)
@click.option("--params", default=25_000_000, show_default=True, type=click.IntRange(min=1), help="Parameters.")
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(min=2), help="Rounds measured.")
@click.option(
    "--folder", type=click.Path(path_type=Path, exists=True), help="Where to write; by default, for temporary files."
)
@markdown_option
def main(params: int, rounds: int, folder: Path | None, *, markdown: bool) -> None:
    """Measure and print the table."""
    torch.set_num_threads(1)
    state = make_state(params)
    size = sum(tensor.nbytes for tensor in _tree(state).values()) / 1e6
    with tempfile.TemporaryDirectory(dir=folder) as below:
        found = measure(state, Path(below), rounds)
    headings = ("", "blocked, s", "/ async_save", "durable, s", "/ safe torch.save", "durable, training, / safe")
    rows = [(name, *(quartiles(column[name], 3) for column in found.values())) for name in _ROWS]
    title = f"One checkpoint of {size:.0f} MB; torch {torch.__version__}, one thread"
    show(Table(title, headings, rows), markdown=markdown)


if __name__ == "__main__":
    main()
