"""A table of runs: status, start, duration, progress and chosen metrics, sorted by any of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, final

from noether.core.metric_keys import direction_of
from noether.core.text import format_seconds
from noether.effects.console.tables import Table
from noether.reports.run_panel import duration_s, format_number, format_time, last_iteration

if TYPE_CHECKING:
    from collections.abc import Sequence

    from noether.reports.reading.run_record import RunRecord

FACTS: Final = ("run", "status", "started", "duration", "update")
_MAX_METRICS: Final = 4
_BEST: Final = "/best"


@final
@dataclass(frozen=True, kw_only=True)
class RunRow:
    """One row of a table of runs.

    Args:
        run: Path of the run.
        status: Its status.
        started: Time of its start, in seconds since 1970; None if unknown.
        duration: Time that it trained, in seconds; None if unknown.
        update: Completed updates.
        metrics: The best value of each chosen metric, or the last value if it is unknown whether higher or lower is
            better; None if the run has no value.
    """

    run: str
    status: str
    started: float | None
    duration: float | None
    update: int
    metrics: dict[str, float | None]


def choose_metrics(runs: Sequence[RunRecord]) -> list[str]:
    """Return the metrics that a table shows by default: at most four whose best value is in the summary of a run."""
    entries = dict.fromkeys(key for run in runs for key in run.summary if key.endswith(_BEST))
    return [key.removesuffix(_BEST) for key in entries][:_MAX_METRICS]


def make_rows(runs: Sequence[RunRecord], keys: Sequence[str]) -> list[RunRow]:
    """Return a row for each run.

    Args:
        runs: The runs.
        keys: The metrics. The log of a run is read only for those whose best value is not in its summary.
    """
    rows = []
    for run in runs:
        status = run.status
        values = {key: _read_value(run, key) for key in keys}
        rows.append(
            RunRow(
                run=str(run.path),
                status=status,
                started=run.started_s,
                duration=duration_s(run, status),
                update=last_iteration(run).update,
                metrics=values,
            )
        )
    return rows


def sort_rows(rows: Sequence[RunRow], by: str) -> list[RunRow]:
    """Return rows sorted by a fact or a metric, the best first; those without a value come last.

    Args:
        rows: The rows.
        by: One of `FACTS`, or a metric of the rows; a minus before it reverses the order. Metrics of which higher
            values are better begin with the highest.

    Example:
        >>> from dataclasses import replace
        >>> row = RunRow(run="a", status="killed", started=1.0, duration=2.0, update=3, metrics={"val/accuracy": 0.5})
        >>> rows = [row, replace(row, run="b", started=0.0, metrics={"val/accuracy": 0.9})]
        >>> [each.run for each in sort_rows(rows, "val/accuracy")]
        ['b', 'a']
        >>> [each.run for each in sort_rows(rows, "-started")]
        ['a', 'b']
    """
    name = by.removeprefix("-")
    is_fact = name in FACTS
    descends = by.startswith("-") != (not is_fact and direction_of(name) == "higher")

    def value(row: RunRow) -> Any:
        return getattr(row, name) if is_fact else row.metrics.get(name)

    known = [row for row in rows if not _is_missing(value(row))]
    missing = [row for row in rows if _is_missing(value(row))]
    return [*sorted(known, key=value, reverse=descends), *missing]


def tabulate_runs(rows: Sequence[RunRow], keys: Sequence[str]) -> Table:
    """Return rows as a table of texts."""
    return Table(
        (*FACTS, *(f"best {key}" if direction_of(key) else key for key in keys)),
        [
            (
                row.run,
                row.status,
                format_time(row.started),
                "" if row.duration is None else format_seconds(row.duration),
                str(row.update),
                *("" if (value := row.metrics[key]) is None else format_number(value) for key in keys),
            )
            for row in rows
        ],
    )


def _read_value(run: RunRecord, key: str) -> float | None:
    best = run.summary.get(f"{key}{_BEST}")
    if isinstance(best, (int, float)):
        return best
    if key not in run.metrics:
        return None
    found = run.best(key)
    return run.metrics[key].last if found is None else found.value


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))
