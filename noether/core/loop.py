"""The functions of a training loop: dispatch an event to the callbacks, and find the next move."""

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
    """Send an event through the callbacks, run the effects that they request, and return the new state.

    Args:
        state: The state at the event.
        event: The event.
        reducer: Any callback, most often the result of `compose`.
        interpreter: Runs the effects, on the new state.

    Raises:
        TypeError: If the callback returns anything but a state and a tuple of effects.

    Example:
        >>> from noether import AfterTraining, LogText, TrainState, dispatch, on
        >>> bye = on(AfterTraining)(lambda state, event: (state, (LogText("bye"),)))
        >>> state = dispatch(TrainState(), AfterTraining(), bye, lambda effects, state, event: print(effects))
        (LogText(text='bye'),)
    """
    result = reducer(state, event)
    if type(result) is not tuple or [type(each) for each in result] != [type(state), tuple]:
        from noether.core.callback_checks import check_result  # imports torch, which `next_move` does without

        check_result(reducer, result)
    state, effects = result
    if effects and not getattr(reducer, "copies_aliases", False):
        effects = state.copy_aliases(effects)
    interpreter(effects, state, event)
    return state


class Move(Enum):
    """The next step of a loop."""

    UPDATE = "update"
    END_EPOCH = "end_epoch"
    END_TRAINING = "end_training"
    NOTHING = "nothing"


def next_move(state: TrainState, run: Run) -> Move:
    """Return the next step of a loop from `state`.

    Args:
        state: The current state.
        run: Gives `end` and `updates_per_epoch`.

    Returns:
        `NOTHING` once the run has ended; `END_EPOCH` if all batches of the epoch are counted, but not yet the epoch;
        `END_TRAINING` at the run's end or if the state asks to stop; else `UPDATE`, with the batch at position
        `updates_in_epoch(state, run)` of the epoch.

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
    if updates_in_epoch(state, run) >= run.updates_per_epoch:
        return Move.END_EPOCH
    return Move.END_TRAINING if over else Move.UPDATE


def updates_in_epoch(state: TrainState, run: Run) -> int:
    """Return the number of updates completed in the current epoch, whatever the lengths of the epochs before it.

    Args:
        state: The current state.
        run: Gives `updates_per_epoch` if the state does not know where the epoch began.

    Example:
        >>> from noether import Run, TrainState
        >>> updates_in_epoch(TrainState().advance(samples=4).next_epoch().advance(samples=4), Run())
        1
    """
    at, start = state.iteration, state.epoch_start
    return at.update - (start.update if start.epoch == at.epoch else at.epoch * run.updates_per_epoch)
