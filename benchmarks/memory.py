"""How much memory does training need at its peak, beside the loop that writes to its parameters?

Run as `python -m benchmarks.memory`. A network of 25 million parameters, 100 MB, is trained with torch's fused AdamW, a
few updates in a fresh process for each row. Its largest resident memory, as the operating system counts it, less that
of a process that only imported everything and made the batch, is what training took. Parameters, gradients and the two
moments make four times the parameters; who does not write to them holds a second copy of three of those at the end of
an update.

Goal: donated updates take no more than the mutable loop. It is met where the run begins with tensors that nobody else
needs, as `noether train` does; else the first update holds a second copy of the parameters, for 1.18 in all.
"""

from __future__ import annotations

import resource
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import torch
from torch import nn
from torch.nn import functional

from benchmarks.measuring import Table, markdown_option, quartiles, ratios, show
from noether import TrainState
from noether.training.step.optimizer import FunctionalOptimizer
from noether.training.step.step import Step
from noether.training.value_schedules import Constant

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_ROOT = Path(__file__).parents[1]
_DEPTH, _BATCH, _UPDATES, _LR = 6, 16, 4, 1e-3
_UNIT = "mutable loop"


def width_of(params: int) -> int:
    """Return how wide an MLP of about `params` parameters is."""
    return max(1, int((params / _DEPTH) ** 0.5))


def make_model(params: int) -> nn.Module:
    """Return an MLP of about `params` parameters."""
    width = width_of(params)
    return nn.Sequential(*(layer for _ in range(_DEPTH) for layer in (nn.Linear(width, width), nn.ReLU())))


def loss(outputs: torch.Tensor, batch: Any) -> dict[str, torch.Tensor]:
    """Return a loss that needs no labels."""
    return {"mse": functional.mse_loss(outputs, batch)}


def nothing(params: int, batch: torch.Tensor) -> None:
    """Do not train."""


def mutable(params: int, batch: torch.Tensor) -> None:
    """Train as everybody does."""
    model = make_model(params)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LR, fused=True)
    for _ in range(_UPDATES):
        optimizer.zero_grad()
        loss(model(batch), batch)["mse"].backward()
        optimizer.step()


def noether(params: int, batch: torch.Tensor, *, donate: bool) -> None:
    """Train with noether's step, from a state that views the model."""
    model = make_model(params)
    optimizer = FunctionalOptimizer(torch.optim.AdamW, {"lr": _LR, "fused": True})
    step = Step(model=model, loss=loss, optimizer=optimizer, lr={"default": Constant(value=_LR)}, donate=donate)
    state = TrainState.from_module(model)
    state = state.replace(opt_state=optimizer.init(state.params))
    if donate:
        state = donate(state)
    for _ in range(_UPDATES):
        state, outputs = step(state, [batch])
        state = state.advance(samples=outputs.samples)


_ROWS: Mapping[str, Callable[[int, torch.Tensor], None]] = {
    "no training": nothing,
    _UNIT: mutable,
    "noether": partial(noether, donate=False),
    "noether, donated": partial(noether, donate=True),
}


def peak_mb(row: str, params: int) -> float:
    """Return the largest resident memory of a fresh process that runs a row.

    Raises:
        click.ClickException: If it fails.
    """
    command = [sys.executable, "-m", "benchmarks.memory", "--params", str(params), "--row", row]
    done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=False)  # noqa: S603  # ourselves
    if done.returncode:
        raise click.ClickException(f"{row!r} failed:\n{done.stderr}")
    return float(done.stdout)


def run(row: str, params: int) -> None:
    """Run a row in this process, and print its largest resident memory."""
    _ROWS[row](params, torch.ones(_BATCH, width_of(params)))
    unit = 1e6 if sys.platform == "darwin" else 1e3  # it counts bytes there, and thousands of them elsewhere
    click.echo(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit)


def table(params: int, rounds: int) -> Table:
    """Return what the rows take beyond a process that does not train."""
    found = [{row: peak_mb(row, params) for row in _ROWS} for _ in range(rounds)]  # fresh processes do not warm up
    extra = [{row: each[row] - each["no training"] for row in _ROWS} for each in found]
    trained = [row for row in _ROWS if row != "no training"]
    rows = [(row, quartiles([e[row] for e in extra], 0), quartiles(ratios(extra, row, _UNIT))) for row in trained]
    title = f"Peak memory of training {params:,} parameters, fused AdamW"
    return Table(title, ("", "MB beyond a process that does not train", f"/ {_UNIT}"), rows)


@click.command(help=__doc__)
@click.option("--params", default=25_000_000, show_default=True, type=click.IntRange(min=1), help="Parameters.")
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(min=1), help="Rounds measured.")
@click.option("--row", type=click.Choice([*_ROWS]), hidden=True, help="Run this row, in this process.")
@markdown_option
def main(params: int, rounds: int, row: str | None, *, markdown: bool) -> None:
    """Measure and print the table."""
    torch.set_num_threads(1)
    if row is None:
        show(table(params, rounds), markdown=markdown)
    else:
        run(row, params)


if __name__ == "__main__":
    main()
