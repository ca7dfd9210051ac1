"""`noether query`: runs a SQL statement over runs."""

from __future__ import annotations

import csv
import io
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from noether.cli.output import echo, make_console, printable, write
from noether.effects.disk.json_numbers import to_plain
from noether.reports.query import query_runs
from noether.reports.reading.run_record import read_runs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from noether.reports.query import QueryResult
    from noether.reports.reading.run_record import RunRecord

_PLAIN_WIDTH = 1 << 16


def query(folders: Sequence[Path], statement: str, form: str) -> None:
    """Print the rows that a SQL statement returns.

    Args:
        folders: Runs, or folders of runs.
        statement: The statement; see `query_runs` for the tables.
        form: `table`, `csv` or `json`.

    Raises:
        ConfigError: If there is no run, or duckdb refuses the statement.
        MissingLibraryError: If duckdb is not installed.
    """
    result = query_runs(name_runs(folders), statement)
    if form == "csv":
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(result.columns)
        writer.writerows(result.rows)
        write(buffer.getvalue())
    elif form == "json":
        rows = [dict(zip(result.columns, to_plain(row), strict=True)) for row in result.rows]
        is_ascii = make_console().options.ascii_only
        write(f"{json.dumps(rows, default=str, ensure_ascii=is_ascii)}\n")
    else:
        _print_table(result)


def name_runs(folders: Sequence[Path]) -> dict[str, RunRecord]:
    """Return the runs in folders by name: the path below the folder, or the whole path if several runs share a name.

    A run that is in several of the folders has the name of the first one.
    """
    places: dict[Path, tuple[Path, RunRecord]] = {}
    for folder in folders:
        for run in read_runs(folder):
            places.setdefault(run.path.resolve(), (folder, run))
    found = list(places.values())
    below = [Path(os.path.relpath(run.path, folder)).as_posix() for folder, run in found]
    names = [run.run_id if name == "." else name for name, (_, run) in zip(below, found, strict=True)]
    return {name if names.count(name) == 1 else str(run.path): run for name, (_, run) in zip(names, found, strict=True)}


def _print_table(result: QueryResult) -> None:
    """Print aligned columns, with the words of wide ones wrapped on a terminal."""
    console = make_console()
    if not console.is_terminal:
        console = Console(width=_PLAIN_WIDTH)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for index, name in enumerate(result.columns):
        is_number = all(isinstance(row[index], (int, float, type(None))) for row in result.rows)
        table.add_column(Text(printable(name)), justify="right" if is_number else "left", overflow="fold")
    for row in result.rows:
        table.add_row(*(Text(_cell(value)) for value in row))
    with console.capture() as captured:
        console.print(table)
    echo("\n".join(line.rstrip() for line in captured.get().splitlines()))
    if not result.rows:
        echo("no rows", err=True)


def _cell(value: Any) -> str:
    return "" if value is None else printable(repr(value) if isinstance(value, float) else str(value))
