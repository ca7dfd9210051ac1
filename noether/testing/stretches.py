"""The law that a callback which is called once for several deferred updates does what it would do at each."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Final, final

from hypothesis import strategies as st

from noether.core.callback import label_of, listens_to
from noether.core.effect import LogUpdates, LogUpdateText
from noether.core.event import AfterAccumulationStep, AfterUpdate
from noether.core.reducer import compose
from noether.core.stretch import Stretch
from noether.testing.counterexamples import LawError
from noether.testing.functions import copy_callback
from noether.testing.law_runs import check_runs
from noether.testing.metric_source import add_metric_source
from noether.testing.run_differences import compare_runs
from noether.testing.traces import DrivenRun, drive, run_loop

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Unpack

    from hypothesis.strategies import SearchStrategy

    from noether.core.callback import Callback, Effects
    from noether.core.effect import Effect
    from noether.core.event import Event
    from noether.core.iteration import TrainingIteration
    from noether.core.reducer import Reducer
    from noether.core.state import TrainState
    from noether.core.stretch import CompletedUpdate
    from noether.testing.models import ModelArguments
    from noether.testing.traces import Trace

    Traces = SearchStrategy[Trace] | None

_EXAMPLES: Final = 100
_MORE_EXAMPLES: Final = 50
"""Further runs to try if updates can be deferred, and none was in the first runs."""
_LONGEST: Final = 8
_VIOLATION: Final = (
    "does something else when a loop calls it once for several updates; track_updates may read of the state only its "
    "own memory and metrics, and has to take the updates in order: it differs from a run that calls it at each update"
)


def check_stretches(
    callback: Callback, *, traces: Traces = None, examples: int = _EXAMPLES, **model: Unpack[ModelArguments]
) -> None:
    """Raise unless a run that calls callbacks once for several updates equals one that calls them at each.

    At every event that is not deferred, states and effects are compared; at deferred updates, the scalars that are
    logged. The trainer defers updates as described at `PeriodicCallback.track_updates`.

    Args:
        callback: Any callback.
        traces: The runs to try; None for all kinds, long enough for the schedules of the callback.
        examples: Largest number of runs to try, >= 1.
        model: What the callback sees of the model: `model=`, `losses=`, `outputs=`, `groups=`, `data=`, `forward=`; see
            `noether.testing.ModelArguments`.

    Raises:
        LawError: With the simplest run that differs, and the first difference.

    Example:
        >>> from noether import LrCallback
        >>> check_stretches(LrCallback(every_n_updates=1), examples=5)
    """
    has_deferred: list[bool] = []  # for each run in which updates can be deferred

    def law(trace: Trace, longest: int) -> None:
        trace = replace(trace, own_events=False)  # a loop with events of its own defers none
        complete = add_metric_source(callback, finite=trace.finite_metrics)
        expected = drive(copy_callback(complete), trace)
        reducer = compose(copy_callback(complete))
        found = _DeferringRun(reducer, longest)
        run_loop(trace, found.dispatch)
        if reducer.defers_updates:
            has_deferred.append(found.has_deferred)
        compare_runs(callback, _VIOLATION, found.fill_in(expected), expected, trace)

    for count in (examples, _MORE_EXAMPLES):
        check_runs(callback, law, st.integers(2, _LONGEST), traces=traces, examples=count, model=model)
        if any(has_deferred) or not has_deferred:
            return
    raise LawError(f"no update was deferred for {label_of(callback)}; give traces=... with longer epochs")


@final
class _DeferringRun:
    """A run that defers up to `longest` consecutive updates."""

    def __init__(self, reducer: Reducer, longest: int) -> None:
        self.has_deferred = False
        self._reducer = reducer
        self._stretch = Stretch(reducer, self, max_s=math.inf, max_updates=longest)
        self._driven: list[tuple[Event, TrainState, Effects]] = []
        self._deferred: set[int] = set()  # indexes of deferred events, and of those for which no callback is called
        self._logged: dict[TrainingIteration, Effects] = {}

    def dispatch(self, state: TrainState, event: Event) -> TrainState:
        """Return the state after an event, which may be deferred."""
        effects: Effects = ()
        if self._defer(state, event):
            self._deferred.add(len(self._driven))
        else:
            state = self._stretch.call_callbacks(state)
            self._stretch.run_effects(state)
            state, effects = self._reducer(state, event)
        self._driven.append((event, state, effects))
        return state

    def _defer(self, state: TrainState, event: Event) -> bool:
        if isinstance(event, AfterUpdate):
            return self._stretch.defer(state, event)
        return isinstance(event, AfterAccumulationStep) and not listens_to(self._reducer, type(event))

    def __call__(self, effects: Effects, state: TrainState, event: Event) -> None:
        """Do nothing: `dispatch` records the effects of a single event."""

    def interpret_stretch(self, effects: Effects, _: TrainState, updates: Sequence[CompletedUpdate]) -> None:
        """Record the effects that log each update."""
        self.has_deferred = self.has_deferred or bool(updates)
        for effect in effects:
            assert isinstance(effect, (LogUpdates, LogUpdateText))  # noqa: S101  # for mypy: a reducer refuses others
            if isinstance(effect, LogUpdateText):
                self._log(effect.iteration, effect.text)
                continue
            for row in effect.rows:
                self._log(row.iteration, effect.scalars_of(row))

    def _log(self, iteration: TrainingIteration, effect: Effect) -> None:
        self._logged[iteration] = (*self._logged.get(iteration, ()), effect)

    def fill_in(self, expected: DrivenRun) -> DrivenRun:
        """Return the run, at deferred events with the expected states and with the effects that log the update."""
        complete: list[tuple[Event, TrainState, Effects]] = []
        for index, (driven, expected_state) in enumerate(zip(self._driven, expected.states, strict=False)):
            event, state, _ = driven
            logged = self._logged.get(state.iteration, ()) if isinstance(event, AfterUpdate) else ()
            complete.append((event, expected_state, logged) if index in self._deferred else driven)
        events, states, effects = zip(*complete, strict=True)
        return DrivenRun(events, states, effects)
