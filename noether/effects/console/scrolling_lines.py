"""Lines that scroll above a live display: the metrics that changed, and texts wrapped at words."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any, Final

from rich.cells import cell_len

from noether.core.text import escape_controls
from noether.effects.console.columns import format_value
from noether.effects.console.live.live_region import shorten_name

if TYPE_CHECKING:
    from collections.abc import Mapping

    from noether.effects.console.live.live_region import Looks
    from noether.effects.console.live.live_view import RunView

_GAP: Final = "  "
_VALUE_WIDTH: Final = 11  # of most values with their sign: lines of the same metrics are aligned below each other
_MIN_NAME: Final = 8
_MORE: Final = "   +99 more"
_BEST: Final = ("/best", "/best_update")


class ChangedMetrics:
    """Describes the metrics of an event in one line: those that changed, as many as fit.

    Args:
        view: What the live display shows.
        looks: The signs of the terminal.
    """

    def __init__(self, view: RunView, looks: Looks) -> None:
        self._view, self._looks = view, looks
        self._last_values: dict[str, str] = {}

    def describe(self, metrics: Mapping[str, Any], width: int) -> str:
        """Return a line of the metrics that changed since the last one, those of the live display first.

        Args:
            metrics: The metrics that an event logs.
            width: Columns that the line may have.

        Returns:
            As many metrics as fit, and how many more there are; empty if none changed.
        """
        values = self._select_changed(metrics)
        line, left, room = "", len(values), width - len(_MORE)
        for key, value in values.items():
            cell = self._describe_metric(key, value, room)
            if line and cell_len(line) + len(_GAP) + cell_len(cell.rstrip()) > room:
                break  # a less important metric that fits does not take its place
            line, left = f"{line}{_GAP}{cell}" if line else cell, left - 1
        return f"{line.rstrip()}   +{left} more" if left else line.rstrip()

    def _select_changed(self, metrics: Mapping[str, Any]) -> dict[str, str]:
        texts = {key: format_value(value) for key, value in metrics.items()}
        changed = [key for key, text in texts.items() if self._last_values.get(key) != text or self._view.is_shown(key)]
        self._last_values |= texts
        shown = [key for key in changed if not key.endswith(_BEST)]
        return {key: texts[key] for key in sorted(shown, key=self._view.rank_of)}

    def _describe_metric(self, key: str, value: str, room: int) -> str:
        metric = self._view.metrics.get(key)
        text = f"{value} {self._looks.better}" if metric is not None and metric.is_best else value
        name = shorten_name(escape_controls(key), max(room - len(text) - 1, _MIN_NAME), self._looks.ellipsis)
        return f"{name} {text:<{_VALUE_WIDTH}}"


def wrap_texts(lines: str, width: int, indent: int) -> str:
    """Return lines wrapped at words; further lines are indented.

    Args:
        lines: The lines.
        width: Columns of the terminal.
        indent: Columns of the label before a text.
    """
    if width <= 2 * indent:
        return lines
    wrapped: list[str] = []
    for line in lines.split("\n"):
        if len(line) < width:
            wrapped.append(line)
        else:
            wrapped += textwrap.wrap(
                line,
                width - 1,
                subsequent_indent=" " * indent,
                break_long_words=False,
                break_on_hyphens=False,
                drop_whitespace=True,
                replace_whitespace=False,
            )
    return "\n".join(wrapped)
