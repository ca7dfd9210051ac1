"""A plan as strict JSON.

`noether plan --json` prints one object:

    config                 the file
    end                    {"epoch", "update", "sample", "iteration"}: where the run ends if nothing stops it early
    updates_per_epoch, samples_per_epoch, effective_batch_size
    params                 {"trainable", "frozen"}: number of parameters
    callbacks              in their order, each
        name, path         what messages call it, and the setting that describes it, such as "callbacks[2]"
        when               its schedule, such as "E1" or "U100|at_U1"; null without one
        first, last        {"event", "epoch", "update", "sample", "iteration"}; null if it never fires
        firings            how often it fires
        checkpoints        what would come of it alone, as below; null if it saves nothing
        evaluations        {"dataset", "weights", "count", "samples"}; null if it iterates no dataset
    checkpoints            what comes of all together
        written, kept, written_bytes, kept_bytes     {"at_least", "at_most"}: they differ where a metric decides
        each_bytes         bytes of one, for each different size
        peak_bytes         the most that is on the disk at any time; all bytes are those of tensors, without their names
    evaluations            {"count", "samples"}
    disk                   {"path", "free_bytes"} of the place where checkpoints will go
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
    """Return the whole plan."""
    run, evaluations = plan.run, plan.evaluations
    return _text(
        config=file,
        end=_iteration(run.final),
        updates_per_epoch=run.updates_per_epoch,
        samples_per_epoch=run.samples_per_epoch,
        effective_batch_size=run.effective_batch_size,
        params={"trainable": plan.trainable_params, "frozen": plan.frozen_params},
        callbacks=[_callback(each) for each in plan.callbacks],
        checkpoints=_checkpoints(plan.checkpoints),
        evaluations={name: sum(getattr(each, name) for each in evaluations) for name in ("count", "samples")},
        disk=disk,
        warnings=list(warnings),
        notes=list(plan.notes),
    )


def fired_json(fired: Iterable[tuple[PlannedCallback, Firing]], file: str, where: str) -> str:
    """Return what fires at one point."""
    return _text(config=file, at=where, fires=[{**_which(each), "at": _firing(firing)} for each, firing in fired])


def counted_json(counted: Iterable[tuple[PlannedCallback, Firings]], file: str, where: Sequence[str]) -> str:
    """Return what fires in a part of the run."""
    fires = [{**_which(each), **_firings(firings)} for each, firings in counted]
    return _text(config=file, between=list(where), fires=fires)


def _text(**content: Any) -> str:
    return json.dumps(content, indent=1, allow_nan=False)


def _callback(planned: PlannedCallback) -> dict[str, Any]:
    return {
        **_which(planned),
        "when": planned.when,
        **_firings(planned.firings),
        "checkpoints": None if planned.checkpoints is None else _checkpoints(planned.checkpoints),
        "evaluations": None if planned.evaluations is None else vars(planned.evaluations),
    }


def _which(planned: PlannedCallback) -> dict[str, Any]:
    return {"name": planned.name, "path": format_path(planned.path)}


def _firings(firings: Firings) -> dict[str, Any]:
    first, last = (None if each is None else _firing(each) for each in (firings.first, firings.last))
    return {"first": first, "last": last, "firings": firings.count}


def _firing(firing: Firing) -> dict[str, Any]:
    return {"event": firing.event.__name__, **_iteration(firing.iteration)}


def _iteration(at: TrainingIteration) -> dict[str, Any]:
    return {"epoch": at.epoch, "update": at.update, "sample": at.sample, "iteration": str(at)}


def _checkpoints(made: CheckpointForecast) -> dict[str, Any]:
    bounds = ("written", "kept", "written_bytes", "kept_bytes")
    return {
        **{name: getattr(made, name)._asdict() for name in bounds},
        "each_bytes": list(made.each_bytes),
        "peak_bytes": made.peak_bytes,
    }
