"""The forward pass of a model with the weights of a state."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, final

import torch
from torch.nn.parallel import DistributedDataParallel

from noether.core.tensors.calls import call_model, compute_losses
from noether.core.tensors.containers import map_tensors
from noether.core.tensors.dtensors import are_same_memory, is_distributed, whole_tensor
from noether.core.tensors.fully_sharded import is_fully_sharded, reshard, use_other_weights
from noether.core.tensors.hidden_parameters import check_buffers, find_held_tensors, refuse_parameters
from noether.core.tensors.live.buffers import BufferPlaces
from noether.core.tensors.live.extra_state import modules_with_extra_state, use_extra_state
from noether.core.tensors.losses import detach_losses
from noether.core.tensors.modes import evaluation_mode
from noether.core.tensors.module import device_of, named_parameters, rename_for_model

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch import Tensor, nn

    from noether.core.state import TrainState
    from noether.core.tensors.hidden_parameters import HeldTensor
    from noether.core.tensors.losses import Losses, LossResult


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
        self._is_fully_sharded = False  # set by `evaluating`
        self._has_extra_state = False  # set by `evaluating`
        self._mode = False  # set by `evaluating`; a model may define `train`, and stay in training mode
        self._held: list[HeldTensor] | None = None  # found at the first call with other weights

    def __call__(self, state: TrainState, batch: Any) -> tuple[Losses, Any]:
        """Return losses and outputs of a batch.

        Raises:
            HiddenParameterError: If the state has other weights than the model, and the model holds a parameter in a
                list, a closure or another object.
        """
        # Loading the batch may have changed the mode.
        if self._model_params is None or self._model.training is not self._mode:
            with self.evaluating():
                return self(state, batch)
        with torch.no_grad():
            if self._precision is None:
                return self._evaluate(self._model_params, state, batch)
            with torch.autocast(device_of(self._model.parameters()).type, dtype=self._precision):
                return self._evaluate(self._model_params, state, batch)

    @contextmanager
    def evaluating(self, state: TrainState | None = None) -> Iterator[None]:
        """Keep the model in evaluation mode for several calls, so that its mode changes once and not at each batch.

        Args:
            state: The state that the calls will have, whose params are gathered now if they are sharded over ranks: a
                rank may have no batch, and every rank has to take part.
        """
        self._is_fully_sharded = any(map(is_fully_sharded, self._model.modules()))
        if self._is_fully_sharded:
            reshard(self._model)
        with evaluation_mode(self._model):
            self._mode = self._model.training
            self._buffers = BufferPlaces(self._model)
            # Empty under autocast, which caches the cast of a parameter and does not see later writes to it.
            self._model_params = {} if self._autocasts() else named_parameters(self._model)
            self._has_extra_state = any(modules_with_extra_state(self._model))
            try:
                if state is not None and not self._is_fully_sharded:
                    self._whole_params(state)
                yield
            finally:
                self._model_params = self._gathered = None

    def _autocasts(self) -> bool:
        device_type = device_of(self._model.parameters()).type
        available = torch.amp.is_autocast_available(device_type)
        return self._precision is not None or (available and torch.is_autocast_enabled(device_type))

    def _evaluate(self, model_params: Mapping[str, Tensor], state: TrainState, batch: Any) -> tuple[Losses, Any]:
        with use_extra_state(self._model, state.extra_state) if self._has_extra_state else nullcontext():
            outputs = self._call_model(model_params, state, batch)
        losses = compute_losses(self._loss, outputs, batch)
        # Detached, as a returned parameter would change with the next update.
        return detach_losses(losses), map_tensors(torch.Tensor.detach, outputs)

    def _call_model(self, model_params: Mapping[str, Tensor], state: TrainState, batch: Any) -> Any:
        buffers = self._buffers.collect(state)
        with self._buffers.exchange(buffers):  # by copies: a module may write to its buffers even in evaluation mode
            if self._is_fully_sharded:
                return self._call_fully_sharded(state, batch)
            params = self._whole_params(state)
            if _are_same(model_params, params):
                return call_model(self._model, batch)
            self._check_held_tensors(state, buffers)
            return call_model(self._model, batch, rename_for_model(self._model, params))

    def _whole_params(self, state: TrainState) -> Mapping[str, Tensor]:
        """Return the params of a state; those that are sharded over ranks are gathered once for an evaluation."""
        source = vars(state)["params"]
        if self._gathered is not None and self._gathered[0] is source:
            return self._gathered[1]
        params = state.params
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
    return len(model_params) == len(params) and all(
        name in model_params and are_same_memory(model_params[name], param) for name, param in params.items()
    )
