"""What the benchmarks share: rows that take turns, ratios within a round, and a table that is printed or pasted.

What else the machine does meets whoever is running. So all rows of a table run in every round, one after the other, a
ratio is taken of two times of the same round, and a cell shows the median over rounds with the quartiles beside it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import quantiles
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.table import Table as RichTable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    Round = Mapping[str, float]

_READING_S = 2e-3  # long beside the microsecond that reading the clock takes
_WIDTH = 150

markdown_option = click.option("--markdown", is_flag=True, help="Print Markdown, to be pasted.")


@dataclass(frozen=True)
class Table:
    """Named rows of cells.

    Args:
        title: What is measured, and in which unit.
        headings: Names of the columns; that of the rows' names is empty.
        rows: The name of each row, then its cells.
        notes: Lines below the table.
    """

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()

    def print(self, console: Console) -> None:
        """Print it with lines, for a person."""
        table = RichTable(title=self.title)
        for index, heading in enumerate(self.headings):
            table.add_column(heading, justify="right" if index else "left")
        for row in self.rows:
            table.add_row(*row)
        console.print(table)
        for note in self.notes:
            console.print(note)

    def markdown(self) -> str:
        """Return it as Markdown."""
        rule = ["---", *["---:"] * (len(self.headings) - 1)]
        lines = ["| " + " | ".join(cells) + " |" for cells in (self.headings, rule, *self.rows)]
        return "\n".join([f"**{self.title}**", "", *lines, *(line for note in self.notes for line in ("", note)), ""])


def show(*tables: Table, markdown: bool) -> None:
    """Print tables, for a person or as Markdown."""
    for table in tables:
        if markdown:
            click.echo(table.markdown())
        else:
            table.print(Console(width=_WIDTH, highlight=False))


def quartiles(values: Iterable[float], digits: int = 2) -> str:
    """Return the median, with the lower and the upper quartile beside it where there are several values.

    Example:
        >>> quartiles([1.0, 2.0, 3.0, 4.0, 5.0], digits=1)
        '3.0 (2.0-4.0)'
    """
    found = list(values)
    if len(found) == 1:
        return f"{found[0]:.{digits}f}"
    low, middle, high = (f"{value:.{digits}f}" for value in quantiles(found, n=4, method="inclusive"))
    return f"{middle} ({low}-{high})"


def take_turns(rows: Mapping[str, Callable[[], float]], rounds: int) -> list[dict[str, float]]:
    """Return what every row measures in each round; in a first one, not returned, all of them warm up."""
    return [{name: row() for name, row in rows.items()} for _ in range(rounds + 1)][1:]


def ratios(found: Sequence[Round], row: str, unit: str) -> list[float]:
    """Return the ratio of two rows within each round."""
    return [each[row] / each[unit] for each in found]


def installed(rows: Mapping[str, Callable[[], Any]]) -> tuple[dict[str, Any], list[str]]:
    """Return what makes the rows make, and a line on those whose library is not there."""
    found, missing = {}, []
    for name, make in rows.items():
        try:
            found[name] = make()
        except ImportError as error:
            missing.append(f"{name} ({error})")
    return found, [f"Left out, for it is not installed: {', '.join(missing)}"] if missing else []


def seconds(work: Callable[[], Any], calls: int = 1, clock_s: Callable[[], float] = time.perf_counter) -> float:
    """Return the seconds that one of some calls takes."""
    start_s = clock_s()
    for _ in range(calls):
        work()
    return (clock_s() - start_s) / calls


def often(work: Callable[[], Any]) -> Callable[[], float]:
    """Return a row for `take_turns`: seconds of a call that is too short to be read alone.

    They are those that the processor spends on it: over milliseconds, another process makes more of a difference.
    """
    work()
    calls = 1
    while seconds(work, calls, time.thread_time) * calls < _READING_S:
        calls *= 2
    return lambda: seconds(work, calls, time.thread_time)
