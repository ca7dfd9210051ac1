"""Stops training before its configured end."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final, Literal, final

from noether.core.callbacks.base import CallbackBase
from noether.core.callbacks.improvement import MetricWatcher, improves, is_nonfinite, min_delta_problem
from noether.core.effect import LogText
from noether.core.errors import Problem, check_choice, check_whole
from noether.core.iteration import TrainingIteration
from noether.core.tensors.tree import FrozenDict
from noether.core.text import count_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from noether.core.callback import Effects
    from noether.core.event import AfterEpoch, AfterUpdate, Event
    from noether.core.schedules.gate import Interval
    from noether.core.state import Memory, TrainState


@final
class MetricEarlyStopping(MetricWatcher):
    """Stops training when a metric has not improved for a number of firings.

    List this callback after the one that logs the metric. It writes the reason to the console and into `state.stop`.

    Args:
        metric_key: The metric to watch, such as `val/accuracy`.
        tolerance: Firings in a row without improvement after which training stops, >= 1.
        min_delta: Improvement over the best value that is too small to count, >= 0.
        mode: Whether `higher` or `lower` is better; None derives it from the key.
        missing: If the metric is not current at a firing: `raise` raises an error; `skip` counts it neither as an
            improvement nor towards `tolerance`.
        nan: What a value of NaN does: `count` as no improvement, `stop` training, or `raise`. An infinite value always
            counts as no improvement.
        every_n_epochs: Epochs between firings, >= 1.
        every_n_updates: Updates between firings, >= 1.
        every_n_samples: Samples between firings, >= 1; give exactly one of the three.

    Raises:
        MetricError: If the metric is not current and `missing` is `raise`.
        FloatingPointError: If it is NaN and `nan` is `raise`.

    ```yaml
    - kind: noether.core.callbacks.MetricEarlyStopping
      every_n_epochs: 1
      metric_key: val/accuracy
      tolerance: 5
    ```

    Example:
        >>> from noether import AfterEpoch, TrainState, log
        >>> stopping = MetricEarlyStopping(every_n_epochs=1, metric_key="val/accuracy", tolerance=1)
        >>> state = TrainState()
        >>> for accuracy in (0.9, 0.8):
        ...     state, _ = log(state.next_epoch(), AfterEpoch(), {"val/accuracy": accuracy})
        ...     state, _ = stopping(state, AfterEpoch())
        >>> state.stop
        'val/accuracy has not been higher than 0.9 for 1 of 1 firing'
    """

    tolerance: int
    min_delta: float = 0.0
    nan: Literal["count", "stop", "raise"] = "count"

    def problems(self) -> Iterator[Problem | None]:
        """Yield the problems of the settings."""
        yield from super().problems()
        yield check_whole("tolerance", self.tolerance)
        yield min_delta_problem(self.min_delta)
        yield check_choice("nan", self.nan, ("count", "stop", "raise"))

    @property
    def produces(self) -> tuple[str, ...]:
        """Empty: it logs no metric."""
        return ()

    def init(self, state: TrainState) -> Mapping[str, Memory]:
        """Return a memory without a best value."""
        return {self.name: FrozenDict(best=None, since=0)}

    def periodic_callback(self, state: TrainState, event: Event, interval: Interval) -> tuple[TrainState, Effects]:
        """Stop if the metric has not improved for `tolerance` firings."""
        if is_nonfinite(state):
            return state, ()
        value, memory = self.read_metric(state, self.metric_key), self.memory(state)
        if value is None:
            return state, ()
        if math.isnan(value) and self.nan == "raise":
            raise FloatingPointError(f"{self.metric_key} is NaN at {state.iteration}; to continue, set nan: count")
        if improves(value, memory["best"], self.direction, self.min_delta):
            return state.remember(self.name, FrozenDict(best=value, since=0)), ()
        since = memory["since"] + 1
        state = state.remember(self.name, FrozenDict({**memory, "since": since}))
        reason = self._reason(value, memory["best"], since)
        # After training there is nothing to stop, and a stop in the state would end a later, longer run at once.
        report = self.report_infinity(state, value)
        if reason is None or state.stop is not None or interval == "end":
            return state, report
        return state.request_stop(reason), (*report, LogText(f"stopping: {reason}"))

    def _reason(self, value: float, best: float | None, since: int) -> str | None:
        if math.isnan(value) and self.nan == "stop":
            return f"{self.metric_key} is NaN"
        if since < self.tolerance:
            return None
        beyond = "finite" if best is None else f"{self.direction} than {best:.6g}"
        return f"{self.metric_key} has not been {beyond} for {since} of {count_of(self.tolerance, 'firing')}"


@final
class FixedUpdateEarlyStopping(CallbackBase):
    """Stops training at a fixed point, however long the run is configured to be.

    Args:
        stop_at_epoch: Epochs after which training stops, >= 1.
        stop_at_update: Updates after which training stops, >= 1.
        stop_at_sample: Samples after which training stops, >= 1; give exactly one of the three.

    Raises:
        SettingsError: If not exactly one is given, or it is not a whole number >= 1.

    ```yaml
    - kind: noether.core.callbacks.FixedUpdateEarlyStopping
      stop_at_update: 10000
    ```

    Example:
        >>> from noether import AfterUpdate, TrainState
        >>> stopping = FixedUpdateEarlyStopping(stop_at_sample=10)
        >>> state, effects = stopping(TrainState().advance(samples=12), AfterUpdate(samples=12))
        >>> state.stop
        'stop_at_sample: 10 is reached'
    """

    stop_at_epoch: int | None = None
    stop_at_update: int | None = None
    stop_at_sample: int | None = None

    def problems(self) -> Iterator[Problem | None]:
        """Yield the problems of the settings."""
        yield from super().problems()
        given = [name for name in _STOPS if getattr(self, name) is not None]
        if len(given) != 1:
            found = f"{' and '.join(given)} are given" if given else "no point is given"
            yield Problem(given[-1] if given else "", f"{found}; give exactly one of {', '.join(_STOPS)}")
        yield from (check_whole(name, getattr(self, name)) for name in given)

    @property
    def produces(self) -> tuple[str, ...]:
        """Empty: it logs no metric."""
        return ()

    @property
    def point(self) -> TrainingIteration:
        """The point at which training stops."""
        counts = {counter: getattr(self, setting) or 0 for setting, counter in _STOPS.items()}
        return TrainingIteration(**counts)

    def name_parts(self) -> tuple[str, ...]:
        """Return the setting and its value, such as `stop_at_update=10`."""
        return tuple(f"{name}={value}" for name in _STOPS if (value := getattr(self, name)) is not None)

    def after_update(self, state: TrainState, event: AfterUpdate) -> tuple[TrainState, Effects]:
        """Stop if the number of updates or samples is reached."""
        return self._stop_if_reached(state)

    def after_epoch(self, state: TrainState, event: AfterEpoch) -> tuple[TrainState, Effects]:
        """Stop if the number of epochs is reached."""
        return self._stop_if_reached(state)

    def _stop_if_reached(self, state: TrainState) -> tuple[TrainState, Effects]:
        for setting, counter in _STOPS.items():
            point = getattr(self, setting)
            if point is not None and getattr(state.iteration, counter) >= point and state.stop is None:
                reason = f"{setting}: {point} is reached"
                return state.request_stop(reason), (LogText(f"stopping: {reason}"),)
        return state, ()


_STOPS: Final = {"stop_at_epoch": "epoch", "stop_at_update": "update", "stop_at_sample": "sample"}

MetricEarlyStopper = MetricEarlyStopping
FixedEarlyStopper = FixedUpdateEarlyStopping
"""Aliases for YAML that was written for a class-based framework."""
