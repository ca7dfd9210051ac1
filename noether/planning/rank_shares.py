"""What several ranks change of a planned run: the share of each, and where ranks have too little to do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from noether.core.callbacks.data_iterator import PeriodicDataIteratorCallback
from noether.core.shares import share_of
from noether.core.text import count_of, format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from noether.config.errors import LocatedProblem
    from noether.planning.retention_forecast import CheckpointForecast
    from noether.training.experiment import Experiment

_SAVED_BYTES_PER_S: Final = 2e8
"""Assumed speed of a save: a file is hashed, written and flushed to a disk at some hundred megabytes per second."""
_SHUTDOWN_TIMEOUT_S: Final = 30
"""Seconds after a SIGTERM at which torchrun kills its processes, unless it is given `--shutdown-timeout`."""


def describe_shares(experiment: Experiment, world_size: int) -> Iterator[str]:
    """Yield notes about the share of each rank in the updates of a run; nothing for one process.

    Args:
        experiment: The experiment.
        world_size: Number of ranks.
    """
    if world_size == 1:
        return
    run = experiment.run
    yield f"each of {world_size} ranks trains on {_share(run.effective_batch_size, world_size)} of an update"
    last = run.samples_per_epoch - (run.updates_per_epoch - 1) * run.effective_batch_size
    if last < world_size <= run.effective_batch_size:
        yield (
            f"the last update of an epoch has {count_of(last, 'sample')}, so {world_size - last} of {world_size} ranks "
            "have none in it; they still take part"
        )


def find_rank_warnings(
    experiment: Experiment, checkpoints: CheckpointForecast, world_size: int
) -> Iterator[LocatedProblem]:
    """Yield warnings about ranks that have nothing to do, and about saves that a launcher would cut short.

    Args:
        experiment: The experiment.
        checkpoints: Forecast of all checkpoints together.
        world_size: Number of ranks.
    """
    if world_size == 1:
        return
    config, samples = experiment.config, experiment.run.effective_batch_size
    if samples < world_size:
        message = (
            f"an update has {count_of(samples, 'sample')}, so {world_size - samples} of {world_size} ranks train on "
            f"nothing; write at least {world_size}, or start fewer ranks"
        )
        yield from config.error(("trainer", "effective_batch_size"), message).problems
    yield from _evaluation_warnings(experiment, world_size)
    largest = max(checkpoints.each_bytes, default=0)
    writers = world_size if config.trainer.parallel == "shard" else 1
    seconds = largest / writers / _SAVED_BYTES_PER_S
    if seconds > _SHUTDOWN_TIMEOUT_S:
        message = (
            f"a checkpoint of {format_bytes(largest)} takes some {seconds:.0f} s to save at "
            f"{format_bytes(_SAVED_BYTES_PER_S)} per second, but torchrun kills its processes "
            f"{_SHUTDOWN_TIMEOUT_S} s after a SIGTERM, which loses the save; start it with "
            f"--shutdown-timeout={2 * seconds:.0f}"
        )
        yield from config.error(("trainer", "checkpoints"), message).problems


def _share(samples: int, world_size: int) -> str:
    sizes = {len(share_of(rank, world_size, samples)) for rank in (0, world_size - 1)}
    return f"{' or '.join(map(str, sorted(sizes)))} of {count_of(samples, 'sample')}"


def _evaluation_warnings(experiment: Experiment, world_size: int) -> Iterator[LocatedProblem]:
    """Yield a warning for each evaluation that has fewer batches than there are ranks."""
    config, seen = experiment.config, set[tuple[str, int]]()
    for configured in experiment.callbacks:
        callback = configured.callback
        if not isinstance(callback, PeriodicDataIteratorCallback):
            continue
        data = experiment.run.data[callback.dataset_key]
        if not hasattr(data, "batch_size"):  # of a stream
            continue
        size = callback.batch_size or data.batch_size
        batches = -(-len(data) // size)
        if batches >= world_size or len(data) < world_size or (callback.dataset_key, size) in seen:
            continue
        seen.add((callback.dataset_key, size))
        message = (
            f"data.{callback.dataset_key} has {count_of(batches, 'batch', 'batches')} of {size} samples, so "
            f"{world_size - batches} of {world_size} ranks wait during its evaluations; write at most "
            f"{len(data) // world_size}"
        )
        path = ("trainer", "eval_batch_size") if callback.batch_size is None else (*configured.path, "batch_size")
        yield from config.error(path, message).problems
