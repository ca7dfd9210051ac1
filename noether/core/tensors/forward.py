"""The forward pass of a model with the weights of a state."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import reduce
from operator import add
from typing import TYPE_CHECKING, Any, final

import torch
from torch.func import functional_call

from noether.core.tensors.batch import model_arguments
from noether.core.tensors.module import device_of
from noether.core.tensors.tree import FrozenDict, map_tensors

if TYPE_CHECKING:
    from torch import Tensor, nn

    from noether.core.state import TrainState

Losses = Mapping[str, "Tensor"]


def forward(model: nn.Module, loss: Callable[[Any, Any], Losses], *, precision: torch.dtype | None = None) -> Forward:
    """Return a forward that calls `model` with the weights of a state, in evaluation mode and without gradients.

    Args:
        model: Gives the architecture; its own weights and its mode are left as they are, unless it changes them itself.
        loss: `(outputs, batch) -> {name: mean over samples}`, pure.
        precision: Autocast type of model and loss, or None.

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

    def __init__(self, model: nn.Module, loss: Callable[[Any, Any], Losses], precision: torch.dtype | None) -> None:
        self._model = model
        self._loss = loss
        self._precision = precision
        self._own: Mapping[str, Tensor] | None = None  # the model's parameters, during an evaluation

    def __call__(self, state: TrainState, batch: Any) -> tuple[Losses, Any]:
        """Return losses and outputs of a batch."""
        if self._own is None or self._model.training:  # whoever loads the data may have trained it meanwhile
            with self.evaluating():
                return self(state, batch)
        with torch.no_grad():
            if self._precision is None:
                return self._evaluated(self._own, state, batch)
            with torch.autocast(device_of(self._model.parameters()).type, dtype=self._precision):
                return self._evaluated(self._own, state, batch)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Leave the model in evaluation mode until the end: of many batches, each need not change it there and back."""
        trained = [module for module in self._model.modules() if module.training]
        self._model.eval()
        # None of them under autocast: it remembers what it made of a parameter, whatever is written to that.
        self._own = {} if self._autocasts() else dict(self._model.named_parameters())
        try:
            yield
        finally:
            self._own = None
            for module in trained:
                module.training = True

    def _autocasts(self) -> bool:
        device_type = device_of(self._model.parameters()).type
        known = torch.amp.is_autocast_available(device_type)
        return self._precision is not None or (known and torch.is_autocast_enabled(device_type))

    def _evaluated(self, own: Mapping[str, Tensor], state: TrainState, batch: Any) -> tuple[Losses, Any]:
        outputs = self._outputs(own, state, batch)
        losses = add_total(self._loss(outputs, batch))
        # What is a parameter as it is would be seen as the next update leaves it.
        detached = FrozenDict({name: loss.detach() for name, loss in losses.items()})
        return detached, map_tensors(torch.Tensor.detach, outputs)

    def _outputs(self, own: Mapping[str, Tensor], state: TrainState, batch: Any) -> Any:
        arguments, keywords = model_arguments(self._model, batch)
        # Copies of the buffers: a module may write to its own even in evaluation mode.
        weights = {name: buffer.clone() for name, buffer in state.buffers.items()}
        if not _are(own, state.params):
            weights |= state.params
        if not weights:  # the model's own, so that it can be called as it is, in less time
            return self._model(*arguments, **keywords)
        return functional_call(self._model, weights, arguments, keywords)


def _are(own: Mapping[str, Tensor], params: Mapping[str, Tensor]) -> bool:
    """Return whether the parameters of a model are `params`."""
    try:
        return len(own) == len(params) and all(
            name in own and own[name].is_set_to(param) for name, param in params.items()
        )
    except NotImplementedError:  # torch cannot tell of sparse tensors, and of those without memory
        return False


def add_total(losses: Losses) -> Losses:
    """Return named losses with their sum as `total`.

    Raises:
        ValueError: If there is none, or one is called `total` beside others.
    """
    if not losses or ("total" in losses and len(losses) > 1):
        raise ValueError(f"a loss function returns named losses, 'total' not among them; got {list(losses)}")
    total = reduce(add, losses.values())
    return FrozenDict({**losses, "total": total})
