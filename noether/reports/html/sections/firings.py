"""The section of firings: how often each callback fires by its schedule, and how often it logged."""

from __future__ import annotations

from typing import TYPE_CHECKING

from noether.reports.firings import count_firings
from noether.reports.html.labels import run_labels
from noether.reports.html.page import Section
from noether.reports.html.tables import html_table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from noether.reports.reading.run_record import RunRecord

_HEAD = ("callback", "run", "schedule", "planned firings", "due until its last line", "lines logged")


def firings_section(runs: Sequence[RunRecord]) -> Section | None:
    """Return the section that compares planned with actual firings; None if no callback has an interval."""
    rows: list[list[object]] = [
        [each.callback, label, each.schedule, each.planned, each.due, each.logged]
        for label, run in zip(run_labels(runs), runs, strict=True)
        for each in count_firings(run)
    ]
    if not rows:
        return None
    note = (
        '<p class="note">A run that ended early, or is in training, has fewer firings due than planned. A callback '
        "may log at other events, too, such as the first update; one that logs no metric has no count.</p>"
    )
    return Section(title="Firings", anchor="firings", html=html_table("Firings of callbacks", _HEAD, rows) + note)
