"""The callbacks, each a pure function of a state and an event, under every name that they have."""

from noether.core.callbacks.base import CallbackBase
from noether.core.callbacks.best_checkpoint import BestCheckpointCallback
from noether.core.callbacks.best_metric import BestMetricCallback
from noether.core.callbacks.checkpoint import CheckpointCallback
from noether.core.callbacks.early_stopping import (
    FixedEarlyStopper,
    FixedUpdateEarlyStopping,
    MetricEarlyStopper,
    MetricEarlyStopping,
)
from noether.core.callbacks.ema import EMACallback, EmaCallback
from noether.core.callbacks.eta import ETA, ETACallback, EtaCallback
from noether.core.callbacks.evaluation import EvaluateCallback, MetricCallback, OfflineLossCallback
from noether.core.callbacks.grad_norm import GradNormCallback
from noether.core.callbacks.lr import LR, LrCallback
from noether.core.callbacks.lr_on_plateau import ReduceLROnPlateauCallback
from noether.core.callbacks.nan_guard import NanGuardCallback
from noether.core.callbacks.online_loss import OnlineLoss, OnlineLossCallback
from noether.core.callbacks.peak_memory import PeakMemory, PeakMemoryCallback
from noether.core.callbacks.periodic import Mean, PeriodicCallback, PeriodicDataIteratorCallback
from noether.core.callbacks.progress import Progress, ProgressCallback
from noether.core.callbacks.summaries import DatasetStatsCallback, HyperparamsCallback, ParamCountCallback
from noether.core.callbacks.track_outputs import TrackAdditionalOutputsCallback, TrackOutputsCallback
from noether.core.callbacks.train_time import TrainTimeCallback

__all__ = [
    "ETA",
    "LR",
    "BestCheckpointCallback",
    "BestMetricCallback",
    "CallbackBase",
    "CheckpointCallback",
    "DatasetStatsCallback",
    "EMACallback",
    "ETACallback",
    "EmaCallback",
    "EtaCallback",
    "EvaluateCallback",
    "FixedEarlyStopper",
    "FixedUpdateEarlyStopping",
    "GradNormCallback",
    "HyperparamsCallback",
    "LrCallback",
    "Mean",
    "MetricCallback",
    "MetricEarlyStopper",
    "MetricEarlyStopping",
    "NanGuardCallback",
    "OfflineLossCallback",
    "OnlineLoss",
    "OnlineLossCallback",
    "ParamCountCallback",
    "PeakMemory",
    "PeakMemoryCallback",
    "PeriodicCallback",
    "PeriodicDataIteratorCallback",
    "Progress",
    "ProgressCallback",
    "ReduceLROnPlateauCallback",
    "TrackAdditionalOutputsCallback",
    "TrackOutputsCallback",
    "TrainTimeCallback",
]
