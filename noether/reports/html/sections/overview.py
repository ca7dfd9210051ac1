"""The overview: status, results and facts of each run, as sentences and as tables."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final

from noether.config.trainer_settings import ENDS
from noether.core.text import count_of, format_duration
from noether.reports.html.labels import escape_text, run_labels
from noether.reports.html.page import Section
from noether.reports.html.tables import html_table
from noether.reports.reading.metric_series import is_derived

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from noether.reports.reading.metric_series import Best
    from noether.reports.reading.run_record import RunRecord

_BEST_ROWS: Final = 12


def overview_section(runs: Sequence[RunRecord]) -> Section:
    """Return the section with the status, the results and the facts of each run."""
    labels = run_labels(runs)
    sentences = "".join(f"<p>{escape_text(summarize(run, label))}</p>" for run, label in zip(runs, labels, strict=True))
    facts = [dict(_facts(run)) for run in runs]
    names = list(dict.fromkeys(name for each in facts for name, value in each.items() if value is not None))
    table = html_table("Runs", ["", *labels], [[name, *(each.get(name) for each in facts)] for name in names])
    return Section(title="Overview", anchor="overview", html=sentences + table + _best_table(runs, labels))


def summarize(run: RunRecord, label: str) -> str:
    """Return the status of a run and its best values in a few sentences.

    Args:
        run: The run.
        label: Its name.
    """
    points = run.metrics.points
    ending = run.summary.get("ending")
    end = f": {ending}" if isinstance(ending, str) and ending else ""
    reached = f", at update {points[-1].update:,}" if len(points) and not end else ""
    parts = [f"{label} is {run.status}{reached}{end}."]
    for key, best in list(best_values(run))[:3]:
        parts.append(f"The best {key} is {best.value:.5g}, at update {best.point.update:,}.")
    return " ".join(parts)


def _facts(run: RunRecord) -> Iterator[tuple[str, Any]]:
    points, summary = run.metrics.points, run.summary
    yield "status", run.status
    yield "name", run.name
    yield "directory", str(run.path.resolve())
    if run.started_s is not None:
        yield "started", time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(run.started_s))
    if (total_s := sum(each.get("total_s", 0) for each in run.phases.values())) > 0:
        yield "duration", format_duration(total_s)
    elif len(points) > 1:
        yield "duration of the log", format_duration(points[-1].time_s - points[0].time_s)
    if len(points):
        yield "reached", str(points[-1].iteration)
    trainer, settings = run.config.get("trainer"), run.config.get("run")
    ends = {name: value for name, value in trainer.items() if name in ENDS} if isinstance(trainer, dict) else {}
    given = (f"{value} {name.removeprefix('max_')}" for name, value in ends.items() if value)
    yield "configured end", next(given, None)
    yield "end", summary.get("ending")
    yield "seed", settings.get("seed") if isinstance(settings, dict) else None
    model = run.config.get("model")
    yield "model", model.get("kind") if isinstance(model, dict) else None
    yield "trainable parameters", summary.get("params/trainable")
    yield "frozen parameters", summary.get("params/frozen") or None
    for key, value in summary.items():
        if key.startswith("samples/"):
            yield f"samples of {key.removeprefix('samples/')}", value


def best_values(run: RunRecord) -> Iterator[tuple[str, Best]]:
    """Yield the best value of each watched metric; without any, of each metric that is not an online mean."""
    keys = [key for key in run.metrics if not is_derived(key)]
    watched = [key for key in keys if f"{key}/best" in run.summary or f"{key}/best" in run.metrics]
    for key in watched or [key for key in keys if "online" not in key and "lossdiff" not in key]:
        if (best := run.best(key)) is not None:
            yield key, best


def _best_table(runs: Sequence[RunRecord], labels: Sequence[str]) -> str:
    bests = [dict(best_values(run)) for run in runs]
    keys = list(dict.fromkeys(key for each in bests for key in each))
    left_out = count_of(len(keys) - _BEST_ROWS, "more metric")
    rows: list[list[object]] = []
    for key in keys[:_BEST_ROWS]:
        for label, run, best in zip(labels, runs, bests, strict=True):
            if key in best:
                value, point = best[key]
                at = str(point.iteration)
                rows.append([key, label, value, at, _checkpoints_at(run, point.update), float(run.metrics[key].last)])
    if not rows:
        return ""
    head = ["metric", "run", "best value", "reached at", "checkpoint", "last value"]
    note = f"<p>{left_out}: see the curves.</p>" if len(keys) > _BEST_ROWS else ""
    return html_table("Best values", head, rows) + note


def _checkpoints_at(run: RunRecord, update: int) -> str:
    return ", ".join(each.tag for each in run.checkpoints if each.iteration.update == update) or "none kept"
