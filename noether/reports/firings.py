"""How often callbacks were to fire by their schedules, and how often they logged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, final

import numpy as np

from noether.core.callbacks.registry import EXPORTS
from noether.core.errors import NoetherError
from noether.core.iteration import TrainingIteration
from noether.core.metrics import keys_overlap
from noether.core.run import Run
from noether.core.schedules.schedule import INTERVALS
from noether.reports.setting_paths import name_callback

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from noether.reports.reading.metric_series import Metrics
    from noether.reports.reading.run_record import RunRecord

_NEVER_LOGGED: Final = ("checkpoints/", "weights/")  # keys that only say what a callback writes or keeps
_ENDS: Final = {"max_epochs": "epoch", "max_updates": "update", "max_samples": "sample"}


@final
@dataclass(frozen=True, kw_only=True)
class FiringCounts:
    """Firings of one callback.

    Args:
        callback: Its kind, and the metric or dataset that it is for.
        schedule: Its interval, such as `every_n_epochs: 1`.
        planned: Firings up to the configured end of the run; None if the end or the length of an epoch is unknown.
        due: Firings up to where the run is, likewise.
        logged: Lines of the log with a metric of it; None if it logs no metric, or cannot be constructed here.
    """

    callback: str
    schedule: str
    planned: int | None
    due: int | None
    logged: int | None


def count_firings(record: RunRecord) -> list[FiringCounts]:
    """Return the firings of the callbacks of a run that have an interval, from its configuration and its log.

    It constructs no dataset and no model, and imports no code of the user's.

    Args:
        record: The run.
    """
    run, points = _run_of(record), record.metrics.points
    reached = points[-1].iteration if len(points) else TrainingIteration()
    counts = []
    for entry in _entries(record.config):
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
                logged=_count_lines(record.metrics, entry),
            )
        )
    return counts


def _entries(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    trainer, callbacks = config.get("trainer"), config.get("callbacks")
    evaluate = trainer.get("evaluate") if isinstance(trainer, dict) else None
    if isinstance(evaluate, dict):
        yield {"kind": "trainer.evaluate", **evaluate}
    if isinstance(callbacks, list):
        yield from (each for each in callbacks if isinstance(each, dict))


def _run_of(record: RunRecord) -> Run | None:
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
    return Run(
        end=TrainingIteration(**end),
        updates_per_epoch=-(-samples // batch),
        samples_per_epoch=samples,
        effective_batch_size=batch,
    )


def _count_lines(metrics: Metrics, entry: Mapping[str, Any]) -> int | None:
    """Return in how many lines of the log a callback has logged."""
    patterns = _produced_keys(entry)
    if not patterns:
        return None
    lines = [metrics[key].lines for key in metrics if any(keys_overlap(pattern, key) for pattern in patterns)]
    return len(np.unique(np.concatenate(lines))) if lines else 0


def _produced_keys(entry: Mapping[str, Any]) -> Sequence[str]:
    """Return patterns of the keys that a callback of noether logs."""
    kind = str(entry["kind"])
    if kind == "trainer.evaluate":
        datasets = [name for name in entry if name not in {"kind", "datasets", *INTERVALS}]
        datasets += entry["datasets"] if isinstance(entry.get("datasets"), dict) else []
        return [pattern for name in datasets for pattern in (f"loss/{name}/*", f"{name}/*")]
    prefix, _, name = kind.rpartition(".")
    if not prefix.startswith("noether.core.callbacks") or name not in EXPORTS:
        return ()
    settings = {key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()}
    del settings["kind"]
    try:
        produced: Sequence[str] | None = EXPORTS[name].load()(**settings).produces
    except (NoetherError, TypeError):  # such as settings of an older version, or the name of a function
        return ()
    return [key for key in produced or () if not key.startswith(_NEVER_LOGGED)]
