"""Applies a function to the tensors in batches and outputs; their containers keep type, entries and attributes."""

from __future__ import annotations

import operator
from collections import OrderedDict, UserList, defaultdict, deque
from collections.abc import Iterator, Mapping
from enum import Enum
from types import BuiltinFunctionType, MappingProxyType, MemberDescriptorType, SimpleNamespace
from typing import TYPE_CHECKING, Any, Final

import torch
from torch.nn import Module
from torch.nn.utils.rnn import PackedSequence

from noether.core.tensors.pytrees import find_pytree_rule

if TYPE_CHECKING:
    from collections.abc import Callable

    Copies = dict[int, tuple[Any, Any]]
    """By id, each object that was seen and what takes its place; holding the object keeps its id from another."""

_SCALARS: Final = frozenset({str, bytes, int, float, bool, complex, type(None), torch.Size})
_COPIED: Final = (Mapping, list, tuple, deque, UserList, SimpleNamespace)
"""Containers that no pytree rule knows, such as a user's subclass of dict; dataclasses and attrs classes, too."""

_UNIQUE: Final = (Module, Enum)
"""Types whose objects have no copies, though they may be dataclasses."""


def map_tensors(
    function: Callable[[torch.Tensor], torch.Tensor],
    value: Any,
    other: Callable[[Any], Any] = lambda value: value,
) -> Any:
    """Return a batch or outputs with `function` applied to every tensor; containers keep their types.

    Classes that are registered as pytrees of torch or optree are mapped by their own functions. Mappings, lists,
    tuples, dataclasses and attrs classes are copied with their attributes and mapped entries, and no constructor of
    theirs runs. The lengths in a `PackedSequence` are kept: torch needs them on the CPU.

    Args:
        function: Is called once for each tensor, also for one that several containers hold.
        value: A tensor, a container, or anything else.
        other: Applied to every object that is neither a tensor, a container, a number nor a text.

    Raises:
        TypeError: If a mapping has tensors that it keeps in no attribute, as one of another language may.

    Example:
        >>> map_tensors(lambda tensor: tensor + 1, [torch.tensor(1), {"name": "x"}])
        [tensor(2), {'name': 'x'}]
    """
    if isinstance(value, torch.Tensor):
        return function(value)
    return _map(function, value, other, {})


def move_batch(batch: Any, device: torch.device) -> Any:
    """Return a batch on `device`; an object that is no container moves itself, by its method `to`.

    Args:
        batch: The batch.
        device: Where its tensors shall be; on the CPU they are already.

    Raises:
        TypeError: If an object that cannot move itself holds tensors on another device.

    Example:
        >>> move_batch({"image": torch.zeros(2)}, torch.device("meta"))["image"].device
        device(type='meta')
    """
    if device.type == "cpu":
        return batch

    def move_object(value: Any) -> Any:
        if isinstance(value, type):
            return value
        if callable(getattr(value, "to", None)):
            return value.to(device)
        for name, held in _attributes(value):
            if isinstance(held, torch.Tensor) and held.device != device:
                kind = type(value)
                raise TypeError(
                    f"the batch holds a {kind.__qualname__} whose {name} is on {held.device}, not on {device}: give "
                    f"{kind.__qualname__} a method to(device) that returns it there, or make it a dataclass or a dict"
                )
        return value

    return map_tensors(lambda tensor: tensor.to(device, non_blocking=True), batch, move_object)


def _map(function: Callable[[Any], Any], value: Any, other: Callable[[Any], Any], copies: Copies) -> Any:
    kind = type(value)
    if kind in _SCALARS:
        return value
    # These three first, and without `copies`, as nearly all containers are of these types.
    if kind is dict:
        return {key: _map(function, item, other, copies) for key, item in value.items()}
    if kind is list or kind is tuple:
        return kind([_map(function, item, other, copies) for item in value])
    if id(value) not in copies:
        mapped = function(value) if isinstance(value, torch.Tensor) else _map_object(function, value, other, copies)
        copies[id(value)] = value, mapped
    return copies[id(value)][1]


def _map_object(function: Callable[[Any], Any], value: Any, other: Callable[[Any], Any], copies: Copies) -> Any:
    kind = type(value)

    def apply(item: Any) -> Any:
        return _map(function, item, other, copies)

    if isinstance(value, PackedSequence):
        data, order, inverse = map(apply, (value.data, value.sorted_indices, value.unsorted_indices))
        return value._replace(data=data, sorted_indices=order, unsorted_indices=inverse)
    if hasattr(kind, "_make") and not getattr(value, "__dict__", None):  # a named tuple; a compiler can trace this
        return kind._make([apply(item) for item in value])
    if kind is MappingProxyType:
        return MappingProxyType(apply(dict(value)))
    if rule := find_pytree_rule(kind):
        children, unflatten = rule(value)
        return unflatten([apply(child) for child in children])
    is_container = (
        isinstance(value, _COPIED) or hasattr(kind, "__dataclass_fields__") or hasattr(kind, "__attrs_attrs__")
    )
    return _copy_container(value, apply, copies) if is_container and not isinstance(value, _UNIQUE) else other(value)


def _copy_container(value: Any, apply: Callable[[Any], Any], copies: Copies) -> Any:
    """Return a copy of a container, made without its constructor, whose entries and attributes are mapped."""
    kind = type(value)
    base: Any = next(base for base in kind.__mro__ if isinstance(vars(base).get("__new__"), BuiltinFunctionType))
    copied: Any
    if isinstance(value, tuple):
        items = [apply(item) for item in tuple.__iter__(value)]
        if not getattr(value, "__dict__", None) and all(map(operator.is_, items, value)):
            return value  # such as a time.struct_time
        copied = base.__new__(kind, items)
    else:
        copied = base.__new__(kind)
    copies[id(value)] = value, copied  # now, as an entry may refer to its container
    if isinstance(value, defaultdict):
        copied.default_factory = value.default_factory
    if isinstance(value, dict):  # the methods of dict itself, as a subclass may override them
        methods: Any = OrderedDict if isinstance(value, OrderedDict) else dict
        for key, item in methods.items(value):
            methods.__setitem__(copied, key, apply(item))
    elif isinstance(value, deque):
        deque.__init__(copied, map(apply, deque.__iter__(value)), value.maxlen)
    elif isinstance(value, list):
        list.extend(copied, map(apply, list.__iter__(value)))
    _copy_attributes(value, copied, apply)
    if isinstance(value, Mapping) and not isinstance(value, dict):
        _check_entries(value, copies)
    return copied


def _copy_attributes(value: Any, copied: Any, apply: Callable[[Any], Any]) -> None:
    """Set the attributes of a copy, in `__dict__` and in slots, also where the class forbids to set them."""
    entries = getattr(value, "__dict__", None)
    if entries is value:  # a dict whose entries are its attributes
        object.__setattr__(copied, "__dict__", copied)
    elif entries:
        vars(copied).update({name: apply(item) for name, item in entries.items()})
    for slot in _slots(type(value)):
        try:
            item = slot.__get__(value)
        except AttributeError:  # it is not set
            continue
        slot.__set__(copied, apply(item))


def _attributes(value: Any) -> Iterator[tuple[str, Any]]:
    yield from getattr(value, "__dict__", {}).items()
    for slot in _slots(type(value)):
        yield slot.__name__, getattr(value, slot.__name__, None)


def _slots(kind: type) -> list[MemberDescriptorType]:
    return [
        member
        for base in kind.__mro__
        if "__slots__" in vars(base)
        for member in vars(base).values()
        if isinstance(member, MemberDescriptorType)
    ]


def _check_entries(value: Mapping[Any, Any], copies: Copies) -> None:
    """Refuse a mapping if one of its tensors was not mapped."""
    for key, item in value.items():
        if isinstance(item, torch.Tensor) and id(item) not in copies:
            name = f"{type(value).__module__}.{type(value).__qualname__}"
            raise TypeError(
                f"{name} keeps its entry {key!r} where noether does not find it, so it cannot be copied: return a "
                "dict, or register the class as a pytree of torch or optree"
            )
