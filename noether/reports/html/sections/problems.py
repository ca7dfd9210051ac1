"""The section of problems: errors, damaged lines of logs, and values that are not finite."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from noether.core.text import count_of
from noether.effects.run_files import METRICS_FILE, TRACEBACK_FILE
from noether.reports.html.labels import escape_text, run_labels
from noether.reports.html.page import Section

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from noether.reports.reading.run_record import RunRecord

_TRACEBACK_CHARACTERS: Final = 20_000
_DAMAGED_LINES: Final = 5


def problems_section(runs: Sequence[RunRecord]) -> Section | None:
    """Return the section of the problems of runs; None if no run has one."""
    parts: list[str] = []
    for label, run in zip(run_labels(runs), runs, strict=True):
        items = "".join(f"<li>{escape_text(each)}</li>" for each in _find_problems(run))
        trace = _read_traceback(run)
        if items or trace:
            parts.append(f"<h3>{escape_text(label)}</h3>{f'<ul>{items}</ul>' if items else ''}{trace}")
    return Section(title="Problems", anchor="problems", html="".join(parts)) if parts else None


def _find_problems(run: RunRecord) -> Iterator[str]:
    if run.status == "killed":
        yield "its process ended before the run did: it was killed, or the machine stopped"
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
