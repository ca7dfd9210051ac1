"""The trainer: the parts of a training run, and the call that trains with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from noether.distributed.ranks import ONE_PROCESS, Ranks
from noether.session.timing import Clock
from noether.training.training_loop import TrainingLoop

if TYPE_CHECKING:
    from collections.abc import Callable

    from noether.core.callback import Effects
    from noether.core.event import Event
    from noether.core.reducer import Reducer
    from noether.core.run import Run
    from noether.core.state import TrainState
    from noether.training.data.indexed import TrainingData
    from noether.training.data.streamed import StreamedData
    from noether.training.replicated.step import ReplicatedStep
    from noether.training.step.compiled import CompiledStep
    from noether.training.step.step import Step


@final
@dataclass(frozen=True, kw_only=True)
class Trainer:
    """Trains a state. It keeps no position: the state holds it.

    On several ranks, each runs this loop, and all make the same moves. If one rank is interrupted, the others learn it
    with the gradients of an update, and all leave after its event. The times of events are those of rank 0.

    Args:
        run: The facts that stay fixed during the run.
        step: Makes one update; on several ranks a `ReplicatedStep`.
        data: Returns the batches.
        reducer: The callbacks, composed.
        interpreter: Runs their effects. If it has an `interpret_stretch`, the trainer defers updates (see `Stretch`).
        evaluate_first: Whether to dispatch an evaluation before the first update of a new run.
        interrupted: Called between events; once it returns True, the trainer returns the state. Once data that
            callbacks iterate, or the training data, raises `DataInterrupt`, it returns the last settled state.
        finish: Called with the state that the trainer is about to return; not if it interrupts a new run before its
            first update, which then starts again.
        fail: Called with an exception before the trainer raises it, with the last settled state (None if it is lost,
            or if the run has to start again), and with the state and the event at which the exception was raised.
        clock: Where the trainer reads time.
        ranks: The processes that train the run.
    """

    run: Run
    step: Step | CompiledStep | ReplicatedStep
    data: TrainingData | StreamedData
    reducer: Reducer
    interpreter: Callable[[Effects, TrainState, Event], None]
    evaluate_first: bool = False
    interrupted: Callable[[], bool] = lambda: False
    finish: Callable[[TrainState], None] = lambda state: None  # noqa: ARG005  # names the argument
    fail: Callable[[BaseException, TrainState | None, TrainState, Event], None] = lambda *_: None
    clock: Clock = Clock()
    ranks: Ranks = ONE_PROCESS

    def __call__(self, state: TrainState, *, resumed: bool = False) -> TrainState:
        """Return the state at the end of the run, or where it was interrupted."""
        loop = TrainingLoop(self, state, resumed=resumed)
        del state  # this frame would keep its tensors alive until the end
        try:
            return loop.run()
        finally:
            self.data.close()
