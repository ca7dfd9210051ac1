"""How far a run is, and when it will be done."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, final

from noether.core.callbacks.periodic import PeriodicCallback
from noether.core.duration import format_duration
from noether.core.effect import LogText
from noether.core.iteration import COUNTERS
from noether.core.tensors.tree import FrozenDict

if TYPE_CHECKING:
    from collections.abc import Mapping

    from noether.core.callback import Effects
    from noether.core.event import AfterUpdate, Event
    from noether.core.run import Run
    from noether.core.schedules.gate import Interval
    from noether.core.state import Memory, TrainState


@final
class ProgressCallback(PeriodicCallback):
    """Writes a line with the share done, the counters and their ends, and the times taken and to come.

    The first interval is left out of the estimate, for its updates are slower than those to come. All seconds are sums
    of what the events carry, so a resumed run goes on with the time that it had.

    Args:
        every_n_epochs: Epochs between runs, >= 1.
        every_n_updates: Updates between runs, >= 1.
        every_n_samples: Samples between runs, >= 1; exactly one of the three is given.

    ```yaml
    - kind: noether.core.callbacks.ProgressCallback
      every_n_updates: 10
    ```

    Example:
        >>> from noether import AfterUpdate, Run, TrainingIteration, TrainState
        >>> end = TrainingIteration(update=8)
        >>> run = Run(end=end, updates_per_epoch=4, samples_per_epoch=16, effective_batch_size=4)
        >>> event = AfterUpdate(run=run, samples=4, duration_s=0.5)
        >>> _, effects = ProgressCallback(every_n_updates=1)(TrainState().advance(samples=4), event)
        >>> print(effects[0].text)
         12.5 %  epoch 0/2  update 1/8  sample 4/32  500.0 ms/update  last 0:00:00  total 0:00:00  left unknown
    """

    @property
    def produces(self) -> tuple[str, ...]:
        """Nothing: it writes text."""
        return ()

    def init(self, state: TrainState) -> Mapping[str, Memory]:
        """Return times of zero."""
        return {
            self.name: FrozenDict(total_s=0.0, since_s=0.0, since_updates=0, steady_s=0.0, steady_updates=0, lines=0)
        }

    def track_after_update_step(self, state: TrainState, event: AfterUpdate) -> tuple[TrainState, Effects]:
        """Add the update's duration."""
        memory = self.memory(state)
        counted = FrozenDict(
            memory,
            total_s=memory["total_s"] + event.duration_s,
            since_s=memory["since_s"] + event.duration_s,
            since_updates=memory["since_updates"] + 1,
        )
        return state.remember(self.name, counted), ()

    def periodic_callback(self, state: TrainState, event: Event, interval: Interval) -> tuple[TrainState, Effects]:
        """Write the line and begin a new interval."""
        memory = self.memory(state)
        first = memory["lines"] == 0
        steady_s = memory["steady_s"] + (0.0 if first else memory["since_s"])
        steady_updates = memory["steady_updates"] + (0 if first else memory["since_updates"])
        left = _left_s(state, event.run, steady_s, steady_updates)
        text = "  ".join((_counted(state, event.run), _timed(memory), _ahead(left, event.time_s)))
        renewed = FrozenDict(
            total_s=memory["total_s"],
            since_s=0.0,
            since_updates=0,
            steady_s=steady_s,
            steady_updates=steady_updates,
            lines=memory["lines"] + 1,
        )
        return state.remember(self.name, renewed), (LogText(text),)


def _left_s(state: TrainState, run: Run, steady_s: float, steady_updates: int) -> float | None:
    """Return the seconds to the run's end at the pace of some updates, or None where there are none yet."""
    if not steady_updates:
        return None
    return (run.final.update - state.iteration.update) * steady_s / steady_updates


def _counted(state: TrainState, run: Run) -> str:
    share = max(
        getattr(state.iteration, name) / end for name in COUNTERS if (end := getattr(run.end, name))
    )  # a run that ends at samples may overshoot
    if not run.end.update and not run.end.sample:  # an epoch is counted only at its end, its updates before
        share = state.iteration.update / run.final.update
    counts = (f"{name} {getattr(state.iteration, name)}/{getattr(run.final, name)}" for name in COUNTERS)
    return "  ".join((f"{min(share, 1.0):6.1%}".replace("%", " %"), *counts))


def _timed(memory: Mapping[str, float]) -> str:
    pace = (
        f"{1000 * memory['since_s'] / memory['since_updates']:.1f} ms/update"
        if memory["since_updates"]
        else "no update"
    )
    return f"{pace}  last {format_duration(memory['since_s'])}  total {format_duration(memory['total_s'])}"


def _ahead(left_s: float | None, time_s: float) -> str:
    if left_s is None:
        return "left unknown"
    end = datetime.fromtimestamp(time_s + left_s, tz=UTC)
    return f"left {format_duration(left_s)}  ends {end:%Y-%m-%d %H:%M:%S} UTC"


Progress = ProgressCallback
"""The name that the class-based framework gives it."""
