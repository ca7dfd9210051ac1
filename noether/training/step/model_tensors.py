"""Tensors that updates write to in place: a model's own parameters, and the optimizer's memory of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self, final

from torch import Tensor

from noether.core.tensors.donation import DonatedTree, OwnedStorages
from noether.core.tensors.module import named_parameters

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import nn

    from noether.core.state import TrainState
    from noether.core.tensors.tree import FrozenDict
    from noether.training.step.optimizer import FunctionalOptimizer

    Writer = Callable[[Mapping[str, Tensor], Mapping[str, Mapping[str, Any]]], None]


@final
class ModelTensors:
    """Tensors of a donated state that are also the parameters of a model, so that updates can write to them in place.

    A tensor that something else holds keeps its value: `OwnedStorages` copies it before an update writes to it.

    Args:
        model: Its parameters become the tensors.
        trainable: Names of the parameters that are trained.
        params: Values of all parameters.
        opt_state: The optimizer's memory; that of each trained parameter consists of tensors only.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> tensors = ModelTensors(model, ["weight"], {"weight": torch.ones(1, 1)}, {})
        >>> view = tensors.params["weight"].detach()
        >>> tensors.unshare()
        >>> _ = tensors.params["weight"].zero_()
        >>> view, model.weight.data
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
        self.parameters = named_parameters(model)
        self.leaves = {name: self.parameters[name] for name in trainable}
        self._ordered_parameters = [self.parameters[name] for name in self.params]
        self._storages = OwnedStorages(
            [
                *((self.params, name) for name in trainable),
                *((memory, key) for memory in opt_state.get("state", {}).values() for key in memory),
            ],
            shared=len(self.leaves),
        )
        # The optimizer, the names of the gradients, and the function that writes an update for both.
        self._writer: tuple[FunctionalOptimizer, tuple[str, ...], Writer] | None = None
        self._optimizer: FunctionalOptimizer | None = None  # the last one that `are_trained_by` was true for
        self._bind()

    @classmethod
    def of(cls, state: TrainState, model: nn.Module, optimizer: FunctionalOptimizer) -> Self | None:
        """Return the tensors of `model` that store params and optimizer memory of `state`, or None.

        Args:
            state: The state.
            model: The architecture.
            optimizer: Makes the next update; it has to train the same parameters as the one of the last update.
        """
        params, opt_state = vars(state)["params"], vars(state)["opt_state"]  # a view is not donated: no need to read it
        if type(params) is not DonatedTree or type(opt_state) is not DonatedTree:
            return None
        owner = params.owner
        if not isinstance(owner, cls) or owner.model is not model or opt_state.owner is not owner:
            return None
        return owner if owner.are_trained_by(optimizer) else None

    def are_trained_by(self, optimizer: FunctionalOptimizer) -> bool:
        """Return whether `optimizer` trains the parameters that have gradients here."""
        if optimizer is not self._optimizer:
            if optimizer.trainable(self.params) != tuple(self.leaves):
                return False
            self._optimizer = optimizer
        return True

    def bind(self) -> None:
        """Prepare the model for a call: its parameters are the tensors."""
        if _addresses(self._ordered_parameters) != self._addresses:
            self._bind()

    def update(
        self,
        state: TrainState,
        optimizer: FunctionalOptimizer,
        grads: Mapping[str, Tensor],
        settings: Mapping[str, Mapping[str, Any]],
    ) -> bool:
        """Write an update to the tensors in place; return False, with nothing written, if the optimizer cannot.

        Args:
            state: The state that has these tensors. It cannot be read after a write.
            optimizer: Computes the update.
            grads: Gradients by name of parameter.
            settings: Settings of the optimizer by group.
        """
        if not self._has_writer(optimizer, tuple(grads)):
            if not optimizer.can_write(grads, self.opt_state, self.params):
                return False
        elif True in [grad.is_sparse for grad in grads.values()]:
            return False
        self.take_from(state)
        self.write(optimizer, grads, settings)
        return True

    def write(
        self,
        optimizer: FunctionalOptimizer,
        grads: Mapping[str, Tensor],
        settings: Mapping[str, Mapping[str, Any]],
    ) -> None:
        """Write an update to tensors that no state has; copies replace those that something else holds."""
        self.unshare()
        names = tuple(grads)
        if self._writer is None or not self._has_writer(optimizer, names):
            self._writer = optimizer, names, optimizer.writer(self.opt_state, self.params, names)
        self._writer[2](grads, settings)

    def _has_writer(self, optimizer: FunctionalOptimizer, names: tuple[str, ...]) -> bool:
        return self._writer is not None and self._writer[0] is optimizer and self._writer[1] == names

    def take_from(self, state: TrainState) -> None:
        """Take the tensors from a state that has these, and which cannot be read afterwards.

        Call it before the first write, so that an error cannot leave a readable state with half of an update.
        """
        vars(state)["params"].take()
        vars(state)["opt_state"].take()

    def unshare(self) -> None:
        """Replace tensors that something else holds by copies, so that all may be written to."""
        self.bind()  # the number of users of a storage includes the model's parameter
        if self._storages.unshare():
            self._bind()
            self._writer = None

    def donate_to(self, state: TrainState, buffers: Mapping[str, FrozenDict]) -> TrainState:
        """Return the state with these tensors as params and optimizer memory; the next update may take them.

        Args:
            state: The state before the update.
            buffers: The fields of the state that hold buffers.
        """
        return state.replace(
            params=DonatedTree(self.params, self), opt_state=DonatedTree(self.opt_state, self), **buffers
        )

    def _bind(self) -> None:
        for parameter, param in zip(self._ordered_parameters, self.params.values(), strict=True):
            parameter.data = param
        for leaf in self.leaves.values():
            leaf.requires_grad_()
        self._addresses = _addresses(self._ordered_parameters)


def _addresses(tensors: Sequence[Tensor]) -> list[int]:
    return list(map(Tensor.data_ptr, tensors))
