"""Logs how long the parts of an update take."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, final

from noether.core.callbacks.interval import PeriodicCallback
from noether.core.effect import SetSummary
from noether.core.metrics import log
from noether.core.tensors.tree import FrozenDict

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from noether.core.callback import Effects
    from noether.core.event import AfterTraining, Event
    from noether.core.schedules.gate import Interval
    from noether.core.state import Memory, TrainState
    from noether.core.stretch import CompletedUpdate

_PARTS: Final = ("data_s", "step_s", "forward_s", "backward_s", "optimizer_s")
_NO_UPDATES: Final = FrozenDict(sum=0.0, max=0.0, updates=0)


@final
class TrainTimeCallback(PeriodicCallback):
    """Logs the mean and maximum seconds per update of each part of training since the last firing.

    The keys are `train_time/{part}/mean/{interval}` and `train_time/{part}/max/{interval}`. The parts are `data_s`
    (waiting for data), `step_s`, and within the step `forward_s`, `backward_s` and `optimizer_s`, which the trainer
    measures only if this callback is listed. After training, the summary holds the totals. An accelerator runs
    asynchronously: there, the parts of a step measure only how long the calls took.

    Args:
        every_n_epochs: Epochs between firings, >= 1.
        every_n_updates: Updates between firings, >= 1.
        every_n_samples: Samples between firings, >= 1; give exactly one of the three.

    ```yaml
    - kind: noether.core.callbacks.TrainTimeCallback
      every_n_epochs: 1
    ```

    Example:
        >>> from noether import AfterUpdate, TrainState
        >>> event = AfterUpdate(samples=8, data_s=0.25, step_s=0.5)
        >>> _, effects = TrainTimeCallback(every_n_updates=1)(TrainState().advance(samples=8), event)
        >>> effects[0].values["train_time/data_s/mean/U1"], effects[0].values["train_time/step_s/max/U1"]
        (0.25, 0.5)
    """

    @property
    def produces(self) -> tuple[str, ...]:
        """The keys of the mean and the maximum of each part."""
        return (f"train_time/*/mean/{self.interval_name}", f"train_time/*/max/{self.interval_name}")

    @property
    def readings(self) -> tuple[str, ...]:
        """The durations of the parts of a step."""
        return ("forward_s", "backward_s", "optimizer_s")

    def init(self, state: TrainState) -> Mapping[str, Memory]:
        """Return a memory without durations."""
        return {self.name: FrozenDict(parts=FrozenDict(), totals=FrozenDict())}

    def track_updates(self, state: TrainState, updates: Sequence[CompletedUpdate]) -> tuple[TrainState, Effects]:
        """Add the durations of updates."""
        memory = self.memory(state)
        parts, totals = dict(memory["parts"]), dict(memory["totals"])
        for part in _PARTS:
            durations = [seconds for _, event in updates if (seconds := getattr(event, part)) is not None]
            if durations:
                old = parts.get(part, _NO_UPDATES)
                parts[part] = FrozenDict(
                    sum=_add(old["sum"], durations),
                    max=max(old["max"], *durations),
                    updates=old["updates"] + len(durations),
                )
                totals[part] = _add(totals.get(part, 0.0), durations)
        return state.remember(self.name, FrozenDict(parts=FrozenDict(parts), totals=FrozenDict(totals))), ()

    def periodic_callback(self, state: TrainState, event: Event, interval: Interval) -> tuple[TrainState, Effects]:
        """Log mean and maximum, and start a new interval."""
        memory = self.memory(state)
        values: dict[str, float] = {}
        for part, seconds in memory["parts"].items():
            values[f"train_time/{part}/mean/{self.interval_name}"] = seconds["sum"] / seconds["updates"]
            values[f"train_time/{part}/max/{self.interval_name}"] = seconds["max"]
        if not values:
            return state, ()
        state = state.remember(self.name, FrozenDict({**memory, "parts": FrozenDict()}))
        return log(state, event, values)

    def after_training(self, state: TrainState, event: AfterTraining) -> tuple[TrainState, Effects]:
        """Write the totals into the summary."""
        state, effects = super().after_training(state, event)
        totals = {f"train_time/{part}/total": total for part, total in self.memory(state)["totals"].items()}
        return state, (*effects, SetSummary(FrozenDict(totals))) if totals else effects


def _add(total: float, durations: Sequence[float]) -> float:
    """Return the sum in the order of the updates; since Python 3.12, `sum` rounds differently."""
    for seconds in durations:
        total += seconds
    return total
