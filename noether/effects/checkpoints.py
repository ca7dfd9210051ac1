"""Checkpoints on disk: one new directory each, committed by a rename, found again by its manifest."""

from __future__ import annotations

import json
import re
import shutil
from itertools import count
from typing import TYPE_CHECKING, Any, Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from noether.core.averages import averaged
from noether.core.errors import nearest
from noether.core.iteration import TrainingIteration
from noether.core.state import Measured, TrainState
from noether.effects.encoding import decode, encode
from noether.effects.files import flush_directory, flush_file, replace_text, sha256_of, write_new
from noether.effects.manifest import Manifest, Part, superfluous

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from noether.core.effect import SaveCheckpoint
    from noether.core.event import Event

WEIGHTS: Final = "weights.safetensors"
OPTIMIZER: Final = "optimizer.safetensors"
STATE: Final = "state.json"
MEMORY: Final = "state.safetensors"
MANIFEST: Final = "MANIFEST.json"
_WHATS: Final = ("params", "buffers")
_FACTS: Final = "noether"
_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.=\-]*", re.ASCII)


class CheckpointError(Exception):
    """A checkpoint cannot be found or read."""


class CheckpointStore:
    """The checkpoints of one run.

    A save writes a new directory and renames it to its tag; only then it exists. Pointers are small files that name a
    tag, replaced in one step after that. Last, what nobody keeps is removed.

    Args:
        directory: Where they lie; made at the first save.
        run_id: Name of the run.
    """

    def __init__(self, directory: Path, run_id: str) -> None:
        self._directory = directory
        self._run_id = run_id
        self._segment = 1 + max((manifest.segment for manifest in self.manifests()), default=0)
        self._parent: str | None = None

    def save(self, effect: SaveCheckpoint, state: TrainState, event: Event) -> None:
        """Save `state` as `effect` asks: the handler of `SaveCheckpoint`."""
        wanted = effect.tag or str(state.iteration)
        _check_name("tag", wanted)
        tag = self._held(wanted, effect, state, event)
        if tag is None:
            tag, number = self._free(wanted)
            self._write(tag, number, effect, state, event)
        for pointer in effect.pointers:
            _check_name("pointer", pointer)
            replace_text(self._directory / pointer, tag)
        for old in superfluous(self.manifests(), self.pointers(), self._parent):
            shutil.rmtree(self._directory / old)

    def manifests(self) -> list[Manifest]:
        """Return the manifests of all checkpoints, oldest first.

        Raises:
            CheckpointError: If one cannot be read.
        """
        found = self._directory.glob(f"*/{MANIFEST}") if self._directory.is_dir() else ()
        manifests = [_read_manifest(path) for path in found if not path.parent.name.startswith(".")]
        return sorted(manifests, key=lambda manifest: manifest.order)

    def pointers(self) -> dict[str, str]:
        """Return the tag that each pointer names."""
        if not self._directory.is_dir():
            return {}
        files = (path for path in self._directory.iterdir() if path.is_file() and not path.name.startswith("."))
        return {path.name: path.read_text().strip() for path in files}

    def find(self, name: str) -> Manifest:
        """Return the manifest of the checkpoint with this tag, or that this pointer names.

        Raises:
            CheckpointError: If there is none, naming those that exist.
        """
        manifests = {manifest.tag: manifest for manifest in self.manifests()}
        pointers = self.pointers()
        tag = pointers.get(name, name)
        if tag not in manifests:
            known = [*pointers, *manifests]
            there = f"there are: {', '.join(known) or 'none'}"
            raise CheckpointError(f"no checkpoint {name!r} in {self._directory}; {there}{nearest(name, known)}")
        return manifests[tag]

    def newest(self) -> Manifest | None:
        """Return the manifest of the newest checkpoint that can be resumed, or None."""
        return next((manifest for manifest in reversed(self.manifests()) if manifest.resumable), None)

    def load(self, manifest: Manifest) -> TrainState:
        """Return the state in a checkpoint, on the CPU; what was not saved is as in a new state.

        Raises:
            CheckpointError: If a file is missing or damaged.
        """
        for name, part in manifest.parts.items():
            self._verify(self._directory / manifest.tag / name, part)
        try:
            return self._read(manifest)
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"checkpoint {manifest.tag}: {error}") from error

    def resume(self, manifest: Manifest) -> TrainState:
        """Return the state in a checkpoint; later saves name it as their parent, and it is never removed."""
        state = self.load(manifest)
        self._parent = manifest.tag
        return state

    def _held(self, tag: str, effect: SaveCheckpoint, state: TrainState, event: Event) -> str | None:
        """Return the tag under which this very event already saved all that is asked, if it did."""
        if not (self._directory / tag / MANIFEST).is_file():
            return None
        held = _read_manifest(self._directory / tag / MANIFEST)
        now = (self._segment, state.iteration, type(event).__name__, effect.weights_of)
        same = (held.segment, held.iteration, held.event, held.weights_of) == now
        return tag if same and _files(effect) <= set(held.parts) and not held.models and not effect.models else None

    def _free(self, tag: str) -> tuple[str, int]:
        """Return `tag`, or the first of `TAG.2`, `TAG.3`, ... that is free, and its number."""
        candidates = ((tag if number == 1 else f"{tag}.{number}", number) for number in count(1))
        return next(each for each in candidates if not (self._directory / each[0]).exists())

    def _write(self, tag: str, number: int, effect: SaveCheckpoint, state: TrainState, event: Event) -> None:
        for stale in self._directory.glob(".tmp-*"):  # of a process that died while it wrote
            if stale.is_dir():
                shutil.rmtree(stale)
        temporary = self._directory / f".tmp-{tag}"
        temporary.mkdir(parents=True)
        if effect.weights:
            weighted = state if effect.weights_of is None else averaged(state, effect.weights_of)
            _write_weights(temporary, weighted, effect.models)
        if effect.optimizer:
            _write_state(temporary, state)
        parts = {
            path.name: Part(size_bytes=path.stat().st_size, sha256=sha256_of(path)) for path in temporary.iterdir()
        }
        manifest = Manifest(
            tag=tag,
            run_id=self._run_id,
            segment=self._segment,
            parent=self._parent,
            iteration=state.iteration,
            event=type(event).__name__,
            parts=parts,
            number=number,
            weights_of=effect.weights_of,
            models=effect.models if effect.weights else (),
            retention=dict(effect.retention),
        )
        write_new(temporary / MANIFEST, manifest.dumps().encode())
        flush_directory(temporary)
        temporary.rename(self._directory / tag)
        flush_directory(self._directory)

    def _verify(self, path: Path, part: Part) -> None:
        if not path.is_file():
            raise CheckpointError(f"{path} is missing")
        if path.stat().st_size != part.size_bytes or sha256_of(path) != part.sha256:
            raise CheckpointError(f"{path} is damaged: its content is not what was written")

    def _read(self, manifest: Manifest) -> TrainState:
        directory, state = self._directory / manifest.tag, TrainState(iteration=manifest.iteration)
        if STATE in manifest.parts:
            state = _read_state(directory)
        if WEIGHTS in manifest.parts:
            tensors, facts = _read_tensors(directory / WEIGHTS)
            # In the order that they had: a sum over all of them, as clipping takes it, depends on it in the last bit.
            ordered = {what: {name: tensors[name] for name in facts["order"][what]} for what in _WHATS}
            state = state.replace(**ordered)
        return state


def _files(effect: SaveCheckpoint) -> set[str]:
    return ({WEIGHTS} if effect.weights else set()) | ({STATE} if effect.optimizer else set())


def _check_name(what: str, name: str) -> None:
    if not _NAME.fullmatch(name):
        raise CheckpointError(f"{what} {name!r}: a name is made of letters, digits and '_.=-'")


def _read_manifest(path: Path) -> Manifest:
    try:
        return Manifest.loads(path.read_text())
    except Exception as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error


def _write_weights(directory: Path, state: TrainState, models: tuple[str, ...]) -> None:
    chosen = {
        name: tensor
        for name, tensor in {**state.params, **state.buffers}.items()
        if not models or any(name.startswith(f"{model}.") for model in models)
    }
    if models and not chosen:
        raise CheckpointError(
            f"model_names: no weights below {', '.join(models)}; there are: {', '.join(state.params)}"
        )
    names = {what: [name for name in getattr(state, what) if name in chosen] for what in _WHATS}
    _write_tensors(directory / WEIGHTS, chosen, order=names)


def _write_state(directory: Path, state: TrainState) -> None:
    optimizer: dict[str, torch.Tensor] = {}
    memory: dict[str, torch.Tensor] = {}
    metrics = {key: (value, str(at)) for key, (value, at) in state.metrics.items()}
    content = {
        "iteration": str(state.iteration),
        "previous": str(state.previous),
        "stop": state.stop,
        "ended": state.ended,
        "seed": state.seed,
        "hyperparams": encode(state.hyperparams, memory, "hyperparams"),
        "metrics": encode(metrics, memory, "metrics"),
        "callback_states": encode(state.callback_states, memory, "callback_states"),
        "opt_state": encode(state.opt_state, optimizer),
    }
    write_new(directory / STATE, json.dumps(content, indent=1, allow_nan=False).encode())
    if optimizer:
        _write_tensors(directory / OPTIMIZER, optimizer)
    if memory:
        _write_tensors(directory / MEMORY, memory)


def _read_state(directory: Path) -> TrainState:
    content = json.loads((directory / STATE).read_text())
    optimizer, memory = (
        _read_tensors(directory / name)[0] if (directory / name).exists() else {} for name in (OPTIMIZER, MEMORY)
    )
    metrics = decode(content["metrics"], memory)
    return TrainState(
        iteration=TrainingIteration.parse(content["iteration"]),
        previous=TrainingIteration.parse(content["previous"]),
        stop=content["stop"],
        ended=content["ended"],
        seed=content["seed"],
        hyperparams=decode(content["hyperparams"], memory),
        metrics={key: Measured(value, TrainingIteration.parse(at)) for key, (value, at) in metrics.items()},
        callback_states=decode(content["callback_states"], memory),
        opt_state=decode(content["opt_state"], optimizer),
    )


def _write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], **facts: Any) -> None:
    # safetensors refuses tensors that share memory, as tied weights do: each is written as one of its own.
    separate, seen = {}, set[int]()
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        address = plain.untyped_storage().data_ptr()
        separate[name] = plain.clone() if address in seen or plain.untyped_storage().nbytes() > plain.nbytes else plain
        seen.add(address)
    facts["strides"] = {name: tensor.stride() for name, tensor in tensors.items() if _is_permuted(tensor)}
    try:
        # One entry, because safetensors writes several in any order: equal tensors are equal files.
        save_file(separate, path, metadata={_FACTS: json.dumps(facts)})
    except SafetensorError as error:
        raise CheckpointError(f"{path} cannot be written: {error}; the checkpoints before it stay") from error
    flush_file(path)


def _read_tensors(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
        facts = json.loads(file.metadata()[_FACTS])
    return tensors | {name: _permuted(tensors[name], stride) for name, stride in facts["strides"].items()}, facts


def _is_permuted(tensor: torch.Tensor) -> bool:
    """Return whether a tensor lies in memory without gaps in another order, as channels last does."""
    return not tensor.is_contiguous() and torch.empty_like(tensor).stride() == tensor.stride()


def _permuted(tensor: torch.Tensor, stride: list[int]) -> torch.Tensor:
    # The order in memory decides which kernel runs, and so the last bits of what comes after.
    last = sum((size - 1) * step for size, step in zip(tensor.shape, stride, strict=True))
    if last + 1 != tensor.numel() or min(stride) < 1:
        raise ValueError(f"stride {stride} does not fit the shape {tuple(tensor.shape)}")
    return torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype).copy_(tensor)
