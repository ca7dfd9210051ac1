"""The timeline of a plan as a PNG."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from matplotlib.figure import Figure

from noether.cli.plan.timeline import counts, edges

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from matplotlib.axes import Axes

    from noether.core.run import Run
    from noether.planning.plan import Plan
    from noether.planning.planned_callback import PlannedCallback

_COLUMNS: Final = 1000
_WIDTH_INCHES: Final = 11.0
_ROW_INCHES: Final = 0.28
_MARGIN_INCHES: Final = 1.4
_BAR_HEIGHT: Final = 0.7  # rows are 1 apart


def draw_timeline(plan: Plan, path: Path) -> None:
    """Write the timeline as a PNG: one row per callback, a bar where it fires."""
    rows = max(1, len(plan.callbacks))
    figure = Figure(figsize=(_WIDTH_INCHES, _MARGIN_INCHES + _ROW_INCHES * rows), layout="constrained")
    axes = figure.add_subplot()
    for index, each in enumerate(plan.callbacks):
        axes.broken_barh(list(_bars(each, plan.run)), (index - _BAR_HEIGHT / 2, _BAR_HEIGHT), color=f"C{index % 10}")
    axes.set_yticks(range(len(plan.callbacks)), [each.name for each in plan.callbacks])
    axes.set_ylim(rows - 0.5, -0.5)
    axes.set_xlim(0, plan.run.final.update)
    axes.set_xlabel("updates")
    axes.grid(axis="x", alpha=0.3)
    _add_epoch_axis(axes, plan.run)
    figure.savefig(path, format="png", dpi=150)


def _bars(planned: PlannedCallback, run: Run) -> Iterator[tuple[float, float]]:
    """Yield start and length of each bar; neighbouring columns in which the callback fires make one bar."""
    start: int | None = None
    ends = edges(run, _COLUMNS)
    for edge, count in zip(ends, [*counts(planned.occasions, run, _COLUMNS), 0], strict=True):
        if count and start is None:
            start = edge
        elif not count and start is not None:
            yield start, edge - start
            start = None


def _add_epoch_axis(axes: Axes, run: Run) -> None:
    length = run.updates_per_epoch

    def epochs_of(updates: Any) -> Any:  # matplotlib passes arrays
        return updates / length

    def updates_of(epochs: Any) -> Any:
        return epochs * length

    epochs = axes.secondary_xaxis("top", functions=(epochs_of, updates_of))
    epochs.set_xlabel("epochs")
