"""The panel at the start of a configured run, with its optimizer, time limit and services."""

from __future__ import annotations

import threading
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Final

from noether.core.progress import show_progress_on
from noether.core.text import count_of
from noether.session.panels import start

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from noether.config import Config
    from noether.core.state import TrainState
    from noether.effects.console.console import Console
    from noether.effects.console.run_panels import RunPanel
    from noether.training.experiment import Experiment

    FindWarnings = Callable[[Experiment], Sequence[str]]

_BUILDING_AFTER_S: Final = 2.0
_MAX_WARNINGS: Final = 5
_PLAN: Final = ", which noether plan shows"


def no_warnings(experiment: Experiment) -> Sequence[str]:  # noqa: ARG001  # as `FindWarnings`
    """Return no warnings."""
    return ()


@contextmanager
def show_building(console: Console | None, path: Path) -> Iterator[None]:
    """Show progress while the block builds datasets and model; after two seconds, print which run is being built.

    The panel at the start is printed after the block, because it needs both.

    Args:
        console: Where to show it; None to show nothing.
        path: The run directory. It need not exist yet: a new one is made after the block, which may refuse the run.
    """
    if console is None:
        yield
        return
    timer = threading.Timer(_BUILDING_AFTER_S, _announce_building, [console, path])
    timer.daemon = True
    timer.start()
    try:
        with show_progress_on(console):
            yield
    finally:
        timer.cancel()
        timer.join()  # so that its line comes before the panel


def _announce_building(console: Console, path: Path) -> None:
    with suppress(OSError, ValueError):  # the standard output is closed
        console.print_above(f"building datasets and model of {path}")


def describe_start(
    experiment: Experiment, path: Path, state: TrainState, find_warnings: FindWarnings = no_warnings
) -> RunPanel:
    """Return the panel at the start of a process that trains a run.

    Args:
        experiment: The run.
        path: The run directory.
        state: The state in which the process begins.
        find_warnings: Returns warnings about the plan of the run.
    """
    config, run = experiment.config, experiment.run
    hours = config.trainer.max_hours
    facts = {
        "directory": [str(path)],
        "model": [start.describe_model(config.model.path, state, run)],
        "data": start.describe_data(run),
        "device": [_describe_device(experiment, state)],
        "optimizer": [describe_optimizer(config)],
        "end": [start.describe_end(run) + ("" if hours is None else f", or after {hours:g} hours in this process")],
        "begins at": [start.describe_position(state.iteration, run)] if state.iteration.update else [],
        "callbacks": start.describe_callbacks(experiment.reducer.members, _PLAN),
        "logs": [name for name, is_used in _services(config).items() if is_used],
        "warnings": start.limit_lines(find_warnings(experiment), _MAX_WARNINGS, "more warning", _PLAN),
    }
    return start.describe_start(f"run {config.run.name}", facts)


def _describe_device(experiment: Experiment, state: TrainState) -> str:
    trainer, ranks = experiment.config.trainer, experiment.ranks
    device = start.describe_device(state, ranks.world_size, f" ({trainer.parallel})")
    accumulates = "" if trainer.max_batch_size is None else f" of at most {trainer.max_batch_size} at once"
    return f"{device}, {trainer.precision}, {start.describe_updates(experiment.run)}{accumulates}"


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


def _services(config: Config) -> dict[str, bool]:
    return {
        "TensorBoard": config.run.tensorboard,
        "Weights & Biases": config.run.wandb is not None,
        "events.jsonl": config.trainer.record == "events",
    }
