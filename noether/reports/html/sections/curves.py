"""The section of curves: a chart of every metric with all runs, its controls, its text and its table of values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from noether.reports.html.charts import chart_data, group_curves, run_style
from noether.reports.html.labels import escape_text, run_labels
from noether.reports.html.page import Section
from noether.reports.reading.metric_series import is_derived

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from noether.reports.html.charts import Curve
    from noether.reports.reading.metric_series import Series
    from noether.reports.reading.run_record import RunRecord

_TABLE_ROWS: Final = 60  # more values are summarized
_PARTS: Final = 12
_NUMBER: Final = ' class="number"'
_OPEN_CHARTS: Final = 24  # groups after so many charts begin closed
_DASH_ARRAYS: Final = {"solid": "none", "dashed": "7 4", "dotted": "2 3", "dotdash": "2 3 7 3"}


def curves_section(runs: Sequence[RunRecord]) -> tuple[Section, dict[str, Any]]:
    """Return the section of curves, and the data that the script of the page draws.

    Args:
        runs: The runs.

    Raises:
        ImportError: If bokeh is not installed.
    """
    groups = group_curves(runs)
    ids = {key: f"curves-{number}" for number, key in enumerate(groups)}
    if not groups:
        return Section(title="Curves", anchor="curves", html="<p>No metric was logged.</p>"), {}
    shown = 0
    parts = [_controls(), _legend(runs)]
    for name, keys in _group_keys(list(groups)).items():
        is_open = shown < _OPEN_CHARTS and name != _DERIVED_TITLE
        shown += len(keys)
        figures = "".join(_figure(key, ids[key], groups[key], runs) for key in keys)
        parts.append(
            f'<details class="group"{" open" if is_open else ""}><summary>{escape_text(name)} ({len(keys)})</summary>'
            f'<div class="grid">{figures}</div></details>'
        )
    data = chart_data(runs, groups, ids)
    for run, label in zip(data["runs"], run_labels(runs), strict=True):
        run["name"] = label
    return Section(title="Curves", anchor="curves", html="".join(parts)), data


_DERIVED_TITLE: Final = "best values"


def _group_keys(keys: Sequence[str]) -> dict[str, list[str]]:
    """Return metric keys by the title of their group: the first part of the key; values derived from others last."""
    grouped: dict[str, list[str]] = {}
    derived = [key for key in keys if is_derived(key)]
    for key in keys:
        if key not in derived:
            grouped.setdefault(key.split("/")[0] if "/" in key else "other", []).append(key)
    return {**grouped, **({_DERIVED_TITLE: derived} if derived else {})}


def _controls() -> str:
    options = "".join(
        f'<option value="{value}">{text}</option>'
        for value, text in ({name: name for name in ("update", "sample", "epoch", "hours")} | {"clock": "time"}).items()
    )
    return (
        '<form class="controls" aria-label="Charts" onsubmit="return false">'
        f'<label>x axis <select id="axis" autocomplete="off">{options}</select></label>'
        '<label>from <input type="number" id="from" step="any" autocomplete="off"></label>'
        '<label>to <input type="number" id="to" step="any" autocomplete="off"></label>'
        '<button type="button" id="whole">Whole run</button>'
        '<label><input type="checkbox" id="log" autocomplete="off"> logarithmic y axis</label>'
        '<label>smoothing <input type="range" id="smoothing" min="0" max="0.99" step="0.01" value="0" '
        'autocomplete="off"> <output id="smoothing-value" for="smoothing">0</output></label></form>'
        '<p class="note">A dot is a value, at a firing of the callback that logged it; very long curves have none. '
        "A diamond is a checkpoint that still exists, a triangle an infinite value; NaN is a gap. "
        "Logarithmic axes leave out zero and negative values. Of a long curve, averages over parts of it are smoothed."
        "</p>"
    )


def _legend(runs: Sequence[RunRecord]) -> str:
    """Return one button for each run, which shows and hides it in all charts; nothing for a single run."""
    if len(runs) == 1:
        return ""
    buttons = []
    for index, label in enumerate(run_labels(runs)):
        color, dash = run_style(index)
        line = (
            f'<svg width="28" height="10" aria-hidden="true"><line x1="0" y1="5" x2="28" y2="5" stroke="{color}" '
            f'stroke-width="3" stroke-dasharray="{_DASH_ARRAYS[dash]}"/></svg>'
        )
        buttons.append(
            f'<li><button type="button" data-run="{index}" aria-pressed="true">{line}{escape_text(label)}</button></li>'
        )
    return f'<ul class="legend" aria-label="Runs: press to show or hide">{"".join(buttons)}</ul>'


def _figure(key: str, element: str, curves: Sequence[Curve], runs: Sequence[RunRecord]) -> str:
    labels = run_labels(runs)
    texts = [(f"{labels[curve.run]}: " if len(runs) > 1 else "") + describe_series(curve.series) for curve in curves]
    caption = "".join(f"<div>{escape_text(text)}</div>" for text in texts[:4])
    if len(texts) > len(texts[:4]):
        rest = "".join(f"<div>{escape_text(text)}</div>" for text in texts[4:])
        caption += f"<details><summary>{len(texts) - 4} more runs</summary>{rest}</details>"
    return (
        f'<figure aria-labelledby="{element}-name"><h3 id="{element}-name">{escape_text(key)}</h3>'
        f'<div class="chart" id="{element}" role="img" aria-label="{escape_text(f"{key}. {texts[0]}")}"></div>'
        f"<figcaption>{caption}</figcaption>{_table(key, curves, labels)}</figure>"
    )


def describe_series(series: Series) -> str:
    """Return a sentence that describes a curve: its ends, its extremes, and how many values are not finite.

    Args:
        series: The metric, with at least one value.
    """
    values, updates = series.values.astype(np.float64), series.points.update
    if len(values) == 1:
        return f"{_number(values[0])} at update {updates[0]}"
    if values.min() == values.max():
        return f"{_number(values[0])} from update {updates[0]} to {updates[-1]}"
    parts = [f"from {_number(values[0])} at update {updates[0]} to {_number(values[-1])} at update {updates[-1]}"]
    is_finite = np.isfinite(values)
    lowest = np.where(is_finite, values, np.inf).argmin()
    highest = np.where(is_finite, values, -np.inf).argmax()
    if is_finite.any() and values[lowest] < values[highest]:
        for name, at in (("lowest", lowest), ("highest", highest)):
            parts.append(f"{name} {_number(values[at])} at {updates[at]}")
    for name, where in (("NaN", np.isnan(values)), ("infinite", np.isinf(values))):
        if where.any():
            parts.append(f"{where.sum():,} {name}, first at update {updates[where.argmax()]}")
    return "; ".join(parts)


def _number(value: float) -> str:
    return f"{value:.5g}"


def _table(key: str, curves: Sequence[Curve], labels: Sequence[str]) -> str:
    """Return the values in a table, or the range of values in parts of the curves if there are many."""
    if sum(len(curve.series) for curve in curves) <= _TABLE_ROWS:
        title, headings = "Values", ["update", "value"]
        rows: list[tuple[Any, ...]] = [
            (labels[curve.run], update, value)
            for curve in curves
            for update, value in zip(curve.series.points.update.tolist(), curve.series.values.tolist(), strict=True)
        ]
    else:
        title, headings = "Values in parts", ["updates", "lowest", "highest", "last"]
        parts = max(1, _PARTS // len(curves))
        rows = [(labels[curve.run], *row) for curve in curves for row in _summarize_parts(curve.series, parts)]
    start = 0 if len(labels) > 1 else 1
    head = "".join(f'<th scope="col"{_NUMBER}>{text}</th>' for text in headings)
    run = "" if start else '<th scope="col">run</th>'
    body = "".join(
        "<tr>"
        + ("" if start else f"<td>{escape_text(str(label))}</td>")
        + "".join(f"<td{_NUMBER}>{cell if isinstance(cell, str) else repr(cell)}</td>" for cell in cells)
        + "</tr>"
        for label, *cells in rows
    )
    return (
        f'<details><summary>{title}</summary><div class="scroll"><table><caption>{escape_text(key)}</caption>'
        f"<thead><tr>{run}{head}</tr></thead><tbody>{body}</tbody></table></div></details>"
    )


def _summarize_parts(series: Series, count: int) -> Iterator[tuple[str, str, str, str]]:
    """Yield the updates and the lowest, highest and last value of each part of a curve."""
    values, updates = series.values.astype(np.float64), series.points.update
    count = min(count, len(values))
    for part, where in zip(np.array_split(values, count), np.array_split(updates, count), strict=True):
        finite = part[np.isfinite(part)]
        ends = (_number(finite.min()), _number(finite.max())) if len(finite) else ("none", "none")
        yield (f"{where[0]} to {where[-1]}", *ends, _number(part[-1]))
