"""Examples of every shipped callback, for the tests that hold for all of them."""

from noether import callback, log
from noether.core.callbacks.periodic import PeriodicCallback
from noether.core.callbacks.registry import SHIPPED


def error(outputs, batch):
    """Return the absolute error of each sample, for scalar outputs `(batch,)` and for scores `(batch, classes)`."""
    return (outputs.reshape(len(outputs), -1).mean(dim=1) - batch[1]).abs()


@callback("sometimes", produces=("sometimes/error", "sometimes/loss"))
def sometimes(state, event):
    """Log two metrics after some updates, and the second one after fewer."""
    update = state.iteration.update
    if update % 4 in {0, 2}:
        return state, ()
    values = {"sometimes/error": float(update * 5 % 7), "sometimes/loss": float(update * 3 % 5)}
    return log(state, event, values if update % 4 == 1 else {"sometimes/error": values["sometimes/error"]})


# Settings without the interval, one entry for each example. A callback stands after those whose metrics it reads.
SETTINGS = {
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


def examples_of(name, interval, n, *, at_end=False, **changes):
    """Return the examples of one callback, those with an interval at every `n` of `interval`."""
    assert name in SETTINGS, f"add settings for {name} to SETTINGS in tests/callbacks/examples.py"
    kind = SHIPPED[name].load()
    when = {interval: n, "at_end": at_end} if issubclass(kind, PeriodicCallback) else {}
    return [kind(**{**settings, **when, **changes}) for settings in SETTINGS[name]]


def all_examples(interval, n, *, at_end=False):
    """Return the examples of every shipped callback, each after those whose metrics it reads."""
    names = [*SETTINGS, *(name for name in SHIPPED if name not in SETTINGS)]
    return [sometimes, *(example for name in names for example in examples_of(name, interval, n, at_end=at_end))]
