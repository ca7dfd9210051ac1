"""Shows the expected time of the next firing and of the end."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

from noether.core.callbacks.interval import PeriodicCallback
from noether.core.effect import ShowProgress
from noether.core.estimates import estimate_end, estimate_updates, known_end
from noether.core.iteration import COUNTERS
from noether.core.tensors.tree import FrozenDict

if TYPE_CHECKING:
    from collections.abc import Mapping

    from noether.core.callback import Effects
    from noether.core.event import AfterTraining, AfterUpdate, Event
    from noether.core.run import Run
    from noether.core.schedules.gate import Interval
    from noether.core.state import Memory, TrainState


@final
class EtaCallback(PeriodicCallback):
    """Shows counters, update time, and the time to the next firing and to the end; refreshed at every update.

    On a terminal, the live display of the run shows the next firing. Without one (pipe, file, CI, batch job), a plain
    line is written at each firing. The update time is a mean in seconds and includes everything between two updates,
    such as evaluation. The first update is left out because it is slower. A resumed run continues with the mean that it
    had. If the length of epochs is unknown, times are estimated from the epochs and updates so far, or left out where
    that is impossible.

    Args:
        every_n_epochs: Epochs between firings, >= 1.
        every_n_updates: Updates between firings, >= 1.
        every_n_samples: Samples between firings, >= 1; give exactly one of the three.

    ```yaml
    - kind: noether.core.callbacks.EtaCallback
      every_n_epochs: 1
    ```

    Example:
        >>> from noether import AfterUpdate, Run, TrainingIteration, TrainState
        >>> end = TrainingIteration(update=8)
        >>> run = Run(end=end, updates_per_epoch=4, samples_per_epoch=16, effective_batch_size=4)
        >>> eta, state = EtaCallback(every_n_epochs=1), TrainState()
        >>> for seconds in (2.0, 0.5):
        ...     event = AfterUpdate(run=run, samples=4, duration_s=seconds)
        ...     state, effects = eta(state.advance(samples=4), event)
        >>> effects[0].fires, effects[0].update_s, effects[0].next_s, effects[0].left_s
        (4, 0.5, 1.0, 3.0)
    """

    @property
    def produces(self) -> tuple[str, ...]:
        """Empty: it logs no metric."""
        return ()

    def init(self, state: TrainState) -> Mapping[str, Memory]:
        """Return a memory without durations."""
        return {self.name: FrozenDict(first_s=0.0, others_s=0.0, updates=0, fired=state.iteration.update)}

    def track_after_update_step(self, state: TrainState, event: AfterUpdate) -> tuple[TrainState, Effects]:
        """Add the duration of the update, and refresh the display."""
        memory = self.memory(state)
        duration = "others_s" if memory["updates"] else "first_s"
        counted = {duration: memory[duration] + event.duration_s, "updates": memory["updates"] + 1}
        state = state.remember(self.name, FrozenDict({**memory, **counted}))
        return state, (self._progress(state, event.run, due=False),)

    def periodic_callback(self, state: TrainState, event: Event, interval: Interval) -> tuple[TrainState, Effects]:
        """Start a new interval, and refresh the display."""
        memory = FrozenDict({**self.memory(state), "fired": state.iteration.update})
        state = state.remember(self.name, memory)
        return state, (self._progress(state, event.run, due=True),)

    def after_training(self, state: TrainState, event: AfterTraining) -> tuple[TrainState, Effects]:
        """Show the final counters; a live display ends there."""
        state, effects = super().after_training(state, event)
        return state, effects or (self._progress(state, event.run, due=False),)

    def _progress(self, state: TrainState, run: Run, *, due: bool) -> ShowProgress:
        memory, end = self.memory(state), state.iteration.update if state.ended else estimate_end(state, run)
        done, update_s = state.iteration.update, _mean_update_s(memory)
        fires = self._next_firing(state, run)
        fires = None if state.ended or fires is None or (end is not None and fires > end) else fires
        return ShowProgress(
            end=known_end(run),
            fired=memory["fired"],
            fires=fires,
            update_s=update_s,
            next_s=None if update_s is None or fires is None else update_s * (fires - done),
            left_s=None if update_s is None or end is None else update_s * (end - done),
            due=due,
        )

    def _next_firing(self, state: TrainState, run: Run) -> int | None:
        """Return the number of completed updates at which the next firing is expected; None if it is unknown."""
        following = self.schedule.next_due(state.iteration)
        thresholds = ((name, getattr(following, name)) for name in COUNTERS)
        expected = (estimate_updates(state, run, name, at) for name, at in thresholds if at is not None)
        return min((update for update in expected if update is not None), default=None)


def _mean_update_s(memory: Mapping[str, float]) -> float | None:
    """Return the mean duration of the updates after the first, or that of the first if there is only one.

    None if the loop reports no durations.
    """
    mean = memory["others_s"] / (memory["updates"] - 1) if memory["updates"] > 1 else memory["first_s"]
    return mean or None


ETA = ETACallback = EtaCallback
"""Aliases for YAML that was written for a class-based framework."""
