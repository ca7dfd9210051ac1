"""The section of times: where the time of each run went, and its memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from noether.core.text import format_bytes, format_seconds
from noether.reports.html.labels import escape_text, run_labels
from noether.reports.html.page import Section
from noether.reports.html.tables import html_table
from noether.session.phase_texts import OTHER_PHASES, PHASE_TEXTS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from noether.reports.reading.run_record import RunRecord


def timing_section(runs: Sequence[RunRecord]) -> Section | None:
    """Return the section about time per phase and memory; None if no run has recorded it."""
    labels = run_labels(runs)
    rows, bars = [], []
    for run, label in zip(runs, labels, strict=True):
        for begin, phases in run.phases.items():
            if isinstance(phases, dict) and phases.get("total_s"):
                name = label if len(run.phases) == 1 else f"{label} from {begin}"
                rows.append(_row(name, phases))
                bars.append(_bar(name, phases))
    if not rows:
        return None
    head = ["run", "total", *PHASE_TEXTS.values(), OTHER_PHASES, "updates", "updates/s", "peak memory"]
    table = html_table("Time of each process by phase, and the largest memory it had", head, rows)
    return Section(title="Time and memory", anchor="timing", html=f"{''.join(bars)}{table}")


def _shares(phases: Mapping[str, float]) -> dict[str, float]:
    """Return the share of each phase in the total time; the shares add up to 1."""
    total_s = phases["total_s"]
    shares = {text: phases.get(name, 0.0) / total_s for name, text in PHASE_TEXTS.items()}
    return {**shares, OTHER_PHASES: max(0.0, 1.0 - sum(shares.values()))}


def _row(name: str, phases: Mapping[str, float]) -> list[object]:
    total_s, updates = phases["total_s"], int(phases.get("updates", 0))
    shares = [f"{share:.1%} ({format_seconds(share * total_s)})" for share in _shares(phases).values()]
    peak = phases.get("peak_bytes")
    memory = None if peak is None else format_bytes(peak)
    return [name, format_seconds(total_s), *shares, updates, updates / total_s, memory]


def _bar(name: str, phases: Mapping[str, float]) -> str:
    """Return a bar of the shares; the table below says the same to those who do not see it."""
    shares, start, parts = _shares(phases), 0.0, []
    for number, share in enumerate(shares.values()):
        parts.append(f'<rect class="phase{number}" x="{100 * start:.3f}" width="{100 * share:.3f}" height="10"/>')
        start += share
    legend = "".join(
        f'<li><svg width="12" height="12"><rect class="phase{number}" width="12" height="12"/></svg> '
        f"{text} {share:.1%}</li>"
        for number, (text, share) in enumerate(shares.items())
    )
    return (
        f'<div class="phases" aria-hidden="true"><p>{escape_text(name)}</p><svg viewBox="0 0 100 10" '
        f'preserveAspectRatio="none">{"".join(parts)}</svg><ul class="legend">{legend}</ul></div>'
    )
