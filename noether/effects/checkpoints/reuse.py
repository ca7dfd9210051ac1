"""Whether a checkpoint already holds what a save requests, so that one moment of a run is saved once."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from noether.effects.checkpoints.contents import STATE, WEIGHTS, checkpoint_files, requested_files

if TYPE_CHECKING:
    from noether.core.effect import SaveCheckpoint
    from noether.core.iteration import TrainingIteration
    from noether.core.state import TrainState
    from noether.effects.checkpoints.manifest import Manifest


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
    models = effect.models if effect.weights else ()
    return (
        saved.slot == (effect.tag or str(iteration), iteration, effect.weights_of)
        and saved.models == models
        and requested_files(effect) <= saved.parts.keys()
    )


def same_weights(saved: Manifest, effect: SaveCheckpoint, state: TrainState) -> bool:
    """Return whether a checkpoint has the weights that a save of `state` would write, if it would write any."""
    return not effect.weights or _same_files(saved, effect, state, [WEIGHTS])


def same_content(saved: Manifest, effect: SaveCheckpoint, state: TrainState) -> bool:
    """Return whether a checkpoint has every file that a save of `state` would write, with the same content."""
    return _same_files(saved, effect, state, None)


def differs_only_in_end(saved: Manifest, effect: SaveCheckpoint, state: TrainState) -> bool:
    """Return whether a checkpoint holds `state` as it was before the end of the run was reached."""
    return state.ended and STATE in requested_files(effect) and same_content(saved, effect, state.replace(ended=False))


def _same_files(saved: Manifest, effect: SaveCheckpoint, state: TrainState, names: list[str] | None) -> bool:
    for name, pieces in checkpoint_files(effect, state).items():
        if names is not None and name not in names:
            continue
        digest = hashlib.sha256()
        for piece in pieces:
            digest.update(piece)
        if name not in saved.parts or digest.hexdigest() != saved.parts[name].sha256:
            return False
    return True
