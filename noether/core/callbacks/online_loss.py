"""Logs the training loss, averaged since the last firing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, final

import torch

from noether.core.callbacks.periodic import PeriodicCallback
from noether.core.errors import check_choice
from noether.core.metrics import log
from noether.core.tensors.tree import FrozenDict

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from noether.core.callback import Effects
    from noether.core.errors import Problem
    from noether.core.event import AfterUpdate, Event
    from noether.core.schedules.gate import Interval
    from noether.core.state import Memory, TrainState


@final
class OnlineLossCallback(PeriodicCallback):
    """Logs `loss/online/{name}/{interval}`: the sample-weighted mean of every training loss since the last firing.

    The mean covers all accumulation steps and ranks. Updates that were skipped because they were not finite do not
    count; if all were skipped, the mean is NaN.

    Args:
        nan: What to do if the loss of an applied update makes the mean NaN: `raise` or `log`.
        verbose: Whether to show the losses on the console, too.
        every_n_epochs: Epochs between firings, >= 1.
        every_n_updates: Updates between firings, >= 1.
        every_n_samples: Samples between firings, >= 1; give exactly one of the three.

    Raises:
        FloatingPointError: If the mean of applied updates is NaN and `nan` is `raise`.

    ```yaml
    - kind: noether.core.callbacks.OnlineLossCallback
      every_n_updates: 50
    ```

    Example:
        >>> from noether import AfterUpdate, TrainState
        >>> event = AfterUpdate(samples=8, losses={"total": 0.25})
        >>> _, effects = OnlineLossCallback(every_n_updates=1)(TrainState().advance(samples=8), event)
        >>> effects[0].values["loss/online/total/U1"]
        tensor(0.2500, dtype=torch.float64)
    """

    nan: Literal["raise", "log"] = "raise"
    verbose: bool = True

    def problems(self) -> Iterator[Problem | None]:
        """Yield the problems of the settings."""
        yield from super().problems()
        yield check_choice("nan", self.nan, ("raise", "log"))

    @property
    def produces(self) -> tuple[str, ...]:
        """The key of every loss."""
        return (f"loss/online/*/{self.interval_name}",)

    def init(self, state: TrainState) -> Mapping[str, Memory]:
        """Return empty sums."""
        return {self.name: FrozenDict(sums=FrozenDict(), samples=0)}

    def track_after_update_step(self, state: TrainState, event: AfterUpdate) -> tuple[TrainState, Effects]:
        """Add the losses of the update, in double precision and on their device."""
        memory = self.memory(state)
        sums, samples = memory["sums"], memory["samples"]
        # A skipped update adds its keys with weight 0: if all updates of an interval are skipped, NaN is logged.
        weight = 0 if event.skipped else event.samples
        added = {name: _add(sums.get(name), loss, weight) for name, loss in event.losses.items()}
        return state.remember(self.name, FrozenDict(sums=FrozenDict({**sums, **added}), samples=samples + weight)), ()

    def periodic_callback(self, state: TrainState, event: Event, interval: Interval) -> tuple[TrainState, Effects]:
        """Log the means, and start a new interval."""
        sums, samples = self.memory(state)["sums"], self.memory(state)["samples"]
        # Without samples this is 0 / 0, and so NaN.
        means = {f"loss/online/{name}/{self.interval_name}": total / samples for name, total in sums.items()}
        if samples and self.nan == "raise":
            for key, mean in means.items():
                _check_not_nan(key, mean, state)
        state = state.remember(self.name, self.init(state)[self.name])
        return log(state, event, means, quiet=not self.verbose) if means else (state, ())


def _add(total: torch.Tensor | None, loss: float | torch.Tensor, samples: int) -> torch.Tensor:
    """Return `total + loss * samples` in double precision, on the device of the loss; without samples, `total`."""
    if isinstance(loss, torch.Tensor) and loss.requires_grad:
        loss = loss.detach()
    if total is None:
        device = loss.device if isinstance(loss, torch.Tensor) else None
        total = torch.zeros((), dtype=torch.float64, device=device)
    # A single call, because this runs at every update. Both are 0-dimensional, so the result is in double precision.
    return total.add(loss, alpha=samples) if samples else total


def _check_not_nan(key: str, mean: torch.Tensor, state: TrainState) -> None:
    if mean.isnan():
        raise FloatingPointError(
            f"{key} is NaN at {state.iteration}: training has diverged. Lower the learning rate, clip gradients, "
            "skip such updates with trainer.nonfinite: skip, or continue with nan: log"
        )


OnlineLoss = OnlineLossCallback
"""Alias for YAML that was written for a class-based framework."""
