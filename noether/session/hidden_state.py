"""State that a loader holds outside of checkpoints: generators to seed, and values that an epoch changes."""

from __future__ import annotations

import hashlib
import random
from typing import TYPE_CHECKING, Any, Final, final

import numpy as np
import torch
from torch import Tensor, nn

from noether.core.object_graph import LEAVES, library_of, walk, walk_model
from noether.core.tensors.module import named_modules
from noether.session.randomness import GENERATORS

if TYPE_CHECKING:
    from collections.abc import Iterable

_MAX_LENGTH: Final = 200_000  # of a list of numbers
_MAX_BYTES: Final = 1_000_000  # of a tensor or array
_MAX_TOTAL_BYTES: Final = 64_000_000  # of all that is digested


def generators_of(loader: Any) -> list[Any]:
    """Return the generators that a loader, its samplers and its dataset hold at any depth, each once.

    It looks into attributes, slots, containers, classes, and the closures and global names of functions; in a bounded
    number of objects.

    Example:
        >>> class Noise:
        ...     def __init__(self):
        ...         self.sources = [random.Random(0)]
        >>> class Batches(list):
        ...     pass
        >>> loader = Batches([1, 2])
        >>> loader.transform = Noise()
        >>> len(generators_of(loader))
        1
    """
    return [
        found.value
        for found in walk(loader, GENERATORS)
        if isinstance(found.value, GENERATORS) and _is_seedable(found.value)
    ]


def generators_of_model(model: nn.Module, *functions: Any) -> list[Any]:
    """Return the generators that the modules of a model, and functions such as a loss, hold at any depth, each once.

    Example:
        >>> class Noisy(nn.Linear):
        ...     def __init__(self):
        ...         super().__init__(2, 1)
        ...         self.rng = np.random.default_rng(0)
        >>> len(generators_of_model(nn.Sequential(Noisy(), Noisy())))
        2
    """
    modules = set(map(id, model.modules()))
    held = [found.value for _, found in walk_model(model, GENERATORS)]
    held += [found.value for function in functions for found in walk(function, GENERATORS, modules)]
    generators = {id(value): value for value in held if isinstance(value, GENERATORS) and _is_seedable(value)}
    return list(generators.values())


def find_unseedable(loader: Any) -> dict[str, str]:
    """Return the type of each generator that cannot be seeded and each iterator that a loader holds, by path."""
    return {
        found.path: type(found.value).__name__
        for found in walk(loader, GENERATORS)
        if found.value is not loader
        and (not _is_seedable(found.value) if isinstance(found.value, GENERATORS) else _is_bare_iterator(found.value))
    }


def hidden_state(loader: Any) -> dict[str, Any]:
    """Return a value or digest of the state that the samplers and the dataset of a loader hold, by path.

    If it differs at the same place of two epochs, the batches may depend on state that no checkpoint has. Objects with
    `set_epoch` are left out, since the loop sets their epoch; so are large containers, and modules, whose weights
    checkpoints hold.
    """
    return _digests((found.path, found.value) for found in walk(loader, GENERATORS) if found.is_compared)


def _digests(values: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Return a value or digest of each of some values by name; of those with the same name, by name and number."""
    digests: dict[str, Any] = {}
    left = _MAX_TOTAL_BYTES
    for path, value in values:
        left -= 8 * len(value) if isinstance(value, (list, tuple, set, frozenset)) else getattr(value, "nbytes", 8)
        if left < 0:
            break
        if (digest := _digest(value)) is not None:
            same_name = sum(name.split("#")[0] == path for name in digests) if path in digests else 0
            digests[f"{path}#{same_name + 1}" if same_name else path] = digest
    return digests


@final
class ModelWatch:
    """Finds the attributes of a model that change from update to update, and that no checkpoint has.

    The first update may fill caches, so the state after it is compared with that after the second.

    Args:
        model: The model.

    Example:
        >>> class Counting(nn.Linear):
        ...     calls = 0
        ...     def forward(self, x):
        ...         self.calls += 1
        ...         return super().forward(x)
        >>> model = Counting(2, 1)
        >>> watch = ModelWatch(model)
        >>> for _ in range(2):
        ...     _ = model(torch.ones(2))
        ...     message = watch.describe_changes()
        >>> message.partition(", ")[0]
        'an update changed calls of the model'
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._paths = {path for path, _ in named_modules(model)}
        self._before: dict[str, Any] | None = None
        self.is_done = False
        """Whether it looked at the first two updates."""

    def describe_changes(self) -> str | None:
        """Return what is wrong after the second update of this process, and what to write instead; else None."""
        if self.is_done:
            return None
        before, self._before = self._before, self._state()
        if before is None:
            return None
        self.is_done = True
        made = [
            f"{path} ({type(each).__name__})" for path, each in named_modules(self._model) if path not in self._paths
        ]
        if made:
            return (
                f"the first updates made {', '.join(made)} in the model: its parameters are not trained unless the "
                "optimizer got them, and a resumed run does not have it; make it in the constructor"
            )
        changed = [name.split(" ")[0] for name, now in self._before.items() if before.get(name, now) != now]
        if not changed:
            return None
        return (
            f"an update changed {', '.join(dict.fromkeys(changed))} of the model, which no checkpoint has: if forward "
            "reads it, a resumed run computes something else; make it a buffer with register_buffer, or save it with "
            "get_extra_state and set_extra_state"
        )

    def _state(self) -> dict[str, Any]:
        return _digests(
            (attribute if attribute == found.path else f"{attribute} {found.path}", found.value)
            for attribute, found in walk_model(self._model, GENERATORS)
            if found.is_compared and attribute.rpartition(".")[2] != "training" and not _has_graph(found.value)
        )


def _has_graph(value: Any) -> bool:
    """Return whether a value is a result of the last forward pass, which the next one cannot use."""
    return isinstance(value, Tensor) and value.grad_fn is not None


def _is_seedable(generator: Any) -> bool:
    if isinstance(generator, random.SystemRandom):
        return False
    return not isinstance(generator, np.random.Generator) or library_of(type(generator.bit_generator)) == "numpy"


def _is_bare_iterator(value: Any) -> bool:
    """Return whether a value is an iterator whose position cannot be read, such as a Python generator."""
    return hasattr(type(value), "__next__") and type(value).__module__ in {"builtins", "itertools", "_csv"}


def _digest(value: Any) -> Any:
    """Return a value that differs if `value` changed; None if it is not compared."""
    if isinstance(value, (int, str, bytes)):
        return value
    if isinstance(value, float):
        return repr(value)  # NaN is equal to itself
    if isinstance(value, (list, tuple, set, frozenset)):
        return _digest_of_items(value)
    if type(value) is Tensor:
        is_plain = value.device.type == "cpu" and value.layout is torch.strided and not value.is_quantized
        if not is_plain or value.numel() * value.element_size() > _MAX_BYTES:
            return None
        return _digest_of_array(value.detach().resolve_conj().resolve_neg().reshape(-1).view(torch.uint8).numpy())
    if isinstance(value, np.ndarray) and not value.dtype.hasobject and value.nbytes <= _MAX_BYTES:
        return _digest_of_array(value)
    return None


def _digest_of_items(items: Any) -> Any:
    """Return a digest of a container of numbers and texts; other objects may be a cache that fills."""
    if len(items) > _MAX_LENGTH or not all(isinstance(item, LEAVES) for item in items):
        return None
    return len(items), hash(frozenset(items) if isinstance(items, (set, frozenset)) else tuple(items))


def _digest_of_array(array: Any) -> Any:
    return array.shape, hashlib.blake2b(np.ascontiguousarray(array).tobytes(), digest_size=16).digest()
