"""Whether a checkpoint already holds what a save requests, so that one moment of a run is saved once."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from noether.core.event import AfterTraining
from noether.effects.checkpoints.file_names import FILES, STATE, WEIGHTS, requested_files
from noether.effects.checkpoints.manifest import RUN_STATE_SUFFIXES, name_of_slot

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable

    from noether.core.effect import SaveCheckpoint
    from noether.core.iteration import TrainingIteration
    from noether.core.state import TrainState
    from noether.effects.checkpoints.manifest import Manifest

    Hashes = Callable[[SaveCheckpoint, TrainState, Collection[str]], Iterable[tuple[str, str]]]
    """Returns name and SHA-256 of the files that a save would write: those of the given names, with their shards."""


def covers(saved: Manifest, effect: SaveCheckpoint, iteration: TrainingIteration) -> bool:
    """Return whether a checkpoint is of this iteration and tag, and has the weights and files that `effect` requests.

    Example:
        >>> from noether import SaveCheckpoint, TrainingIteration
        >>> from noether.effects.checkpoints.manifest import Manifest, Part
        >>> at = TrainingIteration(update=1)
        >>> saved = Manifest(tag="E0_U1_S0.2", number=2, run_id="r", segment=1, parent=None, event="AfterUpdate",
        ...                  parts={"weights.safetensors": Part(size_bytes=0, sha256="")}, iteration=at, retention={})
        >>> covers(saved, SaveCheckpoint(optimizer=False), at), covers(saved, SaveCheckpoint(), at)
        (True, False)
    """
    return _has_slot(saved, effect, iteration) and saved.models == _models(effect) and _has_files(saved, effect)


def covers_end(saved: Manifest, effect: SaveCheckpoint, iteration: TrainingIteration) -> bool:
    """Return whether a checkpoint from before the end of training makes a request after training unnecessary.

    Unlike `covers`, it accepts weights of the whole model for a request of a part, and takes `TAG`, `TAG.latest` and
    `TAG.end` for one checkpoint: what an earlier event saved under one of these tags is not saved again under another.

    Example:
        >>> from noether import SaveCheckpoint, TrainingIteration
        >>> from noether.effects.checkpoints.manifest import Manifest, Part
        >>> at, file = TrainingIteration(update=1), Part(size_bytes=0, sha256="")
        >>> saved = Manifest(tag="E0_U1_S0.latest", run_id="r", segment=1, parent=None, event="AfterUpdate",
        ...                  parts={"weights.safetensors": file, "state.json": file}, iteration=at, retention={})
        >>> covers(saved, SaveCheckpoint(optimizer=False), at), covers_end(saved, SaveCheckpoint(optimizer=False), at)
        (False, True)
    """
    if not _has_files(saved, effect) or (effect.weights and not contains_models(saved.models, effect.models)):
        return False
    tags = [f"{iteration}{suffix}" for suffix in RUN_STATE_SUFFIXES]
    is_of_run = saved.weights_of is None is effect.weights_of and (effect.tag or str(iteration)) in tags
    is_before = saved.event != AfterTraining.__name__ and saved.iteration == iteration and saved.slot[0] in tags
    return _has_slot(saved, effect, iteration) or (is_of_run and is_before)


def contains_models(saved: Collection[str], requested: Collection[str]) -> bool:
    """Return whether weights of some sub-modules contain those of others; empty stands for the whole model.

    Example:
        >>> contains_models((), ("head",)), contains_models(("head", "body"), ("head",)), contains_models(("head",), ())
        (True, True, False)
    """
    return not saved or (bool(requested) and set(requested) <= set(saved))


def _has_slot(saved: Manifest, effect: SaveCheckpoint, iteration: TrainingIteration) -> bool:
    tag = name_of_slot(effect.tag or str(iteration), iteration)
    return saved.slot == (tag, iteration, effect.weights_of)


def _has_files(saved: Manifest, effect: SaveCheckpoint) -> bool:
    return requested_files(effect) <= saved.files


def _models(effect: SaveCheckpoint) -> tuple[str, ...]:
    return effect.models if effect.weights else ()


def same_weights(saved: Manifest, effect: SaveCheckpoint, state: TrainState, hashes: Hashes) -> bool:
    """Return whether a checkpoint has the weights that a save of `state` would write, if it would write any."""
    return not effect.weights or _has_hashes(saved, hashes(replace(effect, models=saved.models), state, {WEIGHTS}))


def same_content(saved: Manifest, effect: SaveCheckpoint, state: TrainState, hashes: Hashes) -> bool:
    """Return whether a checkpoint has every file that a save of `state` would write, with the same content."""
    return _has_hashes(saved, hashes(effect, state, FILES))


def differs_only_in_end(saved: Manifest, effect: SaveCheckpoint, state: TrainState, hashes: Hashes) -> bool:
    """Return whether a checkpoint holds `state` as it was before the end of the run was reached."""
    has_state = state.ended and STATE in requested_files(effect)
    return has_state and same_content(saved, effect, state.replace(ended=False), hashes)


def _has_hashes(saved: Manifest, hashes: Iterable[tuple[str, str]]) -> bool:
    return all(name in saved.parts and saved.parts[name].sha256 == sha256 for name, sha256 in hashes)
