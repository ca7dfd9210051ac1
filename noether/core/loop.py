"""The two functions that a loop is made of: send one event through the callbacks, and ask what comes next."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from noether.core.callback import Callback, Effects
    from noether.core.event import Event
    from noether.core.run import Run
    from noether.core.state import TrainState


def dispatch(
    state: TrainState,
    event: Event,
    reducer: Callback,
    interpreter: Callable[[Effects, TrainState, Event], None],
) -> TrainState:
    """Return the state that the callbacks settled on, after what they asked for was done.

    Args:
        state: The state at the event.
        event: What happened.
        reducer: Any callback, most often the result of `compose`.
        interpreter: Carries the effects out, on the settled state.

    Example:
        >>> from noether import AfterTraining, LogText, TrainState, dispatch, on
        >>> bye = on(AfterTraining)(lambda state, event: (state, (LogText("bye"),)))
        >>> state = dispatch(TrainState(), AfterTraining(), bye, lambda effects, state, event: print(effects))
        (LogText(text='bye'),)
    """
    state, effects = reducer(state, event)
    interpreter(effects, state, event)
    return state


class Move(Enum):
    """What a loop does next."""

    UPDATE = "update"
    END_EPOCH = "end_epoch"
    END_TRAINING = "end_training"
    NOTHING = "nothing"


def next_move(state: TrainState, run: Run) -> Move:
    """Return what a loop does next with `state`.

    Args:
        state: Where the run is.
        run: Gives `end` and `updates_per_epoch`.

    Returns:
        `NOTHING` once the run has ended, `END_EPOCH` while the end of a completed epoch is owed, `END_TRAINING` at the
        run's end or when the state asks to stop, else `UPDATE`: the batch at position
        `update - epoch * updates_per_epoch` of the epoch.

    Example:
        >>> from noether import Run, TrainingIteration, TrainState
        >>> run = Run(end=TrainingIteration(epoch=1), updates_per_epoch=1)
        >>> state = TrainState()
        >>> next_move(state, run).value, next_move(state.advance(samples=4), run).value
        ('update', 'end_epoch')
    """
    over = state.stop is not None or state.iteration.reached(run.end)
    if over and state.ended:
        return Move.NOTHING
    if state.iteration.update == (state.iteration.epoch + 1) * run.updates_per_epoch:
        return Move.END_EPOCH
    return Move.END_TRAINING if over else Move.UPDATE
