"""Runs that log to services, and a history of states to log and resume from."""

from noether import (
    AfterEpoch,
    AfterTraining,
    AfterUpdate,
    LogScalars,
    LogText,
    TrainingIteration,
    TrainState,
)
from noether.core.tensors.tree import freeze
from noether.effects import open_run
from noether.effects.logs.wandb import WeightsAndBiases

TIME_S = 1.6e9  # the same in every process, as for processes that start within one second


def at(update, epoch=0, **fields):
    return TrainState(iteration=TrainingIteration(epoch=epoch, update=update, sample=4 * update), **fields)


def log(directory, state, event_type=AfterUpdate, **values):
    directory.interpreter([LogScalars(freeze(values))], state, event_type(time_s=TIME_S + state.iteration.update))


# Two epochs of three updates, the end of training at the last update, and an update of the extended run.
HISTORY = [
    *(at(update) for update in (1, 2, 3)),
    at(3, epoch=1),
    *(at(update, epoch=1) for update in (4, 5, 6)),
    at(6, epoch=2),
    at(6, epoch=2, ended=True),
    at(7, epoch=2),
]

EVENT_KEYS = [(AfterUpdate, "loss"), (AfterEpoch, "val"), (AfterTraining, "test")]


def event_type_and_key(state):
    return EVENT_KEYS[2 if state.ended else int(state.iteration.update == 3 * state.iteration.epoch)]


def log_history(directory, places, value):
    for place in places:
        event_type, key = event_type_and_key(HISTORY[place])
        log(directory, HISTORY[place], event_type, **{key: value})
        directory.interpreter([LogText(str(value))], HISTORY[place], event_type(time_s=TIME_S))


def open_with(folder, *services):
    return open_run(folder, services=services)


def open_with_wandb(folder, run_id="digits-1", **options):
    return open_with(folder, WeightsAndBiases(folder / "wandb", run_id, mode="offline", **options))
