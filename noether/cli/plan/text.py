"""A plan as text: a table, a timeline, and lists of the firings at points of the run."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Final

from rich.console import Console

from noether.cli.output import echo
from noether.cli.plan.timeline import ASCII_MARKS, UNICODE_MARKS, row, scale
from noether.core.text import count_of, format_bytes
from noether.effects.console.tables import Table, table_lines, wrap_words

if TYPE_CHECKING:
    from collections.abc import Iterable

    from noether.core.schedules.forecast import Firing, Firings
    from noether.planning.plan import Plan
    from noether.planning.planned_callback import PlannedCallback
    from noether.planning.retention_forecast import Bounds, CheckpointForecast

_WIDTH: Final = 144
"""Columns of output that does not go to a terminal."""
_MIN_COLUMNS: Final = 20
"""Minimum width of the names and of the timeline."""
_SAVE_COLUMNS: Final = ("written", "kept", "of each", "in all")
_EVALUATION_COLUMNS: Final = ("evaluations", "samples")


def print_plan(plan: Plan, file: str) -> None:
    """Print the whole plan."""
    width = _terminal_width()
    _print_lines([_heading(plan, file), ""], width)
    _print_table(_tabulate(plan), width)
    echo("\n".join(_timeline(plan, width or _WIDTH, ascii_only=Console().options.ascii_only)))
    _print_lines(["", *_footer(plan)], width)


def print_point(fired: Iterable[tuple[PlannedCallback, Firing]], where: str) -> None:
    """Print the callbacks that fire at one point, in their order."""
    rows = [(str(firing), firing.event.__name__, planned.name) for planned, firing in fired]
    _print_list(Table(("at", "event", "callback"), rows), f"nothing fires at {where}")


def print_interval(fired: Iterable[tuple[PlannedCallback, Firings]], where: str) -> None:
    """Print the callbacks that fire in a part of the run, and how often."""
    rows = [(planned.name, str(each.first), str(each.last), f"{each.count:,}") for planned, each in fired]
    columns = ("callback", "first", "last", "firings")
    _print_list(Table(columns, rows, right=columns[1:]), f"nothing fires {where}")


def _terminal_width() -> int | None:
    return Console().width if sys.stdout.isatty() else None


def _print_lines(lines: Iterable[str], width: int | None) -> None:
    echo("\n".join(line if width is None else "\n".join(wrap_words(line, width)) for line in lines))


def _print_table(table: Table, width: int | None) -> None:
    echo("\n".join(table_lines(table, width)))


def _print_list(table: Table, if_empty: str) -> None:
    if table.rows:
        _print_table(table, _terminal_width())
    else:
        echo(if_empty)


def _heading(plan: Plan, file: str) -> str:
    final, frozen = plan.run.final, f", {plan.frozen_params:,} frozen" if plan.frozen_params else ""
    params = count_of(plan.trainable_params, "parameter", form=",")
    ranks = f"; {plan.world_size} ranks" if plan.world_size > 1 else ""
    return (
        f"{file}: {count_of(final.epoch, 'epoch', form=',')}, {count_of(final.update, 'update', form=',')}, "
        f"{count_of(final.sample, 'sample', form=',')}; {params}{frozen}{ranks}"
    )


def _tabulate(plan: Plan) -> Table:
    saves = any(each.checkpoints for each in plan.callbacks)
    evaluates = bool(plan.evaluations)
    optional = (*(_SAVE_COLUMNS if saves else ()), *(_EVALUATION_COLUMNS if evaluates else ()))
    columns = ("first", "last", "firings", *optional)
    rows = [
        (each.name, *_firing_cells(each.firings), *_cells(each, saves=saves, evaluates=evaluates))
        for each in plan.callbacks
    ]
    if saves or evaluates:
        rows.append(("together", "", "", "", *_totals(plan, saves=saves, evaluates=evaluates)))
    return Table(("callback", *columns), rows, right=columns)


def _firing_cells(firings: Firings) -> tuple[str, str, str]:
    first, last = ("" if each is None else str(each) for each in (firings.first, firings.last))
    return first, last, f"{firings.count:,}"


def _cells(planned: PlannedCallback, *, saves: bool, evaluates: bool) -> list[str]:
    cells: list[str] = []
    if saves:
        forecast = planned.checkpoints
        cells += [""] * len(_SAVE_COLUMNS) if forecast is None else _checkpoint_cells(forecast)
    if evaluates:
        own = planned.evaluations
        cells += [""] * len(_EVALUATION_COLUMNS) if own is None else [f"{own.count:,}", f"{own.samples:,}"]
    return cells


def _totals(plan: Plan, *, saves: bool, evaluates: bool) -> list[str]:
    written, kept, _, in_all = _checkpoint_cells(plan.checkpoints)
    count, samples = (sum(getattr(each, name) for each in plan.evaluations) for name in ("count", "samples"))
    return [*((written, kept, "", in_all) if saves else ()), *((f"{count:,}", f"{samples:,}") if evaluates else ())]


def _checkpoint_cells(forecast: CheckpointForecast) -> list[str]:
    each = ", ".join(map(format_bytes, forecast.each_bytes))
    return [_format_count(forecast.written), _format_count(forecast.kept), each, _format_sizes(forecast.written_bytes)]


def _format_count(bounds: Bounds) -> str:
    return _format_bounds(bounds, f"{bounds.at_least:,}", f"{bounds.at_most:,}")


def _format_sizes(bounds: Bounds) -> str:
    return _format_bounds(bounds, format_bytes(bounds.at_least), format_bytes(bounds.at_most))


def _format_bounds(bounds: Bounds, least: str, most: str) -> str:
    if bounds.at_least == bounds.at_most:
        return most
    return f"{least} to {most}" if bounds.at_least else f"<= {most}"


def _timeline(plan: Plan, width: int, *, ascii_only: bool) -> list[str]:
    """Return the lines of the timeline, which has `width` columns."""
    marks = ASCII_MARKS if ascii_only else UNICODE_MARKS
    names = [each.name for each in plan.callbacks]
    label = min(max(map(len, names), default=0), max(_MIN_COLUMNS, width // 3))
    columns = max(_MIN_COLUMNS, width - label - 2)
    rows = [row(each.occasions, plan.run, columns, marks) for each in plan.callbacks]
    labels = [name.ljust(label) if len(name) <= label else f"{name[: label - 3]}..." for name in names]
    lines = [f"{name}  {drawn}" for name, drawn in zip(labels, rows, strict=True)]
    return ["", *lines, *(" " * (label + 2) + line for line in scale(plan.run, columns))]


def _footer(plan: Plan) -> list[str]:
    forecast = plan.checkpoints
    sizes = (
        f"checkpoints: {_format_sizes(forecast.kept_bytes)} at the end, "
        f"{format_bytes(forecast.peak_bytes)} at most at any time, excluding metadata (some hundred bytes per tensor)"
    )
    return [*([sizes] if forecast.written.at_most else []), *(f"note: {note}" for note in plan.notes)]
