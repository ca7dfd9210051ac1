"""Hypothesis strategies for runs, traces, states, schedules and their parts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, final

import torch
from hypothesis import strategies as st

from noether.core.iteration import COUNTERS, TrainingIteration
from noether.core.run import Run
from noether.core.schedules.schedule import At, EveryNEpochs, EveryNSamples, EveryNUpdates
from noether.core.state import Measured, TrainState
from noether.testing.traces import Reading, Trace

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from noether.core.schedules.base import Schedule

_LONGEST: Final = 60


@st.composite
def run_lengths(draw: Callable[..., Any], max_epochs: int = 6) -> Run:
    """Runs of a few epochs, most of them with a short last batch; only their end and sizes are set.

    Example:
        >>> from hypothesis import find
        >>> find(run_lengths(), lambda run: run.updates_per_epoch == 2).effective_batch_size
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


def runs(*, max_epochs: int = 3, finite: bool = False, interrupted: bool = True) -> st.SearchStrategy[Trace]:
    """Traces of runs as a real loop emits them: accumulation, short last batches, epochs, interruptions.

    Every dataset key names a dataset of a few batches. The forward uses the params of the trace and has two classes.

    Args:
        max_epochs: Largest number of epochs, >= 1.
        finite: Whether all losses are finite.
        interrupted: Whether a process may end before the run does.

    Example:
        >>> from hypothesis import find
        >>> trace = find(runs(), lambda trace: len(trace.interruptions) == 1)
        >>> str(trace.run.final), trace.readings[0].losses
        ('E1_U1_S1', (0.0,))
    """
    return _runs(max_epochs, finite, interrupted)


@st.composite
def _runs(draw: Callable[..., Any], max_epochs: int, finite: bool, interrupted: bool) -> Trace:  # noqa: FBT001  # private
    batch, length = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    run = Run(
        end=TrainingIteration(epoch=draw(st.integers(1, max_epochs))),
        updates_per_epoch=-(-length // batch),
        samples_per_epoch=length,
        effective_batch_size=min(batch, length),
        run_id="trace",
        config={},
        data=_AnyDataset(),
        forward=_forward,
        frozen=frozenset(),
    )
    reading = st.builds(Reading, st.lists(losses(finite=finite), min_size=1, max_size=3).map(tuple), _DURATIONS)
    readings = draw(st.lists(reading, min_size=1, max_size=run.final.update).map(tuple))
    stops = draw(cuts(run.final.update)) if interrupted else ()
    return Trace(run, readings, stops, seed=draw(st.integers(0, 9)))


def losses(*, finite: bool = False) -> st.SearchStrategy[float]:
    """Losses of a real run: small numbers, sometimes large ones, NaN or an infinity.

    Args:
        finite: Whether to leave out NaN and the infinities.

    Example:
        >>> from hypothesis import find
        >>> find(losses(), math.isnan)
        nan
    """
    usual = st.one_of(st.sampled_from((0.0, 0.25, 0.5, 1.0, 2.0)), st.floats(-4.0, 2.0**100, width=32))
    return usual if finite else st.one_of(usual, st.sampled_from((math.nan, math.inf, -math.inf)))


def cuts(length: int = 12) -> st.SearchStrategy[tuple[int, ...]]:
    """Up to three places, in order, at which to cut a run of `length` events.

    Example:
        >>> from hypothesis import find
        >>> find(cuts(9), lambda places: len(places) == 2)
        (0, 1)
    """
    return st.sets(st.integers(0, length), max_size=3).map(lambda places: tuple(sorted(places)))


def batch_sizes(largest: int = 12) -> st.SearchStrategy[tuple[int, ...]]:
    """Batch sizes, each at least 1.

    Example:
        >>> from hypothesis import find
        >>> find(batch_sizes(), lambda sizes: len(sizes) == 2)
        (1, 1)
    """
    return st.lists(st.integers(1, largest), min_size=1, max_size=20).map(tuple)


def iterations(largest: int = _LONGEST) -> st.SearchStrategy[TrainingIteration]:
    """Iterations that a run can reach: an update has at least one sample, and an epoch at least one update.

    Example:
        >>> from hypothesis import find
        >>> str(find(iterations(), lambda iteration: iteration.epoch == 2))
        'E2_U2_S2'
    """
    counts = st.tuples(*(st.integers(0, largest // 3) for _ in COUNTERS))
    return counts.map(lambda more: TrainingIteration(more[0], more[0] + more[1], sum(more)))


@st.composite
def states(draw: Callable[..., Any]) -> TrainState:
    """States in the middle of a run, with params, metrics and memories of callbacks.

    Example:
        >>> from hypothesis import find
        >>> sorted(find(states(), lambda state: state.iteration.update == 1).params)
        ['b', 'w']
    """
    before = draw(iterations())
    state = Trace(Run(), seed=draw(st.integers(0, 9))).start().replace(iteration=before)
    state = state.advance(samples=draw(st.integers(1, 8)))
    measured = draw(st.dictionaries(st.sampled_from(("loss/val/total", "val/accuracy")), losses()))
    metrics = {key: Measured(value, state.iteration) for key, value in measured.items()}
    leaf = st.one_of(st.none(), st.booleans(), st.integers(-9, 9), losses(), st.just(torch.tensor([2.0, -0.0])))
    memory = st.recursive(leaf, lambda inner: st.dictionaries(st.sampled_from("ab"), inner, max_size=2), max_leaves=4)
    memories = draw(st.dictionaries(st.sampled_from(("one", "other")), memory))
    return state.replace(metrics=metrics, callback_states=memories)


def points(largest: int = _LONGEST) -> st.SearchStrategy[TrainingIteration]:
    """Points on one counter, after the start."""
    return st.builds(
        lambda counter, value: TrainingIteration(**{counter: value}), st.sampled_from(COUNTERS), st.integers(1, largest)
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
    return st.recursive(st.one_of(single, _at(largest)), _compound_schedules, max_leaves=4)


_DURATIONS: Final = st.sampled_from((0.25, 0.5, 1.0, 64.0))


def _at(largest: int) -> st.SearchStrategy[Schedule]:
    values = st.lists(st.integers(1, largest), min_size=1, max_size=4)
    return st.builds(
        lambda counter, counts: At(*(TrainingIteration(**{counter: count}) for count in counts)),
        st.sampled_from(COUNTERS),
        values,
    )


def _compound_schedules(schedules: st.SearchStrategy[Schedule]) -> st.SearchStrategy[Schedule]:
    return st.one_of(
        st.builds(lambda a, b: a | b, schedules, schedules),
        st.builds(lambda schedule, point: schedule.starting(point), schedules, points()),
        st.builds(lambda schedule, point: schedule.until(point), schedules, points()),
    )


@final
class _AnyDataset(Mapping[str, Any]):
    """Has a dataset under every key, because a tested callback may iterate any."""

    def __getitem__(self, key: str) -> Any:
        return _BATCHES

    def __iter__(self) -> Iterator[str]:
        return iter(("train", "val"))

    def __len__(self) -> int:
        return 2


_BATCHES: Final = (
    (torch.tensor([[1.0, 2.0], [-1.0, 0.5]]), torch.tensor([0, 1])),
    (torch.tensor([[0.25, -3.0]]), torch.tensor([1])),
)


def _forward(state: TrainState, batch: tuple[torch.Tensor, torch.Tensor]) -> tuple[dict[str, torch.Tensor], Any]:
    inputs, targets = batch
    outputs = inputs * state.params["w"] + state.params["b"]
    return {"total": torch.nn.functional.cross_entropy(outputs, targets)}, outputs
