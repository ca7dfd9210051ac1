"""A plan as text: a table, a timeline, and lists of what fires where."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Final

from rich.console import Console
from rich.table import Table

from noether.cli.plan.timeline import DRAWN, PLAIN, row, scale

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from noether.core.schedules.forecast import Firing, Firings
    from noether.planning.plan import Plan
    from noether.planning.planned_callback import PlannedCallback
    from noether.planning.retention_forecast import Bounds, CheckpointForecast

_WIDTH: Final = 144
"""Of what does not go to a terminal."""
_ENDLESS: Final = 10_000
_LEAST: Final = 20
_SAVING: Final = ("written", "kept", "of each", "in all")
_READING: Final = ("evaluations", "samples")
_THOUSAND: Final = 1000


def print_plan(plan: Plan, file: str) -> None:
    """Print the whole plan."""
    console, table = _console(), _table(plan)
    console.print(_facts(plan, file), soft_wrap=True)
    (console if sys.stdout.isatty() else _wide_enough(table)).print(table)
    for line in (*_timeline(plan, console), "", *_ending(plan)):
        console.print(line, soft_wrap=True)


def print_fired(fired: Iterable[tuple[PlannedCallback, Firing]], where: str) -> None:
    """Print what fires at one point, in the order in which it is called."""
    table = _bare("at", "event", "callback")
    for planned, firing in fired:
        table.add_row(str(firing), firing.event.__name__, planned.name)
    _print_list(table, f"nothing fires at {where}")


def print_counted(counted: Iterable[tuple[PlannedCallback, Firings]], where: str) -> None:
    """Print what fires in a part of the run, and how often."""
    table = _bare("callback", "first", "last", "firings", right=("first", "last", "firings"))
    for planned, each in counted:
        table.add_row(planned.name, str(each.first), str(each.last), f"{each.count:,}")
    _print_list(table, f"nothing fires {where}")


def size(count: float) -> str:
    """Return a number of bytes as text.

    Example:
        >>> size(999), size(999_999), size(1_508_884), size(2.5e12)
        ('999 B', '1 MB', '1.51 MB', '2.50 TB')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if round(count) < _THOUSAND:
            return f"{count:.0f} B" if unit == "B" else f"{count:.3g} {unit}"
        count /= _THOUSAND
    return f"{count:,.2f} TB"


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else _WIDTH, highlight=False, markup=False)


def _wide_enough(table: Table) -> Console:
    """Return a console on which the table does not wrap: a file has no width."""
    endless = Console(width=_ENDLESS, highlight=False, markup=False)
    return Console(width=max(_WIDTH, endless.measure(table).maximum), highlight=False, markup=False)


def _print_list(table: Table, otherwise: str) -> None:
    console = _console()
    if not table.row_count:
        console.print(otherwise, soft_wrap=True)
    else:
        (console if sys.stdout.isatty() else _wide_enough(table)).print(table)


def _bare(*columns: str, right: Sequence[str] = ()) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return table


def _facts(plan: Plan, file: str) -> str:
    final, frozen = plan.run.final, f", {plan.frozen_params:,} frozen" if plan.frozen_params else ""
    return (
        f"{file}: {final.epoch:,} epochs, {final.update:,} updates, {final.sample:,} samples; "
        f"{plan.trainable_params:,} parameters{frozen}\n"
    )


def _table(plan: Plan) -> Table:
    saves = any(each.checkpoints for each in plan.callbacks)
    reads = bool(plan.evaluations)
    columns = ("first", "last", "firings", *(_SAVING if saves else ()), *(_READING if reads else ()))
    table = _bare("callback", *columns, right=columns)
    for each in plan.callbacks:
        table.add_row(each.name, *_when(each.firings), *_cells(each, saves=saves, reads=reads))
    if saves or reads:
        table.add_section()
        table.add_row("together", "", "", "", *_totals(plan, saves=saves, reads=reads))
    return table


def _when(firings: Firings) -> tuple[str, str, str]:
    first, last = ("" if each is None else str(each) for each in (firings.first, firings.last))
    return first, last, f"{firings.count:,}"


def _cells(planned: PlannedCallback, *, saves: bool, reads: bool) -> list[str]:
    saved = ["", "", "", ""] if planned.checkpoints is None else _saved(planned.checkpoints)
    read = planned.evaluations
    return [
        *(saved if saves else ()),
        *(() if not reads else ("", "") if read is None else (f"{read.count:,}", f"{read.samples:,}")),
    ]


def _totals(plan: Plan, *, saves: bool, reads: bool) -> list[str]:
    written, kept, _, in_all = _saved(plan.checkpoints)
    count, samples = (sum(getattr(each, name) for each in plan.evaluations) for name in ("count", "samples"))
    return [*((written, kept, "", in_all) if saves else ()), *((f"{count:,}", f"{samples:,}") if reads else ())]


def _saved(made: CheckpointForecast) -> list[str]:
    each = ", ".join(map(size, made.each_bytes))
    return [_number(made.written), _number(made.kept), each, _sizes(made.written_bytes)]


def _number(bounds: Bounds) -> str:
    return _bounded(bounds, f"{bounds.at_least:,}", f"{bounds.at_most:,}")


def _sizes(bounds: Bounds) -> str:
    return _bounded(bounds, size(bounds.at_least), size(bounds.at_most))


def _bounded(bounds: Bounds, least: str, most: str) -> str:
    if bounds.at_least == bounds.at_most:
        return most
    return f"{least} to {most}" if bounds.at_least else f"<= {most}"


def _timeline(plan: Plan, console: Console) -> list[str]:
    """Return the lines of the timeline, as wide as the terminal."""
    marks = PLAIN if console.options.ascii_only else DRAWN
    names = [each.name for each in plan.callbacks]
    label = min(max(map(len, names), default=0), max(_LEAST, console.width // 3))
    columns = max(_LEAST, console.width - label - 2)
    rows = [row(each.occasions, plan.run, columns, marks) for each in plan.callbacks]
    lines = [f"{_cut(name, label)}  {drawn}" for name, drawn in zip(names, rows, strict=True)]
    return ["", *lines, *(" " * (label + 2) + line for line in scale(plan.run, columns))]


def _cut(name: str, length: int) -> str:
    return name.ljust(length) if len(name) <= length else f"{name[: length - 3]}..."


def _ending(plan: Plan) -> list[str]:
    made = plan.checkpoints
    held = (
        f"checkpoints: {_sizes(made.kept_bytes)} at the end, {size(made.peak_bytes)} at most at any time, in tensors; "
        "their names and what else is remembered come on top, some hundred bytes for each tensor"
    )
    return [*([held] if made.written.at_most else []), *(f"note: {note}" for note in plan.notes)]
