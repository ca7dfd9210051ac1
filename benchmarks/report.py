"""Time and size of the report of a long run.

Run as `python -m benchmarks.report`. It writes a log of metrics in the format of the trainer. The first row reads the
log; the second reads it and writes the report, one HTML file; the third runs the whole command in another process.
CPU seconds are the sum over all threads and processes; other programs on the machine affect them less.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import click
import numpy as np
import orjson

from benchmarks.measurement import Table, markdown_option, quartiles, show, take_turns
from noether.effects import open_run
from noether.reports.html.report import write_report
from noether.reports.reading.run_record import read_run

if TYPE_CHECKING:
    from collections.abc import Callable

_SAMPLES = 32
_UPDATES_PER_EPOCH = 10_000


def write_log(path: Path, updates: int, keys: int) -> None:
    """Write the log of a run in which each metric is a random walk, logged after every update."""
    open_run(path).close()
    steps = np.random.default_rng(0).normal(size=(updates, keys))
    names = [f"loss/{index}" for index in range(keys)]
    with (path / "metrics.jsonl").open("wb") as file:
        for update, values in enumerate(np.cumsum(steps, axis=0).tolist(), 1):
            place = {"event": "after_update", "epoch": update // _UPDATES_PER_EPOCH, "update": update}
            where = {"run": "20260102-030405", **place, "sample": update * _SAMPLES, "time_s": update / 100}
            line = orjson.dumps({**where, "metrics": dict(zip(names, values, strict=True))})
            file.write(line.replace(b'":', b'": ').replace(b',"', b', "') + b"\n")


def read_metrics(path: Path) -> None:
    """Read all metrics of a run.

    Raises:
        click.ClickException: If the run has no metrics.
    """
    if not len(read_run(path).metrics):
        raise click.ClickException("the run has no metrics")


def run_command(run: Path, target: Path) -> None:
    """Run `noether report` in another process."""
    command = [sys.executable, "-m", "noether", "report", str(run), "--to", str(target)]
    subprocess.run(command, check=True, capture_output=True)  # noqa: S603  # our own command


class Times(NamedTuple):
    """Wall-clock seconds of a call, and its CPU seconds in this process and in those that it started."""

    clock_s: float
    cpu_s: float


def measure(work: Callable[[], object]) -> Times:
    """Call a function, and return how long it takes."""
    start_s, start_cpu_s = time.perf_counter(), sum(os.times()[:4])
    work()
    return Times(time.perf_counter() - start_s, sum(os.times()[:4]) - start_cpu_s)


@click.command(help=__doc__)
@click.option("--updates", default=1_000_000, show_default=True, type=click.IntRange(min=1), help="Updates of the run.")
@click.option("--keys", default=20, show_default=True, type=click.IntRange(min=1), help="Metrics of each update.")
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(min=2), help="Rounds measured.")
@markdown_option
def main(updates: int, keys: int, rounds: int, *, markdown: bool) -> None:
    """Write the log, measure and print the table."""
    with tempfile.TemporaryDirectory() as folder:
        run, target = Path(folder, "run"), Path(folder, "report.html")
        write_log(run, updates, keys)
        log_size = (run / "metrics.jsonl").stat().st_size
        work = {
            "read the log": partial(read_metrics, run),
            "read it and write the report": lambda: write_report([read_run(run)], target),
            "python -m noether report": partial(run_command, run, target),
        }
        measured = take_turns({name: partial(measure, each) for name, each in work.items()}, rounds)
        size = target.stat().st_size
    title = f"{updates:,} updates x {keys} metrics, {log_size / 1e6:.0f} MB of log; the report has {size / 1e6:.1f} MB"
    rows = [
        (name, quartiles(each[name].clock_s for each in measured), quartiles(each[name].cpu_s for each in measured))
        for name in work
    ]
    show(Table(title, ("", "seconds", "CPU seconds"), rows), markdown=markdown)


if __name__ == "__main__":
    main()
