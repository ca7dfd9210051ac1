"""What does the cost of telling an update depend on?

Run as `python -m benchmarks.scaling`, with `--png FILE` for a plot. One update is counted and told to a reducer, as a
loop does after each step, while one thing grows: the callbacks that are not due, alone or beside one that is due at
every update; the parameters of the state, in tensors of a thousand; the updates that were made before. The others stay
at one callback, a thousand parameters and no update. The unit is one `state.advance`, which is the part that counts.
All points take turns in one process; a ratio is taken within each round, and the table shows medians over rounds with
quartiles.

Goal: where nothing is due, none of these makes a difference of more than 10 %.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

import click
import torch

from benchmarks.dispatch import NEVER, Nothing
from benchmarks.measuring import Table, markdown_option, often, quartiles, show, take_turns
from noether import AfterUpdate, TrainingIteration, TrainState, compose

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from noether.core.reducer import Reducer

_THOUSAND = 1000
_EVENT = AfterUpdate(samples=64)


class Point(NamedTuple):
    """How much of everything there is."""

    callbacks: int = 1
    parameters: int = _THOUSAND
    updates: int = 0
    due: bool = False


_SERIES: Mapping[str, Mapping[int, Point]] = {
    "callbacks": {n: Point(callbacks=n) for n in (1, 10, 100, 1000)},
    "callbacks beside one that is due": {n: Point(callbacks=n, due=True) for n in (1, 10, 100, 1000)},
    "parameters": {n: Point(parameters=n) for n in (1_000, 10_000, 100_000, 1_000_000)},
    "updates before": {n: Point(updates=n) for n in (0, 1_000, 1_000_000, 1_000_000_000)},
}


def made(point: Point) -> tuple[TrainState, Reducer]:
    """Return the state and the reducer of a point."""
    params = {f"layers.{index}.weight": torch.zeros(_THOUSAND) for index in range(point.parameters // _THOUSAND)}
    state = TrainState(params=params, iteration=TrainingIteration(0, point.updates, 64 * point.updates))
    # Intervals that begin after the last update, so that nothing is due wherever the run is.
    callbacks = (Nothing(every_n_updates=2 * NEVER + index, id=str(index)) for index in range(point.callbacks))
    return state, compose(*callbacks, *[Nothing(every_n_updates=1)] * point.due)


def told(state: TrainState, reducer: Reducer) -> None:
    """Count one update, and tell it."""
    reducer(state.advance(samples=64), _EVENT)


def measure(rounds: int) -> dict[Point, list[float]]:
    """Return for each point the cost of an update in advances of the state, in each round."""
    points = dict.fromkeys(point for series in _SERIES.values() for point in series.values())
    turns: dict[str, Callable[[], float]] = {}
    for point in points:
        state, reducer = made(point)
        turns[f"advance {point}"] = often(partial(state.advance, samples=64))
        turns[f"tell {point}"] = often(partial(told, state, reducer))
    found = take_turns(turns, rounds)
    return {point: [each[f"tell {point}"] / each[f"advance {point}"] for each in found] for point in points}


def table(found: Mapping[Point, Sequence[float]]) -> Table:
    """Return a row for each number of each thing."""
    rows = []
    for name, series in _SERIES.items():
        first = found[next(iter(series.values()))]
        for size, point in series.items():
            growth = quartiles([cost / one for cost, one in zip(found[point], first, strict=True)])
            rows.append((f"{size:,} {name}", quartiles(found[point]), growth))
    return Table("Counting and telling an update", ("", "/ advance", "/ the first of its kind"), rows)


def draw(found: Mapping[Point, Sequence[float]], path: Path) -> None:
    """Draw the medians, against each thing that grows."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3), layout="constrained")
    for axes, (name, series) in zip(figure.subplots(1, len(_SERIES), sharey=True), _SERIES.items(), strict=True):
        axes.plot(list(series), [median(found[point]) for point in series.values()], marker="o")
        axes.set(xscale="symlog", yscale="log", xlabel=name)
    figure.axes[0].set_ylabel("an update / one advance")
    figure.savefig(path)


@click.command(help=__doc__)
@click.option("--rounds", default=20, show_default=True, type=click.IntRange(min=2), help="Rounds measured.")
@click.option("--png", type=click.Path(path_type=Path), help="Where to draw it; needs matplotlib (extra `plot`).")
@markdown_option
def main(rounds: int, png: Path | None, *, markdown: bool) -> None:
    """Measure, print the table and draw it."""
    torch.set_num_threads(1)
    found = measure(rounds)
    show(table(found), markdown=markdown)
    if png is not None:
        draw(found, png)


if __name__ == "__main__":
    main()
