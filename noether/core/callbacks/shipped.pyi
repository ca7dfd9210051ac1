# The callbacks that noether ships: one line each, under the heading of its category. To ship a callback, add its line.
# Type checkers read this file, and `registry.py` reads it at run time.
# ruff: noqa: I001

# watch
from noether.core.callbacks.progress import ProgressCallback as ProgressCallback
from noether.core.callbacks.eta import EtaCallback as EtaCallback
from noether.core.callbacks.lr import LrCallback as LrCallback
from noether.core.callbacks.online_loss import OnlineLossCallback as OnlineLossCallback
from noether.core.callbacks.grad_norm import GradNormCallback as GradNormCallback
from noether.core.callbacks.track_outputs import TrackOutputsCallback as TrackOutputsCallback
from noether.core.callbacks.train_time import TrainTimeCallback as TrainTimeCallback
from noether.core.callbacks.peak_memory import PeakMemoryCallback as PeakMemoryCallback
from noether.core.callbacks.histogram import HistogramCallback as HistogramCallback

# describe
from noether.core.callbacks.summaries import ParamCountCallback as ParamCountCallback
from noether.core.callbacks.summaries import DatasetStatsCallback as DatasetStatsCallback
from noether.core.callbacks.summaries import HyperparamsCallback as HyperparamsCallback

# measure
from noether.core.callbacks.evaluation import OfflineLossCallback as OfflineLossCallback
from noether.core.callbacks.evaluation import MetricCallback as MetricCallback
from noether.core.callbacks.evaluation import EvaluateCallback as EvaluateCallback
from noether.core.callbacks.best_metric import BestMetricCallback as BestMetricCallback
from noether.core.callbacks.predictions import PredictionsCallback as PredictionsCallback

# save
from noether.core.callbacks.checkpoint import CheckpointCallback as CheckpointCallback
from noether.core.callbacks.best_checkpoint import BestCheckpointCallback as BestCheckpointCallback
from noether.core.callbacks.ema import EMACallback as EMACallback

# act
from noether.core.callbacks.early_stopping import MetricEarlyStopping as MetricEarlyStopping
from noether.core.callbacks.early_stopping import FixedUpdateEarlyStopping as FixedUpdateEarlyStopping
from noether.core.callbacks.lr_on_plateau import ReduceLROnPlateauCallback as ReduceLROnPlateauCallback
from noether.core.callbacks.nan_guard import NanGuardCallback as NanGuardCallback
