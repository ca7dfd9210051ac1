"""Logs the training loss, averaged since the last firing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, final

import torch

from noether.core.callbacks.interval import PeriodicCallback
from noether.core.errors import check_choice
from noether.core.metrics import log
from noether.core.tensors.losses import sum_as_total
from noether.core.tensors.tree import FrozenDict

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from noether.core.callback import Effects
    from noether.core.errors import Problem
    from noether.core.event import Event
    from noether.core.schedules.gate import Interval
    from noether.core.state import Memory, TrainState
    from noether.core.stretch import CompletedUpdate


@final
class OnlineLossCallback(PeriodicCallback):
    """Logs `loss/online/{name}/{interval}`: the sample-weighted mean of every training loss since the last firing.

    The mean of a loss covers the updates that have it, all accumulation steps and ranks, weighted by their samples or
    by the weights that the loss function gives (`noether.Mean`). With such weights `total` is the sum of the means of
    the other losses, otherwise the mean of the totals of the updates. Updates that were skipped because they were not
    finite do not count; if all that have a loss were skipped, its mean is NaN.

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
        return (self._key("*"),)

    def init(self, state: TrainState) -> Mapping[str, Memory]:
        """Return empty sums."""
        return {self.name: FrozenDict(sums=FrozenDict(), weights=FrozenDict(), is_weighted=False)}

    def track_updates(self, state: TrainState, updates: Sequence[CompletedUpdate]) -> tuple[TrainState, Effects]:
        """Add the losses of updates, in double precision and on their device."""
        memory = self.memory(state)
        sums, weights = dict(memory["sums"]), dict(_weights(memory))
        is_weighted = memory.get("is_weighted", False)
        for _, event in updates:
            given = event.loss_weights
            is_weighted = is_weighted or bool(given)
            for name, loss in event.losses.items():
                # A skipped update adds its keys with weight 0: if all of an interval are skipped, NaN is logged.
                weight = 0 if event.skipped else given.get(name, event.samples)
                sums[name] = _add(sums.get(name), loss, weight)
                weights[name] = weights.get(name, 0) + weight
        new = FrozenDict(sums=FrozenDict(sums), weights=FrozenDict(weights), is_weighted=is_weighted)
        return state.remember(self.name, new), ()

    def periodic_callback(self, state: TrainState, event: Event, interval: Interval) -> tuple[TrainState, Effects]:
        """Log the means, and start a new interval."""
        memory = self.memory(state)
        weights = _weights(memory)
        # Without samples this is 0 / 0, and so NaN.
        means = {name: total / weights[name] for name, total in memory["sums"].items()}
        if self.nan == "raise":
            for name, mean in means.items():
                if weights[name]:
                    _check_not_nan(self._key(name), mean, state)
        if memory.get("is_weighted", False):
            means = sum_as_total(means)
        state = state.remember(self.name, self.init(state)[self.name])
        values = {self._key(name): mean for name, mean in means.items()}
        return log(state, event, values, quiet=not self.verbose) if values else (state, ())

    def _key(self, name: str) -> str:
        return f"loss/online/{name}/{self.interval_name}"


def _weights(memory: Mapping[str, Any]) -> Mapping[str, float]:
    """Return the sum of the weights of each loss; memory of an earlier version has one number of samples for all."""
    return memory["weights"] if "weights" in memory else dict.fromkeys(memory["sums"], memory["samples"])


def _add(total: torch.Tensor | None, loss: float | torch.Tensor, weight: float) -> torch.Tensor:
    """Return `total + loss * weight` in double precision, on the device of the loss; with weight 0, `total`."""
    if isinstance(loss, torch.Tensor) and loss.requires_grad:
        loss = loss.detach()
    if total is None:
        device = loss.device if isinstance(loss, torch.Tensor) else None
        total = torch.zeros((), dtype=torch.float64, device=device)
    # A single call, because this runs at every update. Both are 0-dimensional, so the result is in double precision.
    return total.add(loss, alpha=weight) if weight else total


def _check_not_nan(key: str, mean: torch.Tensor, state: TrainState) -> None:
    if mean.isnan():
        raise FloatingPointError(
            f"{key} is NaN at {state.iteration}: training has diverged. Lower the learning rate, clip gradients, "
            "skip such updates with trainer.nonfinite: skip, or continue with nan: log"
        )


OnlineLoss = OnlineLossCallback
"""Alias for YAML that was written for a class-based framework."""
