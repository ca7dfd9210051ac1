"""Lines that scroll above the live display: metrics that changed, and texts wrapped between words."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any, Final

from rich.cells import cell_len

from noether.core.text import escape_controls
from noether.effects.console.columns import format_value
from noether.effects.console.live.live_region import shorten_name

if TYPE_CHECKING:
    from collections.abc import Mapping

    from noether.effects.console.live.live_region import TerminalStyle
    from noether.effects.console.live.live_view import RunView

_GAP: Final = "  "
_VALUE_WIDTH: Final = 11  # of most values with their sign: lines of the same metrics are aligned below each other
_MIN_NAME: Final = 8
_MORE: Final = "   +99 more"  # the columns that are reserved for it
_BEST: Final = ("/best", "/best_update")


class ChangedMetrics:
    """Writes one line per event: as many of the metrics that changed as fit.

    Args:
        view: What the live display shows.
        style: The characters that the terminal can show.
    """

    def __init__(self, view: RunView, style: TerminalStyle) -> None:
        self._view, self._style = view, style
        self._last_values: dict[str, str] = {}

    def describe(self, metrics: Mapping[str, Any], width: int) -> str:
        """Return a line of the metrics that changed since the last line; those of the live display come first.

        Args:
            metrics: The metrics that an event logs.
            width: Maximum width of the line in columns.

        Returns:
            As many metrics as fit, and the number of the others; empty if none changed.
        """
        values = self._select_changed(metrics)
        line, left, room = "", len(values), width - len(_MORE)
        for key, value in values.items():
            cell = self._describe_metric(key, value, room)
            if line and cell_len(line) + len(_GAP) + cell_len(cell.rstrip()) > room:
                break  # else a shorter, less important metric would take its place
            line, left = f"{line}{_GAP}{cell}" if line else cell, left - 1
        return f"{line.rstrip()}   +{left} more" if left else line.rstrip()

    def _select_changed(self, metrics: Mapping[str, Any]) -> dict[str, str]:
        texts = {key: format_value(value) for key, value in metrics.items()}
        changed = [key for key, text in texts.items() if self._last_values.get(key) != text or self._view.is_shown(key)]
        self._last_values |= texts
        shown = [key for key in changed if not key.endswith(_BEST)]
        return {key: texts[key] for key in sorted(shown, key=self._view.priority_of)}

    def _describe_metric(self, key: str, value: str, room: int) -> str:
        metric = self._view.metrics.get(key)
        text = f"{value} {self._style.better}" if metric is not None and metric.is_best else value
        name = shorten_name(escape_controls(key), max(room - len(text) - 1, _MIN_NAME), self._style.ellipsis)
        return f"{name} {text:<{_VALUE_WIDTH}}"


def wrap_texts(lines: str, width: int, indent: int) -> str:
    """Return lines wrapped between words; the continuation of a line is indented.

    Args:
        lines: The lines, separated by line feeds.
        width: Width of the terminal in columns.
        indent: Indent of a continuation in columns: the width of the label before a text.
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
