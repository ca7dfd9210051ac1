"""Improvement of a metric: its direction, and comparisons in which only finite values improve."""

from __future__ import annotations

import math
from functools import cached_property
from typing import TYPE_CHECKING, Final, Literal

from noether.core.callback import OptionalKey, SkippableKey
from noether.core.callbacks.interval import PeriodicCallback
from noether.core.effect import LogText
from noether.core.errors import Problem, check_choice, is_number
from noether.core.metric_keys import Mode, direction_of, mode_problem
from noether.core.metrics import MetricError, current, is_current

if TYPE_CHECKING:
    from collections.abc import Iterator

    from noether.core.state import TrainState


NONFINITE: Final = "nonfinite"
"""Key of the metric that `NanGuardCallback` logs at an update that is not finite, and only there."""


def improves(value: float, best: float | None, mode: Mode, min_delta: float = 0.0) -> bool:
    """Return whether `value` is better than `best` by more than `min_delta`; any finite value is better than None.

    NaN and infinity never improve: no later value could be better than an infinite best, such as a ratio whose
    denominator was zero. A `best` that is not finite counts as None.

    Example:
        >>> improves(0.5, None, "higher"), improves(0.5, 0.5, "higher"), improves(float("inf"), None, "higher")
        (True, False, False)
    """
    if not math.isfinite(value):
        return False
    if best is None or not math.isfinite(best):
        return True
    return value > best + min_delta if mode == "higher" else value < best - min_delta


def is_nonfinite(state: TrainState) -> bool:
    """Return whether the last update was not finite, according to a `NanGuardCallback` earlier in the list.

    Callbacks that watch a metric skip such an update: it neither improves the metric nor counts as a wait.
    """
    return is_current(state, NONFINITE)


def min_delta_problem(min_delta: object) -> Problem | None:
    """Return the problem of `min_delta`, or None."""
    if is_number(min_delta) and 0 <= min_delta < math.inf:
        return None
    return Problem("min_delta", f"{min_delta!r} is not a number of at least 0")


class MetricWatcher(PeriodicCallback):
    """Base class of callbacks that watch one metric for improvements.

    Args:
        metric_key: The metric to watch, such as `val/accuracy`.
        mode: Whether `higher` or `lower` is better; None derives it from the key.
        missing: If the metric is not current at a firing: `raise` raises an error; `skip` does not count the firing.

    Example:
        >>> class Watch(MetricWatcher):
        ...     def periodic_callback(self, state, event, interval):
        ...         return state, ()
        >>> Watch(every_n_epochs=1, metric_key="val/accuracy").direction
        'higher'
    """

    metric_key: str
    mode: Mode | None = None
    missing: Literal["skip", "raise"] = "raise"

    def problems(self) -> Iterator[Problem | None]:
        """Yield the problems of the settings."""
        yield from super().problems()
        if not self.metric_key:
            yield Problem("metric_key", "is empty; give the key of a metric, such as 'val/accuracy'")
        yield mode_problem(self.metric_key, self.mode)
        yield check_choice("missing", self.missing, ("skip", "raise"))

    @cached_property
    def direction(self) -> Mode:
        """Whether higher or lower is better: `mode`, or the direction of the key."""
        direction = self.mode or direction_of(self.metric_key)
        assert direction is not None  # noqa: S101  # refused at construction
        return direction

    def name_parts(self) -> tuple[str, ...]:
        """Return the interval and the metric."""
        return (*super().name_parts(), self.metric_key)

    @property
    def consumes(self) -> tuple[str, ...]:
        """The metric that it watches, and whether the update was finite, where a callback logs that."""
        return (self.consumed_key(self.metric_key), OptionalKey(NONFINITE))

    def consumed_key(self, key: str) -> str:
        """Return a key for `consumes`: a `SkippableKey` if `missing` is `skip`."""
        return SkippableKey(key) if self.missing == "skip" else key

    def read_metric(self, state: TrainState, key: str) -> float | None:
        """Return the value of a metric at the current update, or None if it is not current and `missing` is `skip`.

        Raises:
            MetricError: If it is not current and `missing` is `raise`.
        """
        if self.missing == "skip" and not is_current(state, key):
            return None
        try:
            return current(state, key)
        except MetricError as error:
            raise MetricError(f"{error}; to leave out such firings of {self.name}, set missing: skip") from None

    def report_infinity(self, state: TrainState, value: float) -> tuple[LogText, ...]:
        """Return a line for the console if `value` is infinite in the better direction, where it is not the best."""
        if value != (math.inf if self.direction == "higher" else -math.inf):
            return ()
        return (LogText(f"{self.name}: {self.metric_key} is {value} at {state.iteration}, which is never the best"),)
