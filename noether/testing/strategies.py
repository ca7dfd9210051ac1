"""Hypothesis strategies for runs, traces, states, schedules and their parts."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Unpack

import torch
from hypothesis import strategies as st

from noether.core.iteration import COUNTERS, TrainingIteration
from noether.core.run import Run
from noether.core.schedules.forecast import Occasions, count_until, nth_firing
from noether.core.schedules.schedule import At, EveryNEpochs, EveryNSamples, EveryNUpdates
from noether.core.state import Measured
from noether.testing.models import ModelArguments, TracedModel
from noether.testing.traces import Reading, Trace

if TYPE_CHECKING:
    from collections.abc import Callable

    from noether.core.schedules.base import Schedule
    from noether.core.state import TrainState

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


def runs(
    *,
    max_epochs: int = 3,
    finite: bool = False,
    interrupted: bool = True,
    empty: bool = False,
    **model: Unpack[ModelArguments],
) -> st.SearchStrategy[Trace]:
    """Traces of runs as a real loop emits them.

    They have accumulation, short last batches, skipped updates, one or more parameter groups, evaluations,
    interruptions; they end after an epoch or within one, or because another callback stops them. Some start shortly
    before update 50, 100 or 1000, as a run that is resumed with new callbacks. Some have events of subclasses.

    Every dataset key names a dataset of a few batches, and the forward uses the params of the trace and has two
    classes, unless `model` says otherwise.

    Args:
        max_epochs: Largest number of epochs, >= 1.
        finite: Whether all losses are finite, no update is skipped for another reason than that it is empty, and the
            metrics that a law provides are finite.
        interrupted: Whether a process may end before the run does.
        empty: Whether some updates are empty: all their micro-batches have no samples, so they have no losses.
        model: What callbacks see of the model; see `ModelArguments`.

    Example:
        >>> from hypothesis import find
        >>> trace = find(runs(), lambda trace: len(trace.interruptions) == 1)
        >>> str(trace.run.final), trace.readings[0].losses
        ('E1_U1_S1', (0.0,))
    """
    kinds = _Kinds(max_epochs, finite, interrupted, empty)
    return _runs(kinds, TracedModel().with_arguments(**model), ())


def runs_reaching(*schedules: Schedule | None) -> st.SearchStrategy[Trace]:
    """Traces like those of `runs`, but each is long enough for a schedule to be due, or starts shortly before.

    Args:
        schedules: The schedules; None stands for runs of any length.

    Example:
        >>> from hypothesis import find
        >>> str(find(runs_reaching(EveryNUpdates(5000)), lambda trace: True).run.final)
        'E5000_U5000_S5000'
    """
    return _runs(_Kinds(), TracedModel(), schedules)


class _Kinds(NamedTuple):
    max_epochs: int = 3
    finite: bool = False
    interrupted: bool = True
    empty: bool = False


@st.composite
def _runs(draw: Callable[..., Any], kinds: _Kinds, model: TracedModel, schedules: tuple[Schedule | None, ...]) -> Trace:
    batch, length = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    shape = Run(
        updates_per_epoch=-(-length // batch), samples_per_epoch=length, effective_batch_size=min(batch, length)
    )
    first, end = draw(_spans(shape, kinds, schedules))
    run = shape.replace(end=end, run_id="trace", config={})
    updates = run.final.update - first
    readings = draw(st.lists(_readings(kinds), min_size=1, max_size=min(updates, _MOST_READINGS)).map(tuple))
    places = cuts(updates).map(lambda found: tuple(run.iteration_after(first).epoch + first + each for each in found))
    if "groups" not in model.given:
        model = replace(model, groups=draw(st.sampled_from((("default",), ("default", "head")))))
    trace = Trace(
        run, readings, draw(places) if kinds.interrupted else (), seed=draw(st.integers(0, 9)), first_update=first,
        evaluations=draw(st.one_of(st.just(()), places)), finite_metrics=kinds.finite, own_events=draw(_RARELY),
        stop=draw(st.one_of(st.none(), st.none(), st.none(), st.integers(first + 1, first + updates))),
    )  # fmt: skip
    return trace.with_model(model)


@st.composite
def _spans(
    draw: Callable[..., Any], shape: Run, kinds: _Kinds, schedules: tuple[Schedule | None, ...]
) -> tuple[int, TrainingIteration]:
    """The completed updates at the start of a trace, and the end of its run."""
    first, updates = 0, draw(st.integers(1, kinds.max_epochs)) * shape.updates_per_epoch
    schedule = draw(st.sampled_from(schedules)) if schedules else None
    due = None if schedule is None else _update_of_firing(schedule, draw(st.integers(1, 2)), shape)
    if due is None:
        first = draw(st.sampled_from((0, 0, *_LATE_STARTS)))
    elif due > _MOST_READINGS:
        first = due - draw(st.integers(1, 4))
    last = max(first + updates, due or 0)
    if draw(st.booleans()):  # it ends within an epoch
        return first, TrainingIteration(update=draw(st.integers(max(due or 0, first + 1), last)))
    return first, TrainingIteration(epoch=-(-last // shape.updates_per_epoch))


_RARELY: Final = st.sampled_from((False, False, False, True))
_LATE_STARTS: Final = (48, 98, 998)
_MOST_READINGS: Final = 12
"""A schedule that is due later than this is reached by a run that starts late."""
_FAR: Final = TrainingIteration(update=10**9)


def _update_of_firing(schedule: Schedule, number: int, shape: Run) -> int | None:
    """Return the number of the update at which a schedule is due for the n-th time, or for the first; None if never."""
    run, occasions = shape.replace(end=_FAR), Occasions(schedule)
    firings = min(number, count_until(occasions, run.final, run))
    return nth_firing(occasions, firings, run).iteration.update if firings else None


@cache  # with a new strategy for each trace, hypothesis would validate all of its parts each time
def _readings(kinds: _Kinds) -> st.SearchStrategy[Reading]:
    measured = st.lists(losses(finite=kinds.finite), min_size=1, max_size=3).map(tuple)
    skipped = st.just(False) if kinds.finite else st.sampled_from((False, False, True))
    reading = st.builds(Reading, measured, _DURATIONS, skipped)
    return st.one_of(reading, reading, st.builds(Reading, st.just(()), _DURATIONS)) if kinds.empty else reading


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
