"""A run as a row of columns: number of firings in each, and a scale of epochs and updates."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Final, NamedTuple

from noether.core.schedules.forecast import count_until

if TYPE_CHECKING:
    from noether.core.run import Run
    from noether.core.schedules.forecast import Occasions

_STEPS: Final = (1, 2, 5)
_TICK_COLUMNS: Final = 10
"""Minimum distance of two ticks of the scale, in columns."""


class Marks(NamedTuple):
    """Characters of a column with no firing, one firing and several firings."""

    nothing: str
    one: str
    several: str


UNICODE_MARKS: Final = Marks("·", "│", "█")
ASCII_MARKS: Final = Marks(".", "|", "#")
"""The characters for a terminal without Unicode."""


def edges(run: Run, columns: int) -> list[int]:
    """Return the updates at which columns start and end, one more than columns; every column has an update."""
    updates = run.final.update
    count = min(columns, updates)
    return [updates * index // count for index in range(count + 1)]


def counts(occasions: Occasions, run: Run, columns: int) -> list[int]:
    """Return the number of firings in each column; those before the first update are in the first.

    Example:
        >>> from noether import EveryNUpdates, Run, TrainingIteration
        >>> from noether.core.schedules.forecast import Occasions
        >>> run = Run(end=TrainingIteration(update=9), updates_per_epoch=3, samples_per_epoch=9, effective_batch_size=3)
        >>> counts(Occasions(EveryNUpdates(4)), run, 3)
        [0, 1, 1]
    """
    until = [count_until(occasions, run.iteration_after(update), run) for update in edges(run, columns)]
    until[0] = 0
    return [after - before for before, after in pairwise(until)]


def row(occasions: Occasions, run: Run, columns: int, marks: Marks) -> str:
    """Return the columns of one callback as text."""
    return "".join(marks[min(count, 2)] for count in counts(occasions, run, columns))


class Tick(NamedTuple):
    """A labelled place on the scale.

    Args:
        update: The update at this place.
        epoch: The epoch that ends there; None on a scale without epochs.
    """

    update: int
    epoch: int | None


def ticks(run: Run, columns: int) -> list[Tick]:
    """Return the ticks, few enough that labels do not touch: ends of epochs or, in a run of one epoch, updates."""
    max_parts = max(1, columns // _TICK_COLUMNS)
    if run.final.epoch > 1:
        step = _round_step(run.final.epoch, max_parts)
        return [Tick(epoch * run.updates_per_epoch, epoch) for epoch in range(0, run.final.epoch + 1, step)]
    step = _round_step(run.final.update, max_parts)
    return [Tick(update, None) for update in range(0, run.final.update + 1, step)]


def scale(run: Run, columns: int) -> list[str]:
    """Return the lines of the scale: epochs if there are several, and updates."""
    places = ticks(run, columns)
    width = len(edges(run, columns)) - 1
    epochs = [(_column(tick, run, width), f"E{tick.epoch}") for tick in places if tick.epoch is not None]
    updates = [(_column(tick, run, width), f"U{tick.update}") for tick in places]
    return [_line(labels, width) for labels in (epochs, updates) if labels]


def _round_step(length: int, max_parts: int) -> int:
    """Return the smallest of 1, 2, 5, 10, 20, ... that divides `length` into at most `max_parts` parts."""
    power = 1
    while True:
        for factor in _STEPS:
            if length <= factor * power * max_parts:
                return factor * power
        power *= 10


def _column(tick: Tick, run: Run, width: int) -> int:
    """Return the column that contains the update of a tick."""
    return max(0, -(-tick.update * width // run.final.update) - 1)


def _line(labels: list[tuple[int, str]], width: int) -> str:
    """Return the labels at their columns, the last one before the end, without labels that would touch an earlier one.

    Example:
        >>> _line([(0, "U0"), (4, "U50"), (9, "U100")], 10)
        'U0  U50'
        >>> _line([(0, "U0"), (9, "U100")], 10)
        'U0    U100'
    """
    line = ""
    for column, label in labels:
        place = max(min(column, width - len(label)), 0)
        if len(line) < place or not line:
            line = line.ljust(place) + label
    return line
