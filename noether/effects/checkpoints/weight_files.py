"""Reads weights to start from: a checkpoint, a file of torch or safetensors, or a directory with such a file."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
from safetensors import safe_open

from noether.core.errors import suggest
from noether.core.iteration import TrainingIteration
from noether.core.tensors.stored_weights import weights_by_name
from noether.core.tensors.tied_names import EXTRA_STATE, extra_state_name
from noether.effects.checkpoints.contents import ContentError, read_state
from noether.effects.checkpoints.converter import error_text
from noether.effects.checkpoints.file_names import WEIGHTS, file_of, shard_names
from noether.effects.checkpoints.listing import MAX_POINTER_BYTES, CheckpointError
from noether.effects.checkpoints.reader import CheckpointReader
from noether.effects.disk.tensor_files import FACTS, SHARDING_INFO, is_panic
from noether.effects.run_files import MANIFEST

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from noether.core.state import TrainState

_INDEX: Final = ".index.json"
_FILES: Final = (
    WEIGHTS,
    *(f"{file}{end}" for file in ("model.safetensors", "pytorch_model.bin") for end in ("", _INDEX)),
)
"""Files with all weights of a model in a directory; the first that exists is read."""
_SUFFIXES: Final = frozenset({".pt", ".pth", ".bin", ".ckpt", ".safetensors"})
_USUAL_KEYS: Final = ("state_dict", "model_state_dict", "model")
"""Keys under which a file usually has the weights in training, beside others such as an average."""
_MAX_KEYS: Final = 3
_OF_A_MODEL: Final = " (.state_dict() in place of ['state_dict'] if a model was saved)"


class SavedWeights(NamedTuple):
    """Weights that were read.

    Args:
        values: Tensors by name, under all names that they have; and extra state, by the path of its module and
            `_extra_state`.
        source: What they were read from: `checkpoint` or `file`.
        key: Key of the state dict in the file; None if the file is one.
        state: The state in a checkpoint; None for a file.
    """

    values: Mapping[str, Any]
    source: str
    key: str | None = None
    state: TrainState | None = None


def read_weights(path: Path, key: str | None = None) -> SavedWeights:
    """Return the weights at a path, on the CPU; no code in a file is run.

    Args:
        path: A checkpoint such as `runs/NAME/RUN_ID/checkpoints/latest`; a file `.safetensors`, or any other one that
            torch saved, such as `.pt` or `.pth.tar`; or a directory with `weights.safetensors`, the shards of that,
            `model.safetensors`, the index of several such files, or `pytorch_model.bin`.
        key: Dotted key of the state dict in a file of torch; None if there is only one, or one with a usual name.

    Raises:
        CheckpointError: If there are no weights, or they cannot be read; the message says what to give instead.
    """
    path = path.expanduser()
    if path.is_dir() and not (path / MANIFEST).is_file():
        return _read_directory(path, key)
    if (path.suffix.lower() in _SUFFIXES or _is_other_file(path)) and not (path / MANIFEST).is_file():
        return _read_file(path, key)
    _refuse_key(key)
    store = CheckpointReader(path.parent)
    try:
        state = store.load(store.find(path.name))
        return SavedWeights(_values_of(state), "checkpoint", state=state)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; give a checkpoint like runs/NAME/RUN_ID/checkpoints/latest") from error


def _is_other_file(path: Path) -> bool:
    """Return whether a path such as `model.pth.tar` is that of a file larger than a pointer, or of no checkpoint."""
    if not path.exists():
        return path.name.endswith(_INDEX) or not _SUFFIXES.isdisjoint(path.suffixes)
    return path.is_file() and path.stat().st_size > MAX_POINTER_BYTES


def _read_directory(path: Path, key: str | None) -> SavedWeights:
    for name in _FILES:
        if (path / name).is_file():
            return _read_file(path / name, key)
    if any(file_of(each.name) == WEIGHTS for each in path.iterdir()):
        _refuse_key(key)
        return SavedWeights(_read_shards(path), "file")
    for folder, what in ((path / "checkpoints", "a whole run"), (path, "a folder of checkpoints")):
        if folder.is_dir() and (folder is not path or any(path.glob(f"*/{MANIFEST}"))):
            raise CheckpointError(f"it is {what}: give one of its checkpoints, such as {folder / 'newest'}")
    others = [each for each in sorted(path.iterdir()) if each.suffix.lower() in _SUFFIXES]
    hint = f"; give the file, such as {others[0]}" if others else ""
    raise CheckpointError(f"the directory has none of {', '.join(_FILES)}{hint}")


def _read_file(path: Path, key: str | None) -> SavedWeights:
    if not path.is_file():
        others = [each.name for each in path.parent.glob("*")] if path.parent.is_dir() else []
        raise CheckpointError(f"there is no such file{suggest(path.name, others)}")
    if path.name.endswith(_INDEX):
        return _read_parts(path, key)
    if path.suffix.lower() != ".safetensors":
        return _find_state_dict(_load_torch(path), key)
    _refuse_key(key)
    return SavedWeights(_read_safetensors(path), "file")


def _read_parts(index: Path, key: str | None) -> SavedWeights:
    """Return the weights in all files that an index lists, as transformers writes it."""
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        paths = [index.parent / name for name in names]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index.name} does not list files of weights: {error_text(error)}") from error
    if wrong := [path.name for path in paths if not path.is_file() or path.name.endswith(_INDEX)]:
        raise CheckpointError(f"{index.name} lists {wrong[0]!r}, which is no file of weights in its directory")
    parts = [_read_file(path, key).values for path in paths]
    return SavedWeights({name: tensor for part in parts for name, tensor in part.items()}, "file")


def _refuse_key(key: str | None) -> None:
    if key is not None:
        raise CheckpointError(f"key: {key!r} is for files of torch, which may hold several state dicts; remove it")


def _read_shards(folder: Path) -> Mapping[str, Any]:
    """Return the weights in a folder with the shards of all ranks."""
    try:
        names = shard_names([each.name for each in folder.iterdir()], WEIGHTS)
        return _values_of(read_state({name: (folder / name).read_bytes() for name in names}, TrainingIteration()))
    except (ContentError, OSError, ValueError) as error:
        raise CheckpointError(f"the folder does not hold weights: {error}") from error


def _read_safetensors(path: Path) -> Mapping[str, Any]:
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            _refuse_shard(path, metadata)
            if FACTS not in metadata:
                return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118  # it is no mapping
        return _values_of(read_state({WEIGHTS: path.read_bytes()}, TrainingIteration()))
    except ContentError as error:
        raise CheckpointError(f"{path.name} does not hold weights: {error}") from error
    except BaseException as error:  # a panic of the library is not an Exception
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        raise CheckpointError(f"{path.name} is no safetensors file: {error_text(error)}") from error


def _refuse_shard(path: Path, metadata: Mapping[str, str]) -> None:
    if SHARDING_INFO in metadata:
        raise ContentError(f"it has only the shards that one rank saved: give the folder {path.parent}")


def _values_of(state: TrainState) -> dict[str, Any]:
    extra = {extra_state_name(path): value for path, value in state.extra_state.items()}
    return {**weights_by_name(state), **extra}


def _load_torch(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of TorchScript, which is refused
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the file may hold anything
        text, file = str(error), repr(str(path))
        if "TorchScript" in text:
            held, saved = "a TorchScript program", f"torch.jit.load({file}).state_dict()"
        elif found := re.search(r"Unsupported (?:global: GLOBAL|class) (\S+)", text):
            held, saved = f"more than tensors ({found[1]})", f"torch.load({file}, weights_only=False)['state_dict']"
        else:
            is_clear = " " in text and "weights_only" not in text
            reason = text.splitlines()[0] if is_clear else "its content is not readable"
            fix = "give a file of torch.save(model.state_dict(), ...) or a .safetensors file"
            raise CheckpointError(f"{path.name} is no file that torch saved: {reason}; {fix}") from error
        raise CheckpointError(
            f"{path.name} holds {held}, and reading that can run any code: if you trust it, convert it in Python by "
            f"torch.save({saved}, 'weights.pt'){_OF_A_MODEL if '[' in saved else ''}, and give weights.pt"
        ) from error


def _find_state_dict(loaded: Any, key: str | None) -> SavedWeights:
    """Return the state dict in what a file of torch holds."""
    if key is None and _is_state_dict(loaded):
        return SavedWeights(_detach(loaded), "file")
    found = dict(_nested_state_dicts(loaded))
    usual = [name for name in _USUAL_KEYS if name in found]
    if key is None and (len(found) == 1 or len(usual) == 1):
        key = next(iter(usual or found))
    if key in found:
        return SavedWeights(_detach(found[key]), "file", key)
    known = ", ".join(map(repr, found))
    if key is not None:
        raise CheckpointError(f"key: the file has no state dict {key!r}; it has {known or 'none'}{suggest(key, found)}")
    if found:
        raise CheckpointError(f"the file has several state dicts: write key: with one of {known}")
    held = f"a mapping with {', '.join(map(str, loaded))}" if isinstance(loaded, Mapping) else type(loaded).__name__
    raise CheckpointError(f"the file has no state dict, but {held:.200}: save model.state_dict()")


def _nested_state_dicts(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if not isinstance(value, Mapping) or len(path) == _MAX_KEYS:
        return
    for name, inner in value.items():
        if isinstance(name, str) and "optim" not in name:  # whose memory may be tensors by name
            if _is_state_dict(inner):
                yield ".".join((*path, name)), inner
            else:
                yield from _nested_state_dicts(inner, (*path, name))


def _is_state_dict(value: Any) -> bool:
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        return False
    tensors = [isinstance(each, torch.Tensor) for name, each in value.items() if not name.endswith(EXTRA_STATE)]
    return bool(tensors) and all(tensors)


def _detach(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: each.detach() if isinstance(each, torch.Tensor) else each for name, each in values.items()}
