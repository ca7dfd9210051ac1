"""When to stop before the end."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final, Literal, final

from noether.core.callbacks.base import CallbackBase
from noether.core.callbacks.improvement import MetricWatcher, improves, is_nonfinite, min_delta_problem
from noether.core.effect import LogText
from noether.core.errors import Problem, check_choice, check_whole, raise_problems
from noether.core.iteration import TrainingIteration
from noether.core.metrics import current
from noether.core.tensors.tree import FrozenDict

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from noether.core.callback import Effects
    from noether.core.event import AfterEpoch, AfterUpdate, Event
    from noether.core.schedules.gate import Interval
    from noether.core.state import Memory, TrainState


@final
class MetricEarlyStopping(MetricWatcher):
    """Stops training when a metric has not improved for a number of firings.

    Args:
        metric_key: The metric to watch.
        tolerance: Firings in a row without improvement after which it stops, >= 1.
        min_delta: By how much a value has to be better to be an improvement, >= 0.
        mode: `higher` or `lower`; left out, it is read from the key.
        nan: What a value of NaN does: `count` as no improvement, `stop`, or `raise`.
        every_n_epochs: Epochs between runs, >= 1.
        every_n_updates: Updates between runs, >= 1.
        every_n_samples: Samples between runs, >= 1; exactly one of the three is given.

    Raises:
        MetricError: If the metric is not current.
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
        'val/accuracy has not been higher than 0.9 for 1 of 1 firings'
    """

    tolerance: int
    min_delta: float = 0.0
    nan: Literal["count", "stop", "raise"] = "count"

    def problems(self) -> Iterator[Problem | None]:
        """Yield what is wrong with the settings."""
        yield from super().problems()
        yield check_whole("tolerance", self.tolerance)
        yield min_delta_problem(self.min_delta)
        yield check_choice("nan", self.nan, ("count", "stop", "raise"))

    @property
    def produces(self) -> tuple[str, ...]:
        """Nothing: it stops."""
        return ()

    def init(self, state: TrainState) -> Mapping[str, Memory]:
        """Return no best yet."""
        return {self.name: FrozenDict(best=None, since=0)}

    def periodic_callback(self, state: TrainState, event: Event, interval: Interval) -> tuple[TrainState, Effects]:
        """Compare, count, and stop."""
        if is_nonfinite(state):
            return state, ()
        value, memory = current(state, self.metric_key), self.memory(state)
        if math.isnan(value) and self.nan == "raise":
            raise FloatingPointError(f"{self.metric_key} is NaN at {state.iteration}; to go on, set nan: count")
        if improves(value, memory["best"], self.direction, self.min_delta):
            return state.remember(self.name, FrozenDict(best=value, since=0)), ()
        since = memory["since"] + 1
        state = state.remember(self.name, FrozenDict({**memory, "since": since}))
        reason = self._reason(value, memory["best"], since)
        # At the end there is nothing left to stop, and a stop would keep a longer run from going on.
        if reason is None or state.stop is not None or interval == "end":
            return state, ()
        return state.stopped(reason), (LogText(f"stopping: {reason}"),)

    def _reason(self, value: float, best: float | None, since: int) -> str | None:
        if math.isnan(value) and self.nan == "stop":
            return f"{self.metric_key} is NaN"
        if since < self.tolerance:
            return None
        beyond = "a number" if best is None else f"{self.direction} than {best:.6g}"
        return f"{self.metric_key} has not been {beyond} for {since} of {self.tolerance} firings"


@final
class FixedUpdateEarlyStopping(CallbackBase):
    """Stops training at a fixed point, however long the run is configured to be.

    Args:
        stop_at_epoch: Epochs after which it stops, >= 1.
        stop_at_update: Updates after which it stops, >= 1.
        stop_at_sample: Samples after which it stops, >= 1; exactly one of the three is given.

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

    def __post_init__(self) -> None:
        raise_problems(self._problems())

    def _problems(self) -> Iterator[Problem | None]:
        given = [name for name in _STOPS if getattr(self, name) is not None]
        if len(given) != 1:
            said = f"{' and '.join(given)} are given" if given else "no point is given"
            yield Problem(given[-1] if given else "", f"{said}; give exactly one of {', '.join(_STOPS)}")
        yield from (check_whole(name, getattr(self, name)) for name in given)

    @property
    def produces(self) -> tuple[str, ...]:
        """Nothing: it stops."""
        return ()

    @property
    def point(self) -> TrainingIteration:
        """Where it stops."""
        counts = {counter: getattr(self, setting) or 0 for setting, counter in _STOPS.items()}
        return TrainingIteration(**counts)

    def distinction(self) -> tuple[str, ...]:
        """Return where it stops."""
        return tuple(f"{name}={value}" for name in _STOPS if (value := getattr(self, name)) is not None)

    def after_update(self, state: TrainState, event: AfterUpdate) -> tuple[TrainState, Effects]:
        """Stop where updates or samples are reached."""
        return self._stopped(state)

    def after_epoch(self, state: TrainState, event: AfterEpoch) -> tuple[TrainState, Effects]:
        """Stop where epochs are reached."""
        return self._stopped(state)

    def _stopped(self, state: TrainState) -> tuple[TrainState, Effects]:
        for setting, counter in _STOPS.items():
            point = getattr(self, setting)
            if point is not None and getattr(state.iteration, counter) >= point and state.stop is None:
                reason = f"{setting}: {point} is reached"
                return state.stopped(reason), (LogText(f"stopping: {reason}"),)
        return state, ()


_STOPS: Final = {"stop_at_epoch": "epoch", "stop_at_update": "update", "stop_at_sample": "sample"}

MetricEarlyStopper = MetricEarlyStopping
FixedEarlyStopper = FixedUpdateEarlyStopping
"""The names that the class-based framework gives them."""
