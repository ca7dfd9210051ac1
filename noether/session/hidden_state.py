"""State that a loader holds outside of checkpoints: generators to seed, and values that an epoch changes."""

from __future__ import annotations

import functools
import hashlib
import io
import itertools
import random
import types
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from noether.session.randomness import GENERATORS

if TYPE_CHECKING:
    from collections.abc import Iterator

LINKS: Final = ("dataset", "datasets", "sampler", "batch_sampler", "transform")
"""Attributes by which loaders, samplers and datasets hold their parts."""

_MAX_OBJECTS: Final = 2000
_MAX_DEPTH: Final = 8
_MAX_ITEMS: Final = 100  # of a container, in which objects are looked for
_MAX_LENGTH: Final = 200_000  # of a list of numbers
_MAX_BYTES: Final = 1_000_000  # of a tensor or array
_MAX_TOTAL_BYTES: Final = 64_000_000  # of all that is digested
_LEAVES: Final = (int, float, str, bytes)
_OPAQUE: Final = (type, types.ModuleType, io.IOBase, nn.Parameter, torch.device, torch.dtype)
_LIBRARIES: Final = ("torch", "numpy", "multiprocessing", "threading", "builtins", "functools", "abc")


@dataclass(frozen=True)
class _Found:
    """An object that a loader holds.

    Args:
        path: How it is reached, such as `Augmented.transform.rng`.
        value: The object.
        is_compared: Whether a change of it over an epoch is hidden state.
    """

    path: str
    value: Any
    is_compared: bool


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
    return [found.value for found in _walk(loader) if isinstance(found.value, GENERATORS) and _is_seedable(found.value)]


def unseedable(loader: Any) -> dict[str, str]:
    """Return the type of each generator that cannot be seeded and each iterator that a loader holds, by path."""
    return {
        found.path: type(found.value).__name__
        for found in _walk(loader)
        if found.value is not loader
        and (not _is_seedable(found.value) if isinstance(found.value, GENERATORS) else _is_bare_iterator(found.value))
    }


def hidden_state(loader: Any) -> dict[str, Any]:
    """Return a value or digest of the state that the samplers and the dataset of a loader hold, by path.

    If it differs at the same place of two epochs, the batches may depend on state that no checkpoint has. Objects with
    `set_epoch` are left out, since the loop sets their epoch; so are large containers, and modules, whose weights
    checkpoints hold.
    """
    digests: dict[str, Any] = {}
    left = _MAX_TOTAL_BYTES
    for path, value in ((found.path, found.value) for found in _walk(loader) if found.is_compared):
        left -= 8 * len(value) if isinstance(value, (list, tuple, set, frozenset)) else getattr(value, "nbytes", 8)
        if left < 0:
            break
        if (digest := _digest(value)) is not None:
            same_name = sum(name.split("#")[0] == path for name in digests) if path in digests else 0
            digests[f"{path}#{same_name + 1}" if same_name else path] = digest
    return digests


def _walk(loader: Any) -> Iterator[_Found]:
    """Yield what a loader holds, nearest first."""
    is_list = isinstance(loader, (list, tuple))
    queue = [(_Found(type(loader).__name__, loader, is_compared=not is_list), 0)]
    seen: set[int] = set()
    for found, depth in queue:  # grows while it is read
        # Equal numbers and texts are one object, which several attributes may hold.
        if len(queue) > _MAX_OBJECTS or (id(found.value) in seen and not isinstance(found.value, _LEAVES)):
            continue
        seen.add(id(found.value))
        yield found
        if depth < _MAX_DEPTH and not isinstance(found.value, (*_LEAVES, *_OPAQUE, *GENERATORS, Tensor, np.ndarray)):
            queue += [(inner, depth + 1) for inner in _parts_of(found)]


def _parts_of(found: _Found) -> Iterator[_Found]:
    value, path, kind = found.value, found.path, type(found.value)
    if isinstance(value, dict):
        for key, item in list(itertools.islice(dict.items(value), _MAX_ITEMS)):
            yield _Found(f"{path}[{key!r}]", item, found.is_compared)
    elif isinstance(value, (list, tuple)):
        items = list.__iter__(value) if isinstance(value, list) else tuple.__iter__(value)
        for index, item in enumerate(itertools.islice(items, _MAX_ITEMS)):
            if not isinstance(item, _LEAVES):  # numbers and texts are compared as one digest
                yield _Found(f"{path}[{index}]", item, found.is_compared)
    elif isinstance(value, (types.FunctionType, types.MethodType, functools.partial)):
        yield from _parts_of_function(found)
    library = _library_of(kind)
    if library == "torch":
        yield from _parts_of_torch_object(found)
    elif library is None:
        yield from _class_generators(kind)
        has_epoch = hasattr(kind, "set_epoch")
        for name, attribute in _attributes(value):
            is_compared = name in LINKS or (found.is_compared and not has_epoch)
            yield _Found(f"{kind.__name__}.{name}", attribute, is_compared)


def _parts_of_torch_object(found: _Found) -> Iterator[_Found]:
    """Yield what an object of torch holds; its numbers and tensors do not depend on the epoch."""
    kind = type(found.value)
    for name, attribute in _attributes(found.value):
        if name != "_iterator":  # of a DataLoader that keeps its workers alive
            is_fixed = isinstance(attribute, (*_LEAVES, Tensor, dict)) or name in {"indices", "tensors"}
            is_compared = found.is_compared and not is_fixed and not isinstance(found.value, nn.Module)
            yield _Found(f"{kind.__name__}.{name}", attribute, is_compared)


def _library_of(kind: type) -> str | None:
    """Return the library that defines a type, if it is one whose objects are known."""
    library = kind.__module__.split(".")[0]
    return library if library in _LIBRARIES else None


def _attributes(value: Any) -> Iterator[tuple[str, Any]]:
    yield from list(getattr(value, "__dict__", {}).items())
    for kind in type(value).__mro__:
        for name, member in vars(kind).items() if "__slots__" in vars(kind) else ():
            if isinstance(member, types.MemberDescriptorType):
                try:
                    yield name, member.__get__(value)
                except AttributeError:  # a slot that is not set
                    continue


def _parts_of_function(found: _Found) -> Iterator[_Found]:
    function, path = found.value, found.path
    if isinstance(function, functools.partial):
        held = [function.func, *function.args, *function.keywords.values()]
        yield from (_Found(f"{path}.partial[{index}]", each, found.is_compared) for index, each in enumerate(held))
    elif isinstance(function, types.MethodType):
        yield _Found(f"{path}.__self__", function.__self__, found.is_compared)
    else:
        names = function.__code__.co_freevars
        for name, cell in zip(names, function.__closure__ or (), strict=True):
            try:
                yield _Found(f"{path}.{name}", cell.cell_contents, found.is_compared)
            except ValueError:  # a cell that is not filled
                continue
        yield from _global_generators(function)


def _class_generators(kind: type) -> Iterator[_Found]:
    """Yield the generators that are attributes of a class, or global names that its methods use."""
    for base in kind.__mro__:
        if _library_of(base) is not None:
            continue
        for name, value in list(vars(base).items()):
            if isinstance(value, GENERATORS):
                yield _Found(f"{base.__name__}.{name}", value, is_compared=False)
            elif isinstance(value, types.FunctionType):
                yield from _global_generators(value)


def _global_generators(function: types.FunctionType) -> Iterator[_Found]:
    for name in function.__code__.co_names:
        value = function.__globals__.get(name)
        if isinstance(value, GENERATORS):
            yield _Found(name, value, is_compared=False)


def _is_seedable(generator: Any) -> bool:
    if isinstance(generator, random.SystemRandom):
        return False
    return not isinstance(generator, np.random.Generator) or _library_of(type(generator.bit_generator)) == "numpy"


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
    if len(items) > _MAX_LENGTH or not all(isinstance(item, _LEAVES) for item in items):
        return None
    return len(items), hash(frozenset(items) if isinstance(items, (set, frozenset)) else tuple(items))


def _digest_of_array(array: Any) -> Any:
    return array.shape, hashlib.blake2b(np.ascontiguousarray(array).tobytes(), digest_size=16).digest()
