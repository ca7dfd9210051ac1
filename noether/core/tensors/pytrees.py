"""Pytrees: how `torch.func`, `torch.compile`, `tree_map` and optree flatten the containers of a state.

Each class is registered where it is defined, so its objects are pytrees as soon as there are any.

Example:
    A callback that logs the largest gradient norm of a sample, and a product of the Hessian with a direction:

    >>> import torch
    >>> from torch.func import functional_call, grad, jvp, vmap
    >>> from torch.utils import _pytree as pytree
    >>> from noether import AfterUpdate, Run, TrainState, log, on
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> def loss(params, sample):
    ...     return functional_call(model, params, sample).square().sum()
    >>> @on(AfterUpdate)
    ... def log_largest_gradient(state, event):
    ...     (batch,) = event.data["probe"]
    ...     gradients = vmap(grad(loss), in_dims=(None, 0))(state.params, batch)
    ...     squares = sum(gradient.flatten(1).square().sum(1) for gradient in gradients.values())
    ...     return log(state, event, {"grad_norm/largest": squares.sqrt().max()})
    >>> state = TrainState(params={"weight": torch.tensor([[1.0, 0.0]])})
    >>> run = Run(data={"probe": [torch.tensor([[1.0, 0.0], [3.0, 4.0]])]})
    >>> _, effects = log_largest_gradient(state.advance(samples=2), AfterUpdate(run=run, samples=2))
    >>> effects[0].values
    FrozenDict({'grad_norm/largest': tensor(30.)})

    >>> direction = pytree.tree_map(torch.ones_like, state.params)
    >>> slope = grad(lambda params: loss(params, torch.tensor([3.0, 4.0])))
    >>> jvp(slope, (state.params,), (direction,))[1]
    FrozenDict({'weight': tensor([[42., 56.]])})
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from noether.core.tensors.torch_internals import find_torch_pytree, register_torch_pytree

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence

try:
    from optree import GetAttrEntry, GetItemEntry, register_pytree_node
    from optree.registry import __GLOBAL_NAMESPACE as _ALL_NAMESPACES

    _HAS_OPTREE = True
except ImportError:  # not installed, or a version without these names
    _HAS_OPTREE = False


class Flat(NamedTuple):
    """A flattened container.

    Args:
        children: Its children, which are leaves or containers again.
        context: What it consists of besides; two containers have the same structure if their contexts are equal.
        keys: The key of each child: the name of a field, or what `container[key]` takes.
    """

    children: Sequence[Any]
    context: Hashable
    keys: Sequence[Any]


def register_pytree(
    cls: type[Any],
    flatten: Callable[[Any], Flat],
    unflatten: Callable[[Any, Iterable[Any]], Any],
    *,
    dump: Callable[[Any], Any],
    load: Callable[[Any], Any],
    has_fields: bool = False,
) -> None:
    """Register a class as a pytree of torch and, if it is installed, of optree in all of its namespaces.

    Args:
        cls: The class; module and name identify it in serialized structures.
        flatten: Returns the children and the structure of an object.
        unflatten: `(context, children) -> object`; children may be anything, such as placeholders of a transform.
        dump: Returns a context as JSON.
        load: Returns the context that was dumped.
        has_fields: Whether keys are names of attributes, and not what `object[key]` takes.
    """
    register_torch_pytree(cls, flatten, unflatten, dump=dump, load=load, has_fields=has_fields)
    _register_optree(cls, flatten, unflatten, has_fields=has_fields)


def register_mapping(cls: type[Mapping[str, Any]], build: Callable[[dict[str, Any]], Any]) -> None:
    """Register a class of mappings like dict: each value is a child.

    Torch orders the values of a dict as they were inserted, optree by key, and so they do with these.

    Args:
        cls: The class.
        build: Returns the mapping of some entries.
    """

    def flatten(tree: Any) -> Flat:
        entries = dict(tree)
        return Flat(tuple(entries.values()), tuple(entries), tuple(entries))

    def unflatten(keys: Any, children: Iterable[Any]) -> Any:
        return build(dict(zip(keys, children, strict=True)))

    def flatten_sorted(tree: Any) -> Flat:
        entries = dict(tree)
        keys = sorted(entries)
        return Flat([entries[key] for key in keys], _InsertedKeys(entries), keys)

    def unflatten_sorted(keys: Any, children: Iterable[Any]) -> Any:
        values = dict(zip(sorted(keys), children, strict=True))
        return build({key: values[key] for key in keys})

    register_torch_pytree(cls, flatten, unflatten, dump=list, load=tuple, has_fields=False)
    _register_optree(cls, flatten_sorted, unflatten_sorted, has_fields=False)


def find_pytree_rule(cls: type[Any]) -> Callable[[Any], tuple[Iterable[Any], Callable[[list[Any]], Any]]] | None:
    """Return how torch or optree flattens a class: `container -> (children, children -> container)`; else None.

    Rules of named tuples are left out, as they call the constructor.

    Example:
        >>> children, unflatten = find_pytree_rule(dict)({"a": 1, "b": 2})
        >>> unflatten([child + 1 for child in children])
        {'a': 2, 'b': 3}
    """
    rule = find_torch_pytree(cls)
    if rule is None and _HAS_OPTREE and not issubclass(cls, tuple):
        rule = _find_optree_rule(cls)
    return rule


def _find_optree_rule(cls: type[Any]) -> Any:
    entry: Any = register_pytree_node.get(cls)
    if entry is None:
        return None

    def flatten(container: Any) -> tuple[Iterable[Any], Callable[[list[Any]], Any]]:
        children, context, *_ = entry.flatten_func(container)
        return children, lambda mapped: entry.unflatten_func(context, mapped)

    return flatten


class _InsertedKeys(tuple[str, ...]):
    """Keys in the order of their insertion, which is not part of the structure."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _InsertedKeys) and frozenset(self) == frozenset(other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(frozenset(self))


def _register_optree(
    cls: type[Any], flatten: Callable[[Any], Flat], unflatten: Callable[[Any, Iterable[Any]], Any], *, has_fields: bool
) -> None:
    if _HAS_OPTREE:
        entry_type = GetAttrEntry if has_fields else GetItemEntry
        register_pytree_node(cls, flatten, unflatten, path_entry_type=entry_type, namespace=_ALL_NAMESPACES)
