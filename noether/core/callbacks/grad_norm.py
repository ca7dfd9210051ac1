"""How large the gradients are."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

import torch

from noether.core.callbacks.periodic import PeriodicCallback
from noether.core.metrics import log
from noether.core.tensors.tree import FrozenDict

if TYPE_CHECKING:
    from collections.abc import Mapping

    from noether.core.callback import Effects
    from noether.core.event import AfterUpdate, Event
    from noether.core.schedules.gate import Interval
    from noether.core.state import Memory, TrainState


@final
class GradNormCallback(PeriodicCallback):
    """Logs `optim/grad_norm/mean/{interval}` and `optim/grad_norm/max/{interval}` of the updates since the last firing.

    It is the 2-norm of all gradients together, before it is clipped. The trainer measures it because this callback asks
    for it; a loop of one's own gives it to `AfterUpdate(grad_norm=...)`. Updates that were skipped as non-finite do not
    count.

    Args:
        every_n_epochs: Epochs between runs, >= 1.
        every_n_updates: Updates between runs, >= 1.
        every_n_samples: Samples between runs, >= 1; exactly one of the three is given.

    Raises:
        ValueError: If an event does not carry the norm.

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
        """Mean and maximum."""
        return (f"optim/grad_norm/mean/{self.interval_name}", f"optim/grad_norm/max/{self.interval_name}")

    @property
    def readings(self) -> tuple[str, ...]:
        """The norm."""
        return ("grad_norm",)

    def init(self, state: TrainState) -> Mapping[str, Memory]:
        """Return no norms yet."""
        return {self.name: FrozenDict(sum=0.0, max=0.0, updates=0)}

    def track_after_update_step(self, state: TrainState, event: AfterUpdate) -> tuple[TrainState, Effects]:
        """Count the update's norm, on its device."""
        if event.skipped:
            return state, ()
        if event.grad_norm is None:
            raise ValueError(f"{self.name}: this loop does not measure it: give AfterUpdate(grad_norm=...)")
        memory, norm = self.memory(state), torch.as_tensor(event.grad_norm, dtype=torch.float64).detach()
        largest = torch.maximum(norm, torch.as_tensor(memory["max"], dtype=torch.float64, device=norm.device))
        counted = FrozenDict(sum=memory["sum"] + norm, max=largest, updates=memory["updates"] + 1)
        return state.remember(self.name, counted), ()

    def periodic_callback(self, state: TrainState, event: Event, interval: Interval) -> tuple[TrainState, Effects]:
        """Log and begin anew."""
        memory = self.memory(state)
        if not memory["updates"]:
            return state, ()
        mean, largest = self.produces
        state = state.remember(self.name, self.init(state)[self.name])
        return log(state, event, {mean: memory["sum"] / memory["updates"], largest: memory["max"]})
