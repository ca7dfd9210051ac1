"""A state as a pytree: its tensors are the leaves; its counts, numbers and texts belong to the structure.

So a transform of `torch.func` sees nothing but tensors, and an iteration is the same number inside of it as outside.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from noether.core.iteration import TrainingIteration
from noether.core.tensors.pytrees import Flat, register_pytree
from noether.core.tensors.tree import SCALARS, FrozenDict

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    Structure = tuple[str, FrozenDict]  # name of a builder; for each key a scalar, `_LEAF` or `_TREE`

_LEAF: Final = ("leaf",)
_TREE: Final = ("tree",)
_STRUCTURAL: Final = frozenset({*SCALARS, TrainingIteration})
_WEIGHTS: Final = ("params", "buffers")


class StateTree:
    """A part of a state other than its params and buffers; its scalars belong to the structure.

    It takes the place of the part in a pytree, where all values of a FrozenDict would be leaves.
    """

    __slots__ = ("tree",)

    def __init__(self, tree: Any) -> None:
        self.tree = tree


class Leaf(NamedTuple):
    """A leaf in a part of a state that would be structure: a function, or a transform, put it where a tensor was.

    Args:
        value: The leaf itself.
    """

    value: Any


def register_state(state_type: type[Any], *tuple_types: type[Any]) -> None:
    """Register a dataclass as the pytree of a state.

    Args:
        state_type: The dataclass.
        tuple_types: The classes of named tuples that a state contains.
    """
    names = tuple(field.name for field in dataclasses.fields(state_type))

    def build_state(entries: dict[Any, Any]) -> Any:
        state = object.__new__(state_type)
        vars(state).update(entries)
        return state

    builders: dict[str, Callable[[dict[Any, Any]], Any]] = {
        "state": build_state,
        "dict": FrozenDict,
        "tuple": lambda entries: tuple(entries.values()),
        **{each.__name__: _tuple_builder(each) for each in tuple_types},
    }

    def flatten_state(state: Any) -> Flat:
        entries = {name: getattr(state, name) for name in names}
        weights = {name: FrozenDict(entries[name]) for name in _WEIGHTS if isinstance(entries[name], Mapping)}
        return _flatten_entries("state", entries, weights)

    def flatten_tree(wrapper: StateTree) -> Flat:
        tree = wrapper.tree
        if isinstance(tree, Mapping):
            return _flatten_entries("dict", dict(tree))
        kind = type(tree).__name__
        return _flatten_entries(kind if kind in builders else "tuple", dict(enumerate(tree)))

    def unflatten(structure: Structure, children: Iterable[Any]) -> Any:
        kind, entries = structure
        values = dict(zip(_child_keys(structure), children, strict=True))
        leaves = {key: Leaf(value) for key, value in values.items() if entries[key] == _LEAF and not _is_leaf(value)}
        return builders[kind]({**entries, **values, **leaves})

    register_pytree(state_type, flatten_state, unflatten, dump=_dump, load=_load, has_fields=True)
    register_pytree(StateTree, flatten_tree, unflatten, dump=_dump, load=_load)


def _tuple_builder(tuple_type: type[Any]) -> Callable[[dict[Any, Any]], Any]:
    return lambda entries: tuple_type(*entries.values())


def _flatten_entries(kind: str, entries: dict[Any, Any], weights: Mapping[str, Any] = FrozenDict()) -> Flat:
    """Flatten a container; the values of `weights` are children as they are, as all their values are leaves."""
    structure = (
        kind,
        FrozenDict({key: _LEAF if _is_leaf(value) else _describe(value) for key, value in entries.items()}),
    )
    keys = _child_keys(structure)
    return Flat([weights[key] if key in weights else _child(entries[key]) for key in keys], structure, keys)


def _is_leaf(value: Any) -> bool:
    return type(value) not in _STRUCTURAL and not isinstance(value, (Mapping, tuple, list))


def _describe(value: Any) -> Any:
    """Return what the structure has in place of a value that `_is_leaf` is not true of."""
    if type(value) in _STRUCTURAL:
        return math.nan if value != value else value  # noqa: PLR0124  # one object for every NaN, as NaN differs from itself
    return _LEAF if type(value) is Leaf else _TREE


def _child(value: Any) -> Any:
    if type(value) is Leaf:
        return value.value
    return value if _is_leaf(value) else StateTree(value)


def _child_keys(structure: Structure) -> Sequence[Any]:
    """Return the keys of the children, in a dict sorted: states that are equal have the same structure."""
    kind, entries = structure
    keys = [key for key, value in entries.items() if type(value) is tuple]
    return sorted(keys) if kind == "dict" else keys


def _dump(structure: Structure) -> Any:
    kind, entries = structure
    return [kind, [[key, *_dump_value(value)] for key, value in entries.items()]]


def _dump_value(value: Any) -> tuple[str, Any]:
    if type(value) is tuple:
        return value[0], None
    return ("iteration", str(value)) if isinstance(value, TrainingIteration) else ("scalar", value)


_LOADERS: Final[dict[str, Callable[[Any], Any]]] = {
    "leaf": lambda _: _LEAF,
    "tree": lambda _: _TREE,
    "iteration": TrainingIteration.parse,
    "scalar": _describe,
}


def _load(dumped: Any) -> Structure:
    kind, entries = dumped
    return kind, FrozenDict({key: _LOADERS[name](value) for key, name, value in entries})
