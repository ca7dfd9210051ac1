"""Warnings about batches of one sample, which come at the end of an epoch and on which batch norm cannot train."""

from __future__ import annotations

import warnings
from functools import partial
from typing import TYPE_CHECKING, Any

from noether.core.callback import label_of
from noether.core.callbacks.data_iterator import PeriodicDataIteratorCallback

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from noether.config.errors import LocatedProblem
    from noether.training.data.batches import Batching
    from noether.training.experiment import Experiment


def find_single_sample_warnings(experiment: Experiment, world_size: int = 1) -> Iterator[LocatedProblem]:
    """Yield a warning for each kind of batch that has one sample, on which the model fails and would not with two.

    It calls the model on one and on two samples of a dataset, if the run has such a batch; on the meta device that
    needs no values. A stream that is trained on is not read.

    Args:
        experiment: The experiment; its state and the weights of its model stay as they are.
        world_size: Number of ranks, each of which trains on its share of an update.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the loss may warn of shapes, and the same batch comes in training
        yield from _training_warnings(experiment, world_size)
        yield from _evaluation_warnings(experiment)


def _training_warnings(experiment: Experiment, world_size: int) -> Iterator[LocatedProblem]:
    run, batching = experiment.run, experiment.data.batching
    whole, last = (_micro_batch_sizes(batching, at, world_size) for at in (0, batching.updates_per_epoch - 1))
    if 1 not in (*whole, *(last if run.final.update >= batching.updates_per_epoch else ())):
        return
    error = _find_failure(lambda batch: experiment.step.find_unused(experiment.state, batch), run.data.get("train"))
    if error is None:
        return
    if 1 not in whole:
        where, fix = "the last update of an epoch has", "drop_last: true or another effective_batch_size"
    elif len(whole) == 1:
        where, fix = "every update has", "a larger effective_batch_size"
    elif world_size > 1:
        where, fix = "a rank has in every update", "a larger effective_batch_size or another max_batch_size"
    else:
        where, fix = "every update has", "another max_batch_size"
    if 1 not in whole and len(last) > 1:
        fix += " or max_batch_size"
    message = f"{where} a batch of one sample, on which the model cannot train: {error}; write {fix}"
    yield from experiment.config.error(("trainer", "effective_batch_size"), message).problems


def _evaluation_warnings(experiment: Experiment) -> Iterator[LocatedProblem]:
    run = experiment.run
    for configured in experiment.callbacks:
        callback = configured.callback
        if not isinstance(callback, PeriodicDataIteratorCallback) or callback.weights is not None:
            continue
        data = run.data[callback.dataset_key]
        size = callback.batch_size or data.batch_size
        if size != 1 and len(data) % size != 1:
            continue
        error = _find_failure(partial(callback.process_data, experiment.state, forward=run.forward), data)
        if error is not None:
            message = (
                f"the last batch of {callback.dataset_key} has one sample, on which {label_of(callback)} fails: "
                f"{error}; write another trainer.eval_batch_size"
            )
            yield from experiment.config.error(configured.path, message).problems


def _micro_batch_sizes(batching: Batching, update: int, world_size: int) -> set[int]:
    """Return the different sizes of the micro-batches of an update on all ranks."""
    return {part.stop - part.start for rank in range(world_size) for part in batching.parts(update, rank, world_size)}


def _find_failure(call: Callable[[Any], object], data: Any) -> str | None:
    """Return why `call` fails on one sample of the data; None if it does not, or fails on two samples as well."""
    if data is None or len(data) < 2:  # noqa: PLR2004  # two samples are needed for the comparison
        return None
    error = _error_of(call, data, 1)
    return error if error is None or _error_of(call, data, 2) is None else None


def _error_of(call: Callable[[Any], object], data: Any, samples: int) -> str | None:
    try:
        batch, size = next(iter(data.batched(samples).with_sizes()))
        if size == samples:  # otherwise `collate` left some out, and the call would not show anything
            call(batch)
    except Exception as error:  # noqa: BLE001  # a model, a loss or a metric may raise anything
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return None
