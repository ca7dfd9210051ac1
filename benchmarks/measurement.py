"""Helpers of the benchmarks: measure rows in rounds, take ratios within a round, and print tables.

Other work on the machine affects the row that is running. So all rows of a table run in every round, one after the
other, ratios compare two times of the same round, and a cell shows the median over rounds with its quartiles.
"""

from __future__ import annotations

import ctypes
import time
from dataclasses import dataclass
from statistics import quantiles
from typing import TYPE_CHECKING, Any, TypeVar

import click
from rich.console import Console
from rich.table import Table as RichTable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    Round = Mapping[str, float]

_Measured = TypeVar("_Measured")
_MIN_TIMED_S = 2e-3  # long compared with the microsecond that reading the clock takes
_WIDTH = 150
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # parameters of `mallopt` in glibc's malloc.h
_LARGEST_TRIM, _LARGEST_MMAP = 2**31 - 1, 32 * 2**20

markdown_option = click.option("--markdown", is_flag=True, help="Print Markdown.")


@dataclass(frozen=True)
class Table:
    """Named rows of cells.

    Args:
        title: The measured quantity and its unit.
        headings: Names of the columns; the first column, with the names of rows, has an empty heading.
        rows: The name of each row, then its cells.
        notes: Lines below the table.
    """

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()

    def print(self, console: Console) -> None:
        """Print the table with lines, for a person."""
        table = RichTable(title=self.title)
        for index, heading in enumerate(self.headings):
            table.add_column(heading, justify="right" if index else "left")
        for row in self.rows:
            table.add_row(*row)
        console.print(table)
        for note in self.notes:
            console.print(note)

    def markdown(self) -> str:
        """Return the table as Markdown."""
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
    """Return the median as text, followed by the lower and upper quartile if there are several values.

    Example:
        >>> quartiles([1.0, 2.0, 3.0, 4.0, 5.0], digits=1)
        '3.0 (2.0-4.0)'
    """
    numbers = list(values)
    if len(numbers) == 1:
        return f"{numbers[0]:.{digits}f}"
    low, middle, high = (f"{value:.{digits}f}" for value in quantiles(numbers, n=4, method="inclusive"))
    return f"{middle} ({low}-{high})"


def keep_freed_memory() -> list[str]:
    """Tell the C library to keep freed memory, and return a note for the table if it cannot.

    glibc returns freed memory to the system once enough of it lies at the end of the heap, and the next update waits
    while the system maps it again. When that happens depends on the addresses of long-lived objects, so on chance: up
    to a tenth of an update of a medium network, of any loop.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    options = ((_TRIM_THRESHOLD, _LARGEST_TRIM), (_MMAP_THRESHOLD, _LARGEST_MMAP))
    if set_option is not None and all(set_option(*option) for option in options):
        return []
    return ["Freed memory may be returned to the system: the C library has no `mallopt` to keep it."]


def take_turns(rows: Mapping[str, Callable[[], _Measured]], rounds: int) -> list[dict[str, _Measured]]:
    """Return the measurements of all rows in each round; a first round, which is not returned, warms up."""
    return [{name: row() for name, row in rows.items()} for _ in range(rounds + 1)][1:]


def ratios(measured: Sequence[Round], row: str, unit: str) -> list[float]:
    """Return the ratio of two rows within each round."""
    return [each[row] / each[unit] for each in measured]


def available_rows(rows: Mapping[str, Callable[[], Any]]) -> tuple[dict[str, Any], list[str]]:
    """Return the rows whose library is installed, and a note on the others.

    Args:
        rows: Functions that return the rows, by name.
    """
    available, missing = {}, []
    for name, make in rows.items():
        try:
            available[name] = make()
        except ImportError as error:
            missing.append(f"{name} ({error})")
    return available, [f"Left out because it is not installed: {', '.join(missing)}"] if missing else []


def seconds(work: Callable[[], Any], calls: int = 1, clock_s: Callable[[], float] = time.perf_counter) -> float:
    """Return the mean seconds of one call."""
    start_s = clock_s()
    for _ in range(calls):
        work()
    return (clock_s() - start_s) / calls


def short_call_row(work: Callable[[], Any]) -> Callable[[], float]:
    """Return a row for `take_turns` that measures a call too short to be timed alone, in seconds per call.

    It counts CPU time, because within milliseconds another process would affect wall-clock time too much.
    """
    work()
    calls = 1
    while seconds(work, calls, time.thread_time) * calls < _MIN_TIMED_S:
        calls *= 2
    return lambda: seconds(work, calls, time.thread_time)
