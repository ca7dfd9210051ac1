"""What the panel at the start of a run says: what is trained, on what, until where, and what the callbacks do when."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from noether.core.callback import declaration_of, label_of
from noether.core.callbacks.summaries import dataset_lengths, param_counts
from noether.core.reducer import Reducer
from noether.core.schedules.schedule import EveryNEpochs, EveryNSamples, EveryNUpdates
from noether.core.schedules.window import ALWAYS
from noether.core.tensors.module import device_of
from noether.core.text import count_of
from noether.effects.console.run_panels import RunPanel

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from noether.config import Config
    from noether.core.callback import Callback
    from noether.core.iteration import TrainingIteration
    from noether.core.run import Run
    from noether.core.state import TrainState
    from noether.training.experiment import Experiment

    FindWarnings = Callable[[Experiment], Sequence[str]]

_MAX_CALLBACKS: Final = 24
_MAX_WARNINGS: Final = 5
_INTERVALS: Final = {EveryNEpochs: "epoch", EveryNUpdates: "update", EveryNSamples: "sample"}


def no_warnings(experiment: Experiment) -> Sequence[str]:  # noqa: ARG001  # as `FindWarnings`
    """Return no warnings."""
    return ()


def describe_start(
    experiment: Experiment, path: Path, state: TrainState, find_warnings: FindWarnings = no_warnings
) -> RunPanel:
    """Return the panel at the start of a process that trains a run.

    Args:
        experiment: The run.
        path: The run directory.
        state: The state in which the process begins.
        find_warnings: Returns what may be wrong with the plan of the run.
    """
    config, run = experiment.config, experiment.run
    facts = {
        "directory": [str(path)],
        "model": [describe_model(config.model.path, state, run)],
        "data": [_describe_dataset(name, length) for name, length in dataset_lengths(run).items()],
        "device": [_describe_device(experiment, state)],
        "optimizer": [describe_optimizer(config)],
        "end": [describe_end(config, run)],
        "begins at": [describe_position(state.iteration, run)] if state.iteration.update else [],
        "callbacks": describe_callbacks(experiment.reducer.members),
        "logs": [name for name, is_used in _services(config).items() if is_used],
        "warnings": _limit_lines(find_warnings(experiment), _MAX_WARNINGS, "more warning"),
    }
    return RunPanel(title=f"run {config.run.name}", facts=[(name, each) for name, each in facts.items() if each])


def describe_model(kind: str, state: TrainState, run: Run) -> str:
    """Return the kind of a model and its numbers of parameters."""
    counts = param_counts(state.params, run.frozen)
    trainable, frozen = counts["params/trainable"], counts["params/frozen"]
    return f"{kind}, {count_of(trainable, 'parameter', form=',')}" + (f", and {frozen:,} frozen" if frozen else "")


def _describe_dataset(name: str, length: int) -> str:
    return f"{name.removeprefix('samples/')} {count_of(length, 'sample', form=',')}"


def _describe_device(experiment: Experiment, state: TrainState) -> str:
    trainer, ranks = experiment.config.trainer, experiment.ranks
    device = device_of(state.params.values())
    on = f" on each of {ranks.world_size} ranks ({trainer.parallel})" if ranks.are_several else ""
    accumulates = "" if trainer.max_batch_size is None else f" of at most {trainer.max_batch_size} at once"
    samples = count_of(experiment.run.effective_batch_size, "sample", form=",")
    return f"{device}{on}, {trainer.precision}, updates of {samples}{accumulates}"


def describe_optimizer(config: Config) -> str:
    """Return the optimizer with learning rate, weight decay and schedule."""
    optimizer = config.optimizer
    parts = [optimizer.kind.path.rpartition(".")[2], f"lr {optimizer.lr:g}"]
    if optimizer.weight_decay is not None:
        parts.append(f"weight decay {optimizer.weight_decay:g}")
    if optimizer.groups:
        parts.append(count_of(len(optimizer.groups), "parameter group"))
    if (schedule := optimizer.schedule) is not None:
        warmup = {"epoch": schedule.warmup_epochs, "update": schedule.warmup_updates}
        lengths = [count_of(length, unit, form=",") for unit, length in warmup.items() if length]
        after = f" after {lengths[0]} of warm-up" if lengths else ""
        parts.append(f"{schedule.kind if isinstance(schedule.kind, str) else 'own'} schedule{after}")
    return ", ".join(parts)


def describe_end(config: Config, run: Run) -> str:
    """Return where a run ends, in epochs, updates and samples, and its time limit."""
    final = run.final
    counts = [count_of(getattr(final, name), name, form=",") for name in ("epoch", "update", "sample")]
    hours = config.trainer.max_hours
    return " = ".join(counts) + ("" if hours is None else f", or after {hours:g} hours in this process")


def describe_position(iteration: TrainingIteration, run: Run) -> str:
    """Return an iteration, and which part of the run is done there."""
    final = run.final.update
    return f"{iteration}" + (f", {100 * iteration.update / final:.0f} % of the run" if final else "")


def describe_callbacks(members: Iterable[Callback]) -> list[str]:
    """Return a short line for each callback: its name, and when it acts.

    Example:
        >>> from noether import CheckpointCallback, OnlineLossCallback
        >>> describe_callbacks([OnlineLossCallback(every_n_epochs=1), CheckpointCallback(every_n_updates=500)])
        ['OnlineLossCallback every epoch', 'CheckpointCallback every 500 updates']
    """
    listed = [inner for each in members for inner in (each.members if isinstance(each, Reducer) else (each,))]
    lines = [_describe_callback(each) for each in listed]
    return _limit_lines(lines, _MAX_CALLBACKS, "more callback")


def _limit_lines(lines: Sequence[str], limit: int, what: str) -> list[str]:
    more = len(lines) - limit
    return list(lines) if more <= 0 else [*lines[:limit], f"and {count_of(more, what)}, which noether plan shows"]


def _describe_callback(callback: Callback) -> str:
    gate, name = declaration_of(callback).gate, label_of(callback)
    if gate is None:
        return name
    for member in gate.schedule.members:
        name = name.replace(f"/{member}", "", 1)
    when = " and ".join(_describe_schedule(member) for member in gate.schedule.members)
    return f"{name.replace('/', ' ', 1)} {when}" + (" and at the end" if gate.at_end else "")


def _describe_schedule(member: object) -> str:
    for kind, unit in _INTERVALS.items():
        if isinstance(member, kind) and member.window is ALWAYS:
            return f"every {unit}" if member.n == 1 else f"every {member.n:,} {unit}s"
    return str(member).replace("_", " ", 1)


def _services(config: Config) -> dict[str, bool]:
    return {
        "TensorBoard": config.run.tensorboard,
        "Weights & Biases": config.run.wandb is not None,
        "events.jsonl": config.trainer.record == "events",
    }
