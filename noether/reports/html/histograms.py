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
    grid = np.linspace(low, high, _ROWS + 1) if high > low else np.array([low - 0.5, high + 0.5])
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
    not_finite = sum(int(each.get("nan", 0)) + int(each.get("infinite", 0)) for _, each in histograms)
    note = f"; {count_of(not_finite, 'value', form=',')} not finite" if not_finite else ""
    label = escape_text(f"{name}: {sentence}")
    return (
        '<figure class="histogram"><svg viewBox="0 0 100 100" preserveAspectRatio="none" role="img" '
        f'aria-label="{label}">{cells}</svg>'
        f"<figcaption>{escape_text(sentence + note)}</figcaption></figure>"
    )


def _rebin(histogram: Mapping[str, Any], grid: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the counts of a histogram in the bins of another grid; values are taken as uniform within each bin."""
    counts, edges = np.array(histogram["counts"], np.float64), np.array(histogram["edges"], np.float64)
    below = np.interp(grid, edges, np.concatenate([[0.0], counts.cumsum()]))
    shares: NDArray[np.float64] = np.diff(below)
    return shares
