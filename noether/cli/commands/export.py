"""`noether export`: writes the weights of a checkpoint to one safetensors file."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from noether.cli.options import find_path_problem
from noether.cli.output import echo
from noether.config.errors import error_at
from noether.core.tensors.stored_weights import weights_by_name
from noether.core.tensors.tied_names import extra_state_name
from noether.effects.checkpoints.file_names import WEIGHTS, file_of
from noether.effects.checkpoints.listing import CheckpointError
from noether.effects.checkpoints.reader import CheckpointReader
from noether.effects.disk.calls import DISK
from noether.effects.disk.files import TEMPORARY_PREFIX, os_error_text, replace_file
from noether.effects.disk.tensor_files import plain_tensor_pieces
from noether.effects.run_files import CHECKPOINTS
from noether.session.processes import refuse_several_processes
from noether.training.runs.directories import load_weights, require_run

if TYPE_CHECKING:
    from pathlib import Path

    from noether.core.state import TrainState
    from noether.effects.checkpoints.manifest import Manifest

_SUFFIX = ".safetensors"


def export(run_dir: Path, checkpoint: str, weights: str | None, target: Path) -> None:
    """Write the weights of a checkpoint, sharded or not, to one file that `load_state_dict` of the model takes.

    It needs neither the model nor the code of the run, and does not change or lock the run. The file appears under its
    name once it is complete.

    Args:
        run_dir: The run directory.
        checkpoint: A name of the checkpoint, as in `find_tag`.
        weights: Averaged weights in it, such as `ema=0.999`; None for those that the checkpoint is for.
        target: The file, which must not exist.

    Raises:
        ProcessesError: If this is one of several processes.
        ConfigError: If `run_dir` is not the directory of a run, the checkpoint or the weights do not exist, or `target`
            cannot be the name of the file.
        CheckpointError: If the checkpoint is damaged, or has no weights.
        OSError: If the file cannot be written.
    """
    refuse_several_processes("noether export")
    require_run(run_dir)
    _check_target(target)
    reader = CheckpointReader(run_dir / CHECKPOINTS)
    manifest, state = load_weights(reader, checkpoint, weights, lambda found: _select_files(found, weights))
    tensors, left_out = _collect_tensors(state)
    _write(target, tensors)
    if left_out:
        echo(f"Warning: left out, because the file can hold only tensors: {', '.join(left_out)}", err=True)
    size_mb = sum(each.numel() * each.element_size() for each in tensors.values()) / 1e6
    source = weights or manifest.weights_of
    of = f"{source} of {manifest.tag}" if source else manifest.tag
    parts = f", below {', '.join(manifest.models)} only" if manifest.models else ""
    echo(f"{target}: {len(tensors)} tensors, {size_mb:.1f} MB; the weights of {of}{parts}")


def _check_target(target: Path) -> None:
    problem = find_path_problem(target, _SUFFIX)
    if problem is None and (target.exists() or target.is_symlink()):
        problem = "the file exists; remove it, or give another name"
    if problem is not None:
        raise error_at(f"--to {target}", problem)


def _select_files(manifest: Manifest, weights: str | None) -> Manifest:
    """Return the manifest without files that are not needed; averaged weights are in the file of the callbacks."""
    if weights not in {None, manifest.weights_of}:
        return manifest
    return replace(manifest, parts={name: part for name, part in manifest.parts.items() if file_of(name) == WEIGHTS})


def _collect_tensors(state: TrainState) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Return the entries of a state dict that are tensors, and the names of the others."""
    extra: dict[str, Any] = {extra_state_name(path): value for path, value in state.extra_state.items()}
    values = {**weights_by_name(state), **extra}
    tensors = {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}
    return tensors, [name for name in values if name not in tensors]


def _write(target: Path, tensors: dict[str, torch.Tensor]) -> None:
    try:
        replace_file(target, plain_tensor_pieces(tensors))
    except BaseException as error:
        with suppress(OSError):
            DISK.remove(target.with_name(f"{TEMPORARY_PREFIX}{target.name}"))
        if isinstance(error, OSError):
            raise OSError(f"{target} could not be written: {os_error_text(error)}") from error
        if isinstance(error, TypeError):
            raise CheckpointError(f"{target} could not be written: {error}") from error
        raise
