"""How long does an update of a plain loop take inside a `noether.Session`, compared with the same loop without it?

Run as `python -m benchmarks.session`. Both loops train the same network on the same list of batches with AdamW, and end
with the same weights. The session has an `OnlineLossCallback` that fires once per epoch; a directory is not opened. The
rows take turns in one process on one thread; a ratio is taken within each round, and the table shows the median over
rounds with the quartiles.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click
import torch
from torch import nn

import noether
from benchmarks.measurement import Table, markdown_option, quartiles, ratios, show, take_turns
from noether.core.effect import LogUpdates
from noether.effects import Interpreter
from noether.examples.digits import ConvNet

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from torch import Tensor

    Batch = tuple[Tensor, Tensor]

_BARE = "bare loop"
_SESSION = "Session"
_NETWORKS: Mapping[str, Callable[[], nn.Module]] = {
    "MLP": lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)),
    "ConvNet": lambda: ConvNet(dropout=0.0),  # a session seeds its dropout, a bare loop does not
}


def make_batches(updates: int) -> list[Batch]:
    """Return batches of 64 random images and labels."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(updates, 64, 1, 8, 8, generator=generator)
    labels = torch.randint(10, (updates, 64), generator=generator)
    return list(zip(images, labels, strict=True))


def train(make: Callable[[], nn.Module], batches: list[Batch], *, in_session: bool) -> tuple[float, Tensor]:
    """Return the seconds of one update, and all weights after one epoch."""
    torch.manual_seed(0)
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    drop_effects = Interpreter({noether.LogScalars: (), LogUpdates: ()})
    callback = noether.OnlineLossCallback(every_n_epochs=1)
    session = noether.Session(callback, model=model, optimizer=optimizer, max_epochs=1, interpreter=drop_effects)
    loop: Iterable[Batch] = session.batches(batches) if in_session else batches
    start_s = time.perf_counter()
    for images, labels in loop:
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if in_session:
            session.update(loss)
    elapsed_s = time.perf_counter() - start_s
    return elapsed_s / len(batches), torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def measure(make: Callable[[], nn.Module], batches: list[Batch], rounds: int) -> list[dict[str, float]]:
    """Return the seconds of an update of both loops in each round.

    Raises:
        click.ClickException: If the two loops end with different weights.
    """
    if not torch.equal(*(train(make, batches, in_session=each)[1] for each in (False, True))):
        raise click.ClickException("the loop in a session ends with other weights than the bare loop")
    rows = {
        _BARE: lambda: train(make, batches, in_session=False)[0],
        _SESSION: lambda: train(make, batches, in_session=True)[0],
    }
    return take_turns(rows, rounds)


@click.command(help=__doc__)
@click.option("--rounds", default=10, show_default=True, type=click.IntRange(min=2), help="Rounds measured.")
@click.option("--updates", default=200, show_default=True, type=click.IntRange(min=1), help="Updates in each round.")
@markdown_option
def main(rounds: int, updates: int, *, markdown: bool) -> None:
    """Measure and print the table."""
    torch.set_num_threads(1)
    batches = make_batches(updates)
    rows: dict[str, list[str]] = {_BARE: [], _SESSION: []}
    for make in _NETWORKS.values():
        measured = measure(make, batches, rounds)
        for name, cells in rows.items():
            cells += [quartiles([each[name] * 1e6 for each in measured], 0), quartiles(ratios(measured, name, _BARE))]
    headings = ("", *(heading for name in _NETWORKS for heading in (f"{name}, us", f"/ {_BARE}")))
    title = f"An update of a plain loop; torch {torch.__version__}, fused AdamW, batch 64, one thread"
    show(Table(title, headings, [(name, *cells) for name, cells in rows.items()]), markdown=markdown)


if __name__ == "__main__":
    main()
