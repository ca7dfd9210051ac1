"""Base class for callbacks that fire at an interval."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

from noether.core.callback_checks import check_result
from noether.core.callbacks.base import HOOKS, CallbackBase
from noether.core.callbacks.deferral import make_deferred_calls
from noether.core.errors import Problem, check_whole, suggest
from noether.core.event import (
    AfterAccumulationStep,
    AfterEpoch,
    AfterTraining,
    AfterUpdate,
    Event,
    kind_of,
)
from noether.core.schedules.gate import Gate, Interval
from noether.core.schedules.schedule import INTERVALS
from noether.core.stretch import CompletedUpdate

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from noether.core.callback import Callback, Effects
    from noether.core.deferred_calls import DeferredCalls
    from noether.core.schedules.base import Schedule
    from noether.core.state import TrainState

_HOOKS_THAT_ACT: Final = (
    "periodic_callback",
    "track_after_accumulation_step",
    "track_after_update_step",
    "track_updates",
)
_PERIODIC_HOOKS: Final = (*_HOOKS_THAT_ACT, "can_defer", "fire_updates")


class PeriodicCallback(CallbackBase):
    """Base class of callbacks that fire every n epochs, updates or samples.

    A subclass defines `periodic_callback`, which is called at the interval. It may define
    `track_after_accumulation_step`, which is called at every accumulation step, and `track_after_update_step`, which is
    called at every update; or `track_updates` in place of the latter, which a loop may call once for several deferred
    updates. `can_defer` returns whether an update may be deferred, and `fire_updates` fires for several of them. At a
    standalone evaluation (`AtEval`) it does nothing unless it defines `at_eval`.

    Args:
        every_n_epochs: Epochs between firings, >= 1.
        every_n_updates: Updates between firings, >= 1.
        every_n_samples: Samples between firings, >= 1; give exactly one of the three.
        at_end: Whether to fire after training too, unless the callback fired at the last update or epoch.

    Raises:
        SettingsError: If not exactly one interval is given, or it is not a whole number >= 1.

    Example:
        >>> from noether import LogText, TrainState
        >>> class Count(PeriodicCallback):
        ...     def periodic_callback(self, state, event, interval):
        ...         return state, (LogText(f"{interval} {state.iteration}"),)
        >>> Count(every_n_updates=1)(TrainState().advance(samples=8), AfterUpdate(samples=8))[1]
        (LogText(text='update E0_U1_S8'),)
    """

    every_n_epochs: int | None = None
    every_n_updates: int | None = None
    every_n_samples: int | None = None
    at_end: bool = False

    def problems(self) -> Iterator[Problem | None]:
        """Yield the problems of the settings; a subclass adds its own after `yield from super().problems()`."""
        yield from super().problems()
        given = {name: value for name in INTERVALS if (value := getattr(self, name)) is not None}
        names = ", ".join(INTERVALS)
        if not given:
            yield Problem("", f"no interval is set; give exactly one of {names}")
        if len(given) > 1:
            both = " and ".join(f"{name}: {value!r}" for name, value in given.items())
            yield Problem(list(given)[-1], f"{both} are both set; give exactly one of {names}")
        yield from (check_whole(name, value) for name, value in given.items())
        yield from self._unused_hooks()

    def _unused_hooks(self) -> Iterator[Problem]:
        """Yield a problem if the class defines a hook that would never be called."""
        several, single = self.definer_of("track_updates"), self.definer_of("track_after_update_step")
        if issubclass(several, single) and single is not PeriodicCallback:
            where = "" if several is single else f", the latter in {single.__name__}"
            both = "track_updates and track_after_update_step"
            yield Problem("", f"{several.__name__} defines {both}{where}: keep one of them")
        elif "can_defer" in vars(type(self)) and not (self._deferred_calls.track or self._deferred_calls.fire):
            label = type(self).__name__
            yield Problem("", f"{label} defines can_defer, called only before track_updates: define that, too")

    @classmethod
    def definer_of(cls, hook: str) -> Any:
        """Return the class that defines a hook for this class."""
        return next(base for base in cls.__mro__ if hook in vars(base))

    def _hook_names(self) -> tuple[str, ...]:
        return (*super()._hook_names(), *_PERIODIC_HOOKS)

    def _check_hooks(self) -> Problem | None:
        hooks = ("__call__", *HOOKS.values(), *_HOOKS_THAT_ACT)
        overrides = any(self.overrides(hook, PeriodicCallback) for hook in hooks)
        return None if overrides else self._no_hook("periodic_callback")

    def _no_hook(self, hook: str) -> Problem:
        kind = type(self)
        return Problem("", f"{kind.__name__} does nothing: define {hook}{suggest(hook, vars(kind))}")

    @property
    def _interval(self) -> Schedule:
        return next(INTERVALS[name](n) for name in INTERVALS if (n := getattr(self, name)) is not None)

    @property
    def schedule(self) -> Schedule:
        """When it fires, other than at the end."""
        return self._interval

    @cached_property
    def gate(self) -> Gate:
        """When it fires."""
        return Gate(self.schedule, self.at_end)

    @cached_property
    def interval_name(self) -> str:
        """Short name of the interval, such as `E1`, `U100` or `S512`."""
        return str(self._interval)

    def name_parts(self) -> tuple[str, ...]:
        """Return the short name of the interval."""
        return (self.interval_name,)

    def periodic_callback(self, state: TrainState, event: Event, interval: Interval) -> tuple[TrainState, Effects]:
        """Return the state and effects of a firing.

        Args:
            state: The state at the event.
            event: `AfterUpdate`, `AfterEpoch` or `AfterTraining`.
            interval: What made it fire: `epoch`, `update` or `sample` for its interval, `end` for `at_end` after
                training. A `PeriodicDataIteratorCallback` also fires at a standalone evaluation, `AtEval`, with
                `eval`; any other callback does nothing there, unless it defines `at_eval`.
        """
        return state, ()

    def track_after_accumulation_step(
        self,
        state: TrainState,
        event: AfterAccumulationStep,
    ) -> tuple[TrainState, Effects]:
        """Return the state after an accumulation step, and no effects: a reducer refuses them here."""
        return state, ()

    def track_after_update_step(self, state: TrainState, event: AfterUpdate) -> tuple[TrainState, Effects]:
        """Return the state and effects of an update; called at each one, before `periodic_callback` if that is due."""
        if self.overrides("track_updates", PeriodicCallback):
            return self.track_updates(state, (CompletedUpdate(state.iteration, event),))
        return state, ()

    def track_updates(self, state: TrainState, updates: Sequence[CompletedUpdate]) -> tuple[TrainState, Effects]:
        """Return the state and effects of one or several updates; in place of `track_after_update_step`.

        A subclass may define it if one call for several updates does what a call for each of them, in order, would do.
        It may read its own memory and metrics, but nothing else of the state, and neither outputs nor gradients of the
        events. For deferred updates, it must request no effects, because firings log (see `fire_updates`), and change
        nothing of the state but its memory and metrics; for any other change, a reducer raises `CallbackError`. Where a
        callback needs more, `can_defer` has to return False.

        Args:
            state: The state after the last of the updates, or a later one.
            updates: The updates, in order; the callback has not fired between them.

        Example:
            >>> from noether import AfterUpdate, BeforeTraining, TrainState, compose
            >>> class LongestUpdateCallback(PeriodicCallback):
            ...     def init(self, state):
            ...         return {self.name: 0.0}
            ...     def track_updates(self, state, updates):
            ...         longest_s = max(event.duration_s for _, event in updates)
            ...         return state.remember(self.name, max(self.memory(state), longest_s)), ()
            >>> reducer = compose(LongestUpdateCallback(every_n_epochs=1, id="longest"))
            >>> state = reducer(TrainState(), BeforeTraining())[0].advance(samples=4)
            >>> reducer(state, AfterUpdate(samples=4, duration_s=0.5))[0].memory("longest")
            0.5
        """
        return state, ()

    def can_defer(self, state: TrainState, event: AfterUpdate) -> bool:
        """Return whether `track_updates` or `fire_updates` may be called later for an update; True by default.

        Args:
            state: The state after the update; the memory in it lacks the updates deferred before.
            event: The event of the update.
        """
        return True

    def fire_updates(self, state: TrainState, updates: Sequence[CompletedUpdate]) -> tuple[TrainState, Effects]:
        """Return the state and effects of firings at one or several updates; in place of `periodic_callback`.

        A subclass may define it beside `periodic_callback`, under the conditions of `track_updates`, if a firing
        requests only `LogScalars` and `LogText`. One `LogUpdates` takes the place of the scalars of all updates (see
        `log_updates`), and a `LogUpdateText` that of each text.

        Args:
            state: The state after the last of the updates, or a later one.
            updates: The updates at which it fires, in order. If the callback also tracks updates, it is only one, and
                `track_updates` was called for those up to it.
        """
        return state, ()

    def after_accumulation_step(self, state: TrainState, event: AfterAccumulationStep) -> tuple[TrainState, Effects]:
        """Call `track_after_accumulation_step`."""
        return self.track_after_accumulation_step(state, event)

    def after_update(self, state: TrainState, event: AfterUpdate) -> tuple[TrainState, Effects]:
        """Call `track_after_update_step`, and fire if the interval counts updates or samples and is due."""
        if not self._tracks:
            return self._fire_if_due(state, event)
        state, tracked = check_result(self, self.track_after_update_step(state, event), "track_after_update_step")
        state, effects = check_result(self, self._fire_if_due(state, event), "periodic_callback")
        return state, tracked + effects

    def after_epoch(self, state: TrainState, event: AfterEpoch) -> tuple[TrainState, Effects]:
        """Fire if the interval counts epochs and is due."""
        return self._fire_if_due(state, event)

    def after_training(self, state: TrainState, event: AfterTraining) -> tuple[TrainState, Effects]:
        """Fire if `at_end` is true and the callback did not fire at the last update or epoch."""
        return self._fire_if_due(state, event)

    def _fire_if_due(self, state: TrainState, event: Event) -> tuple[TrainState, Effects]:
        interval = self.gate.due(type(event), state)
        return (state, ()) if interval is None else self.periodic_callback(state, event, interval)

    @cached_property
    def _tracks(self) -> bool:
        """Whether a reducer has to call it at every update, even while its gate is closed."""
        hooks = ("track_after_update_step", "track_updates", "after_update")
        return any(self.overrides(hook, PeriodicCallback) for hook in hooks)

    @cached_property
    def _deferred_calls(self) -> DeferredCalls:
        return make_deferred_calls(self, PeriodicCallback, tracks=self._tracks)

    @property
    def _tracker(self) -> Callback | None:
        if self.overrides("after_update", PeriodicCallback) or self.overrides("__call__", PeriodicCallback):
            return self
        return self.track_after_update_step if self._tracks else None  # type: ignore[return-value]  # only for updates

    def _listens(self, event_type: type[Event]) -> bool:
        kind = kind_of(event_type)
        hooks = ["__call__", HOOKS.get(kind, "__call__")]
        if kind is AfterAccumulationStep:
            hooks.append("track_after_accumulation_step")
        return (
            any(self.overrides(hook, PeriodicCallback) for hook in hooks)
            or self.gate.listens(kind)
            or (kind is AfterUpdate and self._tracks)
        )
