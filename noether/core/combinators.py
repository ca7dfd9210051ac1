"""Decorators for callbacks: when to call a function, and what memory it has."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from noether.core.callables import describe_misfit
from noether.core.callback import label_of
from noether.core.callback_checks import check_callback, check_effect_types, check_key_tuples, check_unscheduled
from noether.core.errors import raise_problems
from noether.core.event import AfterUpdate, Event, check_reading
from noether.core.reducer import Reducer
from noether.core.schedules.base import Schedule
from noether.core.schedules.gate import Gate
from noether.core.schedules.schedule import EveryNEpochs, EveryNSamples, EveryNUpdates
from noether.core.wrappers import Gated, On, Remembering, When

if TYPE_CHECKING:
    from collections.abc import Callable

    from noether.core.callback import Callback
    from noether.core.effect import Effect
    from noether.core.state import Memory, TrainState

    Decorator = Callable[[Callback], "Callback"]


def every_n_epochs(n: int, *, at_end: bool = False) -> Decorator:
    """Return the decorator that calls a callback at the end of every n-th epoch.

    Args:
        n: Epochs between calls, >= 1.
        at_end: Whether to also call it after training, unless it was due at the last update or epoch.

    Raises:
        SettingsError: If `n` is not a whole number >= 1.

    Example:
        >>> from noether import AfterEpoch, LogText, TrainState, every_n_epochs
        >>> @every_n_epochs(2)
        ... def say(state, event):
        ...     return state, (LogText(f"epoch {state.iteration.epoch}"),)
        >>> say(TrainState().next_epoch(), AfterEpoch())[1]
        ()
        >>> say(TrainState().next_epoch().next_epoch(), AfterEpoch())[1]
        (LogText(text='epoch 2'),)
    """
    return _gate_decorator(EveryNEpochs(n), at_end=at_end)


def every_n_updates(n: int, *, at_end: bool = False) -> Decorator:
    """Return the decorator that calls a callback after every n-th update; see `every_n_epochs`."""
    return _gate_decorator(EveryNUpdates(n), at_end=at_end)


def every_n_samples(n: int, *, at_end: bool = False) -> Decorator:
    """Return the decorator that calls a callback after every update that crosses a multiple of n samples."""
    return _gate_decorator(EveryNSamples(n), at_end=at_end)


def on(*event_types: type[Event]) -> Decorator:
    """Return the decorator that calls a callback on events of these types only.

    Example:
        >>> from noether import AfterTraining, LogText, TrainState, on
        >>> farewell = on(AfterTraining)(lambda state, event: (state, (LogText("done"),)))
        >>> farewell(TrainState(), AfterTraining())[1]
        (LogText(text='done'),)
    """
    given: tuple[Any, ...] = event_types
    if not given or not all(isinstance(each, type) and issubclass(each, Event) for each in given):
        shown = ", ".join(map(repr, given)) or "nothing"
        raise TypeError(f"on takes types of events, like on(AfterEpoch); got {shown}")

    def decorate(callback: Callback) -> Callback:
        if isinstance(callback, Reducer):
            return Reducer(tuple(decorate(member) for member in callback.members))
        check_callback(callback, "on")
        check_unscheduled(callback, "on")
        return On(callback, event_types)

    return decorate


def when(condition: Schedule | Callable[[TrainState, Event], bool], *, at_end: bool = False) -> Decorator:
    """Return the decorator that calls a callback when a schedule is due, or when `condition(state, event)` is true.

    Args:
        condition: A schedule, or a pure predicate.
        at_end: As for `every_n_epochs`; only with a schedule.

    Raises:
        TypeError: If `at_end` is given with a predicate.

    Example:
        >>> from noether import AfterUpdate, At, LogText, TrainingIteration, TrainState, when
        >>> note = when(At(TrainingIteration(update=1)))(lambda state, event: (state, (LogText("first"),)))
        >>> note(TrainState().advance(samples=1), AfterUpdate(samples=1))[1]
        (LogText(text='first'),)
    """
    if isinstance(condition, Schedule):
        return _gate_decorator(condition, at_end=at_end)
    if at_end:
        raise TypeError("at_end needs a schedule; a predicate can test for AfterTraining itself")
    expected = "when takes a schedule such as EveryNUpdates(2), or a predicate (state, event) -> bool; got"
    if isinstance(condition, type) or not callable(condition):
        raise TypeError(f"{expected} {condition!r}")
    if misfit := describe_misfit(condition, "state", "event"):
        raise TypeError(f"{expected} {label_of(condition)!r}, which {misfit}")

    def decorate(callback: Callback) -> Callback:
        check_callback(callback, "when")
        check_unscheduled(callback, "when")
        return When(_without_checks(callback), condition)

    return decorate


def callback(
    name: str,
    *,
    init: Callable[[TrainState], Memory] | None = None,
    track: Callable[[Memory, AfterUpdate], Memory] | None = None,
    produces: tuple[str, ...] | None = None,
    consumes: tuple[str, ...] = (),
    readings: tuple[str, ...] = (),
    effects: tuple[type[Effect], ...] = (),
) -> Decorator:
    """Return the decorator that gives a function a name, a memory, and declarations.

    Put it above a gate: it calls `track` at every update, and the function only when the gate opens.

    Args:
        name: Name of the memory and of the callback in messages.
        init: `state -> memory`, the memory that it starts with.
        track: `(memory, event) -> memory`, called at every `AfterUpdate` before the function.
        produces: Patterns of the metric keys that it logs; None if it may log any.
        consumes: Metric keys that have to be current; an `OptionalKey` is read only where it is.
        readings: Costly fields of `AfterUpdate` that it reads, such as `grad_norm`; see `READINGS`.
        effects: Types of effects of yours that it requests; a run starts only if each has a handler.

    Raises:
        TypeError: If `track` is given without `init`.
        SettingsError: If a reading is unknown.
        CallbackError: If what it declares is not a tuple, or `effects` has something else than types of effects.

    Example:
        >>> from noether import AfterUpdate, TrainState, callback, every_n_updates, log
        >>> @callback("seen", init=lambda state: 0, track=lambda seen, event: seen + event.samples, produces=("seen",))
        ... @every_n_updates(2)
        ... def seen(state, event):
        ...     return log(state, event, {"seen": state.memory("seen")})
        >>> state = TrainState()
        >>> for _ in range(2):
        ...     state, effects = seen(state.advance(samples=4), AfterUpdate(samples=4))
        >>> effects[0].values["seen"]
        8
    """
    given: Any = name
    if not isinstance(given, str) or not given:
        raise TypeError(f'callback takes the name of the memory, like @callback("seen"); got {name!r}')
    if track is not None and init is None:
        raise TypeError(f"callback {name!r} has track but no memory: add init=lambda state: ..., its first memory")
    for setting, function, arguments in (("init", init, ("state",)), ("track", track, ("memory", "event"))):
        if function is not None and (misfit := describe_misfit(function, *arguments)):
            raise TypeError(f"callback {name!r}: its {setting} {misfit}")
    check_key_tuples(name, produces=produces, consumes=consumes, readings=readings)
    check_effect_types(name, effects)
    raise_problems(check_reading(name, each) for each in readings)

    def decorate(body: Callback) -> Callback:
        check_callback(body, f"callback({name!r})")
        return Remembering(_without_checks(body), name, init, track, produces, consumes, readings, effects)

    return decorate


def _without_checks(callback: Callback) -> Callback:
    """Return the callback to wrap: a reducer leaves its checks to the outer reducer."""
    return callback.without_checks() if isinstance(callback, Reducer) else callback


def _gate_decorator(schedule: Schedule, *, at_end: bool) -> Decorator:
    def decorate(callback: Callback) -> Callback:
        if isinstance(callback, Reducer):  # a gate before each member equals one gate before all of them
            return Reducer(tuple(decorate(member) for member in callback.members))
        check_callback(callback, "a gate")
        check_unscheduled(callback, "this gate")
        return Gated(callback, Gate(schedule, at_end))

    return decorate
