"""A new run that starts at a checkpoint of another one."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from noether.config.errors import ConfigError, LocatedProblem, Place
from noether.effects.branches import branch_run
from noether.effects.checkpoints.file_names import WEIGHTS
from noether.effects.checkpoints.names import NEWEST
from noether.effects.checkpoints.reader import CheckpointReader
from noether.effects.disk.files import os_error_text
from noether.effects.run_files import CHECKPOINTS, CONFIG_FILE
from noether.training.runs.directories import load_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from noether.config import Config
    from noether.core.state import TrainState
    from noether.effects import RunDirectory
    from noether.effects.checkpoints.manifest import Manifest


def check_target(run_dir: Path, into: Path, old: Config, config: Config) -> None:
    """Refuse a directory in which no new run can be made.

    Raises:
        ConfigError: If it exists, lies in the run, or `run.output` is given, too.
    """
    message = None
    if into.exists() or into.is_symlink():
        message = "exists already; give a directory that does not exist"
    elif into.resolve().is_relative_to(run_dir.resolve()):
        message = f"lies in the run itself; give a directory outside of it, such as {run_dir}-branch"
    elif config.run.output != old.run.output:
        message = "says where the new run is, so run.output cannot change; leave one of the two out"
    if message is not None:
        raise ConfigError([LocatedProblem(Place(f"--into {into}"), (), message)])


def load_resumable(run_dir: Path, checkpoint: str | None, allow: Sequence[str]) -> tuple[Manifest, TrainState]:
    """Return a checkpoint from which a run can resume, and its state.

    Args:
        run_dir: The run directory.
        checkpoint: Its name, as in `find_tag`; None for the newest.
        allow: Further prefixes of modules that `kind` may name, for the command in the message.

    Raises:
        ConfigError: If there is no such checkpoint, or a run cannot resume from it.
        CheckpointError: If it is damaged.
    """
    reader = CheckpointReader(run_dir / CHECKPOINTS)
    newest = reader.newest()
    name = (newest.tag if newest is not None else NEWEST) if checkpoint is None else checkpoint
    manifest, state = load_checkpoint(reader, name)
    if manifest.resumable:
        return manifest, state
    others = ", ".join(each.tag for each in reader.manifests() if each.resumable) or "none"
    message = f"{manifest.tag} does not hold weights, optimizer and state of the whole model; those that do: {others}"
    if WEIGHTS in manifest.files and not manifest.models:
        path = run_dir / CHECKPOINTS / manifest.tag
        command = ["noether", "train", str(run_dir / CONFIG_FILE), "--set", f"run.init_from={path}"]
        command += [word for prefix in allow for word in ("--allow", prefix)]
        message += f"; or start a new run from its weights: {shlex.join(command)}"
    raise ConfigError([LocatedProblem(Place(f"--checkpoint {name}"), (), message)])


def check_newest(directory: RunDirectory, checkpoint: str, saved: TrainState | None) -> None:
    """Refuse a checkpoint from which the run would not resume: the run would lose what comes after it.

    Args:
        directory: The open directory of the run.
        checkpoint: Name of the checkpoint, as in `find_tag`.
        saved: The state from which the run resumes.

    Raises:
        ConfigError: If there is no such checkpoint, or it is another one.
    """
    manifest, _ = load_checkpoint(directory.checkpoints, checkpoint)
    if saved is not None and manifest.resumable and manifest.iteration == saved.iteration:
        return
    resumes = "" if saved is None else f"; without --checkpoint the run resumes at {saved.iteration}"
    message = (
        f"the run would lose what it did after {manifest.tag}: give --into NEW_RUN_DIR to start a new run at this "
        f"checkpoint, which leaves {directory.path} as it is{resumes}"
    )
    raise ConfigError([LocatedProblem(Place(f"--checkpoint {checkpoint}"), (), message)])


def make_branch(
    run_dir: Path, into: Path, manifest: Manifest, state: TrainState, notify: Callable[[str], None]
) -> None:
    """Make the directory of a new run that starts at a checkpoint, and report it.

    Args:
        run_dir: The run directory.
        into: The new one.
        manifest: The checkpoint.
        state: The state in it.
        notify: Receives lines for the user.

    Raises:
        OSError: If it cannot be written; then there is no new directory.
    """
    try:
        later = branch_run(run_dir, into, manifest, state)
    except OSError as error:
        where = "" if error.filename is None else f" ({error.filename})"
        raise OSError(f"the branch {into} could not be made: {os_error_text(error)}{where}") from error
    notify(f"{into} starts at {manifest.tag} of {run_dir}")
    if later := [pointer for pointer in later if pointer not in ("latest", "last")]:
        notify(f"the new run has no pointer {', '.join(later)}, which names a later checkpoint, until it sets it")
