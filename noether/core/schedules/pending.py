"""Finds the schedules that are due at an update without evaluating each of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

from noether.core.schedules.window import ALWAYS, START, earliest_thresholds

if TYPE_CHECKING:
    from collections.abc import Sequence

    from noether.core.iteration import TrainingIteration
    from noether.core.schedules.base import Schedule
    from noether.core.schedules.window import Thresholds


@final
class PendingSchedules:
    """Finds the schedules that are due at an update without evaluating each of them.

    It caches the next threshold of each schedule. The cache decides only how fast it answers: every answer is a pure
    function of schedules and iterations. A run may return to an earlier iteration, and threads may share it.

    Args:
        schedules: Schedules that are read at updates.

    Example:
        >>> from noether import EveryNUpdates, TrainingIteration
        >>> pending = PendingSchedules([EveryNUpdates(2), EveryNUpdates(3)])
        >>> at = TrainingIteration
        >>> [pending.due(at(update=u - 1), at(update=u)) for u in range(1, 7)]
        [(), (0,), (1,), (0,), (), (0, 1)]
    """

    def __init__(self, schedules: Sequence[Schedule]) -> None:
        self._schedules = schedules
        # Threads replace the cache as a whole and never change it, so each reads one that is consistent.
        self._cache = _find_thresholds(schedules, START)

    def due(self, previous: TrainingIteration, iteration: TrainingIteration) -> tuple[int, ...]:
        """Return the positions of the schedules that are due at the update from `previous` to `iteration`."""
        if not self._schedules:
            return ()
        since, first, following = self._cache
        if not previous.reached(since):
            since, first, following = self._cache = _find_thresholds(self._schedules, previous)
        if not first.reached(iteration):
            return ()
        reached = [index for index, each in enumerate(following) if each.reached(iteration)]
        thresholds = list(following)
        for index in reached:
            thresholds[index] = self._schedules[index].next_due(iteration)
        self._cache = iteration, earliest_thresholds(thresholds), tuple(thresholds)
        return tuple(index for index in reached if self._schedules[index].due(previous, iteration))


def _find_thresholds(
    schedules: Sequence[Schedule], since: TrainingIteration
) -> tuple[TrainingIteration, Thresholds, tuple[Thresholds, ...]]:
    """Return `since`, the first threshold of all schedules after it, and the next one of each."""
    following = tuple(schedule.next_due(since) for schedule in schedules)
    return since, earliest_thresholds(following), following


def is_always_due(schedule: Schedule) -> bool:
    """Return whether a schedule is due at every update.

    Example:
        >>> from noether import EveryNSamples, EveryNUpdates
        >>> is_always_due(EveryNUpdates(1) | EveryNSamples(100)), is_always_due(EveryNUpdates(2))
        (True, False)
    """
    # Not at every sample: an update may have none.
    return any(each.counter == "update" and each.interval == 1 and each.window == ALWAYS for each in schedule.members)
