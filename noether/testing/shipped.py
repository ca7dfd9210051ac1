"""Every shipped callback with settings under which it acts in a short run, and the laws that each of them obeys."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from noether.core.artifacts import LogTable
from noether.core.callbacks.ema import EMACallback
from noether.core.callbacks.interval import PeriodicCallback
from noether.core.callbacks.registry import SHIPPED
from noether.core.combinators import callback, on
from noether.core.event import AfterUpdate
from noether.core.metrics import log
from noether.core.reducer import compose
from noether.testing.agreement import check_rank_agreement
from noether.testing.independence import check_independent
from noether.testing.laws import check_composition, check_resumable
from noether.testing.purity import check_pure
from noether.testing.stretches import check_stretches

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from noether.core.callback import Callback, Effects
    from noether.core.event import Event
    from noether.core.reducer import Reducer
    from noether.core.state import TrainState


def error(outputs: Tensor, batch: Any) -> Tensor:
    """Return the absolute error of each sample, for scalar outputs `(batch,)` and for scores `(batch, classes)`."""
    difference: Tensor = outputs.reshape(len(outputs), -1).mean(dim=1) - batch[1]
    return difference.abs()


def compare(outputs: Tensor, batch: Any) -> LogTable:
    """Return the error of each sample as a table."""
    return LogTable("val/errors", ["error"], [[each] for each in error(outputs, batch).tolist()])


@callback("sometimes", produces=("sometimes/error", "sometimes/loss"))
def sometimes(state: TrainState, event: Event) -> tuple[TrainState, Effects]:
    """Log two metrics after some updates, and the second one after fewer."""
    update = state.iteration.update
    if update % 4 in {0, 2}:
        return state, ()
    values = {"sometimes/error": float(update * 5 % 7), "sometimes/loss": float(update * 3 % 5)}
    return log(state, event, values if update % 4 == 1 else {"sometimes/error": values["sometimes/error"]})


SETTINGS: Final[dict[str, list[dict[str, Any]]]] = {
    "NanGuardCallback": [{"tolerance": 1, "action": "rollback"}],
    "EMACallback": [{"target_factors": (0.5, 0.9), "save_latest_weights": True}],
    "ParamCountCallback": [{}],
    "DatasetStatsCallback": [{}],
    "HyperparamsCallback": [{}],
    "ProgressCallback": [{}],
    "EtaCallback": [{}],
    "LrCallback": [{}],
    "PeakMemoryCallback": [{}],
    "TrainTimeCallback": [{}],
    "GradNormCallback": [{}],
    "TrackOutputsCallback": [
        {"keys": ("drift",)},
        {"patterns": ("shap", "scal"), "reduce": "last", "save_output": True},
    ],
    "HistogramCallback": [{"bins": 4}, {"bins": 4, "of": ("gradients", "momentum")}],
    "PredictionsCallback": [{"dataset_key": "val", "figure": compare, "weights": "ema=0.5"}],
    "OnlineLossCallback": [{"nan": "log"}],
    "EvaluateCallback": [{"dataset_key": "val", "measures": ("loss", error)}],
    "MetricCallback": [{"dataset_key": "val", "metric": error, "weights": "ema=0.5"}],
    "OfflineLossCallback": [{"dataset_key": "val", "weights": "ema=0.9"}],
    "BestMetricCallback": [
        {"metric_key": "val/error", "target_metric_keys": ("loss/val/total",)},
        {"metric_key": "sometimes/error", "target_metric_keys": ("sometimes/loss",), "missing": "skip"},
    ],
    "BestCheckpointCallback": [
        {"metric_key": "val/error", "tolerances": (1, 2)},
        {"metric_key": "sometimes/error", "tolerances": (1, 2), "missing": "skip"},
    ],
    "CheckpointCallback": [{"save_weights": True, "save_optim": True, "keep": 2}],
    "ReduceLROnPlateauCallback": [
        {"metric_key": "loss/val/total", "tolerance": 1, "factor": 0.5},
        {"metric_key": "sometimes/loss", "tolerance": 1, "factor": 0.5, "missing": "skip"},
    ],
    "MetricEarlyStopping": [
        {"metric_key": "loss/val/total", "tolerance": 4},
        {"metric_key": "sometimes/loss", "tolerance": 4, "missing": "skip"},
    ],
    "FixedUpdateEarlyStopping": [{"stop_at_update": 8}],
}
"""Settings without the interval, one entry for each example; a callback stands after those whose metrics it reads.

Those that read gradients are left out where the interval counts epochs, which have none.
"""
_SOONER: Final[dict[str, dict[str, Any]]] = {
    "MetricEarlyStopping": {"tolerance": 2},
    "FixedUpdateEarlyStopping": {"stop_at_update": 4},
}
"""Settings with which a callback stops training within the short runs of the laws."""
_STOP_AT: Final = 6
_AVERAGES: Final = EMACallback(target_factors=(0.5, 0.9), save_latest_weights=True, every_n_updates=2, at_end=True)


def examples_of(name: str, interval: str, n: int, *, at_end: bool = False, **changes: Any) -> list[Callback]:
    """Return the examples of one shipped callback, those with an interval at every `n` of `interval`.

    Raises:
        LookupError: If there are no settings for it.
    """
    if name not in SETTINGS:
        raise LookupError(f"add settings for {name} to SETTINGS in noether/testing/shipped.py")
    kind = SHIPPED[name].load()
    chosen = [each for each in SETTINGS[name] if interval != "every_n_epochs" or "gradients" not in each.get("of", ())]
    when = {interval: n, "at_end": at_end} if issubclass(kind, PeriodicCallback) else {}
    return [kind(**{**settings, **when, **changes}) for settings in chosen]


def all_examples(interval: str, n: int, *, at_end: bool = False) -> list[Callback]:
    """Return the examples of every shipped callback, each after those whose metrics it reads."""
    names = [*SETTINGS, *(name for name in SHIPPED if name not in SETTINGS)]
    return [sometimes, *(example for name in names for example in examples_of(name, interval, n, at_end=at_end))]


def law_example(name: str, interval: str, n: int) -> Reducer:
    """Return the examples of one shipped callback as the laws take them: with the averaged weights that they read.

    Example:
        >>> law_example("LrCallback", "every_n_updates", 2)
        compose(LrCallback/U2)
    """
    examples = examples_of(name, interval, n, at_end=True, **_SOONER.get(name, {}))
    reads_weights = any(key.startswith("weights/") for each in examples for key in getattr(each, "consumes", ()))
    return compose(*([_AVERAGES] if reads_weights else []), *examples)


@on(AfterUpdate)
def _note(state: TrainState, event: Event) -> tuple[TrainState, Effects]:
    return log(state, event, {"noted": state.iteration.sample})


@on(AfterUpdate)
def _stop(state: TrainState, event: Event) -> tuple[TrainState, Effects]:  # noqa: ARG001  # a callback takes both
    return (state.request_stop("it is late") if state.iteration.update >= _STOP_AT else state), ()


LAWS: Final[dict[str, Callable[[Callback, int], None]]] = {
    "pure": lambda tested, examples: check_pure(tested, examples=examples),
    "resumable": lambda tested, examples: check_resumable(tested, examples=examples),
    "rank agreement": lambda tested, examples: check_rank_agreement(tested, examples=examples),
    "composition": lambda tested, examples: check_composition(tested, _note, _stop, examples=examples),
    "stretches": lambda tested, examples: check_stretches(tested, examples=examples),
    "independence": lambda tested, examples: check_independent(tested, _note, examples=examples),
}
"""Each law by name, as a function of a callback and the number of runs to try."""
