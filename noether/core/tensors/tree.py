"""Trees are values: mappings that cannot be written to, and pure functions over nested mappings and tuples."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, Never

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SCALARS: Final = (str, int, float, bool, type(None))
_LIST: Final = "__list__"
_LEAVES: Final = frozenset({*SCALARS, torch.Tensor})


class FrozenDict(dict[str, Any]):
    """A dict that is never written to after it is made; `|` returns a new one.

    It is a dict, so whatever reads dicts (`torch.func.functional_call`, `json`, `==`) reads it as fast as one.

    Example:
        >>> params = FrozenDict(weight=1)
        >>> params | {"bias": 2}
        FrozenDict({'weight': 1, 'bias': 2})
        >>> params["weight"] = 3
        Traceback (most recent call last):
        TypeError: a state is never written to: make a new one, e.g. state.replace(params=state.params | {...})
    """

    __slots__ = ()

    def _refuse(self, *_: object, **__: object) -> Never:
        raise TypeError("a state is never written to: make a new one, e.g. state.replace(params=state.params | {...})")

    __setitem__ = __delitem__ = clear = pop = popitem = setdefault = update = __ior__ = _refuse

    def __or__(self, other: Mapping[str, Any]) -> FrozenDict:  # type: ignore[override]  # dict's own returns a dict
        return FrozenDict({**self, **other})

    def __hash__(self) -> int:  # type: ignore[override]  # dict has none; equal dicts have equal keys
        return hash(frozenset(self))

    def __repr__(self) -> str:
        return f"FrozenDict({super().__repr__()})"

    def __reduce__(self) -> tuple[type[FrozenDict], tuple[dict[str, Any]]]:
        return FrozenDict, (dict(self),)


def freeze(tree: Any) -> Any:  # any leaf is passed on
    """Return `tree` with its mappings frozen and its lists as tuples; the same object if nothing had to change.

    Example:
        >>> freeze({"a": [1, {"b": 2}]})
        FrozenDict({'a': (1, FrozenDict({'b': 2}))})
    """
    if type(tree) in _LEAVES:  # most of what there is; to ask whether it is a mapping takes longer
        return tree
    if isinstance(tree, (dict, Mapping)):  # a dict is a Mapping, and faster to tell
        if getattr(tree, "is_value", False):
            return tree
        # Most memories are flat. What has to change is not copied before it is found: each update freezes several.
        flat = _LEAVES.issuperset(map(type, tree.values()))
        changed = {} if flat else {key: new for key, old in tree.items() if (new := freeze(old)) is not old}
        return tree if not changed and isinstance(tree, FrozenDict) else FrozenDict({**tree, **changed})
    if isinstance(tree, (list, tuple)):
        items = tuple(freeze(value) for value in tree)
        same = type(tree) is tuple and all(new is old for new, old in zip(items, tree, strict=True))
        return tree if same else items
    return tree


def leaves(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield `(path, leaf)` for every leaf of nested mappings and tuples, in order.

    Example:
        >>> list(leaves({"a": (1, 2), "b": {"c": 3}}))
        [(('a', '0'), 1), (('a', '1'), 2), (('b', 'c'), 3)]
    """
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from leaves(value, (*path, str(key)))
    elif isinstance(tree, (list, tuple)):
        for index, value in enumerate(tree):
            yield from leaves(value, (*path, str(index)))
    else:
        yield path, tree


def tensors(tree: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield `(dotted path, tensor)` for every tensor in `tree`."""
    return ((".".join(path), leaf) for path, leaf in leaves(tree) if isinstance(leaf, torch.Tensor))


def map_leaves(function: Callable[[Any], Any], tree: Any) -> Any:
    """Return `tree` with `function` applied to every leaf.

    Example:
        >>> map_leaves(lambda x: x + 1, {"a": (1, 2)})
        FrozenDict({'a': (2, 3)})
    """
    if type(tree) in _LEAVES:
        return function(tree)
    if isinstance(tree, Mapping):
        return FrozenDict({key: map_leaves(function, value) for key, value in tree.items()})
    if isinstance(tree, (list, tuple)):
        return tuple(map_leaves(function, value) for value in tree)
    return function(tree)


def clone_tensors(tree: Any) -> Any:
    """Return `tree` with every tensor cloned.

    Example:
        >>> weights = {"w": torch.zeros(1)}
        >>> storages(clone_tensors(weights)) & storages(weights)
        set()
    """
    return map_leaves(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, tree)


def move_to_device(device: torch.device, tree: Any) -> Any:
    """Return `tree` with every tensor on `device`.

    Example:
        >>> move_to_device(torch.device("meta"), {"w": torch.zeros(1), "n": 3})["w"].device
        device(type='meta')
    """
    return map_leaves(lambda leaf: leaf.to(device) if isinstance(leaf, torch.Tensor) else leaf, tree)


def map_tensors(function: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:
    """Return a user's batch or outputs with `function` applied to every tensor, every container of the type it has.

    Looked into are mappings, lists, tuples, named tuples and dataclasses; anything else is handed on as it is.

    Example:
        >>> map_tensors(lambda tensor: tensor + 1, [torch.tensor(1), {"name": "x"}])
        [tensor(2), {'name': 'x'}]
    """
    if isinstance(value, torch.Tensor):
        return function(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        held = {each.name: getattr(value, each.name) for each in dataclasses.fields(value) if each.init}
        return dataclasses.replace(value, **{name: map_tensors(function, item) for name, item in held.items()})
    if isinstance(value, Mapping):
        items = {key: map_tensors(function, item) for key, item in value.items()}
        return items if type(value) is dict else type(value)(items)  # type: ignore[call-arg]  # as mappings are made
    if isinstance(value, tuple) and hasattr(value, "_make"):
        return value._make(map_tensors(function, item) for item in value)
    if isinstance(value, (list, tuple)):
        return type(value)(map_tensors(function, item) for item in value)
    return value


def storages(tree: Any) -> set[int]:
    """Return the addresses of the memory that the tensors of `tree` live in; those that hold nothing have none."""
    held = (tensor for _, tensor in tensors(tree) if tensor.numel() and not tensor.is_meta)
    return {tensor.untyped_storage().data_ptr() for tensor in held}


def check_memory(name: str, memory: Any) -> None:
    """Refuse memory that could not be written to disk and read back as it is.

    Raises:
        TypeError: If a leaf is no JSON scalar or tensor, or a key is no string.

    Example:
        >>> check_memory("ema", {"decay": {1, 2}})
        Traceback (most recent call last):
        TypeError: memory 'ema': decay is a set; memory is made of str, int, float, bool, None, tensors, ...
    """
    _check_keys(name, memory)
    for path, leaf in leaves(memory):
        if not isinstance(leaf, (*SCALARS, torch.Tensor)):
            where = ".".join(path) or "it"
            allowed = "str, int, float, bool, None, tensors, tuples and dicts"
            raise TypeError(f"memory {name!r}: {where} is a {type(leaf).__name__}; memory is made of {allowed}")


def _check_keys(name: str, tree: Any) -> None:
    for key in tree if isinstance(tree, Mapping) else ():
        if not isinstance(key, str):
            raise TypeError(f"memory {name!r}: the key {key!r} is a {type(key).__name__}; keys are str")
    if isinstance(tree, (Mapping, list, tuple)):
        for part in tree.values() if isinstance(tree, Mapping) else tree:
            _check_keys(name, part)


def pack(where: str, value: Any) -> Any:
    """Return `value` as a tree that can be in a state; a list becomes `{"__list__": (...)}`, for states hold tuples.

    Args:
        where: Whose memory it is, for the message.
        value: Nested dicts, lists and tuples of JSON scalars and tensors; tensors are not copied.

    Raises:
        TypeError: If something in it cannot be written to a checkpoint.

    Example:
        >>> pack("the sampler", {"order": [2, 0, 1]})
        {'order': {'__list__': (2, 0, 1)}}
    """
    if isinstance(value, (torch.Tensor, *SCALARS)):
        return value
    if isinstance(value, list):
        return {_LIST: pack(where, tuple(value))}
    if isinstance(value, tuple):
        return tuple(pack(f"{where}.{index}", item) for index, item in enumerate(value))
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: pack(f"{where}.{key}", item) for key, item in value.items()}
    kind = "dict with keys that are not text" if isinstance(value, Mapping) else type(value).__name__
    raise TypeError(f"{where} is a {kind}, which no checkpoint can hold")


def unpack(value: Any) -> Any:
    """Return a copy of a packed `value` that may be written to: tensors cloned, dicts and lists new.

    Example:
        >>> unpack({"order": {"__list__": (2, 0, 1)}})
        {'order': [2, 0, 1]}
    """
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, tuple):
        return tuple(unpack(item) for item in value)
    if isinstance(value, Mapping):
        return list(unpack(value[_LIST])) if _LIST in value else {key: unpack(item) for key, item in value.items()}
    return value
