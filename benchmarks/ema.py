"""What does an average of the weights cost at every update, beside torch's own?

Run as `python -m benchmarks.ema`. `EMACallback` makes new averages, for those in a state are never written to, unless
they are donated; `torch.optim.swa_utils.AveragedModel` with `get_ema_multi_avg_fn` writes to its copy. All move the
averages in one call, a small network's and those of 25 million parameters. All rows take turns in one process on one
thread; a ratio is taken within each round, and the table shows medians over rounds with quartiles. They have to end at
the same averages.

What is not donated lies in memory that the operating system hands out anew at every update, in 14,600 page faults for
the large network, which take longer than the arithmetic.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import click
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from benchmarks.measuring import Table, markdown_option, often, quartiles, ratios, show, take_turns
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
    """A training loop's averages, kept by noether; donated where the loop donates its params."""

    def __init__(self, model: nn.Module, *, donate: bool = False) -> None:
        self.reducer = compose(EMACallback(every_n_epochs=1, target_factors=(_DECAY,)))
        self.state, _ = self.reducer(TrainState.from_module(model), BeforeTraining())
        self.state = self.state.advance(samples=1)
        if donate:
            self.state = self.state.replace(params=DonatedTree(dict(self.state.params)))
        self.event = AfterUpdate(samples=1)

    def __call__(self) -> None:
        """Count one update."""
        self.state, _ = self.reducer(self.state, self.event)


def moved(model: nn.Module) -> None:
    """Change the parameters, as training does."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)


def check(model: nn.Module) -> None:
    """Fail if the two do not keep the same average.

    Raises:
        click.ClickException: If so.
    """
    ours, theirs = [Averaging(model, donate=donate) for donate in _DONATED.values()], torch_average(model)
    for _ in range(3):
        moved(model)
        for each in (*ours, partial(theirs.update_parameters, model)):
            each()
    for kept in (each.state.memory(f"weights/ema={_DECAY}")["params"] for each in ours):
        for name, parameter in theirs.module.named_parameters():
            if not torch.allclose(kept[name], parameter):
                raise click.ClickException(f"the averages of {name!r} differ")


def torch_average(model: nn.Module) -> AveragedModel:
    """Return torch's average, which begins with the weights as they are."""
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(_DECAY))
    average.update_parameters(model)  # the first only copies
    return average


def measure(model: nn.Module, rounds: int) -> list[dict[str, float]]:
    """Return the seconds that each takes for an update, in each round."""
    turns: dict[str, Callable[[], float]] = {
        _TORCH: often(partial(torch_average(model).update_parameters, model)),
        **{name: often(Averaging(model, donate=donate)) for name, donate in _DONATED.items()},
    }
    return take_turns(turns, rounds)


@click.command(help=__doc__)
@click.option(
    "--params", default=25_000_000, show_default=True, type=click.IntRange(min=1), help="Of the large network."
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
        found = measure(model, rounds)
        for name, cells in rows.items():
            cells += [quartiles([each[name] * 1e6 for each in found], 0), quartiles(ratios(found, name, _TORCH))]
    headings = ("", *(heading for size in sizes for heading in (f"{size:,} parameters, us", f"/ {_TORCH}")))
    title = f"An exponential moving average at one update; torch {torch.__version__}, one thread"
    show(Table(title, headings, [(name, *cells) for name, cells in rows.items()]), markdown=markdown)


if __name__ == "__main__":
    main()
