"""Logs learning rate and weight decay."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, final

from noether.core.callbacks.interval import PeriodicCallback
from noether.core.effect import UpdateScalars
from noether.core.event import AfterUpdate
from noether.core.iteration import TrainingIteration
from noether.core.metrics import log, log_updates, to_numbers
from noether.core.schedules.schedule import At
from noether.core.tensors.tree import FrozenDict

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from noether.core.callback import Effects
    from noether.core.event import Event
    from noether.core.schedules.base import Schedule
    from noether.core.schedules.gate import Interval
    from noether.core.state import Memory, TrainState
    from noether.core.stretch import CompletedUpdate


@final
class LrCallback(PeriodicCallback):
    """Logs the learning rate `optim/lr` and the weight decay `optim/wd` of the last update.

    It also fires at the first update. With several parameter groups, the keys are `optim/lr/{group}` and
    `optim/wd/{group}`. A run that began with one group keeps `optim/lr` for it when others are added, each under
    its name. In a `Session` a group is named by its entry `name`, else by its index; a second group of one name
    adds its index, as in `head/2`. Of several optimizers, the keys are `optim/lr/{optimizer}`, and
    `optim/lr/{optimizer}/{group}` for named and further groups.

    Args:
        every_n_epochs: Epochs between firings, >= 1.
        every_n_updates: Updates between firings, >= 1.
        every_n_samples: Samples between firings, >= 1; give exactly one of the three.

    ```yaml
    - kind: noether.core.callbacks.LrCallback
      every_n_updates: 1
    ```

    Example:
        >>> from noether import TrainState
        >>> event = AfterUpdate(samples=8, lr={"default": 0.1}, weight_decay={"default": 0.0})
        >>> LrCallback(every_n_updates=10)(TrainState().advance(samples=8), event)[1]
        (LogScalars(values=FrozenDict({'optim/lr': 0.1, 'optim/wd': 0.0})),)
    """

    @property
    def schedule(self) -> Schedule:
        """When it fires: at its interval, and at the first update."""
        return super().schedule | At(TrainingIteration(update=1))

    @property
    def produces(self) -> tuple[str, ...]:
        """The keys of all groups."""
        return ("optim/lr", "optim/wd", "optim/lr/*", "optim/wd/*")

    @cached_property
    def _tracks(self) -> bool:
        """Whether it has to remember the last update: only that event carries the learning rate."""
        return self.every_n_epochs is not None or self.at_end

    def init(self, state: TrainState) -> Mapping[str, Memory]:
        """Return an empty memory if the callback has to remember learning rates."""
        return {self.name: FrozenDict()} if self._tracks else {}

    def track_updates(self, state: TrainState, updates: Sequence[CompletedUpdate]) -> tuple[TrainState, Effects]:
        """Remember the values of the last update, to log them at the end of an epoch or of training."""
        return state.remember(self.name, _values_by_key(updates[-1].event, "optim/lr" in state.metrics)), ()

    def periodic_callback(self, state: TrainState, event: Event, interval: Interval) -> tuple[TrainState, Effects]:
        """Log the values of the last update."""
        is_logged = "optim/lr" in state.metrics
        values = _values_by_key(event, is_logged) if isinstance(event, AfterUpdate) else self.memory(state)
        return log(state, event, values) if values else (state, ())

    def fire_updates(self, state: TrainState, updates: Sequence[CompletedUpdate]) -> tuple[TrainState, Effects]:
        """Log the values of each update; rows with equal values share one object, which logs encode once."""
        rows: list[UpdateScalars] = []
        is_logged, before = "optim/lr" in state.metrics, None
        for iteration, event in updates:
            if before is None or event.lr != before.lr or event.weight_decay != before.weight_decay:
                values = to_numbers(_values_by_key(event, is_logged))
                is_logged = is_logged or "optim/lr" in values
            rows.append(UpdateScalars(iteration, event, values))
            before = event
        return log_updates(state, rows)


def _values_by_key(event: AfterUpdate, is_logged: bool) -> FrozenDict:  # noqa: FBT001  # a private function
    """Return the learning rates and weight decays of an update by metric key.

    Args:
        event: The event of the update.
        is_logged: Whether `optim/lr` was logged before: the group that was alone then keeps the key without a name.
    """
    alone = next(iter(event.lr or event.weight_decay), None) if len(event.lr) <= 1 or is_logged else None
    readings = (("optim/lr", event.lr), ("optim/wd", event.weight_decay))
    return FrozenDict(
        {
            key if group == alone else f"{key}/{group}": value
            for key, groups in readings
            for group, value in groups.items()
        }
    )


LR = LrCallback
"""Alias for YAML that was written for a class-based framework."""
