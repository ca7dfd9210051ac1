"""Charts of metrics: one per key, with all runs in it; the script of the page draws them by bokeh."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, final

import numpy as np

from noether.reports.html.curves import average_parts, choose_levels, choose_points

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from noether.reports.reading.metric_series import Points, Series
    from noether.reports.reading.run_record import RunRecord

_OVERVIEW_POINTS: Final = 2000
_OVERVIEWS_POINTS: Final = 40_000  # of the overviews of all curves of a page together
_FINEST_POINTS: Final = (24_000, 120_000)  # of all curves of a page together, which bounds its size
_VALUES_PER_POINT: Final = 50  # long runs have a larger page, so that zooming shows more of them
_AVERAGES: Final = 500  # per curve; smoothing uses them where the page does not have all values
_SCALES: Final[tuple[Literal["linear", "log"], ...]] = ("linear", "log")
_KNOTS: Final = 4000
_INT32_LIMIT: Final = 2**31
_COLORS: Final = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f")
"""Colors that people with any color vision tell apart (Okabe and Ito, 2008), without yellow and black."""
_DASHES: Final = ("solid", "dashed", "dotted", "dotdash")


@final
@dataclass(frozen=True, kw_only=True)
class Curve:
    """One metric of one run.

    Args:
        run: Index of the run in the report.
        series: Its values.
    """

    run: int
    series: Series


def group_curves(runs: Sequence[RunRecord]) -> dict[str, list[Curve]]:
    """Return the curves of all runs by metric key, in the order in which the keys were first logged."""
    groups: dict[str, list[Curve]] = {}
    for index, run in enumerate(runs):
        for key, series in run.metrics.items():
            if len(series):
                groups.setdefault(key, []).append(Curve(run=index, series=series))
    return groups


def run_style(index: int) -> tuple[str, str]:
    """Return the color and the dash pattern of a run, by its index in the report.

    Example:
        >>> run_style(0), run_style(7)
        (('#0072b2', 'solid'), ('#0072b2', 'dashed'))
    """
    return _COLORS[index % len(_COLORS)], _DASHES[index // len(_COLORS) % len(_DASHES)]


def chart_data(runs: Sequence[RunRecord], groups: dict[str, list[Curve]], ids: dict[str, str]) -> dict[str, Any]:
    """Return the data of the charts of metrics as plain values, which the script of the page draws.

    Args:
        runs: The runs.
        groups: Their curves by key.
        ids: Id of the element of each chart, by key.

    Raises:
        ImportError: If bokeh is not installed.
    """
    count = sum(map(len, groups.values())) or 1
    least, most = _FINEST_POINTS
    values = sum(len(curve.series) for curves in groups.values() for curve in curves)
    finest = max(_OVERVIEW_POINTS, min(max(values // _VALUES_PER_POINT, least), most) // count)
    overview = min(_OVERVIEW_POINTS, max(200, _OVERVIEWS_POINTS // count))
    if finest < 2 * overview:  # two levels would be nearly the same
        overview = finest
    return {
        "templates": {scale: _template(len(runs), scale) for scale in _SCALES},
        "runs": [_encode_run(run) for run in runs],
        "charts": [
            {"id": ids[key], "key": key, "curves": [_encode_curve(each, overview, finest) for each in curves]}
            for key, curves in groups.items()
        ],
    }


def _template(count: int, y_axis_type: Literal["linear", "log"]) -> Any:
    """Return an empty chart for some runs; the script fills in the data of each chart."""
    from bokeh.embed import json_item
    from bokeh.models import BoxZoomTool, HoverTool, PanTool, ResetTool, WheelZoomTool
    from bokeh.plotting import figure

    plot = figure(
        name="chart",
        height=260,
        sizing_mode="stretch_width",
        tools=[BoxZoomTool(), PanTool(), WheelZoomTool(), ResetTool()],
        active_drag=None,
        active_scroll=None,
        toolbar_location="above",
        y_axis_type=y_axis_type,
        output_backend="canvas",
        background_fill_color=None,
        border_fill_color=None,
        outline_line_color=None,
        lod_threshold=None,
    )
    plot.toolbar.logo = None
    hovered = [renderer for index in range(count) for renderer in _add_run(plot, index)]
    plot.add_tools(
        HoverTool(renderers=hovered, tooltips="@label", point_policy="snap_to_data", attachment="horizontal")
    )
    plot.yaxis.axis_label = None
    return json_item(plot)


def _add_run(plot: Any, index: int) -> list[Any]:
    """Add the line, the smooth line and the marks of a run to a chart; return the renderers that a hover finds."""
    from bokeh.models import ColumnDataSource

    color, dash = run_style(index)
    # Without any value bokeh warns that there is no range.
    columns: dict[str, list[Any]] = {"x": [0.0, 1.0], "y": [1.0, 2.0], "label": ["", ""], "marker": ["diamond"] * 2}
    line, points, marks, ends = (
        ColumnDataSource(columns, name=f"{kind}{index}") for kind in ("line", "points", "marks", "ends")
    )
    plot.line("x", "y", source=line, color=color, line_dash=dash, line_width=1.5, name=f"curve{index}")
    smooth = ColumnDataSource({"x": [], "y": []}, name=f"smooth{index}")
    plot.line("x", "y", source=smooth, color=color, line_dash=dash, line_width=2.5)
    return [
        plot.scatter("x", "y", source=points, color=color, size=5, name=f"dots{index}"),
        plot.scatter("x", "y", source=marks, fill_color=color, size=11, marker="diamond", name=f"marks{index}"),
        plot.scatter("x", "y", source=ends, color=color, size=9, marker="marker"),
    ]


def _encode_run(run: RunRecord) -> dict[str, Any]:
    """Return the sample, epoch and hours at some updates of a run, and its checkpoints."""
    points = run.metrics.points
    chosen = _choose_knots(points)
    start_s = float(points.time_s[0]) if len(points) else 0.0
    return {
        "update": _encode(points.update[chosen]),
        "sample": _encode(points.sample[chosen]),
        "epoch": _encode(_epochs(points)[chosen]),
        "hours": _encode((points.time_s[chosen] - start_s) / 3600),
        "start_s": start_s,
        "checkpoints": [[each.iteration.update, each.tag] for each in run.checkpoints],
    }


def _choose_knots(points: Points) -> NDArray[np.int64]:
    count = len(points)
    if count <= _KNOTS:
        return np.arange(count)
    return np.unique(np.linspace(0, count - 1, _KNOTS).round().astype(np.int64))


def _epochs(points: Points) -> NDArray[np.float64]:
    """Return completed epochs with the fraction of the one that was in progress, float64."""
    ends = np.flatnonzero(points.event == "after_epoch")
    if not len(ends):
        return points.epoch.astype(np.float64)
    updates = np.concatenate([[0], points.update[ends]]).astype(np.float64)
    epochs = np.concatenate([[0], points.epoch[ends]]).astype(np.float64)
    length = max(float(updates[-1] - updates[-2]), 1.0)
    updates, epochs = np.append(updates, updates[-1] + 1e6 * length), np.append(epochs, epochs[-1] + 1e6)
    return np.interp(points.update, updates, epochs)


def _encode_curve(curve: Curve, overview: int, finest: int) -> dict[str, Any]:
    values = curve.series.values.astype(np.float64)
    levels = choose_levels(values, overview, finest)
    updates = curve.series.points.update
    infinite = np.flatnonzero(np.isinf(values))
    infinite = infinite[choose_points(infinite.astype(np.float64), 50)]
    encoded: dict[str, Any] = {
        "run": curve.run,
        "levels": [
            {"update": _encode(updates[level]), "y": _encode(_hide_infinities(values[level]))} for level in levels
        ],
        "infinite": [[int(updates[at]), "infinity" if values[at] > 0 else "-infinity"] for at in infinite],
    }
    if len(levels[-1]) < len(values):
        ends, averages = average_parts(values, min(_AVERAGES, overview // 2))
        encoded["averages"] = {"update": _encode(updates[ends]), "y": _encode(averages)}
    return encoded


def _hide_infinities(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where(np.isinf(values), np.nan, values)


def _encode(values: NDArray[Any]) -> str:
    """Return numbers as text: `i` for 32-bit integers or `f` for 64-bit floats, then base64 of their bytes."""
    is_small = values.dtype == np.int64 and (not len(values) or values.max() < _INT32_LIMIT)
    return ("i" if is_small else "f") + base64.b64encode(values.astype("<i4" if is_small else "<f8").tobytes()).decode()
