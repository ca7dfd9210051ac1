"""What one callback will do in a run: when it fires, which checkpoints it requests and what it evaluates."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, final

from noether.core.callback import declaration_of, label_of, leaves_of, listens_to
from noether.core.callbacks.early_stopping import FixedUpdateEarlyStopping, MetricEarlyStopping
from noether.core.callbacks.nan_guard import NanGuardCallback
from noether.core.event import EVENTS, AfterTraining, AtEval, BeforeTraining
from noether.core.reducer import Reducer
from noether.core.schedules.forecast import Occasions, firings, occasions_of
from noether.core.schedules.schedule import At
from noether.planning.requests import UNSAVABLE_ERRORS, ProbeError, ProbeResult
from noether.planning.retention_forecast import forecast_checkpoints
from noether.training.configured_callbacks import ConfiguredCallback

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from noether.config.errors import SettingPath
    from noether.core.callback import Callback
    from noether.core.effect import Effect
    from noether.core.event import Event
    from noether.core.run import Run
    from noether.core.schedules.forecast import Firings
    from noether.planning.requests import Probe, SaveRequest
    from noether.planning.retention_forecast import CheckpointForecast


_STOPPERS: Final = (MetricEarlyStopping, NanGuardCallback)


@final
@dataclass(frozen=True)
class Evaluations:
    """The evaluations of a dataset by one callback.

    Args:
        dataset: Key of the dataset.
        weights: Owner of the evaluated weights, such as `ema=0.99`; None for the weights in training.
        count: Number of evaluations.
        samples: Number of samples in all of them.
    """

    dataset: str
    weights: str | None
    count: int
    samples: int


@final
@dataclass(frozen=True, kw_only=True)
class PlannedCallback:
    """What one callback will do if nothing stops the run early.

    Args:
        callback: The callback.
        path: Path of the setting that describes it, such as `("callbacks", 2)`.
        occasions: When it fires: where its gate opens, and before and after training if it requests a checkpoint there.
            A callback without a gate fires at every event that it listens to, except accumulation steps.
        firings: Number of firings, the first and the last.
        requests: The checkpoints that it requests.
        checkpoints: Forecast for these requests alone; None without requests.
        evaluations: What it evaluates; None if it iterates no dataset.
        stops: Whether it may stop the run early, at a point that the plan does not know.
        effects: Types of effects that it requested as the plan called it.
        probe_error: Why its requests are unknown; None if they are known.
        save_error: Why a checkpoint that it requests cannot be saved; None if all can.
    """

    callback: Callback
    path: SettingPath
    occasions: Occasions
    firings: Firings
    requests: tuple[SaveRequest, ...]
    checkpoints: CheckpointForecast | None
    evaluations: Evaluations | None
    stops: bool
    effects: tuple[type[Effect], ...]
    probe_error: str | None
    save_error: str | None

    @property
    def name(self) -> str:
        """The name of the callback in messages."""
        return label_of(self.callback)

    @property
    def when(self) -> str | None:
        """Its schedule, such as `E1` or `U100|at_U1`; None without one."""
        gate = declaration_of(self.callback).gate
        return None if gate is None else "|".join(map(str, gate.schedule.members))


def plan_callback(configured: ConfiguredCallback, probe: Probe, *, evaluate_first: bool = False) -> PlannedCallback:
    """Return what one callback will do.

    Args:
        configured: The callback, and the path of its setting.
        probe: Finds its requests.
        evaluate_first: Whether the run evaluates before the first update.
    """
    callback, run = configured.callback, probe.run
    events = _events(callback, evaluate_first=evaluate_first)
    occasions = _occasions(callback, events, run)
    result, probe_error, save_error = ProbeResult((), stops=False), None, None
    try:
        occasions, result = _probe_with_ends(callback, occasions, events, probe)
    except ProbeError as error:
        probe_error = str(error)
    except UNSAVABLE_ERRORS as error:
        save_error = str(error)
    stops = result.stops or any(isinstance(each, _STOPPERS) for each in leaves_of(callback))
    return PlannedCallback(
        callback=callback,
        path=configured.path,
        occasions=occasions,
        firings=firings(occasions, run),
        requests=result.requests,
        checkpoints=forecast_checkpoints(result.requests, run) if result.requests else None,
        evaluations=_evaluations(callback, occasions, run),
        stops=stops and not isinstance(callback, FixedUpdateEarlyStopping),  # the plan ends at its fixed point
        effects=result.effects,
        probe_error=probe_error,
        save_error=save_error,
    )


def plan_firings(configured: ConfiguredCallback, run: Run, *, evaluate_first: bool = False) -> PlannedCallback:
    """Return when one callback will fire, without calling it, so without what it requests."""
    callback = configured.callback
    occasions = _occasions(callback, _events(callback, evaluate_first=evaluate_first), run)
    return PlannedCallback(
        callback=callback,
        path=configured.path,
        occasions=occasions,
        firings=firings(occasions, run),
        requests=(),
        checkpoints=None,
        evaluations=_evaluations(callback, occasions, run),
        stops=False,
        effects=(),
        probe_error=None,
        save_error=None,
    )


def split_composed(callbacks: Iterable[ConfiguredCallback]) -> Iterator[ConfiguredCallback]:
    """Yield every callback by itself; one setting may describe several callbacks composed into one."""
    for configured in callbacks:
        members = configured.callback.members if isinstance(configured.callback, Reducer) else (configured.callback,)
        yield from (ConfiguredCallback(member, configured.path) for member in members)


def _events(callback: Callback, *, evaluate_first: bool) -> tuple[type[Event], ...]:
    return tuple(kind for kind in EVENTS if listens_to(callback, kind) and (kind is not AtEval or evaluate_first))


def _occasions(callback: Callback, events: tuple[type[Event], ...], run: Run) -> Occasions:
    if isinstance(callback, FixedUpdateEarlyStopping):  # listens to every event and acts once
        return Occasions(At(callback.point))
    declared = declaration_of(callback)
    occasions = occasions_of(declared, events, run)
    if declared.gate is not None and AtEval in events:
        return replace(occasions, once=(AtEval, *occasions.once))
    return occasions


def _probe_with_ends(
    callback: Callback, occasions: Occasions, events: tuple[type[Event], ...], probe: Probe
) -> tuple[Occasions, ProbeResult]:
    """Return the occasions and requests; outside its gate a callback may still save before and after training."""
    gated = probe.find_requests(callback, occasions)
    ends = tuple(kind for kind in (BeforeTraining, AfterTraining) if kind in events and kind not in occasions.once)
    at_ends = probe.find_requests(callback, Occasions(None, ends))
    saving = dict.fromkeys(kind for request in at_ends.requests for kind in request.occasions.once)
    occasions = replace(occasions, once=(*occasions.once, *saving))
    effects = tuple(dict.fromkeys((*gated.effects, *at_ends.effects)))
    return occasions, ProbeResult((*gated.requests, *at_ends.requests), gated.stops or at_ends.stops, effects)


def _evaluations(callback: Callback, occasions: Occasions, run: Run) -> Evaluations | None:
    key = getattr(callback, "dataset_key", None)
    if key is None or key not in run.data:
        return None
    count = firings(occasions, run).count
    return Evaluations(key, getattr(callback, "weights", None), count, count * len(run.data[key]))
