"""Donation: a mapping of tensors that the next update may write to, and then cannot be read any more."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, final

import torch

from noether.core.tree import FrozenDict, map_leaves

if TYPE_CHECKING:
    from collections.abc import Iterator

    from noether.core.state import TrainState


class DonatedError(RuntimeError):
    """What is read was donated: an update wrote to it."""


@final
class Donatable(Mapping[str, Any]):
    """A tree that whoever makes the next one from it may write to, as JAX donates buffers.

    Reading gives views. While anybody holds one, the memory is shared, and who would write to it copies it first: so a
    tensor that was read keeps its value, however long. Once the tree was taken, reading it is an error.

    Args:
        tree: Nested mappings of tensors and scalars.
        owner: Who may take it without copying; whatever that writes to.

    Example:
        >>> params = Donatable({"weight": torch.ones(2)})
        >>> params["weight"]
        tensor([1., 1.])
        >>> tree = params.take()
        >>> params["weight"]
        Traceback (most recent call last):
        noether.core.donation.DonatedError: this state was donated: the update after it wrote to its tensors. Read the
        state that came of the update, or keep this one with `lease(state)` before
    """

    __slots__ = ("_tree", "owner")

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
        return "Donatable(donated)" if self._tree is None else f"Donatable({dict(self)})"

    def __reduce__(self) -> tuple[type[FrozenDict], tuple[dict[str, Any]]]:
        return FrozenDict, (dict(self),)  # a copy is nobody's to write to

    def _held(self) -> Mapping[str, Any]:
        if self._tree is None:
            raise DonatedError(
                "this state was donated: the update after it wrote to its tensors. Read the state that came of the "
                "update, or keep this one with `lease(state)` before"
            )
        return self._tree


def lease(state: TrainState) -> TrainState:
    """Return the state such that no update writes to its tensors, as long as it is held; nothing is copied for that.

    Example:
        >>> from noether import TrainState
        >>> state = TrainState(params=Donatable({"weight": torch.ones(2)}))
        >>> kept = lease(state)
        >>> _ = state.params.take()
        >>> kept.params["weight"]
        tensor([1., 1.])
    """
    trees = {name: getattr(state, name) for name in ("params", "buffers", "opt_state", "callback_states")}
    return state.replace(**{name: _leased(tree) for name, tree in trees.items()})


def _leased(tree: Any) -> Any:
    """Return `tree` with what is donatable replaced by views; the same object where there is nothing."""
    if isinstance(tree, Donatable):
        return FrozenDict(tree)
    if isinstance(tree, FrozenDict):
        leased = {key: _leased(value) for key, value in tree.items()}
        return FrozenDict(leased) if any(leased[key] is not tree[key] for key in tree) else tree
    return tree


def _view(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, torch.Tensor) else leaf
