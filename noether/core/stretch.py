"""Stretches: updates in a row at which no callback has to act, and of which callbacks hear together.

A reducer knows from the schedules of its callbacks whether one of them is due at an update. Of most updates, callbacks
only keep something, such as a sum of losses, and they can do that later for several at once (`track_updates` of
`PeriodicCallback`), as long as nothing reads their memory before. So a loop may hold the events of such updates: these
updates wait. It tells the callbacks of them before anything else happens: a callback is due, the epoch ends, the run is
interrupted.

A stretch has 100 updates at most and lasts a quarter of a second at most, so a loop with longer updates dispatches the
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
    """An update of which a callback hears: alone, or with the others of a stretch.

    Args:
        iteration: The iteration after it.
        event: Its event; that of an update that waited has no outputs and gradients.
    """

    iteration: TrainingIteration
    event: AfterUpdate


@final
class Stretch:
    """Holds the events of updates at which no callback has to act, and tells the callbacks of them together.

    The state after them, and what is logged of each, are those of a dispatch at each update; `LogUpdates` takes the
    place of `LogScalars`.

    Args:
        reducer: The callbacks; no update waits unless this is a `Reducer`, which knows when they are due.
        interpreter: Runs their effects; no update waits unless `find_interpret_stretch` finds how.
        max_s: Seconds that a stretch lasts at most, by the times of events.
        max_updates: Updates of a stretch at most.

    Example:
        >>> from noether import BeforeTraining, OnlineLossCallback, TrainState, compose
        >>> from noether.effects.interpreter import Interpreter
        >>> from noether.core.effect import LogUpdates
        >>> reducer = compose(OnlineLossCallback(every_n_updates=3))
        >>> state = reducer(TrainState(), BeforeTraining())[0].advance(samples=4)
        >>> stretch = Stretch(reducer, Interpreter({LogUpdates: []}))
        >>> stretch.hold(state, AfterUpdate(samples=4, losses={"total": 0.5}))
        True
        >>> state = stretch.tell(state)
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
        # A callback at an accumulation step of the next update would see a state that lacks the updates that wait.
        can_wait = self._interpret is not None and not listens_to(reducer, AfterAccumulationStep)
        self._reducer = reducer if can_wait and isinstance(reducer, Reducer) and reducer.lets_updates_wait else None
        self._max_s, self._max_updates = max_s, max_updates
        self._updates: list[CompletedUpdate] = []
        self._requests: list[tuple[Effects, Sequence[CompletedUpdate]]] = []

    def hold(self, state: TrainState, event: AfterUpdate) -> bool:
        """Hold the event of an update if no callback has to act at it; return whether it is held.

        Args:
            state: The state after the update.
            event: Its event, which nothing else has seen yet. If it is held, it loses its outputs and gradients.
        """
        if self._reducer is None or type(event) is not AfterUpdate:
            return False
        if self._is_long(event) or not self._reducer.can_wait(state, event):
            return False
        # Outputs may be large, and no callback that reads them can wait.
        vars(event).update(outputs=None, gradients=None)
        self._updates.append(CompletedUpdate(state.iteration, event))
        return True

    def tell(self, state: TrainState) -> TrainState:
        """Tell the callbacks of all updates that are held, and return the new state; then call `run_effects`.

        Args:
            state: The state after the last of these updates, or a later one that no callback has seen.

        Raises:
            Exception: The error of a callback, or `CallbackError` as in `Reducer.after_updates`; then the updates are
                still held.
        """
        if self._reducer is None or not self._updates:
            return state
        updates = tuple(self._updates)
        state, effects = self._reducer.after_updates(state, updates)
        self._updates.clear()
        self._requests.append((effects, updates))
        return state

    def run_effects(self, state: TrainState) -> None:
        """Run the effects that callbacks requested in `tell`.

        Args:
            state: The state that `tell` returned, or the one that the loop made of it at the end of an epoch.

        Raises:
            Exception: The error of the interpreter; these effects are not run again.
        """
        while self._interpret is not None and self._requests:
            effects, updates = self._requests.pop(0)
            self._interpret(effects, state, updates)

    def _is_long(self, event: AfterUpdate) -> bool:
        if not self._updates:
            return event.duration_s >= self._max_s
        # The difference is negative if the clock was set back.
        lasts_s = event.time_s - self._updates[0].event.time_s
        return len(self._updates) >= self._max_updates or not 0 <= lasts_s < self._max_s


def find_interpret_stretch(interpreter: Callable[[Effects, TrainState, Event], None]) -> InterpretStretch | None:
    """Return what runs the effects of several updates for an interpreter: its attribute `interpret_stretch`.

    It is None for an interpreter that takes the effects of single events only, such as a plain function.

    Example:
        >>> find_interpret_stretch(lambda effects, state, event: None) is None
        True
    """
    found: InterpretStretch | None = getattr(interpreter, "interpret_stretch", None)
    return found
