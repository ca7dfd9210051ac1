"""The training loss as it goes by."""

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

    Updates that were skipped as non-finite do not count; a mean over none of them is NaN.

    Args:
        nan: What to do where an applied update's loss makes the mean NaN: `raise` or `log`.
        verbose: Whether the losses are shown on the console, too.
        every_n_epochs: Epochs between runs, >= 1.
        every_n_updates: Updates between runs, >= 1.
        every_n_samples: Samples between runs, >= 1; exactly one of the three is given.

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
        """Yield what is wrong with the settings."""
        yield from super().problems()
        yield check_choice("nan", self.nan, ("raise", "log"))

    @property
    def produces(self) -> tuple[str, ...]:
        """One key for each loss."""
        return (f"loss/online/*/{self.interval_name}",)

    def init(self, state: TrainState) -> Mapping[str, Memory]:
        """Return empty sums."""
        return {self.name: FrozenDict(sums=FrozenDict(), samples=0)}

    def track_after_update_step(self, state: TrainState, event: AfterUpdate) -> tuple[TrainState, Effects]:
        """Add the update's losses, in double precision and on their device."""
        memory = self.memory(state)
        sums, samples = memory["sums"], memory["samples"]
        # The keys of a skipped update are kept, so that an interval of skipped updates only is logged as NaN.
        counted = 0 if event.skipped else event.samples
        added = {name: _sum(sums.get(name), loss, counted) for name, loss in event.losses.items()}
        return state.remember(self.name, FrozenDict(sums=FrozenDict({**sums, **added}), samples=samples + counted)), ()

    def periodic_callback(self, state: TrainState, event: Event, interval: Interval) -> tuple[TrainState, Effects]:
        """Log the means and begin anew."""
        sums, samples = self.memory(state)["sums"], self.memory(state)["samples"]
        # Zero samples divide zero sums: NaN, the mean of nothing.
        means = {f"loss/online/{name}/{self.interval_name}": total / samples for name, total in sums.items()}
        if samples and self.nan == "raise":
            for key, mean in means.items():
                _refuse_nan(key, mean, state)
        state = state.remember(self.name, self.init(state)[self.name])
        return log(state, event, means, quiet=not self.verbose) if means else (state, ())


def _sum(held: torch.Tensor | None, loss: float | torch.Tensor, samples: int) -> torch.Tensor:
    """Return `held + loss * samples`, in double precision, on the device of the loss; of no samples it is not read."""
    if isinstance(loss, torch.Tensor) and loss.requires_grad:
        loss = loss.detach()
    if held is None:
        device = loss.device if isinstance(loss, torch.Tensor) else None
        held = torch.zeros((), dtype=torch.float64, device=device)
    # One call: at every update each call counts. Both have no dimensions, so that the sum is in double precision.
    return held.add(loss, alpha=samples) if samples else held


def _refuse_nan(key: str, mean: torch.Tensor, state: TrainState) -> None:
    if mean.isnan():
        raise FloatingPointError(
            f"{key} is NaN at {state.iteration}: training has diverged. Lower the learning rate, clip gradients, "
            "have such updates left out with trainer.nonfinite: skip, or log on with nan: log"
        )


OnlineLoss = OnlineLossCallback
"""The name that the class-based framework gives it."""
