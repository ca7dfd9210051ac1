"""The directory of a run: its configuration and checkpoints, where a move left it, and where it moves."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from noether.config import load
from noether.config.changes import refuse_changes
from noether.config.errors import ConfigError, LocatedProblem, Place
from noether.config.serialization import dump
from noether.core.errors import WeightsError
from noether.core.tensors.stored_weights import name_in_tags, use_weights
from noether.effects.checkpoints.file_names import WEIGHTS
from noether.effects.checkpoints.listing import CheckpointError
from noether.effects.disk.files import os_error_text
from noether.effects.disk.moves import move_directory
from noether.effects.run_files import CONFIG_FILE

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from noether.config import Config
    from noether.core.state import TrainState
    from noether.effects.checkpoints.manifest import Manifest
    from noether.effects.checkpoints.reader import CheckpointReader

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
    require_run(run_dir)
    path = run_dir / CONFIG_FILE
    config = load(path, overrides, allow, run_dir)
    if overrides:
        refuse_changes(load(path, (), allow, run_dir), config)
    return config


def require_run(run_dir: Path) -> None:
    """Raise an error that says what to give instead if `run_dir` is not the directory of a run.

    Raises:
        ConfigError: If it is not.
    """
    if not (run_dir / CONFIG_FILE).is_file():
        raise ConfigError([LocatedProblem(Place(str(run_dir)), (), _describe_no_run(run_dir))])


def _describe_no_run(path: Path) -> str:
    """Return why `path` is not the directory of a run, and what to give instead."""
    for parent in path.parents:
        if (parent / CONFIG_FILE).is_file() and (parent / "checkpoints").is_dir():
            return f"lies in the directory of a run; give {parent}"
    runs = [found.parent for pattern in ("*/", "*/*/") for found in path.glob(pattern + CONFIG_FILE)]
    fix = "give one like runs/NAME/RUN_ID"
    if runs:
        newest = max(runs, key=lambda run: [int(digits) for digits in re.findall(r"\d+", run.name)])
        fix = f"the newest of the {len(runs)} runs in it is {newest}" if len(runs) > 1 else f"the run in it is {newest}"
    return f"is not the directory of a run: it has no {CONFIG_FILE}; {fix}"


def find_run(run_dir: Path, overrides: Sequence[str]) -> Path:
    """Return the run directory, or that to which a killed move took it, whose command may be repeated."""
    outputs = [each.removeprefix(_OUTPUT) for each in overrides if each.startswith(_OUTPUT)]
    if outputs and not run_dir.exists():
        run = run_dir.resolve()
        moved = Path(outputs[-1].strip("\"'")) / run.parent.name / run.name
        if (moved / CONFIG_FILE).is_file():
            return moved
    return run_dir


def target_directory(run_dir: Path, old: Config, config: Config) -> Path:
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


def load_checkpoint(
    reader: CheckpointReader, name: str, select: Callable[[Manifest], Manifest] = lambda found: found
) -> tuple[Manifest, TrainState]:
    """Return the checkpoint that a name means, and its state.

    A training process may replace the checkpoint of a pointer meanwhile; then the name is looked up again.

    Args:
        reader: The checkpoints of the run.
        name: As in `find_tag`.
        select: Returns the manifest with the files to read.

    Raises:
        ConfigError: If the name means no checkpoint, or several.
        CheckpointError: If the checkpoint is damaged.
    """
    before = None
    while True:
        try:
            manifest = select(reader.find(name))
        except CheckpointError as error:
            raise ConfigError([LocatedProblem(Place(f"--checkpoint {name}"), (), str(error))]) from error
        try:
            return manifest, reader.load(manifest)
        except CheckpointError:
            if manifest == before:
                raise
            before = manifest


def load_weights(
    reader: CheckpointReader,
    name: str,
    weights: str | None,
    select: Callable[[Manifest], Manifest] = lambda found: found,
) -> tuple[Manifest, TrainState]:
    """Return the checkpoint that a name means, and its state with the weights that were chosen.

    Args:
        reader: The checkpoints of the run.
        name: As in `find_tag`.
        weights: Averaged weights in it, such as `ema=0.999`; None for those that the checkpoint is for.
        select: As in `load_checkpoint`.

    Raises:
        ConfigError: If the name means no checkpoint, or several, or it stores no such weights.
        CheckpointError: If the checkpoint is damaged, or has no weights.
    """
    manifest, state = load_checkpoint(reader, name, select)
    if WEIGHTS not in manifest.files:
        raise CheckpointError(f"{manifest.tag} has no weights; give another checkpoint by --checkpoint")
    if weights is not None and weights != manifest.weights_of:
        state = choose_weights(state, weights, reader)
    return manifest, state


def choose_weights(state: TrainState, weights: str, reader: CheckpointReader) -> TrainState:
    """Return the state of a checkpoint with averaged weights in it as its params and buffers.

    Args:
        state: The state.
        weights: Their name, such as `ema=0.999`.
        reader: The checkpoints of the run.

    Raises:
        ConfigError: If it stores no such weights; the message lists those that there are.
    """
    try:
        return use_weights(state, weights)
    except WeightsError as error:
        pointers = [name for name in reader.pointers() if name.endswith(f".{name_in_tags(weights)}")]
        fix = f"; use --checkpoint {' or '.join(pointers)} without --weights" if pointers else ""
        raise ConfigError([LocatedProblem(Place(f"--weights {weights}"), (), f"{error}{fix}")]) from error


def move_run(run_dir: Path, target: Path, old: Config, config: Config) -> None:
    """Move a run; its configuration changes in nothing but its output."""
    moved = replace(old, run=replace(old.run, output=config.run.output))
    try:
        move_directory(run_dir, target, {CONFIG_FILE: dump(moved)}, unchanging=("checkpoints",))
    except OSError as error:
        where = "" if error.filename is None else f" ({error.filename})"
        message = f"{run_dir} could not be moved to {target}: {os_error_text(error)}{where}"
        raise OSError(f"{message}; no file of it is lost: repeat the command once this is solved") from error
