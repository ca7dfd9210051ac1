"""Checkpoints at an interval of time, for runs whose updates take long; no state and no plan knows of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, final

from noether.core.effect import SaveCheckpoint
from noether.core.event import AfterUpdate
from noether.core.stretch import find_interpret_stretch
from noether.core.tensors.tree import FrozenDict
from noether.effects.checkpoints.file_names import requested_files
from noether.effects.checkpoints.retention import is_resumable
from noether.session.timing import Clock

if TYPE_CHECKING:
    from noether.core.callback import Effects
    from noether.core.effect import Effect
    from noether.core.event import Event
    from noether.core.state import TrainState
    from noether.core.stretch import InterpretStretch
    from noether.effects.run_directory import Interpret

_CLOCK: Final = Clock()
_MINUTE_S: Final = 60.0
_SAVE: Final = SaveCheckpoint(pointers=("latest",), retention=FrozenDict(every_n_minutes=0))


@final
class TimedSaves:
    """An interpreter that also saves at the first update after some minutes without a checkpoint to resume from.

    Such a checkpoint stays until the next one from which the run can resume is saved. Time is no part of the state, so
    the run equals one without these checkpoints.

    Args:
        interpret: Runs the effects.
        minutes: Minutes between checkpoints, above 0.
        clock: Reads the time; None for the times of events, which all ranks of a run share.

    Example:
        >>> from noether import TrainState
        >>> seconds = iter([0.0, 59.0, 60.0, 61.0])
        >>> show = lambda effects, state, event: print(state.iteration, [effect.pointers for effect in effects])
        >>> interpret = TimedSaves(show, minutes=1, clock=Clock(elapsed_s=lambda: next(seconds)))
        >>> state = TrainState()
        >>> for _ in range(3):
        ...     state = state.advance(samples=4)
        ...     interpret((), state, AfterUpdate(samples=4))
        E0_U1_S4 []
        E0_U2_S8 [('latest',)]
        E0_U3_S12 []
    """

    def __init__(self, interpret: Interpret, minutes: float, clock: Clock | None = _CLOCK) -> None:
        self._interpret = interpret
        self._interval_s = minutes * _MINUTE_S
        self._clock = clock
        self._saved_s = None if clock is None else clock.elapsed_s()

    @property
    def interpret_stretch(self) -> InterpretStretch | None:
        """Runs the effects of several updates, without a save; None if `interpret` takes those of one only."""
        return find_interpret_stretch(self._interpret)

    def __call__(self, effects: Effects, state: TrainState, event: Event) -> None:
        """Run the effects, with a save if it is time."""
        now_s = event.time_s if self._clock is None else self._clock.elapsed_s()
        if self._saved_s is None or any(map(_saves_run, effects)):
            self._saved_s = now_s
        elif isinstance(event, AfterUpdate) and now_s - self._saved_s >= self._interval_s:
            self._saved_s = now_s
            effects = (*effects, _SAVE)
        self._interpret(effects, state, event)


def _saves_run(effect: Effect) -> bool:
    """Return whether the effect saves a checkpoint from which the run can resume."""
    return isinstance(effect, SaveCheckpoint) and is_resumable(
        requested_files(effect), effect.models, effect.weights_of
    )
