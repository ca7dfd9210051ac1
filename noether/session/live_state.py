"""The state of a run whose model and optimizer are live objects: views of them, and the way back."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

from noether.core.tensors.live.buffers import split_buffers
from noether.core.tensors.live.extra_state import check_extra_state, modules_with_extra_state, read_extra_state
from noether.core.tensors.live.loading import find_problems, write_model, write_non_persistent
from noether.core.tensors.live.views import PARTS, VIEWS, ModuleView, views_of
from noether.core.tensors.live.weights import raise_mismatch
from noether.core.tensors.module import has_buffers, named_buffers, non_persistent_names
from noether.core.tensors.tree import FrozenDict, clone_tensors

if TYPE_CHECKING:
    from torch import Tensor, nn

    from noether.core.state import TrainState
    from noether.session.optimizers import LiveOptimizer

_NO_MEMORY = FrozenDict()


@final
class LiveState:
    """Makes states that view a live model and optimizer, and writes into these what callbacks changed of a state.

    Args:
        model: The model.
        optimizer: Its optimizer, if the run watches one.

    Raises:
        ExtraStateError: If a module has extra state that no checkpoint can contain.

    Example:
        >>> from noether import TrainState
        >>> import torch
        >>> model = torch.nn.BatchNorm1d(2)
        >>> state = LiveState(model, None).view(TrainState())
        >>> model.running_mean = torch.ones(2)
        >>> state.buffers["running_mean"]
        tensor([1., 1.])
    """

    def __init__(self, model: nn.Module, optimizer: LiveOptimizer | None) -> None:
        check_extra_state(model)
        self.model, self.optimizer = model, optimizer
        self._views = views_of(model)
        self._copies: dict[str, Tensor] = {}
        self._has_extra_state = any(modules_with_extra_state(model))
        self._extra_state = _NO_MEMORY

    def view(self, state: TrainState) -> TrainState:
        """Return `state` with what model and optimizer have, which is read whenever the state is read."""
        opt_state = _NO_MEMORY if self.optimizer is None else self.optimizer.opt_state
        return state.replace(**self._views, opt_state=opt_state)

    def copy_buffers(self) -> None:
        """Copy buffers and extra state, because the forward of an update may change them, as batch norm does."""
        # Each is copied: batch norm does not count its writes, so what changed is not known.
        copies = self._copies
        live = named_buffers(self.model) if copies or has_buffers(self.model) else {}
        if live.keys() == copies.keys() and all(map(_have_same_form, live.values(), copies.values())):
            for name, buffer in live.items():
                copies[name].copy_(buffer)
        else:
            self._copies = dict(clone_tensors(live))
        if self._has_extra_state:
            self._extra_state = read_extra_state(self.model)

    def view_before_update(self, state: TrainState) -> TrainState:
        """Return `state` as `view` does, but with what the last `copy_buffers` copied: no step was made since."""
        fields = split_buffers(self._copies, non_persistent_names(self.model))
        return self.view(state).replace(**fields, extra_state=self._extra_state)

    def load(self, saved: TrainState) -> None:
        """Write all of a saved state into model and optimizer.

        Raises:
            MismatchError: If a part of it does not fit; nothing is written then.
        """
        optimizer = self.optimizer
        opt_state = vars(saved)["opt_state"]  # which may view this optimizer
        problems = find_problems(self.model, None, saved)
        raise_mismatch([*problems, *(() if optimizer is None else optimizer.find_problems(opt_state))])
        write_model(self.model, saved)
        if optimizer is not None:
            optimizer.load(opt_state)
        self.apply_lr_scale(saved)

    def load_non_persistent(self, saved: TrainState) -> None:
        """Write the non-persistent buffers of a saved state, of which the checkpoints of frameworks have none."""
        if type(vars(saved)["non_persistent"]) is not ModuleView:
            write_non_persistent(self.model, saved)

    def write_changes(self, before: TrainState, after: TrainState) -> TrainState:
        """Write into model and optimizer what callbacks changed between a state that viewed them and `after`.

        Returns:
            `after` with views of what was written.
        """
        old, new = vars(before), vars(after)  # the views, not what they read
        changed = [field for field in VIEWS if new[field] is not old[field]]
        if any(part in changed for part in PARTS):
            write_model(self.model, after)
        if "opt_state" in changed and self.optimizer is not None:
            self.optimizer.load(after.opt_state)
        self.apply_lr_scale(after)
        return self.view(after) if changed else after

    def apply_lr_scale(self, state: TrainState) -> None:
        """Have the optimizer multiply the learning rate of every later step by the scale in `state`."""
        if self.optimizer is not None:
            self.optimizer.lr_scale = float(state.hyperparams["lr_scale"])


def _have_same_form(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device
