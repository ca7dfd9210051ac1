"""The first and the last line of a metrics log, without the lines between them."""

from __future__ import annotations

import os
from itertools import islice
from typing import TYPE_CHECKING, Final

from noether.reports.reading.log_lines import LogLines
from noether.reports.reading.metrics_log import parse_metrics

if TYPE_CHECKING:
    from pathlib import Path

    from noether.reports.reading.metric_series import Point

_END_BYTES: Final = 1 << 16


def read_first_point(path: Path) -> Point | None:
    """Return where the first whole line of a log was written; None if there is none, or its begin is damaged."""
    lines = LogLines(path=path)
    points = parse_metrics(lines, islice(lines.blocks(), 1)).metrics.points
    return points[0] if len(points) else None


def read_last_point(path: Path) -> Point | None:
    """Return where the last whole line of a log was written; None if there is none."""
    lines = LogLines(path=path)
    if path.exists():
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _END_BYTES))
            if file.tell():
                file.readline()  # the rest of a line
            points = parse_metrics(lines, lines.blocks_of(file)).metrics.points
        if len(points) or size <= _END_BYTES:
            return points[-1] if len(points) else None
        points = parse_metrics(LogLines(path=path)).metrics.points  # a very long last line
        return points[-1] if len(points) else None
    return None
