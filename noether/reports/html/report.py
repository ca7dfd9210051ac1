"""Writes the report of one or several runs as one HTML file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from noether.effects.disk.files import replace_text
from noether.reports.html.page import Section, render_page
from noether.reports.html.sections.curves import curves_section

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from noether.reports.run_record import RunRecord


def write_report(runs: Sequence[RunRecord], target: Path) -> None:
    """Write the report of some runs to one HTML file, which needs no network and no other file.

    Args:
        runs: The runs, at least one; they may be in training.
        target: The file; it is replaced if it exists.

    Raises:
        ImportError: If bokeh is not installed.
        OSError: If the file cannot be written.
    """
    replace_text(target, render_report(runs))


def render_report(runs: Sequence[RunRecord]) -> str:
    """Return the report of some runs as HTML.

    Args:
        runs: The runs, at least one.

    Raises:
        ImportError: If bokeh is not installed.
    """
    curves, data = curves_section(runs)
    sections: list[Section] = [curves]
    return render_page(report_title(runs), sections, data)


def report_title(runs: Sequence[RunRecord]) -> str:
    """Return the title of the report of some runs."""
    names = dict.fromkeys(str(run.config.get("run", {}).get("name", run.path.parent.name)) for run in runs)
    if len(runs) == 1:
        return f"{next(iter(names))} {runs[0].run_id}"
    return f"{len(runs)} runs of {', '.join(names)}"
