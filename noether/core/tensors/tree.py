"""Immutable trees: frozen mappings, and pure functions on nested mappings, tuples and lists."""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, Never

import torch

from noether.core.tensors.dtensors import is_distributed, local_part, place_like
from noether.core.tensors.pytrees import register_mapping

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SCALARS: Final = (str, int, float, bool, type(None))
_LIST: Final = "__list__"
LEAVES: Final = frozenset({*SCALARS, torch.Tensor})
MAX_LEVELS: Final = 100
"""How deep a tree may be nested: far less than Python's recursion limit, as other code recurses through it, too."""


class FrozenDict(dict[str, Any]):
    """An immutable dict; `|` returns a new one.

    It is a dict, so code that reads dicts (`json`, `==`) reads it at full speed. It is a pytree like dict, so
    `torch.func`, `torch.compile` and `tree_map` take it as it is; what they return in its place is frozen, too.

    Example:
        >>> params = FrozenDict(weight=1)
        >>> params | {"bias": 2}
        FrozenDict({'weight': 1, 'bias': 2})
        >>> params["weight"] = 3
        Traceback (most recent call last):
        TypeError: a state is never written to: make a new one, e.g. state.replace(params=state.params | {...})

        The gradient of the loss with respect to all parameters, by name:

        >>> from torch.func import functional_call, grad
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> params, batch = FrozenDict(weight=torch.tensor([[1.0, 2.0]])), torch.ones(1, 2)
        >>> grad(lambda params: functional_call(model, params, batch).square().sum())(params)
        FrozenDict({'weight': tensor([[6., 6.]])})
    """

    __slots__ = ()

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        register_mapping(cls, cls.from_entries)

    @classmethod
    def from_entries(cls, entries: dict[str, Any]) -> FrozenDict:
        """Return what takes the place of such a mapping in a pytree with other leaves."""
        return FrozenDict(entries)

    def _refuse(self, *_: object, **__: object) -> Never:
        raise TypeError("a state is never written to: make a new one, e.g. state.replace(params=state.params | {...})")

    __setitem__ = __delitem__ = clear = pop = popitem = setdefault = __ior__ = _refuse

    def update(self, *entries: Any, **more: Any) -> None:
        """Do nothing if every entry is here already, as `functional_call` writes back what it got; else raise.

        Raises:
            TypeError: If an entry is not the one that is here, such as a buffer that a module assigned.
        """
        for key, value in dict(*entries, **more).items():
            if key not in self or not _is_same(self[key], value):
                self._refuse()

    def __or__(self, other: Mapping[str, Any]) -> FrozenDict:  # type: ignore[override]  # dict returns a dict
        return FrozenDict({**self, **other})

    def __hash__(self) -> int:  # type: ignore[override]  # dict has none; equal dicts have equal keys
        return hash(frozenset(self))

    def __repr__(self) -> str:
        return f"FrozenDict({super().__repr__()})"

    def __reduce__(self) -> tuple[type[FrozenDict], tuple[dict[str, Any]]]:
        return FrozenDict, (dict(self),)


class FrozenView(FrozenDict):
    """The base of immutable mappings that read their entries elsewhere, at each access.

    It is a dict, because `torch.func.functional_call` takes nothing else, and a pytree, in which a FrozenDict takes its
    place. The dict itself is empty: subclasses define `__getitem__`, `__iter__` and `__len__`, and may define `items`,
    `values` and `get` where these can be faster.

    Example:
        >>> class Live(FrozenView):
        ...     def __init__(self, entries):
        ...         self.entries = entries
        ...     def __getitem__(self, key):
        ...         return self.entries[key]
        ...     def __iter__(self):
        ...         return iter(self.entries)
        ...     def __len__(self):
        ...         return len(self.entries)
        >>> entries = {"weight": 1}
        >>> live = Live(entries)
        >>> entries["weight"] = 2
        >>> live, live == {"weight": 2}
        (Live({'weight': 2}), True)
    """

    __slots__ = ()

    if not TYPE_CHECKING:  # a type checker takes the signatures of dict
        get, keys, items, values = Mapping.get, Mapping.keys, Mapping.items, Mapping.values
        __contains__, __eq__ = Mapping.__contains__, Mapping.__eq__

    def copy(self) -> dict[str, Any]:
        """Return the entries as a dict."""
        return dict(self)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = FrozenDict.__hash__

    def __reversed__(self) -> Iterator[str]:
        return reversed(tuple(self))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({dict(self)})"


register_mapping(FrozenDict, FrozenDict.from_entries)


def _is_same(entry: Any, value: Any) -> bool:
    """Return whether `value` is `entry` itself or, as views are new at each access, a tensor of the same memory."""
    if entry is value or torch.compiler.is_compiling():  # a graph has no memory to compare
        return entry is value or isinstance(value, torch.Tensor)
    try:
        if not isinstance(entry, torch.Tensor) or not isinstance(value, torch.Tensor):
            return False
        return local_part(entry).is_set_to(local_part(value))
    except NotImplementedError:  # torch cannot compare sparse and meta tensors
        return True


def freeze(tree: Any) -> Any:
    """Return `tree` with mappings frozen and lists as tuples; the same object if nothing changes.

    Example:
        >>> freeze({"a": [1, {"b": 2}]})
        FrozenDict({'a': (1, FrozenDict({'b': 2}))})
    """
    if type(tree) in LEAVES:  # most values; testing for a Mapping takes longer
        return tree
    if isinstance(tree, (dict, Mapping)):  # testing for a dict is faster
        if getattr(tree, "is_value", False):
            return tree
        # Fast path, as each update freezes several memories: most are flat, and only changed entries are copied.
        flat = LEAVES.issuperset(map(type, tree.values()))
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
    if type(tree) in LEAVES:
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


def storages(tree: Any) -> set[int]:
    """Return the addresses of the storages of the tensors in `tree`.

    Tensors without one are left out: empty, meta and sparse ones, and those inside of a transform of `torch.func`. Of a
    DTensor it is the storage of the part of this rank.
    """
    parts = (local_part(tensor) for _, tensor in tensors(tree))
    allocated = (tensor for tensor in parts if tensor.numel() and not tensor.is_meta)
    addresses: set[int] = set()
    for tensor in allocated:
        with suppress(NotImplementedError):
            addresses.add(tensor.untyped_storage().data_ptr())
    return addresses


def have_same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Return whether two tensors have one shape and dtype, and the same bits; a NaN equals one with the same bits.

    Example:
        >>> zero = torch.tensor(0.0)
        >>> have_same_bits(zero, torch.tensor(0.0)), have_same_bits(zero, torch.tensor(-0.0))
        (True, False)
    """
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if is_distributed(a) or is_distributed(b):
        a, b = local_part(a), local_part(place_like(b, a))
    bits = [tensor.detach().resolve_conj().resolve_neg().reshape(-1).view(torch.uint8) for tensor in (a, b)]
    return torch.equal(*bits)


def plain_number(value: Any) -> Any:
    """Return a number of another type, such as numpy's, as an int or a float of equal value; anything else unchanged.

    Example:
        >>> import numpy
        >>> plain_number(numpy.float64(0.5)), plain_number("text")
        (0.5, 'text')
    """
    if type(value) in LEAVES or not isinstance(value, numbers.Real):
        return value
    plain = int(value) if isinstance(value, numbers.Integral) else float(value)
    return plain if plain == value or plain != plain else value  # noqa: PLR0124  # NaN differs from itself


def pack(where: str, value: Any) -> Any:
    """Return `value` as a tree for a state; a list becomes `{"__list__": (...)}`, as states contain tuples only.

    Args:
        where: Name of the owner, for the message.
        value: Nested dicts, lists and tuples of JSON scalars and tensors; the tensors are not copied.

    Raises:
        TypeError: If a checkpoint cannot contain a value in it.

    Example:
        >>> pack("the sampler", {"order": [2, 0, 1]})
        {'order': {'__list__': (2, 0, 1)}}
    """
    value = plain_number(value)
    if type(value) in LEAVES or isinstance(value, torch.Tensor):
        return value
    if isinstance(value, list):
        return {_LIST: pack(where, tuple(value))}
    if isinstance(value, tuple):
        return tuple(pack(f"{where}.{index}", item) for index, item in enumerate(value))
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: pack(f"{where}.{key}", item) for key, item in value.items()}
    kind = "dict with keys that are not text" if isinstance(value, Mapping) else type(value).__name__
    raise TypeError(f"{where} is a {kind}, which a checkpoint cannot contain")


def unpack(value: Any) -> Any:
    """Return a writable copy of a packed `value`: tensors cloned, dicts and lists new.

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
