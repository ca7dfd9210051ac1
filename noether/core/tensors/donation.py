"""Donation: mappings of tensors that the next update may overwrite, after which they cannot be read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, final

import torch

from noether.core.errors import NoetherError
from noether.core.tensors.dtensors import local_part
from noether.core.tensors.live.views import LiveView
from noether.core.tensors.torch_internals import (
    USERS_OF_ONE_TENSOR,
    has_other_users,
    select_view,
    storage_handle,
    storage_use_count,
)
from noether.core.tensors.tree import FrozenDict, FrozenView, clone_tensors, map_leaves

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from noether.core.state import TrainState


class DonatedError(NoetherError, RuntimeError):
    """A donated tree is read after an update overwrote its tensors."""


@final
class DonatedTree(FrozenView):
    """A tree whose tensors the next update may overwrite, as JAX donates buffers.

    Reading returns views. While a view is alive, the update copies the tensor before it writes, so a tensor that was
    read keeps its value. After `take`, reading raises an error.

    It is a pytree: `torch.func` and `tree_map` take it as it is. What they return in its place has the same type, as
    `torch.func.hessian` and others require, but is not donated: its owner is `NOT_DONATED`. Only a transform inside of
    a function that `torch.compile` compiles cannot take it: pass the params of `noether.lease(state)`.

    Args:
        tree: Nested mappings of tensors and scalars.
        owner: The object that may take the tree without copying; `NOT_DONATED` if no update may take it.

    Attributes:
        successor: The tree that replaced this one in place, once it is complete; None before.

    Example:
        >>> params = DonatedTree({"weight": torch.ones(2)})
        >>> params["weight"]
        tensor([1., 1.])
        >>> tree = params.take()
        >>> params["weight"]
        Traceback (most recent call last):
        noether.core.tensors.donation.DonatedError: this state was donated: the next update overwrote its tensors.
        Read the state that the update returned, or keep this one with `noether.lease(state)` before the update
    """

    __slots__ = ("_tree", "owner", "successor")
    is_value = True
    """`freeze` returns it unchanged, because its readers cannot write to it."""

    def __init__(self, tree: Mapping[str, Any], owner: object = None) -> None:
        # `dataclasses.asdict` constructs a dict of any class from pairs.
        self._tree: Mapping[str, Any] | None = tree if isinstance(tree, dict) else dict(tree)
        self.owner = owner
        self.successor: DonatedTree | None = None

    @property
    def is_taken(self) -> bool:
        """Whether the tree was taken, so that it cannot be read here."""
        return self._tree is None

    def __iter__(self) -> Iterator[str]:
        return iter(self._readable_tree())

    def __len__(self) -> int:
        return len(self._readable_tree())

    def __repr__(self) -> str:
        return "DonatedTree(donated)" if self._tree is None else super().__repr__()

    @classmethod
    def from_entries(cls, entries: dict[str, Any]) -> DonatedTree:
        """Return a tree of these entries that is not donated."""
        return cls(entries, NOT_DONATED)

    def take(self) -> Mapping[str, Any]:
        """Return the tree for writing; it cannot be read here afterwards.

        Raises:
            DonatedError: If the tree was taken before.
        """
        tree, self._tree = self._readable_tree(), None
        return tree

    def __getitem__(self, key: str) -> Any:
        entry = self._readable_tree()[key]
        if self.owner is NOT_DONATED:
            return entry
        return select_view()(entry) if isinstance(entry, torch.Tensor) else map_leaves(_view, entry)

    def copy(self) -> dict[str, Any]:
        """Return the entries as a dict: those of `dict(tree)`, in less time."""
        tree = self._readable_tree()
        if self.owner is NOT_DONATED:
            return dict(tree)
        view = select_view()
        return {
            key: view(entry) if isinstance(entry, torch.Tensor) else map_leaves(_view, entry)
            for key, entry in tree.items()
        }

    def _readable_tree(self) -> Mapping[str, Any]:
        if self._tree is None:
            raise DonatedError(
                "this state was donated: the next update overwrote its tensors. Read the state that the update "
                "returned, or keep this one with `noether.lease(state)` before the update"
            )
        return self._tree


@final
class OwnedStorages:
    """Tensors that are written in place, after a check that nothing else uses their storage.

    Torch counts the users of a storage. If something else still uses a tensor, such as a checkpoint in flight, a metric
    or a view of a view, that user keeps it, and a copy takes its place before the write. Once its users are gone, the
    tensor left behind holds the next copy: writing is faster where memory is mapped already.

    Args:
        places: The dict and the key of each tensor.
        shared: Number of tensors, from the first on, that are also the data of a parameter.

    Example:
        >>> tree = {"weight": torch.ones(1)}
        >>> owned = OwnedStorages([(tree, "weight")])
        >>> held = tree["weight"].detach()
        >>> owned.unshare()
        True
        >>> _ = tree["weight"].zero_()
        >>> held, tree["weight"]
        (tensor([1.]), tensor([0.]))
    """

    def __init__(self, places: Sequence[tuple[dict[str, Any], str]], shared: int = 0) -> None:
        self._places = places
        self._left_behind: dict[int, torch.Tensor] = {}
        self._unshared_counts = [USERS_OF_ONE_TENSOR + (index < shared) for index in range(len(places))]
        self._read_storages()

    def _read_storages(self) -> None:
        self._storages = [local_part(tree[key]).untyped_storage() for tree, key in self._places]
        self._handles = [storage_handle(storage) for storage in self._storages]

    def unshare(self) -> bool:
        """Replace each tensor that has other users by a copy, and return whether any was replaced."""
        users = list(map(storage_use_count, self._handles))
        if users == self._unshared_counts:
            return False
        for index, (count, unshared) in enumerate(zip(users, self._unshared_counts, strict=True)):
            if count != unshared:
                self._replace(index)
        self._read_storages()
        return True

    def _replace(self, index: int) -> None:
        tree, key = self._places[index]
        target, shared = self._left_behind.pop(index, None), tree[key]
        if target is None or has_other_users(local_part(target).untyped_storage()):
            target = torch.empty_like(shared)
        tree[key], self._left_behind[index] = target.copy_(shared), shared


def donate(state: TrainState) -> TrainState:
    """Return the state with params and optimizer memory donated, so that an update may overwrite them.

    Example:
        >>> from noether import TrainState
        >>> state = donate(TrainState(params={"weight": torch.ones(2)}))
        >>> state.params["weight"]
        tensor([1., 1.])
    """
    return state.replace(params=DonatedTree(dict(state.params)), opt_state=DonatedTree(dict(state.opt_state)))


def lease(state: TrainState) -> TrainState:
    """Return the state with views in place of donated trees: no update overwrites its tensors while it is alive.

    Nothing is copied until an update has to write. Tensors of a live module or optimizer are copied now, because their
    updates know of no state.

    Example:
        >>> from noether import TrainState
        >>> state = TrainState(params=DonatedTree({"weight": torch.ones(2)}))
        >>> kept = lease(state)
        >>> _ = state.params.take()
        >>> kept.params["weight"]
        tensor([1., 1.])
    """
    return state.replace(**{name: _view_donated(_copy_live(vars(state)[name])) for name in _TREES})


def was_donated(state: TrainState) -> bool:
    """Return whether an update overwrote tensors of the state, so that the state cannot be read.

    Example:
        >>> from noether import TrainState
        >>> state = donate(TrainState(params={"weight": torch.ones(2)}))
        >>> _ = state.params.take()
        >>> was_donated(state), was_donated(TrainState())
        (True, False)
    """
    try:
        for name in _TREES:
            _view_donated(vars(state)[name])
    except DonatedError:
        return True
    return False


def _copy_live(tree: Any) -> Any:
    return clone_tensors(tree.read()) if isinstance(tree, LiveView) else tree


def _view_donated(tree: Any) -> Any:
    """Return `tree` with donated trees replaced by views; the same object if it contains none."""
    if isinstance(tree, LiveView):
        return tree
    if isinstance(tree, DonatedTree):
        return FrozenDict(tree)
    if isinstance(tree, FrozenDict):
        leased = {key: _view_donated(value) for key, value in tree.items()}
        return FrozenDict(leased) if any(leased[key] is not tree[key] for key in tree) else tree
    return tree


def _view(leaf: Any) -> Any:
    return select_view()(leaf) if isinstance(leaf, torch.Tensor) else leaf


NOT_DONATED: Final = object()
"""Owner of a tree that no update may take, such as the result of `tree_map` on a donated one."""
_TREES: Final = ("params", "buffers", "non_persistent", "extra_state", "opt_state", "callback_states")
ALREADY_UPDATED: Final = object()
"""Owner of a tree that the pending event updated in place before it was cut short: the callback leaves it as it is."""
