"""The deferred calls of a periodic callback."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, final

from noether.core.callback_checks import check_result
from noether.core.deferred_calls import DeferredCalls
from noether.core.event import AfterUpdate
from noether.core.iteration import TrainingIteration
from noether.core.schedules.pending import is_always_due

if TYPE_CHECKING:
    from collections.abc import Sequence

    from noether.core.callback import Effects
    from noether.core.callbacks.interval import PeriodicCallback
    from noether.core.schedules.base import Schedule
    from noether.core.state import TrainState
    from noether.core.stretch import CompletedUpdate


def make_deferred_calls(callback: PeriodicCallback, base: type[PeriodicCallback], *, tracks: bool) -> DeferredCalls:
    """Return the calls that a reducer may make to a periodic callback once for several updates.

    A subclass that overrides a hook of single updates is called at each, so it has no such calls.

    Args:
        callback: The callback.
        base: `PeriodicCallback`, whose hooks do nothing; its module imports this one.
        tracks: Whether it tracks updates at which it is not due.
    """
    sees_each = callback.overrides("after_update", base) or callback.overrides("__call__", base)
    tracks_each = callback.overrides("track_after_update_step", base)
    if sees_each or tracks_each:
        return DeferredCalls()
    firings = Firings(callback, tracks=tracks) if _fires_several(callback, base) else None
    return DeferredCalls(
        track=callback.track_updates if callback.overrides("track_updates", base) else None,
        fire=None if firings is None else firings.fire,
        condition=callback.can_defer if callback.overrides("can_defer", base) else None,
    )


def _fires_several(callback: PeriodicCallback, base: type[PeriodicCallback]) -> bool:
    """Return whether `fire_updates` is defined, and no subclass of its class changed what a single firing does."""
    definer = callback.definer_of("fire_updates")
    return definer is not base and type(callback).periodic_callback is definer.periodic_callback


@final
class Firings:
    """Fires a callback for several deferred updates.

    Args:
        callback: The callback.
        tracks: Whether it also tracks updates.
    """

    def __init__(self, callback: PeriodicCallback, *, tracks: bool) -> None:
        self._callback = callback
        self.fire = self._track_and_fire if tracks else self._fire_due

    @cached_property
    def _schedule(self) -> Schedule:
        return self._callback.gate.parts[AfterUpdate]

    @cached_property
    def _is_always_due(self) -> bool:
        return is_always_due(self._schedule)

    def _fire_due(self, state: TrainState, updates: Sequence[CompletedUpdate]) -> tuple[TrainState, Effects]:
        """Call `fire_updates` once for all updates at which the callback is due."""
        due = [updates[index] for index in self._find_due(updates)]
        return self._callback.fire_updates(state, due) if due else (state, ())

    def _track_and_fire(self, state: TrainState, updates: Sequence[CompletedUpdate]) -> tuple[TrainState, Effects]:
        """Call `track_updates` for all updates, and `fire_updates` in between for each at which the callback is due."""
        callback, begin = self._callback, 0
        effects: Effects = ()
        for index in self._find_due(updates):  # a firing reads what was tracked up to its update
            end = index + 1
            state, tracked = check_result(callback, callback.track_updates(state, updates[begin:end]), "track_updates")
            state, fired = check_result(callback, callback.fire_updates(state, updates[index:end]), "fire_updates")
            effects, begin = effects + tracked + fired, end
        if begin < len(updates):
            state, tracked = check_result(callback, callback.track_updates(state, updates[begin:]), "track_updates")
            effects += tracked
        return state, effects

    def _find_due(self, updates: Sequence[CompletedUpdate]) -> Sequence[int]:
        """Return the indexes of those of several consecutive updates at which the callback is due."""
        if self._is_always_due:
            return range(len(updates))
        schedule, due = self._schedule, list[int]()
        (at, event), *_ = updates
        previous = TrainingIteration(at.epoch, at.update - 1, at.sample - event.samples)
        following = schedule.next_due(previous)
        for index, (iteration, _) in enumerate(updates):
            if following.reached(iteration):  # before that, the schedule is not due: skip the slower check
                following = schedule.next_due(iteration)
                due += [index] if schedule.due(previous, iteration) else []
            previous = iteration
        return due
