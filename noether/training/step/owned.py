"""Tensors that updates write to: a model's own parameters, and its optimizer's memory of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Self, final

from torch import Tensor

from noether.core.tensors.donation import DonatedTree, OwnedStorages
from noether.core.tensors.torch_internals import buffer_dicts
from noether.core.tensors.tree import FrozenDict

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import nn

    from noether.core.state import TrainState
    from noether.training.step.optimizer import FunctionalOptimizer

    Writer = Callable[[Mapping[str, Tensor], Mapping[str, Mapping[str, Any]]], None]

_NONE: Final = FrozenDict()


@final
class OwnedTensors:
    """The trained tensors of a state that nobody else has seen yet, which are from then on a model's own parameters.

    What others hold of them is left to them, and copied before it would be written to; see `OwnedStorages`.

    Args:
        model: Its parameters become the tensors.
        trainable: Names of the parameters that are trained.
        params: Values of all of them.
        opt_state: What the optimizer remembers; of each that is trained, all of it tensors.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> owned = OwnedTensors(model, ["weight"], {"weight": torch.ones(1, 1)}, {})
        >>> held = owned.params["weight"].detach()
        >>> owned.unshare()
        >>> _ = owned.params["weight"].zero_()
        >>> held, model.weight.data
        (tensor([[1.]]), tensor([[0.]]))
    """

    def __init__(
        self,
        model: nn.Module,
        trainable: Sequence[str],
        params: Mapping[str, Tensor],
        opt_state: Mapping[str, Any],
    ) -> None:
        self.model = model
        self.params = dict(params)
        self.opt_state = opt_state
        self.parameters = dict(model.named_parameters())
        self.leaves = {name: self.parameters[name] for name in trainable}
        self._bindings = [self.parameters[name] for name in self.params]
        self._buffers = _buffer_places(model)
        self._owned = OwnedStorages(
            [
                *((self.params, name) for name in trainable),
                *((kept, key) for kept in opt_state.get("state", {}).values() for key in kept),
            ],
            shared=len(self.leaves),
        )
        self._writer: tuple[tuple[str, ...], Writer] | None = None  # what writes the updates of these gradients
        self._bind()

    @classmethod
    def of(cls, state: TrainState, model: nn.Module) -> Self | None:
        """Return the tensors of `model` in which params and optimizer memory of `state` lie, or None."""
        if not isinstance(state.params, DonatedTree) or not isinstance(state.opt_state, DonatedTree):
            return None
        owner = state.params.owner
        return owner if isinstance(owner, cls) and owner.model is model and state.opt_state.owner is owner else None

    def place(self, buffers: Mapping[str, Tensor]) -> None:
        """Have the tensors and copies of `buffers` in the model, which is about to be called."""
        if not self._bound():
            self._bind()
        if buffers:
            copies = {name: buffer.clone() for name, buffer in buffers.items()}
            for held, key, name in self._buffers:
                held[key] = copies[name]

    def placed(self, buffers: Mapping[str, Tensor]) -> FrozenDict:
        """Return what became of the copies of `buffers`."""
        if not buffers:
            return _NONE
        # Batch norm writes to its copies, another module assigns: in its place is either way what is there now.
        now = {name: held[key] for held, key, name in self._buffers}
        return FrozenDict({name: now[name].detach() for name in buffers})

    def can_write(self, optimizer: FunctionalOptimizer, grads: Mapping[str, Tensor]) -> bool:
        """Return whether `optimizer` can write an update with these gradients."""
        if self._writer is not None and self._writer[0] == tuple(grads):
            return True not in [grad.is_sparse for grad in grads.values()]
        return optimizer.writes(grads, self.opt_state, self.params)

    def taken_from(self, state: TrainState) -> Self:
        """Return the tensors, taken from a state, which cannot be read then.

        That comes before anything is written, so that whatever goes wrong leaves no state that is half of an update.
        """
        for donated in (state.params, state.opt_state):
            if isinstance(donated, DonatedTree):
                donated.take()
        return self

    def write(
        self,
        optimizer: FunctionalOptimizer,
        grads: Mapping[str, Tensor],
        settings: Mapping[str, Mapping[str, Any]],
    ) -> None:
        """Write an update to the tensors, or to copies of those that others hold."""
        self.unshare()
        names = tuple(grads)
        if self._writer is None or self._writer[0] != names:
            self._writer = names, optimizer.writer(self.opt_state, self.params, names)
        self._writer[1](grads, settings)

    def unshare(self) -> None:
        """Have copies take the place of tensors that others hold, so that all may be written to."""
        if not self._bound():  # the count of who holds a tensor takes the model for one of them
            self._bind()
        if self._owned.unshare():
            self._bind()
            self._writer = None

    def given_to(self, state: TrainState, buffers: Mapping[str, Tensor]) -> TrainState:
        """Return the state whose params and optimizer memory these are, for the next update to take."""
        return state.replace(
            params=DonatedTree(self.params, self), opt_state=DonatedTree(self.opt_state, self), buffers=buffers
        )

    def _bind(self) -> None:
        for parameter, param in zip(self._bindings, self.params.values(), strict=True):
            parameter.data = param
        for leaf in self.leaves.values():
            leaf.requires_grad_()
        self._addresses = _addresses(self._bindings)

    def _bound(self) -> bool:
        """Return whether the model's parameters are still these tensors."""
        return _addresses(self._bindings) == self._addresses


def _addresses(tensors: Sequence[Tensor]) -> list[int]:
    return list(map(Tensor.data_ptr, tensors))


def _buffer_places(model: nn.Module) -> list[tuple[dict[str, Any], str, str]]:
    """Return for each place that holds a buffer of `model` the dict, the key in it, and the buffer's name."""
    names = {id(buffer): name for name, buffer in model.named_buffers()}
    return [
        (buffers, key, names[id(buffer)])
        for buffers in buffer_dicts(model)
        for key, buffer in buffers.items()
        if buffer is not None
    ]
