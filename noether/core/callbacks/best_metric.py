"""Logs the best value of a metric so far, and other metrics at that moment."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

from noether.core.callback import OptionalKey, merge_keys
from noether.core.callbacks.improvement import MetricWatcher, improves, is_nonfinite
from noether.core.effect import SetSummary
from noether.core.iteration import TrainingIteration
from noether.core.metrics import is_current, log
from noether.core.tensors.tree import FrozenDict

if TYPE_CHECKING:
    from collections.abc import Mapping

    from noether.core.callback import Effects
    from noether.core.event import Event
    from noether.core.schedules.gate import Interval
    from noether.core.state import Memory, TrainState


@final
class BestMetricCallback(MetricWatcher):
    """Logs the best value of a metric so far as `{metric}/best`, and its update as `{metric}/best_update`.

    The summary holds the best value and its iteration, such as `E10_U200_S800`. A value that is not finite is never the
    best. List this callback after the one that logs the metric.

    Args:
        metric_key: The metric to watch, such as `val/accuracy`.
        mode: Whether `higher` or `lower` is better; None derives it from the key.
        missing: If the metric is not current at a firing: `raise` raises an error; `skip` logs nothing, and leaves out
            a target that is not current at the best.
        target_metric_keys: Other metrics whose value at the best is logged as `{target}/at_best/{metric}`.
        optional_target_metric_keys: The same for metrics that may be absent.
        every_n_epochs: Epochs between firings, >= 1.
        every_n_updates: Updates between firings, >= 1.
        every_n_samples: Samples between firings, >= 1; give exactly one of the three.

    Raises:
        MetricError: If the metric or a target is not current and `missing` is `raise`.

    ```yaml
    - kind: noether.core.callbacks.BestMetricCallback
      every_n_epochs: 1
      metric_key: val/accuracy
    ```

    Example:
        >>> from noether import AfterEpoch, TrainState, log
        >>> state, _ = log(TrainState().next_epoch(), AfterEpoch(), {"val/accuracy": 0.9})
        >>> _, effects = BestMetricCallback(every_n_epochs=1, metric_key="val/accuracy")(state, AfterEpoch())
        >>> dict(effects[0].values)
        {'val/accuracy/best': 0.9, 'val/accuracy/best_update': 0}
    """

    target_metric_keys: tuple[str, ...] = ()
    optional_target_metric_keys: tuple[str, ...] = ()

    @property
    def produces(self) -> tuple[str, ...]:
        """The best value, where it was reached, and the targets there."""
        best = (f"{self.metric_key}/best", f"{self.metric_key}/best_update")
        targets = (*self.target_metric_keys, *self.optional_target_metric_keys)
        return best + tuple(self._target_key(target) for target in targets)

    @property
    def consumes(self) -> tuple[str, ...]:
        """The metric, the targets, and whether the update was finite, where a callback logs that."""
        optional = map(OptionalKey, self.optional_target_metric_keys)
        return merge_keys(*super().consumes, *map(self.consumed_key, self.target_metric_keys), *optional)

    def init(self, state: TrainState) -> Mapping[str, Memory]:
        """Return a memory without a best value."""
        return {self.name: FrozenDict(best=None, at=None, targets=FrozenDict())}

    def periodic_callback(self, state: TrainState, event: Event, interval: Interval) -> tuple[TrainState, Effects]:
        """Log the best value so far."""
        value, memory = self.read_metric(state, self.metric_key), self.memory(state)
        if value is None:
            return state, ()
        if not is_nonfinite(state) and improves(value, memory["best"], self.direction):
            memory = FrozenDict(best=value, at=str(state.iteration), targets=self._targets(state))
            state = state.remember(self.name, memory)
        report = self.report_infinity(state, value)
        if memory["best"] is None:
            return state, report
        best_update = TrainingIteration.parse(memory["at"]).update
        best = {f"{self.metric_key}/best": memory["best"], f"{self.metric_key}/best_update": best_update}
        state, effects = log(state, event, {**best, **memory["targets"]})
        summary = SetSummary(
            FrozenDict({f"{self.metric_key}/best": memory["best"], f"{self.metric_key}/best_at": memory["at"]})
        )
        return state, (*effects, summary, *report)

    def _targets(self, state: TrainState) -> FrozenDict:
        present = [key for key in self.optional_target_metric_keys if is_current(state, key)]
        values = {key: self.read_metric(state, key) for key in (*self.target_metric_keys, *present)}
        return FrozenDict({self._target_key(key): value for key, value in values.items() if value is not None})

    def _target_key(self, target: str) -> str:
        return f"{target}/at_best/{self.metric_key}"
