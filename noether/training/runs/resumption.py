"""Resuming a run from its newest checkpoint."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from noether.config import ConfigError, load
from noether.config.changes import refuse_changes
from noether.config.errors import LocatedProblem, Place
from noether.config.schema import ENDS
from noether.config.serialization import dump
from noether.core.effect import SaveCheckpoint
from noether.core.event import AfterUpdate, BeforeTraining
from noether.core.loop import Move, next_move
from noether.core.tensors.tree import FrozenDict
from noether.effects import CheckpointError
from noether.effects.disk.files import os_error_text, replace_text
from noether.effects.disk.moves import finish_move, move_directory
from noether.effects.run_directory import CONFIG_FILE
from noether.training.experiment import build
from noether.training.runs.execution import TrainedRun, execute, write_ending
from noether.training.runs.services import check_services, open_directory
from noether.training.runs.stops import clear_stop
from noether.training.runs.value_jumps import describe_jumps

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from noether.config import Config
    from noether.core.iteration import TrainingIteration
    from noether.core.run import Run
    from noether.core.state import TrainState
    from noether.effects import RunDirectory
    from noether.training.experiment import Experiment
    from noether.training.runs.interruption import Interruption

_OUTPUT: Final = "run.output="


def load_run_config(run_dir: Path, overrides: Sequence[str] = (), allow: Sequence[str] = ()) -> Config:
    """Return the configuration of a run, with the overrides that a resumed run allows.

    Args:
        run_dir: The run directory.
        overrides: Settings such as `trainer.max_epochs=20`.
        allow: Further prefixes of modules that `kind` may name.

    Raises:
        ConfigError: If `run_dir` is not the directory of a run, or an override changes what a resumed run may not
            change.
    """
    path = run_dir / CONFIG_FILE
    if not path.is_file():
        raise ConfigError([LocatedProblem(Place(str(run_dir)), (), _describe_no_run(run_dir))])
    config = load(path, overrides, allow, run_dir)
    if overrides:
        refuse_changes(load(path, (), allow, run_dir), config)
    return config


def resume_run(
    run_dir: Path,
    overrides: Sequence[str],
    allow: Sequence[str],
    drop_memory: Sequence[str],
    *,
    continue_stopped: bool = False,
    interruption: Interruption,
    notify: Callable[[str], None],
) -> TrainedRun:
    """Resume a run from its newest checkpoint, or start it again if it never saved one.

    Args:
        run_dir: The run directory; a changed `run.output` moves it first.
        overrides: Settings such as `trainer.max_epochs=20`.
        allow: Further prefixes of modules that `kind` may name.
        drop_memory: Names of memories to drop although no callback claims them.
        continue_stopped: Whether the run continues if a callback stopped it. It does so too if its end or the settings
            of that callback change.
        interruption: Receives signals during training.
        notify: Receives lines for the user.

    Raises:
        ConfigError: As `load_run_config`, or if a dropped memory does not exist, a callback would stop the run
            again at once, or the training set has another length than when the run began.
        UnclaimedMemoryError: If the run holds memory that no callback claims and that is not dropped.
        CheckpointError: If there are checkpoints, and the run can be resumed from none of them; or if there are none
            although the run had saved some.
        OSError: If the run cannot be moved.
    """
    run_dir = finish_move(_find_moved(run_dir, overrides))
    old, config = load_run_config(run_dir, (), allow), load_run_config(run_dir, overrides, allow)
    check_services(config)
    target = _target_directory(run_dir, old, config)
    with open_directory(run_dir, config) as directory:
        saved = _load_newest(directory)
        experiment = build(config, run_id=directory.run_id, fresh=saved is None)
        # All that can be refused is refused here, before anything is written.
        state, notes = _adapt(saved, old, experiment, run_dir, drop_memory, continue_stopped=continue_stopped)
        if target == run_dir:
            return _continue(experiment, directory, saved, state, notes, interruption=interruption, notify=notify)
        _move(run_dir, target, old, config)
    notify(f"{run_dir} moved to {target}")
    with open_directory(target, config) as directory:
        directory.load()
        return _continue(experiment, directory, saved, state, notes, interruption=interruption, notify=notify)


def _adapt(
    saved: TrainState | None,
    old: Config,
    experiment: Experiment,
    run_dir: Path,
    drop_memory: Sequence[str],
    *,
    continue_stopped: bool,
) -> tuple[TrainState | None, list[str]]:
    """Return the state in which the run continues, and lines for the user."""
    if saved is None:
        return None, []
    state = _check_lengths(_drop_memory(experiment.to_device(saved), drop_memory), experiment, run_dir)
    state, notes = clear_stop(state, old, experiment, continue_stopped=continue_stopped)
    # Reducers are pure: this dry run refuses memory that does not fit.
    experiment.reducer(state, BeforeTraining(run=experiment.run, resumed=True))
    return state, [*notes, *describe_jumps(state, old, experiment)]


def _continue(
    experiment: Experiment,
    directory: RunDirectory,
    saved: TrainState | None,
    state: TrainState | None,
    notes: Sequence[str],
    *,
    interruption: Interruption,
    notify: Callable[[str], None],
) -> TrainedRun:
    """Train from `state` in the open directory of the run; do nothing if the run has ended."""
    if state is not None and next_move(state, experiment.run) is Move.NOTHING:
        run = TrainedRun(directory=directory.path, state=state, finished=True)
        write_ending(run, experiment, directory.interpreter)
        notify(f"{directory.path} already {run.ending}; to continue it, {_ways_to_continue(run, experiment)}")
        return run
    if state is None:
        notify(f"{directory.path} has no checkpoint: training starts at update 0")
    else:
        notify(f"resuming at {state.iteration}")
    for note in notes:
        notify(note)
    if removed := directory.truncate_logs(state):
        notify(f"lines of metrics.jsonl removed, because the resumed run logs them again: {removed}")
    if saved is not None and state is not None and state.stop != saved.stop:
        # The configuration shows only once that it has changed, so the decision to continue is saved before it.
        save = SaveCheckpoint(pointers=("latest",), retention=FrozenDict(continued=0))
        directory.interpreter([save], state, AfterUpdate(run=experiment.run))
        directory.wait()
    replace_text(directory.path / CONFIG_FILE, dump(experiment.config))
    resumed = state is not None
    state = experiment.state if state is None else state
    return execute(experiment, directory, state, resumed=resumed, interruption=interruption, notify=notify)


def _ways_to_continue(run: TrainedRun, experiment: Experiment) -> str:
    trainer = experiment.config.trainer
    name = next(name for name in ENDS if getattr(trainer, name) is not None)
    later_end = f"set a later end (trainer.{name} is {getattr(trainer, name)})"
    if run.state.stop is None or run.state.iteration.reached(experiment.run.end):
        return later_end
    stopper = run.state.stopped_by or "the callback that stopped it"
    return f"give --continue, change the settings of {stopper}, or {later_end}"


def _describe_no_run(path: Path) -> str:
    """Return why `path` is not the directory of a run, and what to give instead."""
    if path.is_file():
        return "is a file, not the directory of a run; give one like runs/NAME/RUN_ID"
    if not path.exists():
        return "does not exist; give the directory of a run, like runs/NAME/RUN_ID"
    runs = [found.parent for pattern in ("*/", "*/*/") for found in path.glob(pattern + CONFIG_FILE)]
    fix = "give one like runs/NAME/RUN_ID"
    if runs:
        newest = max(runs, key=lambda run: [int(digits) for digits in re.findall(r"\d+", run.name)])
        fix = f"the newest of the {len(runs)} runs in it is {newest}"
    return f"is not the directory of a run: it has no {CONFIG_FILE}; {fix}"


def _find_moved(run_dir: Path, overrides: Sequence[str]) -> Path:
    """Return the run directory, or where a move ended that was killed after it removed the directory."""
    outputs = [each.removeprefix(_OUTPUT) for each in overrides if each.startswith(_OUTPUT)]
    if outputs and not run_dir.exists():
        run = run_dir.resolve()
        moved = Path(outputs[-1].strip("\"'")) / run.parent.name / run.name
        if (moved / CONFIG_FILE).is_file():
            return moved
    return run_dir


def _target_directory(run_dir: Path, old: Config, config: Config) -> Path:
    """Return the directory in which the run resumes: another one if `run.output` was changed."""
    run = run_dir.resolve()
    target = Path(config.run.output) / config.run.name / run.name
    if config.run.output == old.run.output or target.resolve() == run:
        return run_dir
    if target.exists() or target.is_symlink():
        raise config.error(("run", "output"), f"{str(target)!r} exists already, so the run cannot move there")
    if target.resolve().is_relative_to(run):
        raise config.error(("run", "output"), f"{str(target)!r} lies in the run itself; give a folder outside of it")
    return target


def _move(run_dir: Path, target: Path, old: Config, config: Config) -> None:
    """Move a run; its configuration changes in nothing but its output."""
    moved = replace(old, run=replace(old.run, output=config.run.output))
    try:
        move_directory(run_dir, target, {CONFIG_FILE: dump(moved)}, unchanging=("checkpoints",))
    except OSError as error:
        where = "" if error.filename is None else f" ({error.filename})"
        message = f"{run_dir} could not be moved to {target}: {os_error_text(error)}{where}"
        raise OSError(f"{message}; no file of it is lost: repeat the command once this is solved") from error


def _load_newest(directory: RunDirectory) -> TrainState | None:
    """Return the newest state of a run; if only parts were saved, the error says how to use them."""
    try:
        return directory.load()
    except CheckpointError as error:
        saved = directory.checkpoints.manifests()
        if not saved or directory.checkpoints.newest() is not None:
            raise
        fix = f"--set run.init_from={directory.path}/checkpoints/{saved[-1].tag}, and save_latest_optim: true"
        raise CheckpointError(f"{error}\nStart a new run with {fix}") from error


def _drop_memory(state: TrainState, names: Sequence[str]) -> TrainState:
    for name in names:
        if name not in state.callback_states:
            known = ", ".join(map(repr, state.callback_states)) or "none"
            message = f"the run has no such memory; it has {known}"
            raise ConfigError([LocatedProblem(Place(f"--drop-memory {name}"), (), message)])
    remaining = {name: memory for name, memory in state.callback_states.items() if name not in names}
    return state.replace(callback_states=FrozenDict(remaining))


def _check_lengths(state: TrainState, experiment: Experiment, run_dir: Path) -> TrainState:
    """Return the state with the lengths of the run, or refuse those with which it did not begin."""
    before, now = state.lengths, experiment.data.batching.lengths
    changed = [name for name in before if before[name] != now.get(name)]
    if changed and changed[0] == "training_samples":
        path, updates = ("data", "train"), f"epochs of {before.get('updates_per_epoch')} updates"
        change = (
            f"has {now['training_samples']} samples, but the run began with {before['training_samples']}, in {updates}"
        )
    elif changed:
        path, change = ("trainer", changed[0]), f"{now.get(changed[0])}, but the run began with {before[changed[0]]}"
    elif not before and not _are_possible(state.iteration, experiment.run):  # of an earlier version
        path = ("data", "train")
        change = f"gives epochs of {now['updates_per_epoch']} updates, in which no run reaches {state.iteration}"
    else:
        return state.replace(lengths=now)
    fix = f"noether train {run_dir / CONFIG_FILE} --set run.init_from={run_dir / 'checkpoints/latest'}"
    raise experiment.config.error(path, f"{change}: restore it, or start a new run from these weights with {fix}")


def _are_possible(at: TrainingIteration, run: Run) -> bool:
    """Return whether a run with epochs of one length passes through an iteration."""
    expected = run.iteration_after(at.update)
    uncounted = expected.epoch - at.epoch  # 1 after the last update of an epoch, before the epoch is counted
    return at.sample == expected.sample and (
        uncounted == 0 or (uncounted == 1 and at.update % run.updates_per_epoch == 0)
    )
