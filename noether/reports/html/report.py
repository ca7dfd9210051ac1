"""Writes the report of one or several runs as one HTML file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from noether.effects.disk.files import replace_text
from noether.reports.html.page import Section, render_page
from noether.reports.html.sections.artifacts import artifacts_section
from noether.reports.html.sections.checkpoints import checkpoints_section, evaluations_section
from noether.reports.html.sections.configuration import configuration_section
from noether.reports.html.sections.curves import curves_section
from noether.reports.html.sections.environment import environment_section
from noether.reports.html.sections.firings import firings_section
from noether.reports.html.sections.overview import overview_section
from noether.reports.html.sections.problems import problems_section
from noether.reports.html.sections.timing import timing_section

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from noether.reports.reading.run_record import RunRecord

_AFTER_CURVES: Final = (
    artifacts_section,
    evaluations_section,
    timing_section,
    firings_section,
    checkpoints_section,
    configuration_section,
    environment_section,
)


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
    sections: list[Section | None] = [overview_section(runs), problems_section(runs), curves]
    sections += [section(runs) for section in _AFTER_CURVES]
    return render_page(report_title(runs), [each for each in sections if each is not None], data)


def report_title(runs: Sequence[RunRecord]) -> str:
    """Return the title of the report of some runs."""
    names = dict.fromkeys(run.name for run in runs)
    if len(runs) == 1:
        return " ".join(dict.fromkeys([runs[0].name, runs[0].run_id]))
    return f"{len(runs)} runs of {', '.join(names)}"
