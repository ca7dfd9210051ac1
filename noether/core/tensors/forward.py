"""The forward pass of a model with the weights of a state."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, final

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from noether.core.tensors.calls import call_model, compute_losses
from noether.core.tensors.containers import map_tensors
from noether.core.tensors.dtensors import are_same_memory, is_distributed, whole_tensor
from noether.core.tensors.fully_sharded import is_fully_sharded, reshard, use_other_weights
from noether.core.tensors.hidden_parameters import check_buffers, find_held_tensors, refuse_parameters
from noether.core.tensors.live.buffers import BufferPlaces
from noether.core.tensors.live.extra_state import has_extra_state, use_extra_state
from noether.core.tensors.losses import detach_losses
from noether.core.tensors.modes import evaluation_mode
from noether.core.tensors.module import device_of, named_modules, named_parameters, rename_for_model
from noether.core.tensors.torch_internals import set_grad_enabled
from noether.core.tensors.tree import FrozenView

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from noether.core.state import TrainState
    from noether.core.tensors.hidden_parameters import HeldTensor
    from noether.core.tensors.losses import Losses, LossResult


_NO_PARAMS: Final[tuple[None, list[Tensor]]] = None, []


def forward(
    model: nn.Module, loss: Callable[[Any, Any], LossResult], *, precision: torch.dtype | None = None
) -> Forward:
    """Return a function that calls `model` with the weights of a state, in evaluation mode and without gradients.

    Args:
        model: The architecture; its weights and its mode are left unchanged, unless it changes them itself.
        loss: `(outputs, batch) -> {name: mean over samples}` or one loss, pure; a `Mean` gives a loss another weight.
        precision: Autocast dtype of model and loss, or None.

    Returns:
        `(state, batch) -> (losses, outputs)`, where `losses["total"]` is the sum of the named losses.

    Example:
        >>> import noether, torch
        >>> model = torch.nn.Linear(2, 1)
        >>> predict = noether.forward(model, lambda outputs, batch: {"mse": (outputs - batch[1]).square().mean()})
        >>> state = noether.TrainState.from_module(model)
        >>> losses, outputs = predict(state, (torch.zeros(4, 2), torch.zeros(4, 1)))
        >>> sorted(losses), tuple(outputs.shape)
        (['mse', 'total'], (4, 1))
    """
    return Forward(model, loss, precision)


@final
class Forward:
    """Calls a model with the weights of a state, in evaluation mode and without gradients; made by `forward`."""

    def __init__(self, model: nn.Module, loss: Callable[[Any, Any], LossResult], precision: torch.dtype | None) -> None:
        # DDP exchanges buffers in each forward pass, and ranks may evaluate different numbers of batches.
        self._model = model.module if isinstance(model, DistributedDataParallel) else model
        self._loss = loss
        self._precision = precision
        self._model_params: Mapping[str, Tensor] | None = None  # set by `evaluating`
        self._buffers = BufferPlaces(model)  # renewed by `evaluating`
        self._gathered: tuple[Any, Mapping[str, Tensor]] | None = None  # params of a state, and the whole ones
        # The `params` of the last state that were the parameters of the model, and views of them.
        self._same_params: tuple[Any, list[Tensor]] = _NO_PARAMS
        self._is_fully_sharded = False  # set by `evaluating`
        self._has_extra_state = False  # set by `evaluating`
        self._is_training = False  # set by `evaluating`; a model may define `train`, and stay in training mode
        self._held: list[HeldTensor] | None = None  # found at the first call with other weights

    def __call__(self, state: TrainState, batch: Any) -> tuple[Losses, Any]:
        """Return losses and outputs of a batch.

        Raises:
            HiddenParameterError: If the state has other weights than the model, and the model holds a parameter in a
                list, a closure or another object.
        """
        # Loading the batch may have changed the mode.
        if self._model_params is None or self._model.training is not self._is_training:
            with self.evaluating():
                return self(state, batch)
        is_enabled = torch.is_grad_enabled()
        set_grad_enabled(False)
        try:
            if self._precision is None:
                return self._evaluate(self._model_params, state, batch)
            with torch.autocast(device_of(self._model.parameters()).type, dtype=self._precision):
                return self._evaluate(self._model_params, state, batch)
        finally:
            set_grad_enabled(is_enabled)

    @contextmanager
    def evaluating(self, state: TrainState | None = None) -> Iterator[None]:
        """Keep the model in evaluation mode for several calls, so that its mode changes once and not at each batch.

        Args:
            state: The state that the calls will have, whose params are gathered now if they are sharded over ranks: a
                rank may have no batch, and every rank has to take part.
        """
        modules = named_modules(self._model)
        self._is_fully_sharded = any(is_fully_sharded(module) for _, module in modules)
        if self._is_fully_sharded:
            reshard(self._model)
        with evaluation_mode(self._model, modules) as modules:
            self._is_training = self._model.training
            self._buffers = BufferPlaces(self._model, modules)
            # Empty under autocast, which caches the cast of a parameter and does not see later writes to it.
            params = named_parameters(self._model, modules)
            self._model_params = {} if self._autocasts(params) else params
            self._has_extra_state = any(has_extra_state(module) for _, module in modules)
            try:
                if state is not None and not self._is_fully_sharded:
                    self._has_params_of(state, self._model_params)  # keeps what it gathers
                yield
            finally:
                self._model_params = self._gathered = None
                self._same_params = _NO_PARAMS

    def _autocasts(self, params: Mapping[str, Tensor]) -> bool:
        if self._precision is not None:
            return True
        first = next(iter(params.values()), None)
        if first is None or first.is_cpu:  # the type of a device takes longer to read
            return torch.is_autocast_enabled("cpu")
        device_type = first.device.type
        return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)

    def _evaluate(self, model_params: Mapping[str, Tensor], state: TrainState, batch: Any) -> tuple[Losses, Any]:
        if self._has_extra_state:
            with use_extra_state(self._model, state.extra_state):
                outputs = self._call_model(model_params, state, batch)
        else:
            outputs = self._call_model(model_params, state, batch)
        losses = compute_losses(self._loss, outputs, batch)
        # Detached, as a returned parameter would change with the next update.
        return detach_losses(losses), map_tensors(torch.Tensor.detach, outputs)

    def _call_model(self, model_params: Mapping[str, Tensor], state: TrainState, batch: Any) -> Any:
        buffers = self._buffers.collect(state)
        before = self._buffers.replace(buffers)  # a module may write to its buffers even in evaluation mode
        try:
            if self._is_fully_sharded:
                return self._call_fully_sharded(state, batch)
            if self._has_params_of(state, model_params):
                return call_model(self._model, batch)
            self._check_held_tensors(state, buffers)
            return call_model(self._model, batch, rename_for_model(self._model, self._whole_params(state)))
        finally:
            self._buffers.restore(before)

    def _has_params_of(self, state: TrainState, model_params: Mapping[str, Tensor]) -> bool:
        """Return whether the params of a state are those of the model; an evaluation reads them only once."""
        source = vars(state)["params"]
        same_source, views = self._same_params
        if same_source is source and all(map(torch.Tensor.is_set_to, model_params.values(), views)):
            return True
        params = self._whole_params(state)
        is_same = _are_same(model_params, params)
        # Not for DTensors and the like: `is_set_to` does not compare their local parts.
        is_plain = {nn.Parameter}.issuperset(map(type, model_params.values()))
        self._same_params = (source, [params[name] for name in model_params]) if is_same and is_plain else _NO_PARAMS
        return is_same

    def _whole_params(self, state: TrainState) -> Mapping[str, Tensor]:
        """Return the params of a state; those that are sharded over ranks are gathered once for an evaluation."""
        source = vars(state)["params"]
        if self._gathered is not None and self._gathered[0] is source:
            return self._gathered[1]
        # Once, as some mappings make a view whenever a tensor is read.
        params = source.copy() if isinstance(source, FrozenView) else dict(state.params)
        if not any(map(is_distributed, params.values())):
            return params
        self._gathered = source, {name: whole_tensor(param) for name, param in params.items()}
        return self._gathered[1]

    def _call_fully_sharded(self, state: TrainState, batch: Any) -> Any:
        own, params = named_parameters(self._model), state.params
        with use_other_weights(self._model, own, None if _are_same(own, params) else params):
            return call_model(self._model, batch)

    def _check_held_tensors(self, state: TrainState, buffers: Mapping[str, Tensor]) -> None:
        """Refuse to exchange weights where the model computes with others, which it holds in a list or a closure."""
        if self._held is None:
            self._held = [held for held in find_held_tensors(self._model, self._loss) if held.name is not None]
        if self._held and not _are_same(named_parameters(self._model), state.params):
            refuse_parameters(self._held)
            check_buffers(self._held, buffers)


def _are_same(model_params: Mapping[str, Tensor], params: Mapping[str, Tensor]) -> bool:
    """Return whether `params` view the parameters of the model."""
    return model_params.keys() == params.keys() and all(
        map(are_same_memory, model_params.values(), map(params.__getitem__, model_params))
    )
