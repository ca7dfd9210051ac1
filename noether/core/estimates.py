"""Estimates of the end of a run: from the lengths of epochs if they are known, else from the epochs so far."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from noether.core.iteration import COUNTERS, Counter

if TYPE_CHECKING:
    from noether.core.iteration import TrainingIteration
    from noether.core.run import Run
    from noether.core.state import TrainState

_NEEDS: Final[dict[Counter, frozenset[str]]] = {
    "epoch": frozenset({"updates_per_epoch"}),
    "update": frozenset(),
    "sample": frozenset({"updates_per_epoch", "samples_per_epoch", "effective_batch_size"}),
}
_KNOWN_END: Final = frozenset({"end", *_NEEDS["sample"]})


def known_end(run: Run) -> TrainingIteration | None:
    """Return the last iteration of a run, or None if its end or the lengths of its epochs are unknown.

    Example:
        >>> from noether import Run, TrainingIteration
        >>> known_end(Run(end=TrainingIteration(epoch=2))) is None
        True
    """
    return run.final if vars(run).keys() >= _KNOWN_END else None


def estimate_end(state: TrainState, run: Run) -> int | None:
    """Return the number of updates after which a run is expected to end, or None if it cannot be estimated.

    Example:
        >>> from noether import Run, TrainingIteration, TrainState
        >>> run, state = Run(end=TrainingIteration(epoch=3)), TrainState().advance(samples=4)
        >>> estimate_end(state, run), estimate_end(state.next_epoch(), run)
        (None, 3)
    """
    if (known := known_end(run)) is not None:
        return max(state.iteration.update, known.update)
    if "end" not in vars(run):
        return None
    ends = ((name, getattr(run.end, name)) for name in COUNTERS)
    expected = [estimate_updates(state, run, name, count) for name, count in ends if count]
    return None if None in expected else max([state.iteration.update, *(each or 0 for each in expected)])


def estimate_updates(state: TrainState, run: Run, counter: Counter, count: int) -> int | None:
    """Return the number of updates after which `count` of `counter` are expected to be completed.

    Without lengths, epochs are expected to have as many updates as those before, and updates as many samples.

    Args:
        state: The state so far.
        run: Gives the lengths of epochs, if they are known.
        counter: What is counted.
        count: Its count, not reached yet.

    Returns:
        The number of updates; None before the first epoch has ended (for epochs), or the first update (for samples).
    """
    if vars(run).keys() >= _NEEDS[counter]:
        return run.updates_to(counter, count)
    at, start = state.iteration, state.epoch_start
    if counter == "epoch":
        updates = round(start.update * count / at.epoch) if at.epoch and start.epoch == at.epoch else None
    else:
        updates = at.update - (at.sample - count) * at.update // at.sample if at.sample else None
    return None if updates is None else max(updates, at.update)
