"""Logs the norm of the gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

import torch

from noether.core.callbacks.interval import PeriodicCallback
from noether.core.metrics import log
from noether.core.tensors.dtensors import whole_tensor
from noether.core.tensors.tree import FrozenDict

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from noether.core.callback import Effects
    from noether.core.event import Event
    from noether.core.schedules.gate import Interval
    from noether.core.state import Memory, TrainState
    from noether.core.stretch import CompletedUpdate


@final
class GradNormCallback(PeriodicCallback):
    """Logs the mean and maximum gradient norm since the last firing.

    The keys are `optim/grad_norm/mean/{interval}` and `optim/grad_norm/max/{interval}`. The norm is the 2-norm of all
    gradients together, before clipping. The trainer and `noether.Session` compute it only if a callback reads it; if
    you call `dispatch` yourself, pass `AfterUpdate(grad_norm=...)`. Updates that were skipped because they were not
    finite do not count.

    Args:
        every_n_epochs: Epochs between firings, >= 1.
        every_n_updates: Updates between firings, >= 1.
        every_n_samples: Samples between firings, >= 1; give exactly one of the three.

    Raises:
        ValueError: If the loop does not pass the norm.

    ```yaml
    - kind: noether.core.callbacks.GradNormCallback
      every_n_updates: 100
    ```

    Example:
        >>> from noether import AfterUpdate, TrainState
        >>> callback, state = GradNormCallback(every_n_updates=2), TrainState()
        >>> for norm in (3.0, 1.0):
        ...     state, effects = callback(state.advance(samples=8), AfterUpdate(samples=8, grad_norm=norm))
        >>> effects[0].values["optim/grad_norm/mean/U2"], effects[0].values["optim/grad_norm/max/U2"]
        (tensor(2., dtype=torch.float64), tensor(3., dtype=torch.float64))
    """

    @property
    def produces(self) -> tuple[str, ...]:
        """The keys of the mean and the maximum."""
        return (f"optim/grad_norm/mean/{self.interval_name}", f"optim/grad_norm/max/{self.interval_name}")

    @property
    def readings(self) -> tuple[str, ...]:
        """The gradient norm."""
        return ("grad_norm",)

    def init(self, state: TrainState) -> Mapping[str, Memory]:
        """Return an empty sum."""
        return {self.name: FrozenDict(sum=0.0, max=0.0, updates=0)}

    def track_updates(self, state: TrainState, updates: Sequence[CompletedUpdate]) -> tuple[TrainState, Effects]:
        """Add the norms of updates, on their device."""
        applied = [event.grad_norm for _, event in updates if not event.skipped]
        if not applied:
            return state, ()
        memory = self.memory(state)
        total, largest = memory["sum"], memory["max"]
        for each in applied:
            if each is None:
                raise ValueError(f"{self.name}: the loop measures no gradient norm; pass AfterUpdate(grad_norm=...)")
            norm = _read_norm(each)
            total = total + norm
            largest = torch.maximum(norm, torch.as_tensor(largest, dtype=torch.float64, device=norm.device))
        memory = FrozenDict(sum=total, max=largest, updates=memory["updates"] + len(applied))
        return state.remember(self.name, memory), ()

    def periodic_callback(self, state: TrainState, event: Event, interval: Interval) -> tuple[TrainState, Effects]:
        """Log mean and maximum, and start a new interval."""
        memory = self.memory(state)
        if not memory["updates"]:
            return state, ()
        mean, largest = self.produces
        state = state.remember(self.name, self.init(state)[self.name])
        return log(state, event, {mean: memory["sum"] / memory["updates"], largest: memory["max"]})


def _read_norm(norm: torch.Tensor | float) -> torch.Tensor:
    """Return a norm in double precision; `clip_grad_norm_` of a module of `fully_shard` returns a DTensor."""
    return whole_tensor(torch.as_tensor(norm, dtype=torch.float64).detach())
