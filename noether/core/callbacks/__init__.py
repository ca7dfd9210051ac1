"""The callbacks, each a pure function of a state and an event."""

from noether.core.callbacks.base import CallbackBase
from noether.core.callbacks.best_checkpoint import BestCheckpointCallback
from noether.core.callbacks.best_metric import BestMetricCallback
from noether.core.callbacks.checkpoint import CheckpointCallback
from noether.core.callbacks.early_stopping import MetricEarlyStopping
from noether.core.callbacks.evaluation import EvaluateCallback, MetricCallback, OfflineLossCallback
from noether.core.callbacks.lr import LrCallback
from noether.core.callbacks.online_loss import OnlineLossCallback
from noether.core.callbacks.periodic import Mean, PeriodicCallback, PeriodicDataIteratorCallback
from noether.core.callbacks.progress import ProgressCallback

__all__ = [
    "BestCheckpointCallback",
    "BestMetricCallback",
    "CallbackBase",
    "CheckpointCallback",
    "EvaluateCallback",
    "LrCallback",
    "Mean",
    "MetricCallback",
    "MetricEarlyStopping",
    "OfflineLossCallback",
    "OnlineLossCallback",
    "PeriodicCallback",
    "PeriodicDataIteratorCallback",
    "ProgressCallback",
]
