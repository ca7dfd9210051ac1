"""The state of a run whose model and optimizer are live objects: views of them, and the way back."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

import torch

from noether.core.tensors.module import buffers_of, params_of, write_weights
from noether.core.tensors.tree import FrozenDict

if TYPE_CHECKING:
    from torch import Tensor, nn

    from noether.core.state import TrainState
    from noether.session.optimizers import LiveOptimizer

_NO_MEMORY = FrozenDict()


@final
class LiveState:
    """Makes states that view a live model and optimizer, and writes into these what callbacks changed of a state.

    Writes in place show through a view. A module may also assign a buffer, and weight averaging may give a parameter
    other memory: the views are made again only then, since checking takes a fraction of the time of making them.

    Args:
        model: The model; its parameters and buffers keep their names.
        optimizer: Its optimizer, if the run watches one.

    Example:
        >>> from noether import TrainState
        >>> import torch
        >>> model = torch.nn.BatchNorm1d(2)
        >>> live = LiveState(model, None)
        >>> before = live.view(TrainState()).buffers
        >>> model.running_mean = torch.ones(2)
        >>> before["running_mean"], live.view(TrainState()).buffers["running_mean"]
        (tensor([0., 0.]), tensor([1., 1.]))
    """

    def __init__(self, model: nn.Module, optimizer: LiveOptimizer | None) -> None:
        self.model, self.optimizer = model, optimizer
        self._parameters: list[Tensor] = []
        self._owners: list[tuple[nn.Module, str, Tensor]] = []
        self._buffer_copies: list[Tensor] | None = None
        self._make_views()

    def view(self, state: TrainState) -> TrainState:
        """Return `state` with the model's params and buffers and the optimizer's memory, as they are now."""
        if self._is_stale():
            self._make_views()
        opt_state = _NO_MEMORY if self.optimizer is None else self.optimizer.opt_state
        return state.replace(params=self._params, buffers=self._buffers, opt_state=opt_state)

    def copy_buffers(self) -> None:
        """Copy the buffers, because the forward of an update may write to them, as that of a batch norm does."""
        if not self._buffers:
            return
        if self._is_stale():
            self._make_views()
        if self._buffer_copies is None:
            self._buffer_copies = [torch.empty_like(buffer) for buffer in self._buffers.values()]
        # Each is copied: batch norm does not count its writes, so what changed is not known.
        for copy, buffer in zip(self._buffer_copies, self._buffers.values(), strict=True):
            copy.copy_(buffer)

    def view_before_update(self, state: TrainState) -> TrainState:
        """Return `state` as `view` does, but with the buffers of the last `copy_buffers`: no step was made since."""
        copies = FrozenDict(zip(self._buffers, self._buffer_copies or (), strict=True))
        return self.view(state).replace(buffers=copies)

    def load(self, saved: TrainState) -> None:
        """Write all of a saved state into model and optimizer.

        Raises:
            KeyError: If the model does not have the parameters and buffers of the state.
        """
        write_weights(self.model, saved.params, saved.buffers)
        if self.optimizer is not None:
            self.optimizer.load(saved.opt_state)
        self.apply_lr_scale(saved)

    def write_changes(self, before: TrainState, after: TrainState) -> None:
        """Write into model and optimizer what callbacks changed between a state that viewed them and `after`."""
        if after.params is not before.params or after.buffers is not before.buffers:
            write_weights(self.model, after.params, after.buffers)
        if after.opt_state is not before.opt_state and self.optimizer is not None:
            self.optimizer.load(after.opt_state)
        self.apply_lr_scale(after)

    def apply_lr_scale(self, state: TrainState) -> None:
        """Have the optimizer multiply the learning rate of every later step by the scale in `state`."""
        if self.optimizer is not None:
            self.optimizer.lr_scale = float(state.hyperparams["lr_scale"])

    def _make_views(self) -> None:
        self._params, self._buffers = params_of(self.model), buffers_of(self.model)
        self._buffer_copies = None
        self._parameters = list(self.model.parameters())
        self._owners = [
            (module, name, buffer)
            for module in self.model.modules()
            for name, buffer in module.named_buffers(recurse=False)
        ]

    def _is_stale(self) -> bool:
        # Lists are compared in half of the time that a generator takes.
        pointers = [parameter.data_ptr() for parameter in self._parameters]
        if pointers != [view.data_ptr() for view in self._params.values()]:
            return True
        return any(getattr(module, name) is not buffer for module, name, buffer in self._owners)
