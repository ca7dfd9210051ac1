"""`noether replay`: replays a recorded run and prints what its callbacks, or others, decide."""

from __future__ import annotations

import traceback
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from rich.console import Console

from noether.cli.output import echo
from noether.config.errors import ConfigError, error_at
from noether.config.loading import replace_callbacks
from noether.config.serialization import resolve_config
from noether.core.artifacts import artifact_key
from noether.core.effect import LogScalars, LogText, SaveCheckpoint
from noether.core.errors import SettingsError
from noether.core.iteration import COUNTERS, TrainingIteration
from noether.core.schedules.gate import Gate
from noether.core.schedules.schedule import At
from noether.core.tensors.tree import leaves
from noether.effects.console.scrolling_lines import wrap_texts
from noether.effects.console.tables import Table, table_lines
from noether.effects.disk.calls import DISK
from noether.effects.disk.json_numbers import to_plain
from noether.effects.logs.events import read_events
from noether.effects.logs.resumption import LogError
from noether.effects.run_files import EVENTS_FILE
from noether.planning.replay import ReplayError, initial_state, missing_producers, replay
from noether.training.configured_callbacks import build_callbacks
from noether.training.runs.directories import load_run_config

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from noether.config import Config
    from noether.planning.replay import Replay, ReplayStep


_MAX_REASON_CHARS: Final = 400
_INDENT: Final = 4


def show_replay(run_dir: Path, callbacks: Path | None, at: str | None, allow: Sequence[str], *, log: bool) -> None:
    """Print what callbacks decide in a recorded run or, with `at`, the state and effects at one point.

    Args:
        run_dir: The run directory.
        callbacks: A file with other callbacks; None for the run's own.
        at: A point such as `U1000`; None for the whole run.
        allow: Further prefixes of modules that `kind` may name.
        log: Whether to print logged text and metrics, too.

    Raises:
        ConfigError: If `run_dir` is not the directory of a run, or the callbacks do not fit it.
        ReplayError: If nothing was recorded, or the run has no such point.
    """
    config = load_run_config(run_dir, (), allow)
    other = None if callbacks is None else replace_callbacks(config, callbacks, allow)
    point = None if at is None else _parse_point(at)
    select = partial(has_decision, log=log) if point is None else partial(_is_at, point)
    with _failures_as_lines(run_dir / EVENTS_FILE):
        replayed = _replay_run(run_dir, config, other, select)
        if point is not None and not replayed.steps:
            raise ReplayError(f"--at {at}: the run has no event there; it ended at {replayed.state.iteration}")
        console = Console()
        width = console.width if console.is_terminal else None
        for step in replayed.steps:
            if point is not None:
                _print_event(step, width)
                continue
            for line in _decision_lines(step, log=log):
                echo(_wrap(line, width))
        for name, reason in replayed.skipped.items():
            echo(f"skipped: {name}, because {reason}")
        echo(_describe_ending(replayed))


@contextmanager
def _failures_as_lines(path: Path) -> Iterator[None]:
    """Raise unexpected errors, such as a `TypeError` for a recorded value, as a `ReplayError` of one line."""
    try:
        yield
    except (ConfigError, ReplayError, LogError, OSError):
        raise
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{type(error).__name__} in {Path(frame.filename).name}, line {frame.lineno}"
        reason = "; ".join((*str(error).splitlines(), *getattr(error, "__notes__", ())))
        raise ReplayError(f"{path} cannot be replayed: {place}: {reason[:_MAX_REASON_CHARS]}") from error


def _replay_run(run_dir: Path, config: Config, other: Config | None, select: Callable[[ReplayStep], bool]) -> Replay:
    path = run_dir / EVENTS_FILE
    if not path.is_file():
        fix = "train with `trainer.record: events`, or --set trainer.record=events"
        raise ReplayError(f"{run_dir} has no {EVENTS_FILE}: nothing was recorded; {fix}")
    read_record, settings = partial(read_events, path, DISK), resolve_config(config)
    state, run = initial_state(read_record(), settings)
    configured = build_callbacks(config, state, run)
    if other is not None:
        own = [each.callback for each in configured if each.path[0] == "callbacks"]
        configured = build_callbacks(
            other, state, run, missing_producers(own, [kind.build() for kind in other.callbacks])
        )
    return replay([each.callback for each in configured], read_record, settings, select)


def _parse_point(text: str) -> TrainingIteration:
    try:
        return TrainingIteration.parse(text)
    except SettingsError as error:
        raise error_at("--at", str(error)) from error


def _is_at(point: TrainingIteration, step: ReplayStep) -> bool:
    """Return whether the counters equal the point or, if it names one counter, whether the event reached its value."""
    if step.state.iteration == point:
        return True
    named = [name for name in COUNTERS if getattr(point, name)]
    return len(named) == 1 and Gate(At(point)).opens(step.before, step.event) is not None


def has_decision(step: ReplayStep, *, log: bool = False) -> bool:
    """Return whether a callback decided something at an event; with `log`, logging counts as a decision."""
    before, after = step.before, step.state
    if not step.effects and after.stop is before.stop and after.hyperparams is before.hyperparams:
        return False  # the fast path, taken at nearly all events
    return any(_describe_decisions(step, log=log))


def _describe_decisions(step: ReplayStep, *, log: bool) -> Iterator[tuple[str, str]]:
    """Yield `(callback, decision)` for each decision at an event; with `log` also logged text and metrics."""
    for name, effect in step.effects:
        if isinstance(effect, SaveCheckpoint):
            pointers = f" as {', '.join(effect.pointers)}" if effect.pointers else ""
            yield name, f"saves {effect.tag or step.state.iteration}{pointers}"
        elif log and (key := artifact_key(effect)) is not None:
            yield name, f"{type(effect).__name__} {key}"
        elif log and isinstance(effect, LogText):
            yield name, effect.text
        elif log and isinstance(effect, LogScalars):
            yield name, "  ".join(f"{key} {float(value):.6g}" for key, value in effect.values.items())
    if step.state.stop is not None and step.before.stop is None:
        yield "", f"stops: {step.state.stop}"
    for key, value in step.state.hyperparams.items():
        if value != step.before.hyperparams.get(key):
            yield "", f"sets {key} to {value}"


def _decision_lines(step: ReplayStep, *, log: bool) -> Iterator[str]:
    where = f"{step.state.iteration!s:<20} {type(step.event).__name__:<14}"
    for name, decision in _describe_decisions(step, log=log):
        for line in decision.splitlines():
            yield f"{where} {f'{name}: ' if name else ''}{line}"


def _print_event(step: ReplayStep, width: int | None) -> None:
    """Print the state after an event, and the effects."""
    rows = []
    values: dict[str, Any] = {"stop": step.state.stop, "hyperparams": step.state.hyperparams}
    metrics = {key: f"{to_plain(value)} at {at}" for key, (value, at) in step.state.metrics.items()}
    for name, tree in {**values, "metrics": metrics, "memory": step.state.callback_states}.items():
        rows += [(name, ".".join(path), _format_leaf(leaf)) for path, leaf in leaves(tree)]
    title = f"{type(step.event).__name__} {step.state.iteration}"
    echo("\n".join([title, *table_lines(Table(("part", "name", "value"), rows), width)]))
    for name, effect in step.effects:
        echo(_wrap(f"{name} returns {effect}", width))


def _wrap(line: str, width: int | None) -> str:
    return line if width is None else wrap_texts(line, width, _INDENT)


def _format_leaf(leaf: object) -> str:
    if isinstance(leaf, torch.Tensor):
        return f"{leaf.dtype} of shape {tuple(leaf.shape)}" if leaf.is_meta or leaf.ndim else str(leaf.item())
    return str(leaf)


def _describe_ending(replayed: Replay) -> str:
    if not replayed.finished:
        return f"the record ends at {replayed.state.iteration}, before the end of the run"
    reason = f": {replayed.state.stop}" if replayed.state.stop is not None else ""
    return f"ended at {replayed.state.iteration}{reason}"
