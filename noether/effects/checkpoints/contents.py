"""Content of a checkpoint: converts a state to the bytes of its files and back."""

from __future__ import annotations

import json
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from noether.core.errors import NoetherError
from noether.core.state import TrainState
from noether.core.tensors.dtensors import local_part
from noether.core.tensors.live.buffers import changed_forms, describe_form
from noether.core.tensors.stored_weights import use_weights, weights_by_name
from noether.core.tensors.tied_names import EXTRA_STATE, add_tied, extra_state_name, names_below
from noether.core.tensors.tree import have_same_bits
from noether.effects.checkpoints.converter import error_text
from noether.effects.checkpoints.file_names import (
    MEMORY,
    OPTIMIZER,
    STATE,
    WEIGHTS,
    file_of,
    shard_name,
    shard_names,
)
from noether.effects.checkpoints.shards import is_sharded, read_shards, shard_pieces
from noether.effects.checkpoints.state_codec import decode_mapping, decode_state, encode_state
from noether.effects.disk.encoding import encode_tree
from noether.effects.disk.tensor_files import read_tensors, tensor_pieces

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    import torch

    from noether.core.effect import SaveCheckpoint
    from noether.core.iteration import TrainingIteration
    from noether.effects.checkpoints.shards import Placement

    Pieces = Iterable[bytes | memoryview]
    Tensors = Mapping[str, torch.Tensor]
    Facts = Mapping[str, Any]


_TIED_NAMES: Final = "tied_names"
_CONSTRUCTED: Final = "constructed"
"""The entry of a file of weights with the forms of buffers that training gave another one."""
_WEIGHT_KINDS: Final = ("params", "buffers")
_PARTS_IN_ERRORS: Final = {WEIGHTS: "weights", OPTIMIZER: "opt_state"}


class ModelNamesError(NoetherError, LookupError):
    """The model has no weights below the requested names of sub-modules."""


class ContentError(NoetherError, ValueError):
    """A file of a checkpoint does not hold valid content; the message names the file."""


def checkpoint_files(
    effect: SaveCheckpoint, state: TrainState, rank: int = 0, world_size: int = 1
) -> dict[str, Pieces]:
    """Return the content of each file of a checkpoint of `state` that a rank writes, in pieces.

    A file with sharded tensors is cut into one file for each rank; rank 0 writes all others.

    Args:
        effect: The request.
        state: The state, with the same tensors on all ranks, or their shards.
        rank: The rank.
        world_size: Number of ranks.

    Raises:
        ModelNamesError: If the model has no weights below the requested names of sub-modules.
        TypeError: If the state holds an object of a type that cannot be saved.
        WeightsError: If no callback keeps the requested weights.
    """
    writer = rank, world_size
    files: dict[str, Pieces] = {}
    if effect.weights:
        files |= _tensor_files(WEIGHTS, *_weights_content(effect, state), writer)
    if effect.optimizer:
        text, optimizer, memory = _state_content(state)
        files |= {STATE: [text.encode()]} if rank == 0 else {}
        files |= _tensor_files(OPTIMIZER, optimizer, {}, writer) if optimizer else {}
        files |= _tensor_files(MEMORY, memory, {}, writer) if memory else {}
    return files


def _tensor_files(file: str, tensors: Tensors, facts: Facts, writer: tuple[int, int]) -> dict[str, Pieces]:
    rank, world_size = writer
    part = _PARTS_IN_ERRORS.get(file)
    if any(map(is_sharded, tensors.values())):
        return {shard_name(file, rank, world_size): _name_part(part, shard_pieces(tensors, rank, world_size, facts))}
    whole = {name: local_part(tensor) for name, tensor in tensors.items()}
    return {file: _name_part(part, tensor_pieces(whole, **facts))} if rank == 0 else {}


def select_weights(effect: SaveCheckpoint, state: TrainState) -> dict[str, torch.Tensor]:
    """Return the weights that a checkpoint of `state` holds, under all names that the model has for them.

    Raises:
        ModelNamesError: If the model has no weights below the requested names of sub-modules.
        WeightsError: If no callback keeps the requested weights.
    """
    source = state if effect.weights_of is None else use_weights(state, effect.weights_of)
    weights = weights_by_name(source, effect.models)
    if effect.models and not weights:
        known = ", ".join(add_tied(state.params, state.tied_names))
        raise ModelNamesError(f"model_names: no weights below {', '.join(effect.models)}; there are: {known}")
    return weights


def _weights_content(effect: SaveCheckpoint, state: TrainState) -> tuple[Tensors, Facts]:
    """Return the tensors and facts of a file of weights, which `load_state_dict` of the model takes.

    Each tensor is there under all its names. The facts name it once, in the order of the state, and then its other
    names.
    """
    weights = select_weights(effect, state)
    first: dict[str, str] = {}  # the first name in the file, by the name in the state
    for name in weights:
        first.setdefault(state.tied_names.get(name, name), name)
    order = {kind: [first[name] for name in getattr(state, kind) if name in first] for kind in _WEIGHT_KINDS}
    facts: dict[str, Any] = {"order": order}
    facts |= _encode_extra_state(effect, state, weights)
    tied = {name: first.get(own, own) for name, own in state.tied_names.items() if name in weights}
    if tied := {name: own for name, own in tied.items() if name != own}:
        facts[_TIED_NAMES] = tied  # left out otherwise, as earlier versions have no such entry
    if forms := {first[name]: form for name, form in changed_forms(state).items() if name in first}:
        facts[_CONSTRUCTED] = forms  # likewise
    return weights, facts


def _encode_extra_state(
    effect: SaveCheckpoint, state: TrainState, weights: dict[str, torch.Tensor]
) -> dict[str, dict[str, Any]]:
    """Return the extra state of the requested sub-modules as JSON values, and add its tensors to `weights`."""
    names = {path: extra_state_name(path) for path in state.extra_state}
    chosen = names_below(names.values(), effect.models, state.tied_names)
    encoded = {
        path: encode_tree(value, weights, names[path])
        for path, value in state.extra_state.items()
        if names[path] in chosen.values()
    }
    weights.update({name: weights[own] for name, own in chosen.items() if name != own and own in weights})
    return {EXTRA_STATE: encoded} if encoded else {}  # likewise


def read_state(
    files: Mapping[str, bytes], iteration: TrainingIteration, placement: Placement | None = None
) -> TrainState:
    """Return the state in the files of a checkpoint, on the CPU; fields that were not saved have their defaults.

    Args:
        files: Content of the files by name; each is read once.
        iteration: Iteration in the manifest, with which the state has to agree.
        placement: What this rank stores of tensors in sharded files; None for the whole tensors.

    Raises:
        ContentError: If the content of a file is not exactly what `checkpoint_files` writes.
    """
    state = TrainState(iteration=iteration)
    read = {file: _read_tensor_file(files, file, placement) for file in (WEIGHTS, OPTIMIZER, MEMORY)}
    if STATE in files:
        with _name_file_in_errors(STATE):
            state = _decode_state_file(files[STATE], iteration, read[OPTIMIZER][0], read[MEMORY][0])
    if WEIGHTS in map(file_of, files):
        with _name_file_in_errors(WEIGHTS):
            state = state.replace(**_split_weights(*read[WEIGHTS]))
    return state


def _read_tensor_file(
    files: Mapping[str, bytes], file: str, placement: Placement | None
) -> tuple[dict[str, torch.Tensor], Facts]:
    with _name_file_in_errors(file):
        if file in files:
            return read_tensors(files[file])
        shards = shard_names(files, file)
        return read_shards(shards, files, placement) if shards else ({}, {})


@contextmanager
def _name_file_in_errors(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # anyone may have written the file, so a reader can fail in any way: all are damage
        raise ContentError(f"{name}: {error_text(error)}") from error


def _state_content(state: TrainState) -> tuple[str, Tensors, Tensors]:
    """Return the JSON text of a state, and the tensors of the optimizer and of callbacks to which it refers."""
    saved = encode_state(state)
    optimizer: dict[str, torch.Tensor] = {}
    try:
        content = {**saved["state"], "opt_state": encode_tree(state.opt_state, optimizer)}
    except TypeError as error:
        raise TypeError(f"opt_state: {error}") from error
    return json.dumps(content, indent=1, allow_nan=False), optimizer, saved["tensors"]


def _name_part(part: str | None, pieces: Pieces) -> Pieces:
    """Yield the pieces, with the part of the state in the message of an error."""
    try:
        yield from pieces
    except TypeError as error:
        if part is None:
            raise
        raise TypeError(f"{part}: {error}") from error


def _decode_state_file(
    text: bytes,
    iteration: TrainingIteration,
    optimizer: Mapping[str, torch.Tensor],
    memory: Mapping[str, torch.Tensor],
) -> TrainState:
    values = json.loads(text.decode())
    opt_state = decode_mapping("opt_state", values.pop("opt_state"), optimizer)
    state = decode_state({"state": values, "tensors": memory}).replace(opt_state=opt_state)
    # The decoder accepts content that the encoder never writes, such as repeated keys: encode again and compare.
    if _state_content(state)[0].encode() != text:
        raise ValueError("its content is not what was written")
    if state.iteration != iteration:
        raise ValueError(f"it is the state of {state.iteration}, but the manifest says {iteration}")
    return state


def _split_weights(tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return params, buffers, extra state and tied names, in the order in which they were saved.

    A sum over all of them, such as a gradient norm, depends on their order in its last bits.
    """
    weights: dict[str, Mapping[str, Any]] = {
        kind: {name: tensors[name] for name in facts["order"][kind]} for kind in _WEIGHT_KINDS
    }
    names = {kind: list(each) for kind, each in weights.items()}
    extra = decode_mapping(EXTRA_STATE, facts.get(EXTRA_STATE, {}), tensors)
    used = {name for each in names.values() for name in each} | _names_of_tensors(facts.get(EXTRA_STATE, {}))
    tied = facts.get(_TIED_NAMES, {})
    if names != facts["order"] or used | tied.keys() != set(tensors) or not set(tied.values()) <= used - tied.keys():
        raise ValueError("its tensors do not match the stored order")
    for name, own in tied.items():
        if not have_same_bits(tensors[name], tensors[own]):
            raise ValueError(f"{name!r} and {own!r} are one tensor of the model, and have different values")
    forms = facts.get(_CONSTRUCTED, {})
    if not all(name in names["buffers"] and isinstance(form, str) for name, form in forms.items()):
        raise ValueError(f"{_CONSTRUCTED} does not describe its buffers")
    constructed = {name: describe_form(buffer) for name, buffer in weights["buffers"].items()} | forms
    return {**weights, "extra_state": extra, "tied_names": tied, "constructed": constructed}


def _names_of_tensors(encoded: Any) -> set[str]:
    """Return the names of the tensors to which the JSON values of a tree refer."""
    if isinstance(encoded, list):
        return set().union(*map(_names_of_tensors, encoded))
    if not isinstance(encoded, dict):
        return set()
    if encoded.keys() == {"$tensor"}:
        return {encoded["$tensor"]}
    return set().union(*map(_names_of_tensors, encoded.values()))
