"""What is in a checkpoint: a state as the files that hold it, and back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from attrs import frozen
from cattrs import transform_error
from cattrs.errors import BaseValidationError
from cattrs.preconf.json import make_converter

from noether.core.errors import NoetherError
from noether.core.iteration import TrainingIteration
from noether.core.state import Measured, TrainState
from noether.core.tensors.averages import use_weights
from noether.effects.disk.encoding import decode, encode
from noether.effects.disk.tensor_files import read_tensors, tensor_pieces

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import torch

    from noether.core.effect import SaveCheckpoint

    Pieces = Iterable[bytes | memoryview]

WEIGHTS: Final = "weights.safetensors"
OPTIMIZER: Final = "optimizer.safetensors"
STATE: Final = "state.json"
MEMORY: Final = "state.safetensors"
FILES: Final = frozenset({WEIGHTS, OPTIMIZER, STATE, MEMORY})
"""The names that a file of a checkpoint can have."""

_WHATS: Final = ("params", "buffers")
_TREES: Final = ("hyperparams", "metrics", "callback_states", "opt_state")
_LARGEST: Final = 2**63 - 1
_SHOWN: Final = 300

CONVERTER: Final = make_converter(forbid_extra_keys=True)
"""Between the classes that are written as JSON and plain values; what it does not know it refuses."""
CONVERTER.register_unstructure_hook(TrainingIteration, str)
CONVERTER.register_structure_hook(TrainingIteration, lambda text, _: TrainingIteration.parse(text))


class ModelNamesError(NoetherError, LookupError):
    """No weights lie below the names of sub-modules."""


class ContentError(NoetherError, ValueError):
    """A file of a checkpoint does not hold what belongs there; the message names it."""


@frozen(kw_only=True)
class _Remembered:
    """What `state.json` holds: all of a state but its weights, the tensors in files beside it."""

    iteration: TrainingIteration
    previous: TrainingIteration
    stop: str | None
    ended: bool
    seed: int
    hyperparams: Any
    metrics: Any
    callback_states: Any
    opt_state: Any


def files_asked(effect: SaveCheckpoint) -> set[str]:
    """Return the names of the files that a checkpoint has at least."""
    return ({WEIGHTS} if effect.weights else set()) | ({STATE} if effect.optimizer else set())


def files_of(effect: SaveCheckpoint, state: TrainState) -> dict[str, Pieces]:
    """Return the content of each file of a checkpoint of `state`, in pieces.

    Raises:
        ModelNamesError: If no weights lie below the names of sub-modules that are asked for.
        TypeError: If something in the state is of a type that cannot be saved.
        WeightsError: If the weights that are asked for are not in the state.
    """
    files: dict[str, Pieces] = {}
    if effect.weights:
        chosen = weights_asked(effect, state)
        order = {what: [name for name in getattr(state, what) if name in chosen] for what in _WHATS}
        files[WEIGHTS] = tensor_pieces(chosen, order=order)
    return files | (_remembered(state) if effect.optimizer else {})


def weights_asked(effect: SaveCheckpoint, state: TrainState) -> dict[str, torch.Tensor]:
    """Return the weights that a checkpoint of `state` holds, by name.

    Raises:
        ModelNamesError: If no weights lie below the names of sub-modules that are asked for.
        WeightsError: If the weights that are asked for are not in the state.
    """
    weighted = state if effect.weights_of is None else use_weights(state, effect.weights_of)
    models = effect.models
    chosen = {
        name: tensor
        for name, tensor in {**weighted.params, **weighted.buffers}.items()
        if not models or any(name.startswith(f"{model}.") for model in models)
    }
    if models and not chosen:
        there = f"there are: {', '.join(state.params)}"
        raise ModelNamesError(f"model_names: no weights below {', '.join(models)}; {there}")
    return chosen


def state_in(files: Mapping[str, bytes], iteration: TrainingIteration) -> TrainState:
    """Return the state in the files of a checkpoint, on the CPU; what they do not hold is as in a new state.

    Raises:
        ContentError: If one of them does not hold what `files_of` writes.
    """
    state = TrainState(iteration=iteration)
    read: dict[str, tuple[dict[str, torch.Tensor], dict[str, Any]]] = {}
    for name in (WEIGHTS, OPTIMIZER, MEMORY):
        with _naming(name):
            read[name] = read_tensors(files[name]) if name in files else ({}, {})
    if STATE in files:
        with _naming(STATE):
            state = _recalled(files[STATE], iteration, read[OPTIMIZER][0], read[MEMORY][0])
    if WEIGHTS in files:
        with _naming(WEIGHTS):
            state = state.replace(**_ordered(*read[WEIGHTS]))
    return state


def why(error: Exception) -> str:
    r"""Return in one line what a library says of what it could not read, whatever that holds.

    Example:
        >>> why(ValueError("no\n"))
        'ValueError: no\\n'
    """
    validation = isinstance(error, BaseValidationError)
    text = "; ".join(transform_error(error)) if validation else f"{type(error).__name__}: {error}"
    return text.encode("unicode_escape").decode()[:_SHOWN]


@contextmanager
def _naming(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the content may be anybody's: whatever its readers meet is damage
        raise ContentError(f"{name}: {why(error)}") from error


def _remembered(state: TrainState) -> dict[str, Pieces]:
    optimizer: dict[str, torch.Tensor] = {}
    memory: dict[str, torch.Tensor] = {}
    metrics = {key: (value, str(at)) for key, (value, at) in state.metrics.items()}
    content = _Remembered(
        iteration=state.iteration,
        previous=state.previous,
        stop=state.stop,
        ended=state.ended,
        seed=state.seed,
        hyperparams=encode(state.hyperparams, memory, "hyperparams"),
        metrics=encode(metrics, memory, "metrics"),
        callback_states=encode(state.callback_states, memory, "callback_states"),
        opt_state=encode(state.opt_state, optimizer),
    )
    text = json.dumps(CONVERTER.unstructure(content), indent=1, allow_nan=False)
    beside = {OPTIMIZER: optimizer, MEMORY: memory}
    tensors = {name: tensor_pieces(held) for name, held in beside.items() if held}
    return {STATE: [text.encode()], **tensors}


def _ordered(tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> dict[str, dict[str, torch.Tensor]]:
    # In the order that they had: a sum over all of them, as clipping takes it, depends on it in the last bit.
    ordered = {what: {name: tensors[name] for name in facts["order"][what]} for what in _WHATS}
    listed = {what: list(held) for what, held in ordered.items()}
    if listed != facts["order"] or {name for names in listed.values() for name in names} != set(tensors):
        raise ValueError("its tensors are not those of its order")
    return ordered


def _recalled(
    text: bytes,
    iteration: TrainingIteration,
    optimizer: Mapping[str, torch.Tensor],
    memory: Mapping[str, torch.Tensor],
) -> TrainState:
    content = CONVERTER.loads(text.decode(), _Remembered)
    trees = {name: decode(getattr(content, name), optimizer if name == "opt_state" else memory) for name in _TREES}
    flat = [name for name, tree in trees.items() if not isinstance(tree, Mapping)]
    if flat:
        raise ValueError(f"{', '.join(flat)} has to be a mapping")
    metrics = {key: Measured(value, TrainingIteration.parse(at)) for key, (value, at) in trees["metrics"].items()}
    state = TrainState(
        iteration=content.iteration,
        previous=content.previous,
        stop=content.stop,
        ended=content.ended,
        seed=content.seed,
        **{**trees, "metrics": metrics},
    )
    # Numbers that were text, keys that were given twice, what no encoder makes: all that is not read as it is written.
    if b"".join(_remembered(state)[STATE]) != text:
        raise ValueError("its content is not what was written")
    if state.iteration != iteration:
        raise ValueError(f"it is of {state.iteration}, in a checkpoint of {iteration}")
    if abs(state.seed) > _LARGEST:
        raise ValueError("its seed is larger than a seed can be")
    return state
