"""Cost of a moving average of the weights at every update, compared with torch's.

Run as `python -m benchmarks.ema`. `EMACallback` creates new tensors, because tensors in a state are never written to
unless they are donated; `torch.optim.swa_utils.AveragedModel` with `get_ema_multi_avg_fn` updates its copy in place.
All update the averages in one call, for a small network and one of 25 million parameters. All rows take turns in one
process on one thread; a ratio is taken within each round, and the table shows medians over rounds with quartiles. All
rows must end at the same averages.

Averages that are not donated are allocated again at every update. For the large network this causes 14,600 page faults,
which take longer than the arithmetic.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import click
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from benchmarks.measurement import Table, markdown_option, quartiles, ratios, short_call_row, show, take_turns
from benchmarks.memory import make_model
from noether import AfterUpdate, BeforeTraining, TrainState, compose
from noether.core.callbacks import EMACallback
from noether.core.tensors.donation import DonatedTree

if TYPE_CHECKING:
    from collections.abc import Callable

_DECAY = 0.999
_TORCH = "torch, `AveragedModel`"
_DONATED = {"noether, `EMACallback`": False, "noether, donated": True}


class Averaging:
    """Averages updated by noether, in place if the params are donated."""

    def __init__(self, model: nn.Module, *, donate: bool = False) -> None:
        self.reducer = compose(EMACallback(every_n_epochs=1, target_factors=(_DECAY,)))
        self.state, _ = self.reducer(TrainState.from_module(model), BeforeTraining())
        self.state = self.state.advance(samples=1)
        if donate:
            self.state = self.state.replace(params=DonatedTree(dict(self.state.params)))
        self.event = AfterUpdate(samples=1)

    def __call__(self) -> None:
        """Dispatch one update."""
        self.state, _ = self.reducer(self.state, self.event)


def change_params(model: nn.Module) -> None:
    """Change the parameters, as training does."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)


def check(model: nn.Module) -> None:
    """Check that noether and torch compute the same averages.

    Raises:
        click.ClickException: If they do not.
    """
    ours, theirs = [Averaging(model, donate=donate) for donate in _DONATED.values()], torch_average(model)
    for _ in range(3):
        change_params(model)
        for each in (*ours, partial(theirs.update_parameters, model)):
            each()
    for averages in (each.state.memory(f"weights/ema={_DECAY}")["params"] for each in ours):
        for name, parameter in theirs.module.named_parameters():
            if not torch.allclose(averages[name], parameter):
                raise click.ClickException(f"the averages of {name!r} differ")


def torch_average(model: nn.Module) -> AveragedModel:
    """Return torch's average, which starts at the current weights."""
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(_DECAY))
    average.update_parameters(model)  # the first update only copies
    return average


def measure(model: nn.Module, rounds: int) -> list[dict[str, float]]:
    """Return the seconds of one update of each row, in each round."""
    turns: dict[str, Callable[[], float]] = {
        _TORCH: short_call_row(partial(torch_average(model).update_parameters, model)),
        **{name: short_call_row(Averaging(model, donate=donate)) for name, donate in _DONATED.items()},
    }
    return take_turns(turns, rounds)


@click.command(help=__doc__)
@click.option(
    "--params",
    default=25_000_000,
    show_default=True,
    type=click.IntRange(min=1),
    help="Size of the large network.",
)
@click.option("--rounds", default=20, show_default=True, type=click.IntRange(min=2), help="Rounds measured.")
@markdown_option
def main(params: int, rounds: int, *, markdown: bool) -> None:
    """Measure and print the table."""
    torch.set_num_threads(1)
    rows: dict[str, list[str]] = {name: [] for name in (_TORCH, *_DONATED)}
    sizes = (5_000, params)
    for size in sizes:
        model = make_model(size)
        check(model)
        measured = measure(model, rounds)
        for name, cells in rows.items():
            cells += [quartiles([each[name] * 1e6 for each in measured], 0), quartiles(ratios(measured, name, _TORCH))]
    headings = ("", *(heading for size in sizes for heading in (f"{size:,} parameters, us", f"/ {_TORCH}")))
    title = f"An exponential moving average at one update; torch {torch.__version__}, one thread"
    show(Table(title, headings, [(name, *cells) for name, cells in rows.items()]), markdown=markdown)


if __name__ == "__main__":
    main()
