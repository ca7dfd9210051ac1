"""When the next firing and the end are to be expected."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

from noether.core.callbacks.periodic import PeriodicCallback
from noether.core.effect import ShowProgress
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
    """Shows counters, pace, and the time to the next firing and to the end, renewed at every update.

    On a terminal that is a live display. Elsewhere (a pipe, a file, a CI, a batch job) nothing is redrawn: a line is
    written at each firing. The pace is the mean duration of an update, all that happens between two updates included;
    the first update, which is slower than the others, is left out. A resumed run goes on with the pace that it had.

    Args:
        every_n_epochs: Epochs between firings, >= 1.
        every_n_updates: Updates between firings, >= 1.
        every_n_samples: Samples between firings, >= 1; exactly one of the three is given.

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
        """Nothing: it shows."""
        return ()

    def init(self, state: TrainState) -> Mapping[str, Memory]:
        """Return no durations yet."""
        return {self.name: FrozenDict(first_s=0.0, others_s=0.0, updates=0, fired=state.iteration.update)}

    def track_after_update_step(self, state: TrainState, event: AfterUpdate) -> tuple[TrainState, Effects]:
        """Count the duration of the update, and show."""
        memory = self.memory(state)
        duration = "others_s" if memory["updates"] else "first_s"
        counted = {duration: memory[duration] + event.duration_s, "updates": memory["updates"] + 1}
        state = state.remember(self.name, FrozenDict({**memory, **counted}))
        return state, (self._shown(state, event.run, due=False),)

    def periodic_callback(self, state: TrainState, event: Event, interval: Interval) -> tuple[TrainState, Effects]:
        """Begin a new interval, and show."""
        renewed = FrozenDict({**self.memory(state), "fired": state.iteration.update})
        state = state.remember(self.name, renewed)
        return state, (self._shown(state, event.run, due=True),)

    def after_training(self, state: TrainState, event: AfterTraining) -> tuple[TrainState, Effects]:
        """Show the end, at which a display goes."""
        state, effects = super().after_training(state, event)
        return state, effects or (self._shown(state, event.run, due=False),)

    def _shown(self, state: TrainState, run: Run, *, due: bool) -> ShowProgress:
        memory, final = self.memory(state), run.final
        pace = _pace_s(memory)
        fires = self._next_firing(state, run)
        fires = None if state.ended or fires is None or fires > final.update else fires
        return ShowProgress(
            end=final,
            fired=memory["fired"],
            fires=fires,
            update_s=pace,
            next_s=None if pace is None or fires is None else pace * (fires - state.iteration.update),
            left_s=None if pace is None else pace * (0 if state.ended else final.update - state.iteration.update),
            due=due,
        )

    def _next_firing(self, state: TrainState, run: Run) -> int | None:
        """Return the number of updates completed at the next firing."""
        following = self.schedule.next_due(state.iteration)
        thresholds = ((name, getattr(following, name)) for name in COUNTERS)
        return min((run.updates_to(name, at) for name, at in thresholds if at is not None), default=None)


def _pace_s(memory: Mapping[str, float]) -> float | None:
    """Return the mean duration of an update: of those after the first, or of the first where it is alone.

    None where the loop does not tell durations.
    """
    pace = memory["others_s"] / (memory["updates"] - 1) if memory["updates"] > 1 else memory["first_s"]
    return pace or None


ETA = ETACallback = EtaCallback
"""The names that the class-based framework gives it."""
