"""Updates of parameters that are sharded over ranks: each rank updates its shards, and has memory of these only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Self, final

from torch import Tensor, optim

from noether.core.tensors.donation import DonatedTree, OwnedStorages
from noether.core.tensors.dtensors import is_distributed, local_part
from noether.core.tensors.tree import FrozenDict, map_leaves

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from noether.core.state import TrainState
    from noether.distributed.sharding import Sharding
    from noether.training.step.accumulation import Grads
    from noether.training.step.optimizer import FunctionalOptimizer

    Settings = Mapping[str, Mapping[str, float]]
    Writer = Callable[[Mapping[str, Tensor], Mapping[str, Mapping[str, Any]]], None]

_ELEMENTWISE: Final = (
    *(optim.SGD, optim.Adam, optim.AdamW, optim.Adamax, optim.NAdam, optim.RAdam),
    *(optim.Adagrad, optim.Adadelta, optim.RMSprop, optim.Rprop, optim.ASGD),
)


def find_optimizer_problem(cls: Any) -> str | None:
    """Return why an optimizer cannot update shards of parameters, or None.

    Example:
        >>> print(find_optimizer_problem(optim.Adam))
        None
        >>> find_optimizer_problem(optim.Adafactor)
        'Adafactor is not known to update each number of a parameter by itself, ...: take one of SGD, Adam, ...'
    """
    if cls in _ELEMENTWISE:
        return None
    known = ", ".join(each.__name__ for each in _ELEMENTWISE)
    return (
        f"{cls.__name__} is not known to update each number of a parameter by itself, as parts of parameters need it: "
        f"take one of {known}, or trainer.parallel: replicate"
    )


def place_state(state: TrainState, sharding: Sharding) -> TrainState:
    """Return the state with params and optimizer memory as shards; the same state if they are.

    Args:
        state: Its params and memory are whole, or DTensors in any placement; it is the same on all ranks.
        sharding: The placement.
    """
    if Shards.of(state) is not None:
        return state
    params = {name: sharding.place(name, param) for name, param in state.params.items()}
    memory = state.opt_state.get("state", {})
    placed = {
        name: {key: _place(sharding, name, params[name], value) for key, value in entries.items()}
        for name, entries in memory.items()
    }
    same = all(params[name] is param for name, param in state.params.items())
    if same and all(placed[name][key] is value for name, each in memory.items() for key, value in each.items()):
        return state
    return state.replace(params=FrozenDict(params), opt_state=FrozenDict({**state.opt_state, "state": placed}))


def gather_state(state: TrainState, sharding: Sharding) -> TrainState:
    """Return the state with whole params, for forward and backward passes; every rank has to make the call."""
    return state.replace(params=FrozenDict(sharding.gather(state.params)))


def _place(sharding: Sharding, name: str, param: Tensor, value: Any) -> Any:
    is_elementwise = isinstance(value, Tensor) and value.shape == param.shape
    return sharding.place(name, value) if is_elementwise else value


def apply_to_shards(
    state: TrainState,
    grads: Grads,
    settings: Settings,
    buffers: Mapping[str, FrozenDict],
    *,
    sharding: Sharding,
    optimizer: FunctionalOptimizer,
    donate: bool,
) -> TrainState:
    """Return the state with new params and optimizer memory, written in place where `donate` allows it.

    Args:
        state: The state before the update, whose params and memory are shards.
        grads: Gradients of the shards of this rank by parameter, None where no rank has one.
        settings: Settings of the optimizer by group.
        buffers: The fields of the state that hold the new buffers.
        sharding: The placement.
        optimizer: Computes new shards from gradients.
        donate: Whether to write to the tensors of a donated state, and to donate those of the new one.
    """
    present = {name: grad for name, grad in grads.items() if grad is not None}
    shards = Shards.of(state) if donate else None
    if shards is not None and shards.can_write(optimizer, present):
        shards.write(state, optimizer, present, settings)
        return shards.donate_to(state, buffers)
    local_params = {name: local_part(param) for name, param in state.params.items()}
    local_memory = map_leaves(lambda leaf: local_part(leaf) if isinstance(leaf, Tensor) else leaf, state.opt_state)
    params, opt_state = optimizer.update(present, local_memory, local_params, settings=settings)
    shards = Shards(sharding, optimizer.trainable(params), params, opt_state)
    if donate and optimizer.can_write(present, opt_state, params):
        return shards.donate_to(state, buffers)
    return state.replace(params=FrozenDict(shards.params), opt_state=FrozenDict(shards.opt_state), **buffers)


@final
class Shards:
    """The shards that this rank stores of params and optimizer memory, and the DTensors that wrap them.

    A shard that something else holds keeps its value: `OwnedStorages` copies it before an update writes to it.

    Args:
        sharding: The placement.
        trainable: Names of the parameters that are trained.
        params: Shards of all parameters; those that are not sharded are whole.
        opt_state: The optimizer's memory of the shards.

    Attributes:
        params: The parameters, as a state has them.
        opt_state: The optimizer's memory, likewise.
    """

    def __init__(
        self, sharding: Sharding, trainable: tuple[str, ...], params: Mapping[str, Tensor], opt_state: Mapping[str, Any]
    ) -> None:
        self._sharding, self._trainable = sharding, trainable
        self._local_params = dict(params)
        self._local_memory = {**opt_state, "state": {name: dict(each) for name, each in opt_state["state"].items()}}
        self._wrap()
        memory = self._local_memory["state"]
        places = [
            *((self._local_params, name, self.params[name]) for name in trainable),
            *((memory[name], key, self.opt_state["state"][name][key]) for name in memory for key in memory[name]),
        ]
        tensors = [each for each in places if isinstance(each[2], Tensor)]
        tensors.sort(key=lambda place: not is_distributed(place[2]))  # those with a DTensor first
        shared = sum(is_distributed(wrapped) for *_, wrapped in tensors)
        self._places = [(tree, key) for tree, key, _ in tensors]
        self._shared = shared
        self._storages: OwnedStorages | None = None
        # The optimizer, the names of the gradients, and the function for both.
        self._writer: tuple[FunctionalOptimizer, tuple[str, ...], Writer] | None = None

    @classmethod
    def of(cls, state: TrainState) -> Self | None:
        """Return the shards of a donated state, or None."""
        if not isinstance(state.params, DonatedTree) or not isinstance(state.opt_state, DonatedTree):
            return None
        owner = state.params.owner
        return owner if isinstance(owner, cls) and state.opt_state.owner is owner else None

    def can_write(self, optimizer: FunctionalOptimizer, grads: Mapping[str, Tensor]) -> bool:
        """Return whether `optimizer` can write an update with these gradients."""
        if self._has_writer(optimizer, tuple(grads)):
            return True
        if optimizer.trainable(self._local_params) != self._trainable:  # the others may be held elsewhere
            return False
        return optimizer.can_write(grads, self._local_memory, self._local_params)

    def write(
        self, state: TrainState, optimizer: FunctionalOptimizer, grads: Mapping[str, Tensor], settings: Settings
    ) -> None:
        """Write an update to the shards; `state`, whose shards they are, cannot be read afterwards."""
        for tree in (state.params, state.opt_state):
            if isinstance(tree, DonatedTree):
                tree.take()  # before the first write, so that no error leaves half of an update readable
        if self._storages is None:
            self._storages = OwnedStorages(self._places, shared=self._shared)
        if self._storages.unshare():
            self._wrap()
            self._writer = None
        names = tuple(grads)
        if self._writer is None or not self._has_writer(optimizer, names):
            self._writer = optimizer, names, optimizer.writer(self._local_memory, self._local_params, names)
        self._writer[2](grads, settings)

    def _has_writer(self, optimizer: FunctionalOptimizer, names: tuple[str, ...]) -> bool:
        return self._writer is not None and self._writer[0] is optimizer and self._writer[1] == names

    def donate_to(self, state: TrainState, buffers: Mapping[str, FrozenDict]) -> TrainState:
        """Return the state with these shards as params and optimizer memory; the next update may write to them."""
        params, opt_state = DonatedTree(self.params, self), DonatedTree(self.opt_state, self)
        return state.replace(params=params, opt_state=opt_state, **buffers)

    def _wrap(self) -> None:
        wrap = self._sharding.wrap
        self.params = {name: wrap(name, local) for name, local in self._local_params.items()}
        memory = {
            name: {key: wrap(name, each) if isinstance(each, Tensor) else each for key, each in entries.items()}
            for name, entries in self._local_memory["state"].items()
        }
        self.opt_state = {**self._local_memory, "state": memory}
