"""Time until training continues after a checkpoint, and until the checkpoint is on the disk.

Run as `python -m benchmarks.checkpoint`. 25 million parameters with the two moments of Adam are 300 MB. "Blocked" is
the time until training continues; "durable" is the time until the row considers the checkpoint written. Only the rows
with fsync and noether wait for the disk; noether also hashes the files, flushes the directories, and can detect later
whether a byte has changed. "Durable, training" is the same while the training thread makes updates of a small network.
All rows take turns; a ratio is taken within each round, and the table shows medians over rounds with quartiles.

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

from benchmarks.measurement import Table, markdown_option, quartiles, show
from noether import AfterUpdate, SaveCheckpoint, TrainState
from noether.core.tensors.tree import tensors
from noether.effects import open_run

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    Start = Callable[[TrainState], None]
    Wait = Callable[[], object]

_ASYNC = "distributed.checkpoint.async_save"
_SAFE = "torch.save + fsync + sha256"


class Times(NamedTuple):
    """Times of one checkpoint in seconds."""

    blocked_s: float
    durable_s: float


def make_state(params: int) -> TrainState:
    """Return a state with about `params` parameters in square matrices, and the moments of Adam."""
    side = min(1000, params)
    names = [f"layers.{index}.weight" for index in range(max(1, params // side**2))]
    generator = torch.Generator().manual_seed(0)

    def matrices() -> dict[str, torch.Tensor]:
        return {name: torch.randn(side, side, generator=generator) for name in names}

    weights, first, second = matrices(), matrices(), matrices()
    memory = {name: {"step": torch.tensor(1.0), "exp_avg": first[name], "exp_avg_sq": second[name]} for name in names}
    return TrainState(params=weights, opt_state={"state": memory, "groups": {}}).advance(samples=1)


def torch_save(folder: Path, *, fsync: bool = False, sha256: bool = False) -> tuple[Start, Wait]:
    """Return functions that save with `torch.save` into `folder`, and wait for it."""

    def start(state: TrainState) -> None:
        with (folder / "checkpoint.pt").open("w+b") as file:
            torch.save(_tree(state), file)
            if fsync:
                file.flush()
                os.fsync(file.fileno())
            if sha256:
                file.seek(0)
                hashlib.file_digest(file, "sha256")

    return start, lambda: None


def dcp_save(folder: Path) -> tuple[Start, Wait]:
    """Return functions that save with `torch.distributed.checkpoint` in the calling thread."""

    def start(state: TrainState) -> None:
        dcp.save(_tree(state), checkpoint_id=folder / "dcp", no_dist=True)

    return start, lambda: None


def dcp_async_save(folder: Path) -> tuple[Start, Wait]:
    """Return functions that save with `torch.distributed.checkpoint` in a background thread, and wait for it."""
    futures: list[Any] = []

    def start(state: TrainState) -> None:
        futures.append(dcp.async_save(_tree(state), checkpoint_id=folder / "dcp", no_dist=True))

    return start, lambda: futures[-1].result()  # noqa: PLW0108  # the list is still empty


def noether(folder: Path, *, asynchronous: bool) -> tuple[Start, Wait]:
    """Return functions that save with noether in a background thread or in the calling thread, and wait for it."""
    directory = open_run(folder / "run", asynchronous=asynchronous, borrowed=False)
    effects, event = [SaveCheckpoint(pointers=("latest",))], AfterUpdate(samples=1)
    return lambda state: directory.interpreter(effects, state, event), directory.close


_ROWS: Mapping[str, Callable[[Path], tuple[Start, Wait]]] = {
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


def time_checkpoint(
    row: Callable[[Path], tuple[Start, Wait]], state: TrainState, folder: Path, *, training: bool
) -> Times:
    """Return the times of a checkpoint of `state` in an empty folder."""
    os.sync()  # so that the row does not wait for earlier writes
    with tempfile.TemporaryDirectory(dir=folder) as directory, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about a missing process group
        start, wait = row(Path(directory))
        start_s = time.perf_counter()
        start(state)
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
    """Return the seconds of each round, and ratios within the round, by column and row."""
    columns = ("blocked_s", "blocked", "durable_s", "durable", "training")
    measured: dict[str, dict[str, list[float]]] = {column: {name: [] for name in _ROWS} for column in columns}
    for number in range(rounds + 1):
        idle = {name: time_checkpoint(row, state, folder, training=False) for name, row in _ROWS.items()}
        busy = {name: time_checkpoint(row, state, folder, training=True) for name, row in _ROWS.items()}
        for name in _ROWS if number else ():  # the first round warms up
            measured["blocked_s"][name].append(busy[name].blocked_s)
            measured["blocked"][name].append(busy[name].blocked_s / busy[_ASYNC].blocked_s)
            measured["durable_s"][name].append(idle[name].durable_s)
            measured["durable"][name].append(idle[name].durable_s / idle[_SAFE].durable_s)
            measured["training"][name].append(busy[name].durable_s / busy[_SAFE].durable_s)
    return measured


@click.command(help=__doc__)
@click.option("--params", default=25_000_000, show_default=True, type=click.IntRange(min=1), help="Parameters.")
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(min=2), help="Rounds measured.")
@click.option(
    "--folder",
    type=click.Path(path_type=Path, exists=True),
    help="Where to write; by default, a temporary folder.",
)
@markdown_option
def main(params: int, rounds: int, folder: Path | None, *, markdown: bool) -> None:
    """Measure and print the table."""
    torch.set_num_threads(1)
    state = make_state(params)
    size = sum(tensor.nbytes for tensor in _tree(state).values()) / 1e6
    with tempfile.TemporaryDirectory(dir=folder) as root:
        measured = measure(state, Path(root), rounds)
    headings = ("", "blocked, s", "/ async_save", "durable, s", "/ safe torch.save", "durable, training, / safe")
    rows = [(name, *(quartiles(column[name], 3) for column in measured.values())) for name in _ROWS]
    title = f"One checkpoint of {size:.0f} MB; torch {torch.__version__}, one thread"
    show(Table(title, headings, rows), markdown=markdown)


if __name__ == "__main__":
    main()
