"""The curves of runs as one PNG picture, for a paper or a chat."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from noether.core.text import escape_controls
from noether.reports.html.charts import group_curves, run_style
from noether.reports.html.curves import choose_points
from noether.reports.html.labels import run_labels
from noether.reports.reading.metric_series import is_derived

if TYPE_CHECKING:
    from collections.abc import Sequence

    from noether.reports.html.charts import Curve
    from noether.reports.reading.run_record import RunRecord

_MAX_CHARTS: Final = 24
_POINTS: Final = 2000
_MAX_DOTS: Final = 60  # curves with more points are drawn without dots
_COLUMNS: Final = 3
_NAME_CHARACTERS: Final = 48  # fit in one line above a chart
_STYLES: Final = {"solid": "-", "dashed": "--", "dotted": ":", "dotdash": "-."}
"""Line styles of matplotlib by dash pattern of bokeh."""


def draw_picture(runs: Sequence[RunRecord]) -> tuple[bytes, int]:
    """Return the curves of all runs as a PNG picture, and how many metrics are left out of it.

    Each metric has a chart with all runs. A diamond is the best value, a dotted line a checkpoint that exists. Values
    that callbacks derive from others, such as best values, are left out first.

    Args:
        runs: The runs, at least one with a metric.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups = group_curves(runs)
    keys = sorted(groups, key=is_derived)
    shown = keys[:_MAX_CHARTS]
    columns = min(_COLUMNS, len(shown)) or 1
    rows = -(-len(shown) // columns) or 1
    figure = Figure(figsize=(5.2 * columns, 3.1 * rows + 0.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    for number, key in enumerate(shown, start=1):
        _draw_chart(figure.add_subplot(rows, columns, number), key, groups[key], runs)
    if len(runs) > 1:
        _add_legend(figure, run_labels(runs))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue(), len(keys) - len(shown)


def _draw_chart(axes: Any, key: str, curves: Sequence[Curve], runs: Sequence[RunRecord]) -> None:
    for curve in curves:
        color, dash = run_style(curve.run)
        series = curve.series
        values, updates = series.values.astype(np.float64), series.points.update
        chosen = choose_points(values, _POINTS)
        drawn = np.where(np.isfinite(values[chosen]), values[chosen], np.nan)
        marker = "." if len(chosen) <= _MAX_DOTS else ""
        axes.plot(updates[chosen], drawn, color=color, linestyle=_STYLES[dash], marker=marker, linewidth=1.2)
        run = runs[curve.run]
        mode = None if is_derived(key) else run.direction(key)
        best = None if mode is None else series.best(mode)
        if best is not None:
            axes.plot(best.point.update, best.value, marker="D", color=color, markersize=6, markerfacecolor="none")
        if len(runs) == 1:
            for update in {each.iteration.update for each in run.checkpoints}:
                axes.axvline(update, color="0.6", linewidth=0.8, linestyle=":")
    key = escape_controls(key)
    name = key if len(key) <= _NAME_CHARACTERS else f"...{key[3 - _NAME_CHARACTERS :]}"
    axes.set_title(name.replace("$", r"\$"), fontsize=10, loc="left")
    axes.set_xlabel("update", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(visible=True, color="0.9", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)


def _add_legend(figure: Any, labels: Sequence[str]) -> None:
    from matplotlib.lines import Line2D

    handles = []
    for index, label in enumerate(labels):
        color, dash = run_style(index)
        line: Any = _STYLES[dash]  # matplotlib lists its names as literals
        handles.append(Line2D([], [], color=color, linestyle=line, label=label.replace("$", r"\$")))
    figure.legend(handles=handles, loc="outside upper left", ncols=4, fontsize=8, frameon=False)
