"""Updates of a loop in one process, with their times."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from noether.core.event import AfterUpdate
    from noether.core.state import TrainState
    from noether.session.timing import Clock
    from noether.training.step.compiled import CompiledStep
    from noether.training.step.step import Observer, Step


@final
class LocalUpdates:
    """Makes updates in this process, as `ReplicatedUpdates` does on several ranks.

    Args:
        step: Makes an update.
        clock: Where it reads time; the first update begins here.
        interrupted: Returns whether the process is interrupted.
    """

    def __init__(self, step: Step | CompiledStep, clock: Clock, interrupted: Callable[[], bool]) -> None:
        self._step, self._clock = step, clock
        self.are_interrupted = interrupted
        self._begin_s = clock.elapsed_s()

    def stop(self, state: TrainState, observe: Observer | None) -> None:
        """Do nothing: there are no other processes to stop."""

    def make(
        self,
        state: TrainState,
        next_batches: Callable[[TrainState], tuple[TrainState, Sequence[Any]]],
        observe: Observer | None,
    ) -> tuple[TrainState, AfterUpdate]:
        """Return the state after one update that is not counted yet, and the event without the run.

        Args:
            state: The state.
            next_batches: Returns the state with the position in the data, and the micro-batches.
            observe: Called after each micro-batch; None if no callback listens.
        """
        clock, begin_s = self._clock, self._begin_s
        waiting_s = clock.elapsed_s()
        state, batches = next_batches(state)
        loaded_s = clock.elapsed_s()
        state, event = self._step(state, batches, observe)
        self._begin_s = stepped_s = clock.elapsed_s()
        event.complete(
            time_s=clock.wall_s(),
            duration_s=stepped_s - begin_s,
            data_s=loaded_s - waiting_s,
            step_s=stepped_s - loaded_s,
        )
        return state, event
