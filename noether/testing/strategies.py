"""Hypothesis strategies for what schedules and callbacks are functions of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hypothesis import strategies as st

from noether.core.iteration import COUNTERS, TrainingIteration
from noether.core.run import Run
from noether.core.schedule import At, EveryNEpochs, EveryNSamples, EveryNUpdates, Schedule

if TYPE_CHECKING:
    from collections.abc import Callable


@st.composite
def runs(draw: Callable[..., Any], max_epochs: int = 6) -> Run:
    """Runs of a few epochs, most with a short last batch.

    Example:
        >>> from hypothesis import find
        >>> find(runs(), lambda run: run.updates_per_epoch == 2).effective_batch_size
        1
    """
    batch, length = draw(st.integers(1, 8)), draw(st.integers(1, 30))
    epochs = draw(st.integers(1, max_epochs))
    return Run(
        end=TrainingIteration(epoch=epochs),
        updates_per_epoch=-(-length // batch),
        samples_per_epoch=length,
        effective_batch_size=min(batch, length),
    )


def points(largest: int = 60) -> st.SearchStrategy[TrainingIteration]:
    """Points on one counter, not at the start."""
    return st.builds(
        lambda counter, value: TrainingIteration(**{counter: value}), st.sampled_from(COUNTERS), st.integers(1, largest)
    )


def _at(largest: int) -> st.SearchStrategy[Schedule]:
    values = st.lists(st.integers(1, largest), min_size=1, max_size=4)
    return st.builds(
        lambda counter, counts: At(*(TrainingIteration(**{counter: count}) for count in counts)),
        st.sampled_from(COUNTERS),
        values,
    )


def _limited(schedules: st.SearchStrategy[Schedule]) -> st.SearchStrategy[Schedule]:
    return st.one_of(
        st.builds(lambda a, b: a | b, schedules, schedules),
        st.builds(lambda schedule, point: schedule.starting(point), schedules, points()),
        st.builds(lambda schedule, point: schedule.until(point), schedules, points()),
    )


def schedules(largest: int = 40) -> st.SearchStrategy[Schedule]:
    """Schedules of every kind, closed under `|`, `starting` and `until`.

    Example:
        >>> from hypothesis import find
        >>> str(find(schedules(), lambda schedule: isinstance(schedule, EveryNSamples)))
        'S1'
    """
    n = st.integers(1, largest)
    single = st.one_of(st.builds(EveryNEpochs, n), st.builds(EveryNUpdates, n), st.builds(EveryNSamples, n))
    return st.recursive(st.one_of(single, _at(largest)), _limited, max_leaves=4)
