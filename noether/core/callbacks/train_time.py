"""Where the time of an update goes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, final

from noether.core.callbacks.periodic import PeriodicCallback
from noether.core.effect import SetSummary
from noether.core.metrics import log
from noether.core.tensors.tree import FrozenDict

if TYPE_CHECKING:
    from collections.abc import Mapping

    from noether.core.callback import Effects
    from noether.core.event import AfterTraining, AfterUpdate, Event
    from noether.core.schedules.gate import Interval
    from noether.core.state import Memory, TrainState

_PARTS: Final = ("data_s", "step_s", "forward_s", "backward_s", "optimizer_s")
_NONE: Final = FrozenDict(sum=0.0, max=0.0, updates=0)


@final
class TrainTimeCallback(PeriodicCallback):
    """Logs `train_time/{part}/mean/{interval}` and `train_time/{part}/max/{interval}`, in seconds for each update.

    The parts are `data_s` (waiting for data), `step_s`, and of the step `forward_s`, `backward_s` and `optimizer_s`,
    which the trainer measures because this callback asks for them. After training the totals go into the summary. An
    accelerator computes on after it was called: there the parts of a step tell how long the calls took.

    Args:
        every_n_epochs: Epochs between runs, >= 1.
        every_n_updates: Updates between runs, >= 1.
        every_n_samples: Samples between runs, >= 1; exactly one of the three is given.

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
        """Mean and largest of each part."""
        return (f"train_time/*/mean/{self.interval_name}", f"train_time/*/max/{self.interval_name}")

    @property
    def readings(self) -> tuple[str, ...]:
        """The parts of a step."""
        return ("forward_s", "backward_s", "optimizer_s")

    def init(self, state: TrainState) -> Mapping[str, Memory]:
        """Return no durations yet."""
        return {self.name: FrozenDict(parts=FrozenDict(), totals=FrozenDict())}

    def track_after_update_step(self, state: TrainState, event: AfterUpdate) -> tuple[TrainState, Effects]:
        """Add the durations of the update."""
        memory = self.memory(state)
        took = {part: seconds for part in _PARTS if (seconds := getattr(event, part)) is not None}
        parts = {part: _counted(memory["parts"].get(part, _NONE), seconds) for part, seconds in took.items()}
        totals = {part: memory["totals"].get(part, 0.0) + seconds for part, seconds in took.items()}
        counted = FrozenDict(
            parts=FrozenDict({**memory["parts"], **parts}),
            totals=FrozenDict({**memory["totals"], **totals}),
        )
        return state.remember(self.name, counted), ()

    def periodic_callback(self, state: TrainState, event: Event, interval: Interval) -> tuple[TrainState, Effects]:
        """Log and begin anew."""
        memory = self.memory(state)
        values: dict[str, float] = {}
        for part, seconds in memory["parts"].items():
            values[f"train_time/{part}/mean/{self.interval_name}"] = seconds["sum"] / seconds["updates"]
            values[f"train_time/{part}/max/{self.interval_name}"] = seconds["max"]
        begun = FrozenDict({**memory, "parts": FrozenDict()})
        return log(state.remember(self.name, begun), event, values) if values else (state, ())

    def after_training(self, state: TrainState, event: AfterTraining) -> tuple[TrainState, Effects]:
        """Put the totals into the summary."""
        state, effects = super().after_training(state, event)
        totals = {f"train_time/{part}/total": total for part, total in self.memory(state)["totals"].items()}
        return state, (*effects, SetSummary(FrozenDict(totals))) if totals else effects


def _counted(held: Mapping[str, float], seconds: float) -> FrozenDict:
    return FrozenDict(sum=held["sum"] + seconds, max=max(held["max"], seconds), updates=held["updates"] + 1)
