"""Names of runs in a report."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from noether.reports.run_record import RunRecord


def run_labels(runs: Sequence[RunRecord]) -> list[str]:
    """Return a short name of each run, different for each: its id, with the name of its folder where needed."""
    ids = [run.run_id for run in runs]
    if len(set(ids)) == len(ids):
        return ids
    longer = [f"{run.path.resolve().parent.name}/{run.run_id}" for run in runs]
    return longer if len(set(longer)) == len(longer) else [str(run.path) for run in runs]
