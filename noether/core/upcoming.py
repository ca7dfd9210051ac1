"""What comes next: a pure function of the state, so that entering at a loaded state is the same as going on."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from noether.core.run import Run
    from noether.core.state import TrainState


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
