# The public names of noether, listed once: type checkers read this file, and `__init__.py` reads it at run time.
# ruff: noqa: F403

from noether.core.artifacts import LogFigure as LogFigure
from noether.core.artifacts import LogFile as LogFile
from noether.core.artifacts import LogHistogram as LogHistogram
from noether.core.artifacts import LogImages as LogImages
from noether.core.artifacts import LogTable as LogTable
from noether.core.callback import Callback as Callback
from noether.core.callbacks.shipped import *
from noether.core.combinators import callback as callback
from noether.core.combinators import every_n_epochs as every_n_epochs
from noether.core.combinators import every_n_samples as every_n_samples
from noether.core.combinators import every_n_updates as every_n_updates
from noether.core.combinators import on as on
from noether.core.combinators import when as when
from noether.core.effect import Effect as Effect
from noether.core.effect import LogScalars as LogScalars
from noether.core.effect import LogText as LogText
from noether.core.effect import MeasurePeakMemory as MeasurePeakMemory
from noether.core.effect import SaveCheckpoint as SaveCheckpoint
from noether.core.effect import SaveTensors as SaveTensors
from noether.core.effect import SetSummary as SetSummary
from noether.core.effect import ShowProgress as ShowProgress
from noether.core.errors import NoetherError as NoetherError
from noether.core.event import AfterAccumulationStep as AfterAccumulationStep
from noether.core.event import AfterEpoch as AfterEpoch
from noether.core.event import AfterTraining as AfterTraining
from noether.core.event import AfterUpdate as AfterUpdate
from noether.core.event import AtEval as AtEval
from noether.core.event import BeforeTraining as BeforeTraining
from noether.core.event import Event as Event
from noether.core.iteration import TrainingIteration as TrainingIteration
from noether.core.loop import Move as Move
from noether.core.loop import dispatch as dispatch
from noether.core.loop import next_move as next_move
from noether.core.metrics import current as current
from noether.core.metrics import log as log
from noether.core.reducer import Reducer as Reducer
from noether.core.reducer import compose as compose
from noether.core.reducer import identity as identity
from noether.core.run import Run as Run
from noether.core.schedules.base import Schedule as Schedule
from noether.core.schedules.schedule import At as At
from noether.core.schedules.schedule import EveryNEpochs as EveryNEpochs
from noether.core.schedules.schedule import EveryNSamples as EveryNSamples
from noether.core.schedules.schedule import EveryNUpdates as EveryNUpdates
from noether.core.state import TrainState as TrainState
from noether.core.tensors.donation import lease as lease
from noether.core.tensors.forward import forward as forward
from noether.core.tensors.means import Mean as Mean
from noether.core.tensors.means import Sum as Sum
from noether.effects.run_directory import open_run as open_run
from noether.reports.reading.run_record import read_run as read_run
from noether.reports.reading.run_record import read_runs as read_runs
from noether.session.session import Session as Session
from noether.training.runs.train import train as train

__version__: str
