"""Histograms of a run over its updates as one picture: a column per histogram, darker where more values are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from noether.core.text import count_of
from noether.reports.html.labels import escape_text

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

_COLUMNS: Final = 60
_ROWS: Final = 40
_MAX_RATIO: Final = 10.0  # of the largest values of two histograms on a linear scale
_LEAST_SHARE: Final = 1e-6


def draw_histograms(name: str, histograms: Sequence[tuple[int, Mapping[str, Any]]]) -> str:
    """Return the histograms of one key as HTML: an SVG picture, and a sentence for people who do not see it.

    Args:
        name: Name of the key, as the page shows it.
        histograms: Update and content (`counts`, `edges`, `nan`, `infinite`) of each, in the order of updates. Of more
            than 60, some are chosen at equal distances.
    """
    filled = [(update, each) for update, each in histograms if sum(each.get("counts", ())) > 0]
    if not filled:
        return f"<p>{escape_text(name)}: no finite values.</p>"
    chosen = [filled[at] for at in np.unique(np.linspace(0, len(filled) - 1, _COLUMNS).round().astype(int))]
    low = min(float(each["edges"][0]) for _, each in chosen)
    high = max(float(each["edges"][-1]) for _, each in chosen)
    linear = _find_linear_range([each for _, each in chosen])
    grid = _divide(low, high, linear)
    columns = [_rebin(each, grid) for _, each in chosen]
    width, height = 100 / len(columns), 100 / (len(grid) - 1)
    cells = "".join(
        f'<rect x="{x * width:.2f}" y="{100 - (y + 1) * height:.2f}" width="{width + 0.05:.2f}" '
        f'height="{height + 0.05:.2f}" opacity="{share:.2f}"/>'
        for x, shares in enumerate(columns)
        for y, share in enumerate(shares / shares.max())
        if share > 0.005  # noqa: PLR2004  # would be drawn with opacity 0
    )
    first, last = chosen[0], chosen[-1]
    sentence = (
        f"values from {low:.5g} (bottom) to {high:.5g} (top), at updates {first[0]:,} (left) to {last[0]:,} (right)"
    )
    scale = "" if linear is None else f"; beyond {linear:.2g} above and below 0, the scale is logarithmic"
    not_finite = sum(int(each.get("nan", 0)) + int(each.get("infinite", 0)) for _, each in histograms)
    note = f"; {count_of(not_finite, 'value', form=',')} not finite" if not_finite else ""
    label = escape_text(f"{name}: {sentence}{scale}")
    return (
        '<figure class="histogram"><svg viewBox="0 0 100 100" preserveAspectRatio="none" role="img" '
        f'aria-label="{label}">{cells}</svg>'
        f"<figcaption>{escape_text(sentence + scale + note)}</figcaption></figure>"
    )


def _find_linear_range(histograms: Sequence[Mapping[str, Any]]) -> float | None:
    """Return up to which absolute value the scale is linear; None if it is linear everywhere.

    Values that shrink, as gradients do in training, would fill a single row of a linear scale at the end.
    """
    reaches = [max(abs(float(each["edges"][0])), abs(float(each["edges"][-1]))) for each in histograms]
    least = max(min((reach for reach in reaches if reach > 0), default=0.0), max(reaches) * _LEAST_SHARE)
    return least if max(reaches) > _MAX_RATIO * least else None


def _divide(low: float, high: float, linear: float | None) -> NDArray[np.float64]:
    """Return the edges of the rows: of one width, or, beyond `linear`, of widths that grow with the value."""
    if not high > low:
        return np.array([low - 0.5, high + 0.5])
    if linear is None:
        return np.linspace(low, high, _ROWS + 1)
    edges: NDArray[np.float64] = linear * np.sinh(
        np.linspace(np.arcsinh(low / linear), np.arcsinh(high / linear), _ROWS + 1)
    )
    edges[0], edges[-1] = low, high  # rounding would lose values at the ends
    return edges


def _rebin(histogram: Mapping[str, Any], grid: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the counts of a histogram in the bins of another grid; values are taken as uniform within each bin."""
    counts, edges = np.array(histogram["counts"], np.float64), np.array(histogram["edges"], np.float64)
    below = np.interp(grid, edges, np.concatenate([[0.0], counts.cumsum()]))
    shares: NDArray[np.float64] = np.diff(below)
    return shares
