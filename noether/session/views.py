"""Params and buffers of a live model as a state has them, made anew only where the model has changed."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

from noether.core.tensors.module import buffers_of, params_of

if TYPE_CHECKING:
    from torch import Tensor, nn

    from noether.core.state import TrainState


@final
class Views:
    """Views of the params and buffers of a model, as they are whenever they are read.

    Writes in place show through a view. A module may also assign a buffer, and whoever averages weights may give a
    parameter other memory: looking for that takes a fraction of the time of walking the modules again.

    Args:
        model: The model; its parameters and buffers keep their names.

    Example:
        >>> from noether import TrainState
        >>> import torch
        >>> model = torch.nn.BatchNorm1d(2)
        >>> views = Views(model)
        >>> before = views.of(TrainState()).buffers
        >>> model.running_mean = torch.ones(2)
        >>> before["running_mean"], views.of(TrainState()).buffers["running_mean"]
        (tensor([0., 0.]), tensor([1., 1.]))
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._parameters: list[Tensor] = []
        self._owners: list[tuple[nn.Module, str, Tensor]] = []
        self._read()

    def of(self, state: TrainState) -> TrainState:
        """Return `state` with the model's params and buffers."""
        if self._stale():
            self._read()
        return state.replace(params=self._params, buffers=self._buffers)

    def _read(self) -> None:
        self._params, self._buffers = params_of(self._model), buffers_of(self._model)
        self._parameters = list(self._model.parameters())
        self._owners = [
            (module, name, buffer)
            for module in self._model.modules()
            for name, buffer in module.named_buffers(recurse=False)
        ]

    def _stale(self) -> bool:
        return any(
            parameter.data_ptr() != view.data_ptr()
            for parameter, view in zip(self._parameters, self._params.values(), strict=True)
        ) or any(getattr(module, name) is not buffer for module, name, buffer in self._owners)
