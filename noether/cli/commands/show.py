"""`noether show`: one run, a table of runs, or the differences between them."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from rich.live import Live

from noether.cli.output import echo, make_console, print_panel
from noether.config.errors import error_at
from noether.core.errors import suggest
from noether.core.text import count_of
from noether.effects.console.columns import format_columns
from noether.effects.console.run_panels import RunPanel
from noether.effects.console.tables import Table
from noether.effects.disk.json_numbers import to_plain
from noether.reports.differences import find_run_differences, merge_missing_callbacks
from noether.reports.html.labels import run_labels
from noether.reports.reading.metrics_tail import MetricsTail
from noether.reports.reading.run_folders import is_run
from noether.reports.reading.run_record import read_run, read_runs
from noether.reports.run_panel import describe_run, to_values
from noether.reports.run_table import FACTS, choose_metrics, make_rows, sort_rows, tabulate_runs

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from rich.console import Console

    from noether.reports.reading.run_record import RunRecord

_INTERVAL_S: Final = 1.0
_LINE_WIDTH: Final = 100


def show_run(path: Path, *, as_json: bool, follow: bool) -> None:
    """Print one screen about a run.

    Args:
        path: The run directory.
        as_json: Whether to print JSON.
        follow: Whether to show it until it ends: live on a terminal, else as a line for each new line of its log.

    Raises:
        ConfigError: If it is not the directory of a run.
    """
    run, console = read_run(path), make_console()
    if as_json:
        echo(json.dumps(to_plain(to_values(run)), indent=1))
    elif not follow:
        print_panel(_describe(run, console), console)
    else:
        with suppress(KeyboardInterrupt):
            if console.is_terminal and not console.is_dumb_terminal:
                _follow_live(run, console)
            else:
                _follow_lines(run)
        print_panel(_describe(read_run(path), console), console)


def _describe(run: RunRecord, console: Console) -> RunPanel:
    return describe_run(run, is_ascii=console.options.ascii_only)


def _follow_live(run: RunRecord, console: Console) -> None:
    def describe() -> RunPanel:
        return replace(_describe(run, console), max_lines=max(console.height - 1, 4))  # the cursor has a line, too

    with Live(describe(), console=console, transient=True, auto_refresh=False) as live:
        while run.status == "running":
            time.sleep(_INTERVAL_S)
            run = run.reread()
            live.update(describe(), refresh=True)


def _follow_lines(run: RunRecord) -> None:
    tail = MetricsTail(run.path)
    tail.read()
    is_running = True
    while is_running:
        is_running = run.status == "running"  # read before the log, so that its last lines are printed
        metrics, rewound = tail.read()
        if rewound:
            echo("the run was resumed from an earlier checkpoint")
        else:
            lines: dict[int, dict[str, float]] = {number: {} for number in range(len(metrics.points))}
            for key, series in metrics.items():
                for number, value in zip(series.lines.tolist(), series.values.tolist(), strict=True):
                    lines[number][key] = value
            for number, values in lines.items():
                for text in format_columns(values, _LINE_WIDTH):
                    echo(f"{metrics.points[number].iteration}  {text}")
        if is_running:
            time.sleep(_INTERVAL_S)


def show_runs(
    paths: Sequence[Path], *, metrics: Sequence[str], sort: str | None, only_differences: bool, as_json: bool
) -> None:
    """Print a table of runs, or the differences between them.

    Args:
        paths: Directories of runs, and folders of runs.
        metrics: Metrics to show; by default those whose best value is in the summary of a run.
        sort: The fact or metric to sort by, as in `sort_rows`; None to sort by path.
        only_differences: Whether to print the differences in place of the table.
        as_json: Whether to print JSON.

    Raises:
        ConfigError: If there is no run at a path, or no run has a metric that is shown or sorted by.
    """
    runs = list({run.path.resolve(): run for path in paths for run in read_runs(path)}.values())
    if only_differences:
        _show_differences(runs, as_json=as_json)
        return
    keys = list(metrics) or choose_metrics(runs)
    name = (sort or "run").removeprefix("-")
    if name not in FACTS and name not in keys:
        keys.append(name)
    rows = sort_rows(make_rows(runs, keys), sort or "run")
    for key in keys:
        if all(row.metrics[key] is None for row in rows):
            known = dict.fromkeys([*FACTS, *(each for run in runs for each in run.metrics)])
            option = "--metric" if key in metrics else "--sort"
            raise error_at(f"{option} {key}", f"no run has this metric{suggest(key, known)}")
    if as_json:
        echo(json.dumps([to_plain(vars(row)) for row in rows], indent=1))
    else:
        print_panel(RunPanel(title=count_of(len(rows), "run"), table=tabulate_runs(rows, keys)), make_console())


def _show_differences(runs: Sequence[RunRecord], *, as_json: bool) -> None:
    if len(runs) == 1:
        raise error_at("--diff", f"compares runs, and only {runs[0].path} is given; give a second one")
    found = find_run_differences(runs)
    paths = [str(run.path) for run in runs]
    if as_json:
        values = {name: dict(zip(paths, map(to_plain, each), strict=True)) for name, each in found.items()}
        echo(json.dumps(values, indent=1, default=str))
    elif not found:
        echo(f"{len(runs)} runs do not differ in configuration, code, machine or packages")
    else:
        labels, shown = run_labels(runs), merge_missing_callbacks(found)
        rows = [(name, *("" if value is None else str(value) for value in each)) for name, each in shown.items()]
        print_panel(RunPanel(title="differences", table=Table(("setting", *labels), rows)), make_console())


def is_single_run(paths: Sequence[Path]) -> bool:
    """Return whether one path is given, and it is the directory of a run."""
    return len(paths) == 1 and is_run(paths[0])
