"""Stretches: consecutive updates for which a loop defers the callbacks, to call each callback once for all of them.

A reducer knows from the schedules of its callbacks whether one of them is due at an update. At most updates, callbacks
only accumulate something, such as a sum of losses. They can do that later for several updates at once (`track_updates`
of `PeriodicCallback`), as long as nothing reads their memory before. So a loop may defer such updates. It calls the
callbacks for the deferred updates before anything else happens: a callback is due, the epoch ends, the run is
interrupted or fails, the user reads the state of a session.

A stretch has at most 100 updates and lasts at most a quarter of a second, so a loop with longer updates dispatches the
event of each.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple, final

from noether.core.callback import listens_to
from noether.core.event import AfterAccumulationStep, AfterUpdate
from noether.core.reducer import Reducer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from noether.core.callback import Callback, Effects
    from noether.core.event import Event
    from noether.core.iteration import TrainingIteration
    from noether.core.state import TrainState

    InterpretStretch = Callable[[Effects, TrainState, Sequence["CompletedUpdate"]], None]

_MAX_S: Final = 0.25  # keeps logs and displays current
_MAX_UPDATES: Final = 100  # bounds the memory that the events take


class CompletedUpdate(NamedTuple):
    """A completed update, as callbacks get it: alone, or with the others of a stretch.

    Args:
        iteration: The iteration after the update.
        event: Its event, which has no outputs and gradients if the update was deferred.
    """

    iteration: TrainingIteration
    event: AfterUpdate


@final
class Stretch:
    """Defers updates, and calls each callback once for all of them.

    The state after them, and what is logged for each, are the same as with a dispatch at each update; `LogUpdates`
    takes the place of `LogScalars`.

    Args:
        reducer: The callbacks; no update is deferred unless this is a `Reducer`, which knows when they are due.
        interpreter: Runs their effects; no update is deferred unless it has an `interpret_stretch`.
        max_s: Longest duration of a stretch in seconds, by the times of events.
        max_updates: Largest number of updates of a stretch.

    Example:
        >>> from noether import BeforeTraining, OnlineLossCallback, TrainState, compose
        >>> from noether.effects.interpreter import Interpreter
        >>> from noether.core.effect import LogUpdates
        >>> reducer = compose(OnlineLossCallback(every_n_updates=3))
        >>> state = reducer(TrainState(), BeforeTraining())[0].advance(samples=4)
        >>> stretch = Stretch(reducer, Interpreter({LogUpdates: []}))
        >>> stretch.defer(state, AfterUpdate(samples=4, losses={"total": 0.5}))
        True
        >>> state = stretch.call_callbacks(state)
        >>> state.memory("OnlineLossCallback/U3")["sums"]["total"]
        tensor(2., dtype=torch.float64)
    """

    def __init__(
        self,
        reducer: Callback,
        interpreter: Callable[[Effects, TrainState, Event], None],
        *,
        max_s: float = _MAX_S,
        max_updates: int = _MAX_UPDATES,
    ) -> None:
        self._interpret = find_interpret_stretch(interpreter)
        # A callback at an accumulation step of the next update would see a state that lacks the deferred updates.
        can_defer = self._interpret is not None and not listens_to(reducer, AfterAccumulationStep)
        self._reducer = reducer if can_defer and isinstance(reducer, Reducer) and reducer.defers_updates else None
        self._max_s, self._max_updates = max_s, max_updates
        self._updates: list[CompletedUpdate] = []
        self._requests: list[tuple[Effects, Sequence[CompletedUpdate]]] = []
        self.has_unfinished_effects = False
        """Whether callbacks were called whose effects are not complete; it stays True if Ctrl-C interrupts them."""

    def defer(self, state: TrainState, event: AfterUpdate) -> bool:
        """Defer an update if no callback has to be called now; return whether it is deferred.

        Args:
            state: The state after the update.
            event: Its event, which nothing else has seen yet. If the update is deferred, the event loses its outputs
                and gradients.
        """
        if self._reducer is None or type(event) is not AfterUpdate:
            return False
        if self._would_exceed_limits(event) or not self._reducer.can_defer(state, event):
            return False
        # They may be large, and a callback that reads them cannot be deferred.
        vars(event).update(outputs=None, gradients=None)
        self._updates.append(CompletedUpdate(state.iteration, event))
        return True

    def call_callbacks(self, state: TrainState) -> TrainState:
        """Call the callbacks for all deferred updates, and return the new state; `run_effects` has to follow.

        Args:
            state: The state after the last of these updates, or a later one that no callback has seen.

        Raises:
            Exception: The error of a callback, or `CallbackError` as in `Reducer.after_updates`; the updates then stay
                deferred.
        """
        if self._reducer is None or not self._updates:
            return state
        updates = tuple(self._updates)
        state, effects = self._reducer.after_updates(state, updates)
        self.has_unfinished_effects = True
        self._updates.clear()
        self._requests.append((effects, updates))
        return state

    def run_effects(self, state: TrainState) -> None:
        """Run the effects that callbacks requested in `call_callbacks`.

        Args:
            state: The state that `call_callbacks` returned, or the one after the end of the epoch.

        Raises:
            Exception: The error of the interpreter; these effects are not run again.
        """
        while self._interpret is not None and self._requests:
            effects, updates = self._requests.pop(0)
            try:
                self._interpret(effects, state, updates)
            except Exception:  # not for Ctrl-C, which is no Exception
                self.has_unfinished_effects = False
                raise
            self.has_unfinished_effects = False

    def finish_after(self, error: BaseException, state: TrainState) -> TrainState | None:
        """Call the callbacks for all deferred updates and run the effects, as an error ends the run.

        Args:
            error: The error. Notes on it say what failed here.
            state: As for `call_callbacks`.

        Returns:
            The state after the callbacks; None if one of them failed.
        """
        try:
            state = self.call_callbacks(state)
        except BaseException as failed:  # noqa: BLE001  # the error that is reported, or one that follows from it
            error.add_note(f"the state is not saved, as callbacks failed for its last updates: {failed!r}")
            self._updates.clear()
            return None
        try:
            self.run_effects(state)
        except Exception as failed:  # noqa: BLE001  # the error that is reported came first
            error.add_note(f"the last updates before it are not logged: {failed!r}")
        return state

    def _would_exceed_limits(self, event: AfterUpdate) -> bool:
        if not self._updates:
            return event.duration_s >= self._max_s
        # The difference is negative if the clock was set back.
        lasts_s = event.time_s - self._updates[0].event.time_s
        return len(self._updates) >= self._max_updates or not 0 <= lasts_s < self._max_s


def find_interpret_stretch(interpreter: Callable[[Effects, TrainState, Event], None]) -> InterpretStretch | None:
    """Return the `interpret_stretch` of an interpreter, which runs the effects of several updates.

    It is None for an interpreter that runs the effects of single events only, such as a plain function.

    Example:
        >>> find_interpret_stretch(lambda effects, state, event: None) is None
        True
    """
    found: InterpretStretch | None = getattr(interpreter, "interpret_stretch", None)
    return found
