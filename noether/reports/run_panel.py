"""One run as a panel: its status, progress, metrics and checkpoints, and the commands that continue or evaluate it."""

from __future__ import annotations

import math
import re
import shlex
import time
from collections import Counter
from datetime import datetime
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from noether.core.iteration import TrainingIteration
from noether.core.text import count_of, format_bytes, format_seconds
from noether.effects.console.columns import SIDE_METRICS, repeats_single_loss
from noether.effects.console.next_commands import suggest_commands
from noether.effects.console.run_panels import RunPanel
from noether.effects.console.tables import Table
from noether.effects.run_files import TRACEBACK_FILE
from noether.reports.reading.metric_series import is_derived
from noether.session.phase_texts import describe_phases

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from noether.reports.reading.run_record import RunRecord

STYLES: Final = {
    **dict.fromkeys(("finished", "stopped"), "green"),
    **dict.fromkeys(("interrupted", "running"), "yellow"),
    **dict.fromkeys(("failed", "killed"), "red"),
}
_UNITS: Final = {"max_epochs": "epoch", "max_updates": "update", "max_samples": "sample"}
_CHECKPOINTS: Final = 6
_PARTS: Final = 8
_TRACEBACK_LINES: Final = 3
_BARS: Final = "▁▂▃▄▅▆▇█"
_ASCII_BARS: Final = "_.:-=+*#"
_ITERATION: Final = re.compile(r"\bE\d+_U\d+_S\d+\b")


def describe_run(run: RunRecord, *, is_ascii: bool = False) -> RunPanel:
    """Return the panel of a run in any status.

    Args:
        run: The run; the panel does not have what it wrote after it was read.
        is_ascii: Whether trends are drawn in ASCII.
    """
    status = run.status
    facts = {
        "directory": [str(run.path)],
        "ending": [str(run.summary["ending"])] if run.summary.get("ending") else [],
        "progress": [describe_progress(run)],
        "time": _describe_time(run, status),
        "phases": describe_phases(sum_phases(run)),
        "trained by": _describe_processes(run),
        "checkpoints": _describe_checkpoints(run),
        "evaluations": list(run.evaluations),
        "artifacts": _describe_artifacts(run),
        "error": _read_error(run) if status == "failed" else [],
    }
    return RunPanel(
        title=f"{run.name}: {status}",
        facts=[(name, entries) for name, entries in facts.items() if entries],
        table=tabulate_metrics(run, bars=_ASCII_BARS if is_ascii else _BARS),
        commands=_suggest_commands(run, status),
        style=STYLES.get(status, "dim"),
    )


def describe_progress(run: RunRecord) -> str:
    """Return the last known iteration of a run, with the share of its configured end."""
    at = last_iteration(run)
    trainer = run.config.get("trainer")
    texts = []
    for setting, unit in _UNITS.items():
        end = trainer.get(setting) if isinstance(trainer, dict) else None
        done = getattr(at, unit)
        if isinstance(end, int) and end > 0:
            texts.append(f"{done:,} of {count_of(end, unit, form=',')} ({100 * min(done / end, 1):.0f} %)")
        else:
            texts.append(count_of(done, unit, form=","))
    return ", ".join(texts)


def last_iteration(run: RunRecord) -> TrainingIteration:
    """Return the iteration in the ending of a run, else the last one that a log line or a checkpoint names."""
    if named := _ITERATION.findall(str(run.summary.get("ending") or "").partition(":")[0]):
        return TrainingIteration.parse(named[-1])  # without reading the log, which may be long
    known = [TrainingIteration(), *(each.iteration for each in run.checkpoints)]
    if (last := run.last_point) is not None:
        known.append(last.iteration)
    return max(known, key=lambda each: (each.update, each.epoch))


def sum_phases(run: RunRecord) -> dict[str, float]:
    """Return the seconds of each phase, summed over the processes that trained a run."""
    sums = {"total_s": 0.0}
    for each in run.phases.values():
        for name, value in each.items():
            sums[name] = sums.get(name, 0.0) + value
    return sums


def duration_s(run: RunRecord, status: str) -> float | None:
    """Return how long the processes of a run have trained it, in seconds; None if that is unknown.

    Args:
        run: The run.
        status: Its status; for `running`, the time of the last process counts until now.
    """
    known = sum_phases(run)["total_s"]
    if status != "running" or not run.provenance:
        return known or None
    *_, begin = run.provenance
    earlier = sum(each.get("total_s", 0.0) for at, each in run.phases.items() if at != begin)
    started_s = run.provenance[begin].get("started_s")
    return known if not isinstance(started_s, (int, float)) else max(known, earlier + time.time() - started_s)


def format_time(time_s: float | None) -> str:
    """Return a time since 1970 as date and time of the local time zone."""
    return "" if time_s is None else f"{datetime.fromtimestamp(time_s).astimezone():%Y-%m-%d %H:%M:%S}"


def format_number(value: Any) -> str:
    """Return a number with at most six significant digits; NaN and infinities by their names.

    Example:
        >>> format_number(0.12345678), format_number(1234567), format_number(float("nan")), format_number(True)
        ('0.123457', '1234567', 'nan', 'True')
    """
    return str(value) if isinstance(value, (bool, int, str)) or not math.isfinite(value) else f"{value:.6g}"


def draw_trend(values: NDArray[Any], width: int = 12, bars: str = _BARS) -> str:
    """Return a sparkline of values; a place with only NaN or infinities is empty.

    Args:
        values: The values in their order.
        width: Largest number of bars.
        bars: Characters from the lowest to the highest bar.

    Example:
        >>> draw_trend(np.array([0.0, 1.0, np.nan, 3.0])), draw_trend(np.array([2.0, 2.0])), draw_trend(np.zeros(0))
        ('▁▃ █', '▁▁', '')
    """
    values = values.astype(np.float64)
    scale = np.abs(values[np.isfinite(values)]).max(initial=0) or 1.0  # sums of large values would overflow
    parts = [part[np.isfinite(part)] for part in np.array_split(values / scale, min(len(values), width) or 1)]
    means = np.array([part.mean() if len(part) else np.nan for part in parts])
    known = means[np.isfinite(means)]
    if not len(known):
        return ""
    low, span = known.min(), (known.max() - known.min()) or 1.0
    return "".join(
        " " if not np.isfinite(mean) else bars[round((mean - low) / span * (len(bars) - 1))] for mean in means
    ).rstrip()


def tabulate_metrics(run: RunRecord, bars: str) -> Table:
    """Return a table with the last and best value and the trend of each metric."""
    shown = {key: series for key, series in run.metrics.items() if not is_derived(key)}
    values = {key: series.last for key, series in shown.items()}
    rows = [
        (key, format_number(shown[key].last), *_describe_best(run, key), draw_trend(shown[key].values, bars=bars))
        for key in sorted(shown, key=lambda key: _rank_metric(run, key))
        if not repeats_single_loss(key, values)
    ]
    return Table(("metric", "last", "best", "at", "trend"), rows)


def _rank_metric(run: RunRecord, key: str) -> int:
    """Return the order of a metric in the table: watched ones first, then losses, others, and the optimizer's last."""
    if f"{key}/best" in run.summary:
        return 0
    return 1 if key.startswith("loss/") else 3 if key.startswith(SIDE_METRICS) else 2


def _describe_best(run: RunRecord, key: str) -> tuple[str, str]:
    best = run.best(key)
    return ("", "") if best is None else (format_number(best.value), str(best.point.iteration))


def _describe_time(run: RunRecord, status: str) -> list[str]:
    texts = [f"started {format_time(run.started_s)}"] if run.started_s is not None else []
    if (seconds := duration_s(run, status)) is not None:
        texts.append(f"trained for {format_seconds(seconds)}")
    if (memory := max((each.get("peak_bytes") or 0 for each in run.phases.values()), default=0)) > 0:
        texts.append(f"peak memory {format_bytes(memory)}")
    return texts


def _describe_processes(run: RunRecord) -> list[str]:
    """Return a line for each of the newest processes."""
    lines = []
    for at, each in run.provenance.items():
        code = each["git"] if isinstance(each.get("git"), dict) else {}
        commit = "" if not code.get("commit") else f", commit {str(code['commit'])[:10]}"
        changed = " with changes" if code.get("dirty") else ""
        devices = each["devices"] if isinstance(each.get("devices"), (dict, list)) else ()
        where = f"{', '.join(map(str, (each.get('host', 'unknown host'), *devices)))}{commit}{changed}"
        lines.append(where if len(run.provenance) == 1 else f"{where}, from {at}")
    return lines[-_PARTS:]


def _describe_checkpoints(run: RunRecord) -> list[str]:
    pointers: dict[str, list[str]] = {}
    for name, tag in run.pointers.items():
        pointers.setdefault(tag, []).append(name)
    texts = [
        f"{each.tag} ({format_bytes(sum(part.size_bytes for part in each.parts.values()))})"
        f"{': ' if each.tag in pointers else ''}{', '.join(pointers.get(each.tag, ()))}"
        for each in run.checkpoints
    ]
    left_out = [number for number, each in enumerate(run.checkpoints[:-_CHECKPOINTS]) if each.tag not in pointers]
    shown = [text for number, text in enumerate(texts) if number not in left_out]
    return [*shown, *([f"and {count_of(len(left_out), 'older checkpoint')}"] if left_out else [])]


def _describe_artifacts(run: RunRecord) -> list[str]:
    kinds = Counter(each.kind for each in run.artifacts)
    return [f"{count} of kind {kind}" for kind, count in kinds.items()]


def _read_error(run: RunRecord) -> list[str]:
    """Return the time of the failure, and the last lines of its traceback, which name the error."""
    try:
        text = (run.path / TRACEBACK_FILE).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    head, *lines = [line.strip() for line in text.splitlines() if line.strip()] or [""]
    return [f"{head}, in {TRACEBACK_FILE}", *lines[-_TRACEBACK_LINES:]]


def _suggest_commands(run: RunRecord, status: str) -> list[tuple[str, str]]:
    commands = suggest_commands(
        run.path,
        status,
        config=run.config or None,
        pointers=run.pointers,
        at=last_iteration(run),
        allow=_read_allowed(run),
    )
    return [each for each in commands.items() if each[0] != "show"]


def _read_allowed(run: RunRecord) -> list[str]:
    """Return the values of `--allow` in the command that trained a run last."""
    *_, process = [{}, *run.provenance.values()]
    try:
        words = shlex.split(str(process.get("command") or ""))
    except ValueError:  # it was changed by hand
        return []
    return [value for option, value in pairwise(words) if option == "--allow"]


def to_values(run: RunRecord) -> Mapping[str, Any]:
    """Return the content of the panel of a run as plain values, for `noether show --json`."""
    status = run.status
    at = last_iteration(run)
    metrics = {}
    for key, series in run.metrics.items():
        best = run.best(key)
        metrics[key] = {
            "last": series.last,
            "best": None if best is None else best.value,
            "best_at": None if best is None else str(best.point.iteration),
            "count": len(series),
        }
    return {
        "path": str(run.path),
        "name": run.name,
        "run_id": run.run_id,
        "status": status,
        "ending": run.summary.get("ending"),
        "started_s": run.started_s,
        "duration_s": duration_s(run, status),
        "iteration": {"epoch": at.epoch, "update": at.update, "sample": at.sample},
        "metrics": metrics,
        "checkpoints": [each.tag for each in run.checkpoints],
        "pointers": dict(run.pointers),
        "evaluations": dict(run.evaluations),
        "artifacts": [each.key for each in run.artifacts],
    }
