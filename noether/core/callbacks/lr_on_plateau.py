"""Reduces the learning rate when a metric stops improving."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

from noether.core.callbacks.improvement import MetricWatcher, improves, is_nonfinite, min_delta_problem
from noether.core.effect import LogText
from noether.core.errors import Problem, check_whole, is_number
from noether.core.tensors.tree import FrozenDict
from noether.core.text import count_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from noether.core.callback import Effects
    from noether.core.event import Event
    from noether.core.schedules.gate import Interval
    from noether.core.state import Memory, TrainState


@final
class ReduceLROnPlateauCallback(MetricWatcher):
    """Multiplies the learning rate of all later updates by a factor when a metric stops improving.

    It changes `state.hyperparams["lr_scale"]`, by which the trainer and `noether.Session` multiply the learning rate
    that any scheduler sets. If you call `dispatch` yourself, write it into the optimizer afterwards with
    `state = state.into_module(model, optimizer)`. It decides as `torch.optim.lr_scheduler.ReduceLROnPlateau` with an
    absolute threshold and a patience of `tolerance - 1`, except that an infinite value never improves.

    Args:
        metric_key: The metric to watch, such as `val/accuracy`.
        tolerance: Firings in a row without improvement after which the learning rate is reduced, >= 1.
        factor: Factor for the learning rate, in (0, 1).
        cooldown: Firings after a reduction that do not count as firings without improvement, >= 0.
        min_scale: Lower bound of `lr_scale`, in [0, 1].
        min_delta: Improvement over the best value that is too small to count, >= 0.
        mode: Whether `higher` or `lower` is better; None derives it from the key.
        missing: If the metric is not current at a firing: `raise` raises an error; `skip` counts it neither towards
            `tolerance` nor towards `cooldown`.
        every_n_epochs: Epochs between firings, >= 1.
        every_n_updates: Updates between firings, >= 1.
        every_n_samples: Samples between firings, >= 1; give exactly one of the three.

    Raises:
        MetricError: If the metric is not current and `missing` is `raise`.

    ```yaml
    - kind: noether.core.callbacks.ReduceLROnPlateauCallback
      every_n_epochs: 1
      metric_key: loss/val/total
      tolerance: 5
      factor: 0.5
    ```

    Example:
        >>> from noether import AfterEpoch, TrainState, log
        >>> reduce = ReduceLROnPlateauCallback(every_n_epochs=1, metric_key="loss/val/total", tolerance=1, factor=0.5)
        >>> state = TrainState()
        >>> for loss in (0.3, 0.4):
        ...     state, _ = log(state.next_epoch(), AfterEpoch(), {"loss/val/total": loss})
        ...     state, _ = reduce(state, AfterEpoch())
        >>> state.hyperparams["lr_scale"]
        0.5
    """

    tolerance: int
    factor: float = 0.1
    cooldown: int = 0
    min_scale: float = 0.0
    min_delta: float = 0.0

    def problems(self) -> Iterator[Problem | None]:
        """Yield the problems of the settings."""
        yield from super().problems()
        yield check_whole("tolerance", self.tolerance)
        yield check_whole("cooldown", self.cooldown, at_least=0)
        yield min_delta_problem(self.min_delta)
        if not is_number(self.factor) or not 0 < self.factor < 1:
            yield Problem("factor", f"{self.factor!r} is not a number between 0 and 1, both excluded")
        if not is_number(self.min_scale) or not 0 <= self.min_scale <= 1:
            yield Problem("min_scale", f"{self.min_scale!r} is not a number from 0 to 1")

    @property
    def produces(self) -> tuple[str, ...]:
        """Empty: it logs no metric."""
        return ()

    def init(self, state: TrainState) -> Mapping[str, Memory]:
        """Return a memory without a best value."""
        return {self.name: FrozenDict(best=None, since=0, cooling=0)}

    def periodic_callback(self, state: TrainState, event: Event, interval: Interval) -> tuple[TrainState, Effects]:
        """Reduce the learning rate if the metric has not improved for `tolerance` firings."""
        if is_nonfinite(state):
            return state, ()
        value, memory = self.read_metric(state, self.metric_key), self.memory(state)
        if value is None:
            return state, ()
        improved = improves(value, memory["best"], self.direction, self.min_delta)
        best = value if improved else memory["best"]
        since = 0 if improved or memory["cooling"] else memory["since"] + 1
        reduces = since >= self.tolerance
        cooling = self.cooldown if reduces else max(0, memory["cooling"] - 1)
        memory = FrozenDict(best=best, since=0 if reduces else since, cooling=cooling)
        state = state.remember(self.name, memory)
        state, effects = self._reduce(state, best) if reduces else (state, ())
        return state, (*self.report_infinity(state, value), *effects)

    def _reduce(self, state: TrainState, best: float | None) -> tuple[TrainState, Effects]:
        before = state.hyperparams["lr_scale"]
        after = max(before * self.factor, self.min_scale)
        if after >= before:
            return state, ()
        beyond = "finite" if best is None else f"{self.direction} than {best:.6g}"
        reason = f"{self.metric_key} has not been {beyond} for {count_of(self.tolerance, 'firing')}"
        text = f"learning rate times {after / before:.6g}: {reason}"
        hyperparams = FrozenDict({**state.hyperparams, "lr_scale": after})
        return state.replace(hyperparams=hyperparams), (LogText(text),)
