"""Updates of a loop that several ranks run, with the times of rank 0 and the interruptions of all ranks."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any, final

from noether.training.data.interruptible import DataInterrupt
from noether.training.replicated.step import RankReport

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from noether.core.event import AfterUpdate
    from noether.core.state import TrainState
    from noether.session.timing import Clock
    from noether.training.replicated.step import ReplicatedStep
    from noether.training.step.step import Observer


@final
class ReplicatedUpdates:
    """Makes updates on several ranks, with the times of rank 0; all ranks leave if one is interrupted.

    Times are measured from one reduction to the next, so that they need no exchange: `step_s` includes the
    part of the previous step after its reduction, and `optimizer_s` is of the previous update.

    Args:
        step: Makes an update.
        clock: Where it reads time; the first update begins here.
        interrupted: Returns whether this rank is interrupted.
    """

    def __init__(self, step: ReplicatedStep, clock: Clock, interrupted: Callable[[], bool]) -> None:
        self._step, self._clock, self._interrupted = step, clock, interrupted
        self._reduced_s = clock.elapsed_s()
        self._rest_s = 0.0

    def are_interrupted(self) -> bool:
        """Whether a rank was interrupted, as all ranks know since the last update."""
        return self._step.is_interrupted

    def stop(self, state: TrainState, observe: Observer | None) -> None:
        """Return once all ranks have stopped the run in place of the next update.

        Args:
            state: The state, whose `stop` is set.
            observe: As for `make`.

        Raises:
            RankStateError: If other ranks do not stop, on all ranks.
        """
        with suppress(DataInterrupt):
            self._step(state, (), observe, lambda: RankReport(is_stopping=True))

    def make(
        self,
        state: TrainState,
        next_batches: Callable[[TrainState], tuple[TrainState, Sequence[Any]]],
        observe: Observer | None,
    ) -> tuple[TrainState, AfterUpdate]:
        """Return the state after one update of all ranks, and the event without the run.

        Args:
            state: The state.
            next_batches: Returns the state with the position in the data, and the micro-batches of this rank.
            observe: As for `ReplicatedStep`.

        Raises:
            DataInterrupt: If a rank was interrupted while it waited for data, on all ranks.
        """
        waiting_s = self._clock.elapsed_s()
        try:
            state, batches = next_batches(state)
        except DataInterrupt:
            self._step(state, (), observe, lambda: RankReport(is_abandoned=True))
            raise
        loaded_s = self._clock.elapsed_s()

        def report() -> RankReport:
            now_s, before_s = self._clock.elapsed_s(), self._reduced_s
            self._reduced_s = now_s
            times = {
                "time_s": self._clock.wall_s(),
                "duration_s": now_s - before_s,
                "data_s": loaded_s - waiting_s,
                "step_s": now_s - loaded_s + self._rest_s,
            }
            return RankReport(is_interrupted=self._interrupted(), times=times)

        state, event = self._step(state, batches, observe, report)
        self._rest_s = self._clock.elapsed_s() - self._reduced_s
        return state, event
