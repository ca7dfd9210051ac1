"""The sections of what a run saved: checkpoints, standalone evaluations and problems."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from noether.core.text import count_of, format_bytes
from noether.effects.run_files import METRICS_FILE, TRACEBACK_FILE
from noether.reports.html.labels import escape_text, run_labels
from noether.reports.html.page import Section
from noether.reports.html.sections.overview import best_values
from noether.reports.html.tables import html_table

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from noether.reports.reading.run_record import RunRecord

_TRACEBACK_CHARACTERS: Final = 20_000
_DAMAGED_LINES: Final = 5
_VALUES: Final = 4  # metrics beside each checkpoint


def checkpoints_section(runs: Sequence[RunRecord]) -> Section | None:
    """Return the section of the checkpoints that exist; None if there are none."""
    rows: list[list[object]] = []
    keys = list(dict.fromkeys(key for run in runs for key, _ in best_values(run)))[:_VALUES]
    for label, run in zip(run_labels(runs), runs, strict=True):
        for each in run.checkpoints:
            pointers = ", ".join(name for name, tag in run.pointers.items() if tag == each.tag)
            size = sum(part.size_bytes for part in each.parts.values())
            content = "whole state" if each.resumable else ", ".join(each.files)
            values = (_value_at(run, key, each.iteration.update) for key in keys)
            rows.append([each.tag, label, pointers, content, format_bytes(size), *values])
    if not rows:
        return None
    table = html_table("Checkpoints that exist now", ["tag", "run", "pointers", "content", "size", *keys], rows)
    return Section(title="Checkpoints", anchor="checkpoints", html=table)


def _value_at(run: RunRecord, key: str, update: int) -> float | None:
    """Return the value of a metric that was logged last at an update; None if there is none."""
    if key not in run.metrics:
        return None
    series = run.metrics[key]
    found = np.flatnonzero(series.points.update == update)
    return float(series.values[found[-1]]) if len(found) else None


def evaluations_section(runs: Sequence[RunRecord]) -> Section | None:
    """Return the section of the results of `noether eval`; None if there are none."""
    rows: list[list[object]] = [
        [key, label, name, value]
        for label, run in zip(run_labels(runs), runs, strict=True)
        for name, metrics in run.evaluations.items()
        for key, value in metrics.items()
    ]
    if not rows:
        return None
    table = html_table("Results of noether eval", ["metric", "run", "checkpoint", "value"], rows)
    return Section(title="Evaluations", anchor="evaluations", html=table)


def problems_section(runs: Sequence[RunRecord]) -> Section | None:
    """Return the section of errors and of values that are not finite; None if there are none."""
    parts: list[str] = []
    for label, run in zip(run_labels(runs), runs, strict=True):
        items = "".join(f"<li>{escape_text(each)}</li>" for each in _find_problems(run))
        trace = _read_traceback(run)
        if items or trace:
            parts.append(f"<h3>{escape_text(label)}</h3>{f'<ul>{items}</ul>' if items else ''}{trace}")
    return Section(title="Problems", anchor="problems", html="".join(parts)) if parts else None


def _find_problems(run: RunRecord) -> Iterator[str]:
    if run.status == "killed":
        yield "its process ended without an end of the run: it was killed, or the machine stopped"
    if damaged := run.damaged_lines:
        shown = "; ".join(f"line {line}: {reason}" for line, reason in list(damaged.items())[:_DAMAGED_LINES])
        more = "; ..." if len(damaged) > _DAMAGED_LINES else ""
        yield f"{METRICS_FILE} has {count_of(len(damaged), 'damaged line')}, which the curves leave out: {shown}{more}"
    for key, series in run.metrics.items():
        values = series.values.astype(np.float64)
        where = np.flatnonzero(~np.isfinite(values))
        if len(where):
            first = series.points.update[where[0]]
            yield f"{key}: {len(where):,} of {len(values):,} values are not finite, the first at update {first:,}"


def _read_traceback(run: RunRecord) -> str:
    path = run.path / TRACEBACK_FILE
    if run.status != "failed" or not path.is_file():
        return ""
    text = path.read_text(encoding="utf-8", errors="replace")[-_TRACEBACK_CHARACTERS:]
    return f'<details open><summary>Its last error</summary><pre tabindex="0">{escape_text(text)}</pre></details>'
