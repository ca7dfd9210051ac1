"""Counts how often callbacks fire by their schedules, and how often they logged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, final

import numpy as np

from noether.core.iteration import TrainingIteration
from noether.core.metric_keys import keys_overlap
from noether.core.run_lengths import RunLengths
from noether.core.schedules.schedule import INTERVALS
from noether.effects.logs.summary_entries import PRODUCES
from noether.reports.setting_paths import name_callback

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from noether.reports.reading.run_record import RunRecord

_EVALUATE: Final = "trainer.evaluate"
_NEVER_LOGGED: Final = ("checkpoints/", "weights/")  # declared for checkpoints and averaged weights, which no line has
_ENDS: Final = {"max_epochs": "epoch", "max_updates": "update", "max_samples": "sample"}


@final
@dataclass(frozen=True, kw_only=True)
class FiringCounts:
    """Firings of one callback.

    Args:
        callback: Its kind, and its metric or dataset.
        schedule: Its interval, such as `every_n_epochs: 1`.
        planned: Firings up to the configured end of the run; None if the end or the length of an epoch is unknown.
        due: Firings up to the last line of the log; None as for `planned`.
        logged: Lines of the log with a metric that it declares; None if it declares no metric, or if an earlier version
            wrote the summary, without declarations.
    """

    callback: str
    schedule: str
    planned: int | None
    due: int | None
    logged: int | None


def count_firings(record: RunRecord) -> list[FiringCounts]:
    """Return the firings of the callbacks of a run that have an interval, from its configuration and its log.

    It does not import the callbacks: the summary of a run has the keys that they log.

    Args:
        record: The run.
    """
    run, points = _run_of(record), record.metrics.points
    reached = points[-1].iteration if len(points) else TrainingIteration()
    counts = []
    for section, entry in _entries(record.config):
        interval = next((name for name in INTERVALS if entry.get(name) is not None), None)
        if interval is None:
            continue
        schedule = INTERVALS[interval](entry[interval])
        planned = due = None
        if run is not None:
            planned = schedule.count(TrainingIteration(), run.final, run)
            due = schedule.count(TrainingIteration(), reached, run)
        counts.append(
            FiringCounts(
                callback=name_callback(entry),
                schedule=f"{interval}: {entry[interval]}",
                planned=planned,
                due=due,
                logged=_count_lines(record, section),
            )
        )
    return counts


def _entries(config: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the path and the settings of the section of each callback."""
    trainer, callbacks = config.get("trainer"), config.get("callbacks")
    evaluate = trainer.get("evaluate") if isinstance(trainer, dict) else None
    if isinstance(evaluate, dict):
        yield _EVALUATE, {"kind": _EVALUATE, **evaluate}
    for number, each in enumerate(callbacks if isinstance(callbacks, list) else ()):
        if isinstance(each, dict):
            yield f"callbacks.{number}", each


def _run_of(record: RunRecord) -> RunLengths | None:
    """Return the end of a run and the length of its epochs; None if they are unknown."""
    trainer = record.config.get("trainer")
    samples = record.summary.get("samples/train")
    if not isinstance(trainer, dict) or not isinstance(samples, int) or samples < 1:
        return None
    end = {counter: trainer[name] for name, counter in _ENDS.items() if isinstance(trainer.get(name), int)}
    batch = trainer.get("effective_batch_size")
    if len(end) != 1 or not isinstance(batch, int) or batch < 1:
        return None
    rest = samples % batch
    if trainer.get("drop_last") and samples > rest:
        samples -= rest
    return RunLengths(
        end=TrainingIteration(**end),
        updates_per_epoch=-(-samples // batch),
        samples_per_epoch=samples,
        effective_batch_size=batch,
    )


def _count_lines(record: RunRecord, section: str) -> int | None:
    """Return the number of log lines with a metric of the callbacks of a section; None if these declare no metric."""
    produced = record.summary.get(PRODUCES)
    known = produced.items() if isinstance(produced, dict) else ()
    patterns = [
        pattern
        for path, keys in known
        if (path == section or path.startswith(f"{section}.")) and isinstance(keys, list)
        for pattern in map(str, keys)
        if not pattern.startswith(_NEVER_LOGGED)
    ]
    if not patterns:
        return None
    metrics = record.metrics
    lines = [metrics[key].lines for key in metrics if any(keys_overlap(pattern, key) for pattern in patterns)]
    return len(np.unique(np.concatenate(lines))) if lines else 0
