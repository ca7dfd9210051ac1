"""noether: callbacks of a training loop as pure functions `(state, event) -> (state, effects)`."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from noether.core.callback import Callback
    from noether.core.combinators import callback, every_n_epochs, every_n_samples, every_n_updates, on, when
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
    from noether.core.errors import NoetherError
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
    from noether.core.loop import Move, dispatch, next_move
    from noether.core.metrics import current, log
    from noether.core.reducer import Reducer, compose, identity
    from noether.core.run import Run
    from noether.core.schedules.schedule import At, EveryNEpochs, EveryNSamples, EveryNUpdates, Schedule
    from noether.core.state import TrainState
    from noether.core.tensors.donation import lease
    from noether.core.tensors.module import forward

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
    "NoetherError",
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
    "lease",
    "log",
    "next_move",
    "on",
    "when",
]

_HOMES = {
    "AfterAccumulationStep": "noether.core.event",
    "AfterEpoch": "noether.core.event",
    "AfterTraining": "noether.core.event",
    "AfterUpdate": "noether.core.event",
    "At": "noether.core.schedules.schedule",
    "AtEval": "noether.core.event",
    "BeforeTraining": "noether.core.event",
    "Callback": "noether.core.callback",
    "Effect": "noether.core.effect",
    "Event": "noether.core.event",
    "EveryNEpochs": "noether.core.schedules.schedule",
    "EveryNSamples": "noether.core.schedules.schedule",
    "EveryNUpdates": "noether.core.schedules.schedule",
    "LogScalars": "noether.core.effect",
    "LogText": "noether.core.effect",
    "MeasurePeakMemory": "noether.core.effect",
    "Move": "noether.core.loop",
    "NoetherError": "noether.core.errors",
    "Reducer": "noether.core.reducer",
    "Run": "noether.core.run",
    "SaveCheckpoint": "noether.core.effect",
    "SaveTensors": "noether.core.effect",
    "Schedule": "noether.core.schedules.schedule",
    "SetSummary": "noether.core.effect",
    "ShowProgress": "noether.core.effect",
    "TrainState": "noether.core.state",
    "TrainingIteration": "noether.core.iteration",
    "callback": "noether.core.combinators",
    "compose": "noether.core.reducer",
    "current": "noether.core.metrics",
    "dispatch": "noether.core.loop",
    "every_n_epochs": "noether.core.combinators",
    "every_n_samples": "noether.core.combinators",
    "every_n_updates": "noether.core.combinators",
    "forward": "noether.core.tensors.module",
    "identity": "noether.core.reducer",
    "lease": "noether.core.tensors.donation",
    "log": "noether.core.metrics",
    "next_move": "noether.core.loop",
    "on": "noether.core.combinators",
    "when": "noether.core.combinators",
}
"""Where each name is defined: most of these modules import torch, which much of the command line does without."""

if not TYPE_CHECKING:  # a type checker would otherwise accept any name

    def __getattr__(name: str) -> Any:
        """Return a public name, imported when it is first asked for."""
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name)
        value = globals()[name] = getattr(import_module(_HOMES[name]), name)
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
