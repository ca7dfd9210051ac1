"""What the ranks of a run agree on before one of them writes: the configuration, the data, the run directory."""

from __future__ import annotations

import hashlib
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from noether.config.changes import find_differences
from noether.config.serialization import resolve_config
from noether.core.callbacks.summaries import dataset_lengths
from noether.core.tensors.checksums import sum_bits
from noether.core.tensors.module import device_of
from noether.distributed.ranks import Ranks, count_processes, join
from noether.effects import RunDirectory
from noether.effects.checkpoints.listing import CheckpointError
from noether.effects.checkpoints.reader import CheckpointReader
from noether.effects.run_files import CHECKPOINTS
from noether.training.data.indexed import TrainingData
from noether.training.devices import choose_device
from noether.training.runs.services import open_directory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from noether.config import Config
    from noether.core.state import TrainState
    from noether.effects.checkpoints.manifest import Manifest
    from noether.training.experiment import Experiment

    CheckExperiment = Callable[[Experiment], None]
    Notify = Callable[[str], None]


def join_ranks(config: Config) -> Ranks:
    """Return the ranks that train a configuration, once all have joined.

    Raises:
        ConfigError: If `trainer.device` cannot be used here, or the ranks have different configurations.
    """
    device = choose_device(config, are_several=count_processes() > 1)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    ranks = join(timeout_s=config.trainer.rank_timeout_s, device=device)
    _require_same_config(ranks, config)
    return ranks


def _require_same_config(ranks: Ranks, config: Config) -> None:
    """Refuse a configuration that another rank does not have, on all ranks."""
    values = resolve_config(config)
    digest = hashlib.sha256(repr(values).encode()).hexdigest()
    if len(set(ranks.control.gather("hash of the configuration", digest))) == 1:
        return
    first, *others = ranks.control.gather("configuration", _plain_tree(values))
    for rank, other in enumerate(others, 1):
        for path, *both in find_differences(first, other):
            here, there = ("not given" if value is None else value for value in both)
            message = f"is {here} on rank 0 and {there} on rank {rank}; give all ranks the same configuration"
            raise config.error(path, message)


def _plain_tree(values: Any) -> Any:
    """Return plain values as a tree that can be gathered: YAML has more kinds of values than JSON."""
    if isinstance(values, dict):
        return {str(key): _plain_tree(value) for key, value in values.items()}
    return tuple(map(_plain_tree, values)) if isinstance(values, (list, tuple)) else repr(values)


def accept_all(experiment: Experiment) -> None:
    """Refuse nothing."""


def agree_to_start(experiment: Experiment, check: CheckExperiment = accept_all) -> None:
    """Return once all ranks have built their experiment; until then none may write.

    Args:
        experiment: The run.
        check: Raises an error, on every rank, if the run has to be refused for another reason.

    Raises:
        ConfigError: If their datasets have different lengths, `trainer.sampler` yields different orders, their devices
            have different types, or their models different initial values.
    """
    config, ranks = experiment.config, experiment.ranks
    check(experiment)
    if not ranks.are_several:
        return
    lengths = {**dataset_lengths(experiment.run), **experiment.data.batching.lengths}
    facts = {"device": device_of(experiment.state.params.values()).type, "lengths": lengths, "order": ""}
    if isinstance(experiment.data, TrainingData):
        facts["order"] = experiment.data.order_digest
    first, *others = ranks.control.gather("start", facts)
    for rank, other in enumerate(others, 1):
        if first["device"] != other["device"]:
            message = f"rank 0 trains on {first['device']} and rank {rank} on {other['device']}; write one of them"
            raise config.error(("trainer", "device"), message)
        for name in {**first["lengths"], **other["lengths"]}:
            here, there = first["lengths"].get(name), other["lengths"].get(name)
            if here != there:
                message = f"{name} is {here} on rank 0 and {there} on rank {rank}; all ranks need the same data"
                raise config.error(("data",), message)
        if first["order"] != other["order"]:
            message = f"yields another order on rank {rank} than on rank 0; draw it from seed and epoch alone"
            raise config.error(("trainer", "sampler"), message)
    _require_same_values(experiment)


def _require_same_values(experiment: Experiment) -> None:
    """Refuse a model whose constructor draws other values on another rank."""
    params = dict(experiment.model.named_parameters())
    sums = dict(zip(params, sum_bits(list(params.values())), strict=True))
    digest = hashlib.sha256(repr(sums).encode()).hexdigest()
    gather = experiment.ranks.control.gather
    if len(set(gather("hash of the initial values", digest))) == 1:
        return
    first, *others = gather("initial values", sums)
    for rank, other in enumerate(others, 1):
        for name in {**first, **other}:
            if first.get(name) != other.get(name):
                fix = "draw them by functions of torch, numpy or random, which are seeded with run.seed"
                message = f"{name} has other initial values on rank {rank} than on rank 0: {fix}"
                raise experiment.config.error(("model",), message)


def load_newest(
    directory: RunDirectory, ranks: Ranks, load: Callable[[RunDirectory], TrainState | None] = RunDirectory.load
) -> TrainState | None:
    """Return the state from which the run resumes: rank 0 chooses the checkpoint, and the others load the same.

    Args:
        directory: The open directory of the run.
        ranks: The ranks of the run.
        load: Loads it on rank 0.

    Raises:
        CheckpointError: If this rank does not see the checkpoint, or it is damaged.
    """
    state = load(directory) if ranks.is_first else None
    tag = ask_rank_0(ranks, "checkpoint", lambda: None if directory.loaded is None else directory.loaded.tag)
    return state if ranks.is_first or tag is None else load_tag(directory.path, tag, ranks)[1]


def load_tag(run_dir: Path, tag: str, ranks: Ranks) -> tuple[Manifest, TrainState]:
    """Return a checkpoint that rank 0 chose, and its state.

    Raises:
        CheckpointError: If this rank does not see it, or it is damaged.
    """
    path = (run_dir / CHECKPOINTS / tag).absolute()
    if not path.is_dir():
        raise CheckpointError(
            f"rank {ranks.rank} does not see {path}, which rank 0 does: put run.output on a disk that all ranks share"
        )
    reader = CheckpointReader(run_dir / CHECKPOINTS)
    manifest = reader.find(tag)
    return manifest, reader.load(manifest)


def describe_ranks(ranks: Ranks) -> str:
    """Return ` on N ranks`, or nothing for one process."""
    return f" on {ranks.world_size} ranks" if ranks.are_several else ""


def ask_rank_0(ranks: Ranks, what: str, make: Callable[[], Any]) -> Any:
    """Return what `make` returns on rank 0, which alone calls it.

    Args:
        ranks: The ranks of the run.
        what: Name of the exchange, for errors.
        make: Returns a tree, as for `Channel.gather`; what it writes exists on return.
    """
    return ranks.control.gather(what, make() if ranks.is_first else None)[0]


@contextmanager
def open_on_ranks(path: Path, config: Config, ranks: Ranks, *, with_services: bool = True) -> Iterator[RunDirectory]:
    """Open the directory of a run on all ranks, of which rank 0 writes; at the end, all wait until it has closed it.

    A launcher ends all processes as soon as one has ended with an exit code other than 0.
    """
    with open_directory(path, config, with_services=with_services, ranks=ranks) as directory:
        yield directory
    ranks.control.reduce("run directory is closed")


def notify_once(ranks: Ranks, notify: Notify) -> Notify:
    """Return the function on rank 0, and one that says nothing on others."""
    return notify if ranks.is_first else lambda _: None
