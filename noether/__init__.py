"""noether: callbacks of a training loop as pure functions `(state, event) -> (state, effects)`."""

from noether.core.callback import Callback
from noether.core.combinators import callback, every_n_epochs, every_n_samples, every_n_updates, on, when
from noether.core.dispatch import dispatch
from noether.core.effect import (
    Effect,
    LogScalars,
    LogText,
    MeasurePeakMemory,
    SaveCheckpoint,
    SaveTensors,
    SetSummary,
    ShowProgress,
)
from noether.core.event import (
    AfterAccumulationStep,
    AfterEpoch,
    AfterTraining,
    AfterUpdate,
    AtEval,
    BeforeTraining,
    Event,
)
from noether.core.iteration import TrainingIteration
from noether.core.metrics import current, log
from noether.core.module import forward
from noether.core.reducer import Reducer, compose, identity
from noether.core.run import Run
from noether.core.schedule import At, EveryNEpochs, EveryNSamples, EveryNUpdates, Schedule
from noether.core.state import TrainState
from noether.core.upcoming import Move, next_move

__all__ = [
    "AfterAccumulationStep",
    "AfterEpoch",
    "AfterTraining",
    "AfterUpdate",
    "At",
    "AtEval",
    "BeforeTraining",
    "Callback",
    "Effect",
    "Event",
    "EveryNEpochs",
    "EveryNSamples",
    "EveryNUpdates",
    "LogScalars",
    "LogText",
    "MeasurePeakMemory",
    "Move",
    "Reducer",
    "Run",
    "SaveCheckpoint",
    "SaveTensors",
    "Schedule",
    "SetSummary",
    "ShowProgress",
    "TrainState",
    "TrainingIteration",
    "callback",
    "compose",
    "current",
    "dispatch",
    "every_n_epochs",
    "every_n_samples",
    "every_n_updates",
    "forward",
    "identity",
    "log",
    "next_move",
    "on",
    "when",
]
