"""Metrics as text: one aligned line per event, shortened values, and what a line leaves out."""

from __future__ import annotations

from itertools import zip_longest
from typing import TYPE_CHECKING, Any, Final

from noether.core.text import escape_controls

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from noether.core.state import TrainState

GAP: Final = "    "
SIDE_METRICS: Final = ("optim/", "train_time/", "memory/", "lossdiff/")
"""Beginnings of the names of metrics about training itself, which come last."""
LABEL_WIDTH: Final = 18
_VALUE_WIDTH: Final = 12  # of the longest number: -1.2345e-100


def format_line(metrics: Mapping[str, Any]) -> str:
    """Return metrics as one line of columns; lines of the same metrics are aligned below each other.

    Example:
        >>> print(format_line({"loss/val/mse": 0.25, "optim/lr": 1e-3}))
        loss/val/mse  0.25            optim/lr  0.001
    """
    cells = (f"{escape_controls(name)}  {format_value(value):<{_VALUE_WIDTH}}" for name, value in metrics.items())
    return GAP.join(cells).rstrip()


def format_columns(metrics: Mapping[str, Any], width: int) -> list[str]:
    r"""Return metrics as lines of aligned columns, read downwards; as many columns as fit into `width` characters.

    Example:
        >>> print(*format_columns({"loss/val/mse": 0.25, "val/accuracy": 0.5, "optim/lr": 1e-3}, width=60), sep="|\n")
        loss/val/mse  0.25    optim/lr      0.001|
        val/accuracy  0.5
    """
    names, values = [escape_controls(name) for name in metrics], [format_value(value) for value in metrics.values()]
    name_width, value_width = max(map(len, names)), max(map(len, values))
    cells = [f"{name:<{name_width}}  {value:<{value_width}}" for name, value in zip(names, values, strict=True)]
    column_count = max(1, (width + len(GAP)) // (len(cells[0]) + len(GAP)))
    row_count = -(-len(cells) // column_count)
    by_column = (cells[start : start + row_count] for start in range(0, len(cells), row_count))
    return [GAP.join(row).rstrip() for row in zip_longest(*by_column, fillvalue="")]


def add_label(state: TrainState, lines: Sequence[str], width: int = LABEL_WIDTH) -> str:
    """Return lines as one text; the first begins with the counters, the others are indented as far.

    Args:
        state: The state with the counters.
        lines: The lines.
        width: Least columns of the counters, so that lines are aligned.
    """
    label = f"{state.iteration!s:<{width}} "
    return "\n".join(f"{label if number == 0 else ' ' * len(label)}{line}" for number, line in enumerate(lines))


def repeats_single_loss(key: str, metrics: Mapping[str, Any]) -> bool:
    """Return whether a metric is the total of one single loss, which is shown already."""
    parts = key.split("/")
    if "total" not in parts:
        return False
    place = parts.index("total")
    others = [name.split("/") for name in metrics if name != key]
    losses = [each for each in others if each[:place] == parts[:place] and each[place + 1 :] == parts[place + 1 :]]
    return len(losses) == 1 and format_value(metrics["/".join(losses[0])]) == format_value(metrics[key])


def format_value(value: Any) -> str:
    """Return a value as text; of a fraction five digits."""
    value = value.item() if hasattr(value, "item") else value  # a tensor; this module imports no torch
    return f"{value:.5g}" if isinstance(value, float) else escape_controls(str(value))
