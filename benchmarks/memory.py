"""Peak memory of training, compared with the loop that updates its parameters in place.

Run as `python -m benchmarks.memory`. A network of 25 million parameters, 100 MB, is trained with torch's fused AdamW, a
few updates in a fresh process for each row. The memory of training is the peak resident memory of the process, as the
operating system counts it, minus that of a process that only imports everything and creates the batch. Parameters,
gradients and the two moments take four times the parameters; an update that is not in place holds a second copy of
three of those at its end.

Goal: donated updates take no more than the mutable loop. It is met if no other code needs the initial tensors, as in
`noether train`; otherwise the first update holds a second copy of the parameters, for 1.18 in all.
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

from benchmarks.measurement import Table, markdown_option, quartiles, ratios, show
from noether import TrainState
from noether.core.tensors.donation import donate
from noether.training.step.optimizer import FunctionalOptimizer
from noether.training.step.step import Step
from noether.training.value_schedules import Constant

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_ROOT = Path(__file__).parents[1]
_DEPTH, _BATCH, _UPDATES, _LR = 6, 16, 4, 1e-3
_UNIT = "mutable loop"


def mlp_width(params: int) -> int:
    """Return the width of an MLP with about `params` parameters."""
    return max(1, int((params / _DEPTH) ** 0.5))


def make_model(params: int) -> nn.Module:
    """Return an MLP with about `params` parameters."""
    width = mlp_width(params)
    return nn.Sequential(*(layer for _ in range(_DEPTH) for layer in (nn.Linear(width, width), nn.ReLU())))


def loss(outputs: torch.Tensor, batch: Any) -> dict[str, torch.Tensor]:
    """Return a loss that needs no labels."""
    return {"mse": functional.mse_loss(outputs, batch)}


def nothing(params: int, batch: torch.Tensor) -> None:
    """Do not train, to measure the memory without training."""


def mutable(params: int, batch: torch.Tensor) -> None:
    """Train with the usual PyTorch loop."""
    model = make_model(params)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LR, fused=True)
    for _ in range(_UPDATES):
        optimizer.zero_grad()
        loss(model(batch), batch)["mse"].backward()
        optimizer.step()


def noether(params: int, batch: torch.Tensor, *, is_donated: bool) -> None:
    """Train with noether's step, from a state that views the model."""
    model = make_model(params)
    optimizer = FunctionalOptimizer(torch.optim.AdamW, {"lr": _LR, "fused": True})
    step = Step(model=model, loss=loss, optimizer=optimizer, lr={"default": Constant(value=_LR)}, donate=is_donated)
    state = TrainState.from_module(model)
    state = state.replace(opt_state=optimizer.init(state.params))
    if is_donated:
        state = donate(state)
    for _ in range(_UPDATES):
        state, outputs = step(state, [batch])
        state = state.advance(samples=outputs.samples)


_ROWS: Mapping[str, Callable[[int, torch.Tensor], None]] = {
    "no training": nothing,
    _UNIT: mutable,
    "noether": partial(noether, is_donated=False),
    "noether, donated": partial(noether, is_donated=True),
}


def peak_mb(row: str, params: int) -> float:
    """Return the peak resident memory of a fresh process that runs a row, in MB.

    Raises:
        click.ClickException: If the process fails.
    """
    command = [sys.executable, "-m", "benchmarks.memory", "--params", str(params), "--row", row]
    process = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=False)  # noqa: S603  # this module
    if process.returncode:
        raise click.ClickException(f"{row!r} failed:\n{process.stderr}")
    return float(process.stdout)


def run(row: str, params: int) -> None:
    """Run a row in this process, and print its peak resident memory in MB."""
    _ROWS[row](params, torch.ones(_BATCH, mlp_width(params)))
    unit = 1e6 if sys.platform == "darwin" else 1e3  # macOS counts bytes, Linux KB
    click.echo(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit)


def table(params: int, rounds: int) -> Table:
    """Return the table of memory beyond that of a process that does not train."""
    measured = [{row: peak_mb(row, params) for row in _ROWS} for _ in range(rounds)]  # fresh processes need no warm-up
    extra = [{row: each[row] - each["no training"] for row in _ROWS} for each in measured]
    trained = [row for row in _ROWS if row != "no training"]
    rows = [(row, quartiles([e[row] for e in extra], 0), quartiles(ratios(extra, row, _UNIT))) for row in trained]
    title = f"Peak memory of training {params:,} parameters, fused AdamW"
    return Table(title, ("", "MB beyond a process that does not train", f"/ {_UNIT}"), rows)


@click.command(help=__doc__)
@click.option("--params", default=25_000_000, show_default=True, type=click.IntRange(min=1), help="Parameters.")
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(min=1), help="Rounds measured.")
@click.option("--row", type=click.Choice([*_ROWS]), hidden=True, help="Run this row in this process.")
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
