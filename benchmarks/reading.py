"""Time to read the metrics of a run, relative to parsing each line of its log with `json.loads`.

Run as `python -m benchmarks.reading`. Each line of the log has 20 metrics. The rows run in turns.
"""

from __future__ import annotations

import json
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click
import numpy as np
import orjson

from benchmarks.measurement import Table, markdown_option, quartiles, show, take_turns
from noether.reports.reading.log_lines import LogLines
from noether.reports.reading.metrics_log import parse_metrics

if TYPE_CHECKING:
    from collections.abc import Callable

_METRICS = 20


def write_log(path: Path, lines: int) -> None:
    """Write a log of random metrics."""
    numbers = np.random.default_rng(0)
    with path.open("w", encoding="utf-8") as file:
        for update in range(1, lines + 1):
            point = {"event": "after_update", "epoch": update // 1000, "update": update, "sample": 32 * update}
            metrics = {f"loss/val/{index:02d}": numbers.random() for index in range(_METRICS)}
            line = {"run": "20260102-030405", **point, "time_s": 1.7e9 + 0.0131 * update, "metrics": metrics}
            file.write(json.dumps(line) + "\n")


def time_call(function: Callable[[], object]) -> float:
    """Call a function, and return how many seconds it takes."""
    start_s = time.perf_counter()
    function()
    return time.perf_counter() - start_s


def parse_lines(path: Path, loads: Callable[[bytes], object]) -> None:
    """Parse each line, and drop the result."""
    with path.open("rb") as file:
        for line in file:
            loads(line)


@click.command(help=__doc__)
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(min=2), help="Rounds measured.")
@click.option("--lines", default=200_000, show_default=True, type=click.IntRange(min=1), help="Lines of the log.")
@markdown_option
def main(rounds: int, lines: int, *, markdown: bool) -> None:
    """Measure and print the table."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "metrics.jsonl"
        write_log(path, lines)
        rows: dict[str, Callable[[], object]] = {
            "json.loads": partial(parse_lines, path, json.loads),
            "orjson.loads": partial(parse_lines, path, orjson.loads),
            "noether.read_run(path).metrics, with arrays": lambda: parse_metrics(LogLines(path=path)),
        }
        measured = take_turns({name: partial(time_call, row) for name, row in rows.items()}, rounds)
    cells = [
        (name, quartiles(each[name] / each["json.loads"] for each in measured), quartiles(e[name] for e in measured))
        for name in rows
    ]
    title = f"Reading {lines:,} lines with {_METRICS} metrics / json.loads of each line"
    show(Table(title, ("", "/ json.loads", "s"), cells), markdown=markdown)


if __name__ == "__main__":
    main()
