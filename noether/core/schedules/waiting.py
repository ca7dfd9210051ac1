"""Which of many schedules can be due, without asking each of them at every update."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, final

from noether.core.iteration import TrainingIteration
from noether.core.schedules.schedule import Thresholds

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from noether.core.schedules.schedule import Schedule

_START: Final = TrainingIteration()


@final
class Waiting:
    """Schedules, with the threshold before which each of them is known not to be due.

    What it answers is a pure function of schedules and iterations; what it keeps only saves computing it again. So a
    state may be taken back to an earlier iteration.

    Args:
        schedules: Read at updates.

    Example:
        >>> from noether.core.schedules.schedule import EveryNUpdates
        >>> waiting = Waiting([EveryNUpdates(2), EveryNUpdates(3)])
        >>> at = TrainingIteration
        >>> [waiting.due(at(update=u - 1), at(update=u)) for u in range(1, 7)]
        [(), (0,), (1,), (0,), (), (0, 1)]
    """

    def __init__(self, schedules: Sequence[Schedule]) -> None:
        self._schedules = schedules
        self._since = _START
        self._following = [schedule.next_due(_START) for schedule in schedules]
        self._first = _earliest(self._following)

    def due(self, previous: TrainingIteration, iteration: TrainingIteration) -> tuple[int, ...]:
        """Return the positions of the schedules that may be due at the update from `previous` to `iteration`."""
        if not previous.reached(self._since):
            self._following = [schedule.next_due(previous) for schedule in self._schedules]
            self._since, self._first = previous, _earliest(self._following)
        if not self._first.reached(iteration):
            return ()
        reached = tuple(index for index, each in enumerate(self._following) if each.reached(iteration))
        for index in reached:
            self._following[index] = self._schedules[index].next_due(iteration)
        self._since, self._first = iteration, _earliest(self._following)
        return reached


def _earliest(thresholds: Iterable[Thresholds]) -> Thresholds:
    counts = zip(*((each.epoch, each.update, each.sample) for each in thresholds), strict=True)
    return Thresholds(*(min((count for count in each if count is not None), default=None) for each in counts))
