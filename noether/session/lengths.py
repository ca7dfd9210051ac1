"""The lengths of epochs that a loop announces, and comparisons of them with the run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from noether.core.run import Run
    from noether.core.state import TrainState

LENGTHS: Final = ("updates_per_epoch", "samples_per_epoch", "effective_batch_size")
"""The fields of a `Run` that describe an epoch."""


class Contradiction(NamedTuple):
    """Lengths that a run does not have.

    Args:
        reason: What the run has instead.
        fields: The fields of `Run` that no longer hold.
    """

    reason: str
    fields: tuple[str, ...] = LENGTHS


def known_lengths(run: Run) -> dict[str, int]:
    """Return the lengths that `run` was given.

    Example:
        >>> from noether import Run
        >>> known_lengths(Run(updates_per_epoch=3, rank=0))
        {'updates_per_epoch': 3}
    """
    return {name: vars(run)[name] for name in LENGTHS if name in vars(run)}


def lengths_of_ranks(lengths: Mapping[str, int], world_size: int | None) -> dict[str, int]:
    """Return the lengths of a run on several ranks.

    Args:
        lengths: Those of one rank.
        world_size: Number of ranks, of equal batches; None if batches may differ, so that samples are not known.

    Example:
        >>> lengths_of_ranks({"updates_per_epoch": 3, "samples_per_epoch": 9}, 2)
        {'updates_per_epoch': 3, 'samples_per_epoch': 18}
    """
    return {
        name: count if name == "updates_per_epoch" else count * (world_size or 1)
        for name, count in lengths.items()
        if name == "updates_per_epoch" or world_size is not None
    }


def without_fields(run: Run, names: Iterable[str]) -> Run:
    """Return `run` as if it had not been given some of its fields.

    Example:
        >>> from noether import Run
        >>> run = without_fields(Run(updates_per_epoch=3, samples_per_epoch=9), ["updates_per_epoch"])
        >>> hasattr(run, "updates_per_epoch"), run.samples_per_epoch
        (False, 9)
    """
    return type(run)(**{name: value for name, value in vars(run).items() if name not in names})


def compare_saved_lengths(state: TrainState, run: Run) -> Contradiction | None:
    """Compare the lengths of a saved run with those of `run`; return the first difference, or None."""
    now, at, start = known_lengths(run), state.iteration, state.epoch_start
    if changed := [name for name in now if state.lengths.get(name, now[name]) != now[name]]:
        old, new = (", ".join(f"{name}={values[name]}" for name in changed) for values in (state.lengths, now))
        return Contradiction(f"the saved run was made with {old}, and this loop has {new}", _invalid(changed))
    if start.epoch != at.epoch:  # a checkpoint of an earlier version
        return None
    for name, counter in _COUNTERS.items():
        begins, count = now.get(name, 0) * at.epoch, getattr(start, counter)
        if name in now and begins != count:
            reason = f"epoch {at.epoch} of the saved run began after {count} {counter}s, not {begins}"
            return Contradiction(reason, _invalid([name]))
    return None


def compare_epoch_lengths(state: TrainState, run: Run) -> Contradiction | None:
    """Compare the epoch that ends at `state` with the lengths of `run`; return the first difference, or None."""
    at, start = state.iteration, state.epoch_start
    if start.epoch != at.epoch:
        return None
    for name, counter in _COUNTERS.items():
        count, expected = getattr(at, counter) - getattr(start, counter), vars(run).get(name)
        if expected is not None and count != expected:
            return Contradiction(f"epoch {at.epoch} had {count} {counter}s, not {name}={expected}", _invalid([name]))
    return None


_COUNTERS: Final = {"updates_per_epoch": "update", "samples_per_epoch": "sample"}


def _invalid(changed: Iterable[str]) -> tuple[str, ...]:
    """Return the fields that no longer hold: all if the number of updates changed, else those that count samples."""
    return LENGTHS if "updates_per_epoch" in changed else LENGTHS[1:]
