"""The plan of a run, computed from its configuration without training: firings, checkpoints, evaluations, warnings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from noether.core.callbacks.early_stopping import FixedUpdateEarlyStopping
from noether.core.callbacks.summaries import param_counts
from noether.planning.end_checkpoint import find_end_request
from noether.planning.planned_callback import plan_callback, split_composed
from noether.planning.rank_shares import describe_shares, find_rank_warnings
from noether.planning.requests import PROBED_FIRINGS, Probe
from noether.planning.retention_forecast import forecast_checkpoints
from noether.planning.shapes import build_on_meta
from noether.planning.single_samples import find_single_sample_warnings
from noether.planning.unhandled_effects import find_unhandled_requests
from noether.planning.warnings import find_warnings, warning_at

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from noether.config import Config
    from noether.config.errors import LocatedProblem
    from noether.core.callback import Callback
    from noether.core.run import Run
    from noether.planning.planned_callback import Evaluations, PlannedCallback
    from noether.planning.retention_forecast import CheckpointForecast


@final
@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run will do if nothing stops it early.

    Args:
        config: The configuration.
        run: The run; if a callback stops it at a fixed point, it ends there.
        trainable_params: Number of trained parameters.
        frozen_params: Number of frozen parameters.
        callbacks: What each callback will do, in their order.
        checkpoints: Forecast of all checkpoints together.
        warnings: Likely mistakes, each with the place of the setting.
        notes: What the plan does not know, and why.
        world_size: Number of ranks.
    """

    config: Config
    run: Run
    trainable_params: int
    frozen_params: int
    callbacks: tuple[PlannedCallback, ...]
    checkpoints: CheckpointForecast
    warnings: tuple[LocatedProblem, ...]
    notes: tuple[str, ...]
    world_size: int = 1

    @property
    def evaluations(self) -> tuple[Evaluations, ...]:
        """The evaluations of each callback that iterates a dataset."""
        return tuple(each.evaluations for each in self.callbacks if each.evaluations is not None)


def make_plan(config: Config, *, world_size: int = 1) -> Plan:
    """Return the plan of the run that `config` describes; it trains and writes nothing.

    It constructs the datasets for their lengths, the model for its shapes. A long run takes no more time than a short
    one, except with schedules that unite several numbers of samples; see `Schedule.count`. When callbacks fire does not
    depend on the number of ranks.

    Args:
        config: The configuration.
        world_size: Number of ranks that will train it, >= 1.

    Raises:
        ConfigError: If the datasets, the model or the callbacks show that a setting is wrong, as `build` does.
    """
    experiment, updated, notes = build_on_meta(config)
    callbacks = list(split_composed(experiment.callbacks))
    run = _run_until_fixed_stop(experiment.run, [configured.callback for configured in callbacks])
    probe = Probe(state=updated, initial=experiment.state, run=run)
    planned = tuple(plan_callback(each, probe, evaluate_first=config.trainer.evaluate_first) for each in callbacks)
    requests = [request for each in planned for request in each.requests]
    end = find_end_request(requests, probe) if config.trainer.checkpoints.at_end else None
    counts = param_counts(experiment.state.params, run.frozen)
    checkpoints = forecast_checkpoints(requests if end is None else [*requests, end], run)
    return Plan(
        config=config,
        run=run,
        trainable_params=counts["params/trainable"],
        frozen_params=counts["params/frozen"],
        callbacks=planned,
        checkpoints=checkpoints,
        warnings=(
            *find_warnings(config, planned, run),
            *(warning_at(config, path, text) for path, text in find_unhandled_requests(config, planned)),
            *find_single_sample_warnings(experiment, world_size),
            *find_rank_warnings(experiment, checkpoints, world_size),
        ),
        notes=(*notes, *_notes(config, planned), *describe_shares(experiment, world_size)),
        world_size=world_size,
    )


def _run_until_fixed_stop(run: Run, callbacks: Iterable[Callback]) -> Run:
    """Return the run with an earlier end if a callback stops it at a fixed point."""
    points = [run.end, *(each.point for each in callbacks if isinstance(each, FixedUpdateEarlyStopping))]
    return min((run.replace(end=point) for point in points), key=lambda run: run.final.update)


def _notes(config: Config, planned: Sequence[PlannedCallback]) -> Iterator[str]:
    """Yield what the plan does not know."""
    for each in planned:
        if each.probe_error is not None:
            yield f"checkpoints of {each.name} are not counted: it cannot be called before training: {each.probe_error}"
        if each.stops:
            yield f"{each.name} may stop the run early; the plan is valid up to that point"
    if config.trainer.checkpoints.every_n_minutes is not None:
        yield (
            "checkpoints of trainer.checkpoints.every_n_minutes are not counted: the time decides when it saves; the "
            "newest of them is kept until the next checkpoint from which the run can resume"
        )
    partly_probed = [p.name for p in planned if p.firings.count > PROBED_FIRINGS + 1 and not _is_shipped(config, p)]
    if partly_probed:
        yield (
            f"{', '.join(partly_probed)}: only the first {PROBED_FIRINGS} firings and the last were tried; "
            "checkpoints that are requested only in between are not counted"
        )


def _is_shipped(config: Config, planned: PlannedCallback) -> bool:
    section, index, *_ = planned.path
    return section != "callbacks" or config.callbacks[int(index)].path.startswith("noether.")
