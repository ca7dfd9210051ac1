"""Counts how often the parts of a callback act in a run, and says why one never does."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, final

from noether.core.callback import declaration_of, label_of
from noether.core.callbacks.base import HOOKS
from noether.core.callbacks.interval import PeriodicCallback
from noether.core.event import AfterEpoch, AfterTraining, AfterUpdate
from noether.core.iteration import COUNTERS
from noether.core.reducer import Reducer, compose, identity
from noether.core.schedules.schedule import At
from noether.core.schedules.window import START
from noether.core.wrappers import Bound, Gated, On, Remembering, When
from noether.testing.functions import CallbackProxy
from noether.testing.metric_source import metric_source
from noether.testing.traces import drive

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from noether.core.callback import Callback, Effects
    from noether.core.event import Event
    from noether.core.schedules.base import Schedule
    from noether.core.schedules.gate import Gate
    from noether.core.state import TrainState
    from noether.testing.traces import Trace

_WRAPPERS: Final = (Gated, On, When, Remembering, Bound)  # final classes, which a type checker can tell apart
_GATE_EVENTS: Final = (AfterUpdate, AfterEpoch, AfterTraining)


@final
@dataclass(eq=False)
class Part:
    """A function or object that does the work of a callback, inside of its decorators, with what it did in the runs.

    Args:
        callback: The function or object.
        label: Name of the callback in messages.
        gate: The gate that it is behind, or its own; None if it has none.
        decorator: The innermost decorator that says when to call it; None if there is none.
        calls: How often it was called.
        acts: How often it acted: it was called through a decorator or at its interval, it requested effects, or it
            changed the state otherwise than by tracking.
        effects: Number of effects that it requested.
    """

    callback: Callback
    label: str
    gate: Gate | None = None
    decorator: Gated | On | When | None = None
    calls: int = 0
    acts: int = 0
    effects: int = 0

    @property
    def schedule(self) -> Schedule | None:
        """When it acts at the earliest, as far as its settings say so."""
        if self.gate is not None:
            return self.gate.schedule
        point = getattr(self.callback, "point", None)  # as `FixedUpdateEarlyStopping` has it
        return None if point is None else At(point)


def parts_of(callback: Callback) -> list[Part]:
    """Return the parts of a callback, in order.

    Example:
        >>> from noether import compose, every_n_epochs, on, AfterUpdate
        >>> def body(state, event):
        ...     return state, ()
        >>> [str(part.schedule) for part in parts_of(compose(every_n_epochs(5)(body), on(AfterUpdate)(body)))]
        ['E5', 'None']
    """
    parts: list[Part] = []
    _observe(callback, parts)
    return parts


def count_acts(callback: Callback, traces: Iterable[Trace], *, every: bool = False) -> list[Part]:
    """Return the parts of a callback with what they did in runs; a source provides the metrics that it consumes.

    Args:
        callback: Any callback.
        traces: The runs.
        every: Whether to count all runs; by default the last one counted is that in which the last part has acted.
    """
    parts: list[Part] = []
    observed = _observe(callback, parts)
    for trace in traces:
        drive(compose(metric_source(callback, finite=trace.finite_metrics), observed), trace)
        if not every and all(part.acts for part in parts):
            break
    return parts


def explain_inactivity(part: Part, traces: Iterable[Trace]) -> str:
    """Return why a part did not act in runs, as far as that is known."""
    decorator = part.decorator
    if part.schedule is not None:
        furthest = max((trace.run.final for trace in traces), key=lambda at: at.update)
        first = part.schedule.next_due(START)
        due = " or ".join(f"{name} {n}" for name in COUNTERS if (n := getattr(first, name)) is not None)
        return (
            f"its schedule is {f'first due at {due}' if due else 'never due'}, and the longest run ends at {furthest}"
        )
    if isinstance(decorator, On):
        return f"it listens to {', '.join(each.__name__ for each in decorator.event_types)} only"
    if isinstance(decorator, When):
        return "the condition of its `when` was never true"
    return f"in {part.calls} calls it always returned the same state and no effects"


def _observe(callback: Callback, parts: list[Part], outer: Part | None = None) -> Callback:
    """Return the callback with a proxy around each of its parts that counts, and append the parts to `parts`."""
    if isinstance(callback, Reducer):
        members = [_observe(each, parts, outer and replace(outer, label=label_of(each))) for each in callback.members]
        return compose(*members) if outer is None else compose(*members).without_checks()
    outer = outer or Part(callback, label_of(callback))
    outer = replace(outer, callback=callback, gate=outer.gate or declaration_of(callback).gate)
    if isinstance(callback, _WRAPPERS):
        if isinstance(callback, (Gated, On, When)):
            outer = replace(outer, decorator=callback)
        return replace(callback, callback=_observe(callback.callback, parts, outer))
    if callback is identity:
        return callback
    parts.append(outer)
    return _CountingProxy(outer)


class _CountingProxy(CallbackProxy):
    """Calls a callback and counts what it does."""

    def __init__(self, part: Part) -> None:
        super().__init__(part.callback)
        self._part = part

    def __call__(self, state: TrainState, event: Event, **settings: Any) -> tuple[TrainState, Effects]:
        call: Callable[..., tuple[TrainState, Effects]] = self._part.callback
        after, effects = call(state, event, **settings)
        self._part.calls += 1
        self._part.effects += len(effects)
        self._part.acts += bool(effects) or self._part.decorator is not None or _acts(call, state, after, event)
        return after, effects


def _acts(callback: Callback, before: TrainState, after: TrainState, event: Event) -> bool:
    """Return whether a callback fires at its interval or changes the state; memory that it only tracks is left out."""
    hook = next((hook for kind, hook in HOOKS.items() if isinstance(event, kind)), "__call__")
    if not isinstance(callback, PeriodicCallback) or callback.overrides(hook, PeriodicCallback):
        return after is not before
    if isinstance(event, _GATE_EVENTS) and callback.gate.opens(before, event) is not None:
        return True
    return any(getattr(after, name) is not getattr(before, name) for name in vars(before) if name != "callback_states")
