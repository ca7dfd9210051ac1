"""Donation: tensors that the next update may write to, in a mapping that cannot be read any more then."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, final

import torch

from noether.core.errors import NoetherError
from noether.core.tensors.torch_internals import storage_handle, storage_use_count
from noether.core.tensors.tree import FrozenDict, map_leaves

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from noether.core.state import TrainState


class DonatedError(NoetherError, RuntimeError):
    """What is read was donated: an update wrote to it."""


@final
class DonatedTree(Mapping[str, Any]):
    """A tree that whoever makes the next one from it may write to, as JAX donates buffers.

    Reading gives views. While anybody holds one, the memory is shared, and who would write to it copies it first: so a
    tensor that was read keeps its value, however long. Once the tree was taken, reading it is an error.

    Args:
        tree: Nested mappings of tensors and scalars.
        owner: Who may take it without copying; whatever that writes to.

    Example:
        >>> params = DonatedTree({"weight": torch.ones(2)})
        >>> params["weight"]
        tensor([1., 1.])
        >>> tree = params.take()
        >>> params["weight"]
        Traceback (most recent call last):
        noether.core.tensors.donation.DonatedError: this state was donated: the update after it wrote to its tensors.
        Read the state that came of the update, or keep this one with `noether.lease(state)` before
    """

    __slots__ = ("_tree", "owner")
    is_value = True
    """It is never written to by those who read it."""

    def __init__(self, tree: Mapping[str, Any], owner: object = None) -> None:
        self._tree: Mapping[str, Any] | None = tree
        self.owner = owner

    def take(self) -> Mapping[str, Any]:
        """Return the tree itself, which may then be written to; it cannot be read here any more.

        Raises:
            DonatedError: If it was taken before.
        """
        tree, self._tree = self._held(), None
        return tree

    def __getitem__(self, key: str) -> Any:
        return map_leaves(_view, self._held()[key])

    def __iter__(self) -> Iterator[str]:
        return iter(self._held())

    def __len__(self) -> int:
        return len(self._held())

    def __or__(self, other: Mapping[str, Any]) -> FrozenDict:
        return FrozenDict({**self, **other})

    def __repr__(self) -> str:
        return "DonatedTree(donated)" if self._tree is None else f"Donatable({dict(self)})"

    def __reduce__(self) -> tuple[type[FrozenDict], tuple[dict[str, Any]]]:
        return FrozenDict, (dict(self),)  # a copy is nobody's to write to

    def _held(self) -> Mapping[str, Any]:
        if self._tree is None:
            raise DonatedError(
                "this state was donated: the update after it wrote to its tensors. Read the state that came of the "
                "update, or keep this one with `noether.lease(state)` before"
            )
        return self._tree


@final
class OwnedStorages:
    """Tensors that are written to where they are, and known to be nobody else's then.

    Torch counts the users of a tensor's memory. So what anybody else holds, be it a checkpoint in flight, a metric or a
    view of a view, is seen, and left to them: a copy takes its place before it would be written to. What was left is
    kept, and once nobody else holds it the next copy is written to it: memory that is mapped is filled in less time.

    Args:
        places: Dicts and the keys in them at which the tensors are.
        shared: How many of the first of them are the data of a parameter, too.

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
        self._left: dict[int, torch.Tensor] = {}
        self._alone = [_OF_ONE_TENSOR + (index < shared) for index in range(len(places))]
        self._look()

    def _look(self) -> None:
        self._held = [kept[key].untyped_storage() for kept, key in self._places]
        self._handles = [storage_handle(storage) for storage in self._held]

    def unshare(self) -> bool:
        """Have copies take the place of tensors that others hold, and return whether there were any."""
        users = list(map(storage_use_count, self._handles))
        if users == self._alone:
            return False
        for index, (now, alone) in enumerate(zip(users, self._alone, strict=True)):
            if now != alone:
                self._replace(index)
        self._look()
        return True

    def _replace(self, index: int) -> None:
        kept, key = self._places[index]
        left, held = self._left.pop(index, None), kept[key]
        if left is None or _is_held(left.untyped_storage()):
            left = torch.empty_like(held)
        kept[key], self._left[index] = left.copy_(held), held


def donate(state: TrainState) -> TrainState:
    """Return the state whose params and optimizer memory an update may take: nobody else needs their values.

    Example:
        >>> from noether import TrainState
        >>> state = donate(TrainState(params={"weight": torch.ones(2)}))
        >>> state.params["weight"]
        tensor([1., 1.])
    """
    return state.replace(params=DonatedTree(dict(state.params)), opt_state=DonatedTree(dict(state.opt_state)))


def lease(state: TrainState) -> TrainState:
    """Return the state such that no update writes to its tensors, as long as it is held; nothing is copied for that.

    Example:
        >>> from noether import TrainState
        >>> state = TrainState(params=DonatedTree({"weight": torch.ones(2)}))
        >>> kept = lease(state)
        >>> _ = state.params.take()
        >>> kept.params["weight"]
        tensor([1., 1.])
    """
    trees = {name: getattr(state, name) for name in ("params", "buffers", "opt_state", "callback_states")}
    return state.replace(**{name: _leased(tree) for name, tree in trees.items()})


def _leased(tree: Any) -> Any:
    """Return `tree` with what is donatable replaced by views; the same object where there is nothing."""
    if isinstance(tree, DonatedTree):
        return FrozenDict(tree)
    if isinstance(tree, FrozenDict):
        leased = {key: _leased(value) for key, value in tree.items()}
        return FrozenDict(leased) if any(leased[key] is not tree[key] for key in tree) else tree
    return tree


def _is_held(storage: torch.UntypedStorage) -> bool:
    """Return whether a storage that one tensor is known to have is somebody else's, too."""
    return storage_use_count(storage_handle(storage)) > _OF_ONE_TENSOR


def _view(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, torch.Tensor) else leaf


_OF_ONE_TENSOR: Final = 2
"""Users of the storage of one tensor: the tensor, and the object by which the storage is looked at."""
