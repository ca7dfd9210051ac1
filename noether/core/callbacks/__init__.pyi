# All names of this package, once: type checkers read this file, and `registry.py` reads it at run time.
# ruff: noqa: F403, I001

from noether.core.callbacks.shipped import *

# bases
from noether.core.callbacks.base import CallbackBase as CallbackBase
from noether.core.callbacks.interval import PeriodicCallback as PeriodicCallback
from noether.core.callbacks.data_iterator import PeriodicDataIteratorCallback as PeriodicDataIteratorCallback
from noether.core.tensors.means import Mean as Mean
from noether.core.tensors.means import Sum as Sum

# aliases
from noether.core.callbacks.early_stopping import FixedEarlyStopper as FixedEarlyStopper
from noether.core.callbacks.early_stopping import MetricEarlyStopper as MetricEarlyStopper
from noether.core.callbacks.ema import EmaCallback as EmaCallback
from noether.core.callbacks.eta import ETA as ETA
from noether.core.callbacks.eta import ETACallback as ETACallback
from noether.core.callbacks.lr import LR as LR
from noether.core.callbacks.online_loss import OnlineLoss as OnlineLoss
from noether.core.callbacks.peak_memory import PeakMemory as PeakMemory
from noether.core.callbacks.progress import Progress as Progress
from noether.core.callbacks.track_outputs import TrackAdditionalOutputsCallback as TrackAdditionalOutputsCallback
