"""Helpers for tests of log files."""

import json

from noether import (
    AfterUpdate,
    TrainingIteration,
    TrainState,
)


def refuse(constant):
    raise AssertionError(f"{constant} is not JSON")


def read(path):
    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def at(update, epoch=0, **fields):
    return TrainState(iteration=TrainingIteration(epoch=epoch, update=update, sample=4 * update), **fields)


BEGIN_S = 1000.0


def update_at(seconds):
    return AfterUpdate(samples=4, time_s=BEGIN_S + seconds)
