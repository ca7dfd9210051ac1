"""Names of runs, and text from runs, as a report shows them."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from noether.core.text import escape_controls

if TYPE_CHECKING:
    from collections.abc import Sequence

    from noether.reports.reading.run_record import RunRecord


def escape_text(text: str) -> str:
    r"""Return text as HTML: markup is escaped, and control characters are visible escapes, but not tabs and line ends.

    Example:
        >>> print(escape_text("a\x1b[2J <b>"))
        a\x1b[2J &lt;b&gt;
    """
    return escape(escape_controls(text, keep="\n\t"))


def run_labels(runs: Sequence[RunRecord]) -> list[str]:
    """Return a short name of each run, different for each: its id, with the name of its folder where needed."""
    ids = [run.run_id for run in runs]
    longer = [f"{run.path.resolve().parent.name}/{run.run_id}" for run in runs]
    different = (each for each in (ids, longer) if len(set(each)) == len(runs))
    return [escape_controls(each) for each in next(different, [str(run.path) for run in runs])]
