"""What a session holds: the state of a run beside live objects, and what is saved when the loop ends anywhere."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, Literal

from noether.core.event import AfterEpoch, AfterTraining, AfterUpdate
from noether.core.pending import keep_event
from noether.core.state import TrainState
from noether.effects.checkpoints.state_codec import decode_state, encode_state
from noether.effects.failure import record_failure, save_interrupted
from noether.session.timing import Stopwatch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from noether.core.callback import Effects
    from noether.core.event import Event
    from noether.core.reducer import Reducer
    from noether.core.run import Run
    from noether.effects import RunDirectory
    from noether.session.live_state import LiveState
    from noether.session.losses import MicroBatch
    from noether.session.scheduler import SchedulerMemory
    from noether.session.timing import Clock

_LOGGER: Final = logging.getLogger(__name__)


class SessionState:
    """Holds the state of a run beside live objects, and saves it when the loop ends before the run does.

    Args:
        run: What is fixed for the run.
        reducer: The callbacks, composed.
        live: The model and the optimizer.
        scheduler: The scheduler's memory, if the run has one.
        interpreter: Runs effects.
        directory: The run on disk, if there is one.
        seed: The run's seed.
        clock: Reads the time.
    """

    def __init__(
        self,
        *,
        run: Run,
        reducer: Reducer,
        live: LiveState,
        scheduler: SchedulerMemory | None,
        interpreter: Callable[[Effects, TrainState, Event], None],
        directory: RunDirectory | None,
        seed: int,
        clock: Clock,
    ) -> None:
        self.run = self._given = run
        self.readings = frozenset(reducer.readings)
        """Costly fields of `AfterUpdate` that a callback needs, such as `grad_norm`."""
        self.stopwatch = Stopwatch(clock.elapsed_s)
        self._reducer, self._live, self._optimizer, self._scheduler = reducer, live, live.optimizer, scheduler
        self._interpreter, self._directory, self._clock = interpreter, directory, clock
        self._state = TrainState(seed=seed)
        self._remembers = False
        self._seeds_loop = False
        self._pending: list[MicroBatch] = []
        self._settled = self._state  # as it was before the current update began
        self._steps_before = 0  # of the optimizer, at the last update
        self._model_is: Literal["settled", "in an update", "partly written"] = "settled"
        self._current: tuple[TrainState, Event] | None = None  # the event in progress, and the state at it
        self._has_begun = False  # before, nothing is there to save
        self._recorded: BaseException | None = None
        self._warned_of_empty_update = False
        self._epoch_batches = 0  # drawn in this epoch; the state has those that an update counted
        self._carries_gradients = False  # whether an epoch ended inside of an update
        self._trusts_lengths = True  # whether an epoch with as many updates as announced has certainly no more
        self.resumes_within_epochs = False
        """Whether the loop finds its position in an epoch again; a framework may not."""

    @property
    def state(self) -> TrainState:
        """The state; it views the live model and optimizer."""
        return self._state

    @property
    def stop(self) -> str | None:
        """Why a callback stopped the run, or None."""
        return self._state.stop

    @property
    def is_over(self) -> bool:
        """Whether a callback stopped the run, or its end is reached."""
        end = getattr(self.run, "end", None)
        return self._state.stop is not None or (end is not None and self._state.iteration.reached(end))

    @property
    def pending(self) -> int:
        """The number of micro-batches since the last update."""
        return len(self._pending)

    @property
    def steps(self) -> int:
        """The number of steps that the optimizer made since the last update."""
        return 0 if self._optimizer is None else self._optimizer.steps - self._steps_before

    @property
    def settled_state(self) -> TrainState | None:
        """The state from which a resumed run continues exactly as this one, if there is one.

        It is None once the optimizer has stepped, and within an epoch that a framework reads from its first batch.

        Inside of an update that is the state before it, until the optimizer steps. If the event of an update was cut
        short, the state has its readings, and the resumed run dispatches it again.
        """
        state, event = self._current or (self._state, None)
        between_epochs = (
            isinstance(event, (AfterEpoch, AfterTraining))
            or self._state.iteration.epoch != self._state.previous.epoch  # no update since the last epoch ended
        )
        if self._model_is == "partly written" or not (between_epochs or self.resumes_within_epochs):
            return None
        if isinstance(event, AfterUpdate):
            return keep_event(state if self._scheduler is None else self._scheduler(state, event)[0], event)
        if self._model_is == "settled":
            return self._live.view(self._state)
        if self._optimizer is None or self.steps:
            return None
        return self._live.view_before_update(self._settled if self._pending else self._state)

    def record_failure(self, error: Exception) -> None:
        """Save what an exception would lose, and add notes to it that say where; a no-op without an open directory.

        The session does this for every exception that passes through it; a framework's loop does it for others.
        """
        at = self._current or (self._state, AfterUpdate.of(run=self.run, time_s=self._clock.wall_s()))
        if self._recorded is error or not self._has_begun or self.run.rank != 0:
            return
        self._recorded = error
        if self._directory is not None and self._directory.is_open:
            record_failure(error, self._directory, self.settled_state, at, self._interpreter)

    @contextmanager
    def save_where_it_ends(self) -> Iterator[None]:
        """Return a context for a loop: if it is left before its end, the session saves what it can; then it closes."""
        try:
            yield
        except (GeneratorExit, KeyboardInterrupt, SystemExit):
            self.leave()
            raise
        except Exception as error:
            self.record_failure(error)
            raise
        finally:
            self.close()

    def leave(self) -> None:
        """Save a run that the loop leaves before its end, and say what was not dispatched."""
        if not self._has_begun or self._state.ended or self._recorded is not None:
            return
        at, settled = self._state.iteration, self.settled_state
        if settled is None:
            _LOGGER.warning(
                "left before update %d was reported, where no exact checkpoint can be made: a resumed run continues "
                "from its last one",
                at.update + 1,
            )
        elif settled.iteration.update == 0:
            _LOGGER.warning("left before the first update: there is nothing to save")
        elif self._directory is None or not self._directory.is_open:
            _LOGGER.warning("left at %s, before the end of the run, without an open directory to save it in", at)
        else:
            save_interrupted(self._directory, settled, self.run, self._clock.wall_s())
            _LOGGER.info(
                "left at %s, before the end of the run, and saved: AfterTraining was not dispatched; a new session in "
                "%s resumes",
                settled.iteration,
                self._directory.path,
            )

    def close(self) -> None:
        """Stop watching the optimizer."""
        if self._optimizer is not None:
            self._optimizer.release()

    def state_dict(self) -> dict[str, Any]:
        """Return what the run remembers beside model and optimizer, for a checkpoint of the framework.

        Inside of an update that is the state before it: its gradients are in no checkpoint.

        Returns:
            Plain values and tensors, which torch reads back with `weights_only=True`.
        """
        return encode_state(self._settled if self._pending else self._state)

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Recall what `state_dict` returned, before `begin`; the framework restores model, optimizer and scheduler.

        Raises:
            ValueError: If `state_dict` did not return `saved`.
        """
        self._state = decode_state(saved)
        self._remembers = True
