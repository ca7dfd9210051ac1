"""Metrics as text: aligned lines, values of five digits, and totals that only repeat a loss."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from noether.core.text import escape_controls
from noether.effects.console.tables import COLUMN_GAP, arrange_columns

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from noether.core.state import TrainState

SIDE_METRICS: Final = ("optim/", "train_time/", "memory/", "lossdiff/")
"""Prefixes of the keys of metrics about training itself; panels show them last or leave them out."""
LABEL_WIDTH: Final = 18
_VALUE_WIDTH: Final = 12  # of the longest number: -1.2345e-100


def format_line(metrics: Mapping[str, Any]) -> str:
    """Return metrics as one line of columns; lines of the same metrics are aligned below each other.

    Example:
        >>> print(format_line({"loss/val/mse": 0.25, "optim/lr": 1e-3}))
        loss/val/mse  0.25            optim/lr  0.001
    """
    cells = (f"{escape_controls(name)}  {format_value(value):<{_VALUE_WIDTH}}" for name, value in metrics.items())
    return COLUMN_GAP.join(cells).rstrip()


def format_columns(metrics: Mapping[str, Any], width: int) -> list[str]:
    r"""Return metrics in as many aligned columns as fit into `width` characters, each read from top to bottom.

    Example:
        >>> print(*format_columns({"loss/val/mse": 0.25, "val/accuracy": 0.5, "optim/lr": 1e-3}, width=60), sep="|\n")
        loss/val/mse  0.25    optim/lr      0.001|
        val/accuracy  0.5
    """
    names, values = [escape_controls(name) for name in metrics], [format_value(value) for value in metrics.values()]
    name_width, value_width = max(map(len, names)), max(map(len, values))
    cells = [f"{name:<{name_width}}  {value:<{value_width}}" for name, value in zip(names, values, strict=True)]
    return arrange_columns(cells, width)


def add_label(state: TrainState, lines: Sequence[str], width: int = LABEL_WIDTH) -> str:
    """Return lines as one text: the first begins with the iteration, and the others are indented to the same column.

    Args:
        state: The state, whose iteration is the label.
        lines: The lines.
        width: Minimum width of the label in characters, so that the texts of several events are aligned.
    """
    label = f"{state.iteration!s:<{width}} "
    indent = f"\n{' ' * len(label)}"
    return f"{label}{indent.join(lines)}"


def repeats_single_loss(key: str, metrics: Mapping[str, Any]) -> bool:
    """Return whether a metric is a `total` that only repeats the value of a single loss.

    Args:
        key: The key of the metric.
        metrics: All metrics that are shown together, with this one.

    Example:
        >>> repeats_single_loss("loss/val/total", {"loss/val/total": 0.5, "loss/val/mse": 0.5})
        True
    """
    if "total" not in key or "total" not in (parts := key.split("/")):
        return False
    place = parts.index("total")
    other_keys = [name.split("/") for name in metrics if name != key]
    losses = [each for each in other_keys if each[:place] == parts[:place] and each[place + 1 :] == parts[place + 1 :]]
    return len(losses) == 1 and format_value(metrics["/".join(losses[0])]) == format_value(metrics[key])


def format_value(value: Any) -> str:
    """Return a value as text; a floating-point number has five significant digits."""
    value = value.item() if hasattr(value, "item") else value  # a tensor; this module imports no torch
    return f"{value:.5g}" if isinstance(value, float) else escape_controls(str(value))
