"""A recorded run, told to callbacks again from the command line."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import click
import torch
from rich.console import Console
from rich.table import Table

from noether.cli.train import resumed_config
from noether.config.errors import ConfigError, LocatedProblem, Place
from noether.config.loading import replace_callbacks
from noether.config.serialization import resolve_config
from noether.core.effect import LogScalars, LogText, SaveCheckpoint
from noether.core.errors import SettingsError
from noether.core.iteration import COUNTERS, TrainingIteration
from noether.core.schedules.gate import Gate
from noether.core.schedules.schedule import At
from noether.core.tensors.tree import leaves
from noether.effects.disk.calls import DISK
from noether.effects.disk.encoding import to_plain
from noether.effects.logs.events import read_events
from noether.effects.run_logs import EVENTS_FILE
from noether.planning.replay import ReplayError, beginning, producers, replay
from noether.training.configured_callbacks import build_callbacks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from noether.config import Config
    from noether.planning.replay import Replayed, ReplayStep


def show(run_dir: Path, callbacks: Path | None, at: str | None, allow: Sequence[str], *, log: bool) -> None:
    """Print what callbacks decide in a run that was recorded, or all that there is at one point of it.

    Raises:
        ConfigError: If `run_dir` is no run, or its callbacks do not fit it.
        ReplayError: If nothing was recorded, or the point is not in the run.
    """
    config = resumed_config(run_dir, (), allow)
    other = None if callbacks is None else replace_callbacks(config, callbacks, allow)
    point = None if at is None else _point(at)
    replayed = _replayed(run_dir, config, other, partial(decides, log=log) if point is None else partial(_is_at, point))
    if point is not None and not replayed.steps:
        raise ReplayError(f"--at {at}: the run has no event there; it went to {replayed.state.iteration}")
    console = Console(highlight=False, soft_wrap=True)
    for step in replayed.steps:
        if point is not None:
            _show_event(console, step)
            continue
        for line in _decisions(step, log=log):
            click.echo(line)
    for name, why in replayed.left_out.items():
        click.echo(f"left out: {name}, because {why}")
    click.echo(_ending(replayed))


def _replayed(run_dir: Path, config: Config, other: Config | None, keep: Callable[[ReplayStep], bool]) -> Replayed:
    path = run_dir / EVENTS_FILE
    if not path.is_file():
        right = "train with `trainer.record: events`, or --set trainer.record=events"
        raise ReplayError(f"{run_dir} holds no {EVENTS_FILE}: nothing was recorded; {right}")
    recorded, settings = partial(read_events, path, DISK), resolve_config(config)
    state, run = beginning(recorded(), settings)
    placed = build_callbacks(config, state, run)
    if other is not None:
        own = [each.callback for each in placed if each.path[0] == "callbacks"]
        placed = build_callbacks(other, state, run, producers(own, [kind.build() for kind in other.callbacks]))
    return replay([each.callback for each in placed], recorded, settings, keep)


def _point(text: str) -> TrainingIteration:
    try:
        return TrainingIteration.parse(text)
    except SettingsError as error:
        raise ConfigError([LocatedProblem(Place("--at"), (), str(error))]) from error


def _is_at(point: TrainingIteration, step: ReplayStep) -> bool:
    """Return whether an event is the one that reached a point, or any that came where all counters are as named."""
    if step.state.iteration == point:
        return True
    named = [name for name in COUNTERS if getattr(point, name)]
    return len(named) == 1 and Gate(At(point)).opens(step.before, step.event) is not None


def decides(step: ReplayStep, *, log: bool = False) -> bool:
    """Return whether there is something to tell of an event; with `log` also what is logged."""
    before, after = step.before, step.state
    if not step.asked and after.stop is before.stop and after.hyperparams is before.hyperparams:
        return False  # so it is at nearly all of many events
    return any(_told(step, log=log))


def _told(step: ReplayStep, *, log: bool) -> Iterator[tuple[str, str]]:
    """Yield who decided what at an event; with `log` also what is logged."""
    for name, effect in step.asked:
        if isinstance(effect, SaveCheckpoint):
            pointers = f", and {', '.join(effect.pointers)} name{'s'[: len(effect.pointers) == 1]} it"
            yield name, f"saves {effect.tag or step.state.iteration}{pointers if effect.pointers else ''}"
        elif log and isinstance(effect, LogText):
            yield name, effect.text
        elif log and isinstance(effect, LogScalars):
            yield name, "  ".join(f"{key} {float(value):.6g}" for key, value in effect.values.items())
    if step.state.stop is not None and step.before.stop is None:
        yield "", f"stops: {step.state.stop}"
    for key, value in step.state.hyperparams.items():
        if value != step.before.hyperparams.get(key):
            yield "", f"sets {key} to {value}"


def _decisions(step: ReplayStep, *, log: bool) -> Iterator[str]:
    where = f"{step.state.iteration!s:<20} {type(step.event).__name__:<14}"
    for name, what in _told(step, log=log):
        for line in what.splitlines():
            yield f"{where} {f'{name}: ' if name else ''}{line}"


def _show_event(console: Console, step: ReplayStep) -> None:
    """Print the state that was settled at an event, and what was asked for."""
    console.rule(f"{type(step.event).__name__} {step.state.iteration}")
    table = Table(box=None, show_header=False)
    shown: dict[str, Any] = {"stop": step.state.stop, "hyperparams": step.state.hyperparams}
    metrics = {key: f"{to_plain(value)} at {at}" for key, (value, at) in step.state.metrics.items()}
    for name, tree in {**shown, "metrics": metrics, "memory": step.state.callback_states}.items():
        for path, leaf in leaves(tree):
            table.add_row(name, ".".join(path), _shown(leaf))
    console.print(table)
    for name, effect in step.asked:
        console.print(f"{name} asks for {effect}", markup=False)


def _shown(leaf: object) -> str:
    if isinstance(leaf, torch.Tensor):
        return f"{leaf.dtype} of shape {tuple(leaf.shape)}" if leaf.is_meta or leaf.ndim else str(leaf.item())
    return str(leaf)


def _ending(replayed: Replayed) -> str:
    if not replayed.over:
        return f"the record ends at {replayed.state.iteration}, before the end of the run"
    reason = f": {replayed.state.stop}" if replayed.state.stop is not None else ""
    return f"ended at {replayed.state.iteration}{reason}"
