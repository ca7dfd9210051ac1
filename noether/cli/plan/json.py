"""A plan as strict JSON.

`noether plan --json` prints one object:

    config                 the file
    end                    {"epoch", "update", "sample", "iteration"}: where the run ends if nothing stops it early
    updates_per_epoch, samples_per_epoch, effective_batch_size
    ranks                  number of processes that train it
    params                 {"trainable", "frozen"}: number of parameters
    callbacks              in their order, each
        name, path         its name in messages, and the setting that describes it, such as "callbacks[2]"
        when               its schedule, such as "E1" or "U100|at_U1"; null without one
        first, last        {"event", "epoch", "update", "sample", "iteration"}; null if it never fires
        firings            how often it fires
        checkpoints        forecast for it alone, as below; null if it saves nothing
        evaluations        {"dataset", "weights", "count", "samples"}; null if it iterates no dataset
    checkpoints            forecast for all callbacks together
        written, kept, written_bytes, kept_bytes     {"at_least", "at_most"}: they differ if a metric decides
        each_bytes         bytes of one checkpoint, for each different size
        peak_bytes         upper bound of the bytes on the disk at any time
                           (all bytes are those of tensors, without names)
    evaluations            {"count", "samples"}
    disk                   {"path", "free_bytes"} of the nearest existing folder of the output
    warnings, notes        lines of text

With `--at` it is `{"config", "at", "fires"}`, each of `fires` `{"name", "path", "at"}` with `at` as `first` above; with
`--between` it is `{"config", "between", "fires"}`, each `{"name", "path", "first", "last", "firings"}`.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from noether.config.errors import format_path

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from noether.core.iteration import TrainingIteration
    from noether.core.schedules.forecast import Firing, Firings
    from noether.planning.plan import Plan
    from noether.planning.planned_callback import PlannedCallback
    from noether.planning.retention_forecast import CheckpointForecast


def plan_json(plan: Plan, file: str, disk: dict[str, Any], warnings: Sequence[str]) -> str:
    """Return the whole plan as JSON."""
    run, evaluations = plan.run, plan.evaluations
    return _dump(
        config=file,
        end=_iteration(run.final),
        updates_per_epoch=run.updates_per_epoch,
        samples_per_epoch=run.samples_per_epoch,
        effective_batch_size=run.effective_batch_size,
        ranks=plan.world_size,
        params={"trainable": plan.trainable_params, "frozen": plan.frozen_params},
        callbacks=[_callback(each) for each in plan.callbacks],
        checkpoints=_checkpoints(plan.checkpoints),
        evaluations={name: sum(getattr(each, name) for each in evaluations) for name in ("count", "samples")},
        disk=disk,
        warnings=list(warnings),
        notes=list(plan.notes),
    )


def point_json(fired: Iterable[tuple[PlannedCallback, Firing]], file: str, where: str) -> str:
    """Return the callbacks that fire at one point as JSON."""
    return _dump(config=file, at=where, fires=[{**_identity(each), "at": _firing(firing)} for each, firing in fired])


def interval_json(fired: Iterable[tuple[PlannedCallback, Firings]], file: str, where: Sequence[str]) -> str:
    """Return the callbacks that fire in a part of the run as JSON."""
    fires = [{**_identity(each), **_firings(firings)} for each, firings in fired]
    return _dump(config=file, between=list(where), fires=fires)


def _dump(**content: Any) -> str:
    return json.dumps(content, indent=1, allow_nan=False)


def _callback(planned: PlannedCallback) -> dict[str, Any]:
    return {
        **_identity(planned),
        "when": planned.when,
        **_firings(planned.firings),
        "checkpoints": None if planned.checkpoints is None else _checkpoints(planned.checkpoints),
        "evaluations": None if planned.evaluations is None else vars(planned.evaluations),
    }


def _identity(planned: PlannedCallback) -> dict[str, Any]:
    return {"name": planned.name, "path": format_path(planned.path)}


def _firings(firings: Firings) -> dict[str, Any]:
    first, last = (None if each is None else _firing(each) for each in (firings.first, firings.last))
    return {"first": first, "last": last, "firings": firings.count}


def _firing(firing: Firing) -> dict[str, Any]:
    return {"event": firing.event.__name__, **_iteration(firing.iteration)}


def _iteration(at: TrainingIteration) -> dict[str, Any]:
    return {"epoch": at.epoch, "update": at.update, "sample": at.sample, "iteration": str(at)}


def _checkpoints(forecast: CheckpointForecast) -> dict[str, Any]:
    bounds = ("written", "kept", "written_bytes", "kept_bytes")
    return {
        **{name: getattr(forecast, name)._asdict() for name in bounds},
        "each_bytes": list(forecast.each_bytes),
        "peak_bytes": forecast.peak_bytes,
    }
