"""The sections of checkpoints and of their standalone evaluations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from noether.core.text import format_bytes
from noether.reports.html.labels import run_labels
from noether.reports.html.page import Section
from noether.reports.html.sections.overview import best_values
from noether.reports.html.tables import html_table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from noether.reports.reading.run_record import RunRecord

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
