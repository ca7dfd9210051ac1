"""Cost of dispatching an update by number of callbacks, parameters and earlier updates.

Run as `python -m benchmarks.scaling`, with `--png FILE` for a plot. One update is counted and dispatched to a reducer,
as a loop does after each step, while one quantity grows: the callbacks that are not due, alone or beside one that is
due at every update; the parameters of the state, in tensors of a thousand; the earlier updates. The other quantities
stay at one callback, a thousand parameters and no update. The unit is one `state.advance`, the part that counts the
update. All points take turns in one process; a ratio is taken within each round, and the table shows medians over
rounds with quartiles.

Goal: while no callback is due, none of these makes a difference of more than 10 %.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

import click
import torch

from benchmarks.dispatch import NEVER, Nothing
from benchmarks.measurement import Table, markdown_option, quartiles, short_call_row, show, take_turns
from noether import AfterUpdate, TrainingIteration, TrainState, compose

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from noether.core.reducer import Reducer

_THOUSAND = 1000
_EVENT = AfterUpdate(samples=64)


class Point(NamedTuple):
    """Value of each quantity."""

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


def make_reducer(point: Point) -> tuple[TrainState, Reducer]:
    """Return the state and the reducer of a point."""
    params = {f"layers.{index}.weight": torch.zeros(_THOUSAND) for index in range(point.parameters // _THOUSAND)}
    state = TrainState(params=params, iteration=TrainingIteration(0, point.updates, 64 * point.updates))
    # Intervals longer than any run here, so that no callback is due.
    callbacks = (Nothing(every_n_updates=2 * NEVER + index, id=str(index)) for index in range(point.callbacks))
    return state, compose(*callbacks, *[Nothing(every_n_updates=1)] * point.due)


def dispatch_update(state: TrainState, reducer: Reducer) -> None:
    """Count one update and dispatch it."""
    reducer(state.advance(samples=64), _EVENT)


def measure(rounds: int) -> dict[Point, list[float]]:
    """Return by point the cost of an update as a ratio to one advance, in each round."""
    points = dict.fromkeys(point for series in _SERIES.values() for point in series.values())
    turns: dict[str, Callable[[], float]] = {}
    for point in points:
        state, reducer = make_reducer(point)
        turns[f"advance {point}"] = short_call_row(partial(state.advance, samples=64))
        turns[f"dispatch {point}"] = short_call_row(partial(dispatch_update, state, reducer))
    measured = take_turns(turns, rounds)
    return {point: [each[f"dispatch {point}"] / each[f"advance {point}"] for each in measured] for point in points}


def table(measured: Mapping[Point, Sequence[float]]) -> Table:
    """Return a table with one row per value of each quantity."""
    rows = []
    for name, series in _SERIES.items():
        first = measured[next(iter(series.values()))]
        for size, point in series.items():
            growth = quartiles([cost / one for cost, one in zip(measured[point], first, strict=True)])
            rows.append((f"{size:,} {name}", quartiles(measured[point]), growth))
    return Table("Counting and dispatching an update", ("", "/ advance", "/ the first of its kind"), rows)


def draw(measured: Mapping[Point, Sequence[float]], path: Path) -> None:
    """Plot the medians against each quantity."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3), layout="constrained")
    for axes, (name, series) in zip(figure.subplots(1, len(_SERIES), sharey=True), _SERIES.items(), strict=True):
        axes.plot(list(series), [median(measured[point]) for point in series.values()], marker="o")
        axes.set(xscale="symlog", yscale="log", xlabel=name)
    figure.axes[0].set_ylabel("an update / one advance")
    figure.savefig(path)


@click.command(help=__doc__)
@click.option("--rounds", default=20, show_default=True, type=click.IntRange(min=2), help="Rounds measured.")
@click.option("--png", type=click.Path(path_type=Path), help="File of the plot; needs matplotlib (extra `plot`).")
@markdown_option
def main(rounds: int, png: Path | None, *, markdown: bool) -> None:
    """Measure, print the table and plot it."""
    torch.set_num_threads(1)
    measured = measure(rounds)
    show(table(measured), markdown=markdown)
    if png is not None:
        draw(measured, png)


if __name__ == "__main__":
    main()
