"""Resuming a run from its newest checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from noether.config import ConfigError, load
from noether.config.changes import refuse_changes
from noether.config.errors import LocatedProblem, Place
from noether.config.serialization import dump
from noether.core.event import BeforeTraining
from noether.core.loop import Move, next_move
from noether.core.tensors.tree import FrozenDict
from noether.effects import CheckpointError
from noether.effects.disk.files import make_directories, replace_text
from noether.effects.run_directory import CONFIG_FILE
from noether.training.experiment import build
from noether.training.runs.execution import TrainedRun, execute, write_ending
from noether.training.runs.services import check_services, open_directory

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from noether.config import Config
    from noether.core.iteration import TrainingIteration
    from noether.core.run import Run
    from noether.core.state import TrainState
    from noether.effects import RunDirectory
    from noether.training.experiment import Experiment
    from noether.training.runs.interruption import Interruption


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
        message = f"is not the directory of a run: it has no {CONFIG_FILE}; give one like runs/NAME/RUN_ID"
        raise ConfigError([LocatedProblem(Place(str(run_dir)), (), message)])
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
    interruption: Interruption,
    notify: Callable[[str], None],
) -> TrainedRun:
    """Resume a run from its newest checkpoint, or start it again if it has none.

    Args:
        run_dir: The run directory; a changed `run.output` moves it first.
        overrides: Settings such as `trainer.max_epochs=20`.
        allow: Further prefixes of modules that `kind` may name.
        drop_memory: Names of memories to drop although no callback claims them.
        interruption: Receives signals during training.
        notify: Receives lines for the user.

    Raises:
        ConfigError: As `load_run_config`, or if a dropped memory does not exist, or if the training set has another
            length than when the run began.
        UnclaimedMemoryError: If the run holds memory that no callback claims and that is not dropped.
        CheckpointError: If there are checkpoints, and the run can be resumed from none of them.
    """
    config = load_run_config(run_dir, overrides, allow)
    check_services(config)
    target = _target_directory(run_dir, config, allow)
    with open_directory(run_dir, config) as directory:
        state = _load_newest(directory)
        experiment = build(config, run_id=directory.run_id, fresh=state is None)
        if state is not None:
            state = _check_lengths(_drop_memory(experiment.to_device(state), drop_memory), experiment, run_dir)
            # Reducers are pure: this dry run refuses memory that does not fit before anything is written.
            experiment.reducer(state, BeforeTraining(run=experiment.run, resumed=True))
            if next_move(state, experiment.run) is Move.NOTHING:
                run = TrainedRun(directory=run_dir, state=state, finished=True)
                write_ending(run, experiment, directory.interpreter)
                notify(f"{run_dir} already {run.ending}; to continue it, set a later end")
                return run
        if target == run_dir:
            notify(
                f"{run_dir} has no checkpoint: training starts at update 0"
                if state is None
                else f"resuming at {state.iteration}"
            )
            if removed := directory.truncate_logs(state):
                notify(f"lines of metrics.jsonl removed, because the resumed run logs them again: {removed}")
            replace_text(directory.path / CONFIG_FILE, dump(config))
            resumed = state is not None
            state = experiment.state if state is None else state
            return execute(experiment, directory, state, resumed=resumed, interruption=interruption, notify=notify)
        make_directories(target.parent)
        shutil.move(run_dir, target)  # while this process holds the lock
    notify(f"{run_dir} moved to {target}")
    replace_text(target / CONFIG_FILE, dump(config))
    return resume_run(target, (), allow, drop_memory, interruption=interruption, notify=notify)


def _target_directory(run_dir: Path, config: Config, allow: Sequence[str]) -> Path:
    """Return the directory in which the run resumes: another one if `run.output` was changed."""
    previous_output = load(run_dir / CONFIG_FILE, (), allow, run_dir).run.output
    target = Path(config.run.output) / config.run.name / run_dir.resolve().name
    if config.run.output == previous_output or target.resolve() == run_dir.resolve():
        return run_dir
    if target.exists():
        raise config.error(("run", "output"), f"{str(target)!r} exists already, so the run cannot move there")
    return target


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


def _drop_memory(state: TrainState, names: Sequence[str]) -> TrainState:
    for name in names:
        if name not in state.callback_states:
            known = ", ".join(map(repr, state.callback_states)) or "none"
            message = f"the run has no such memory; it has {known}"
            raise ConfigError([LocatedProblem(Place(f"--drop-memory {name}"), (), message)])
    remaining = {name: memory for name, memory in state.callback_states.items() if name not in names}
    return state.replace(callback_states=FrozenDict(remaining))
