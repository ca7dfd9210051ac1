"""Saves the checkpoint at which a metric was best."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, final

from noether.core.callbacks.improvement import MetricWatcher, improves, is_nonfinite, min_delta_problem
from noether.core.effect import SaveCheckpoint
from noether.core.errors import Problem, check_whole
from noether.core.file_names import best_pointer
from noether.core.tensors.stored_weights import check_model_names, measured_weights, memory_of, name_in_tags
from noether.core.tensors.tree import FrozenDict

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from noether.core.callback import Effects
    from noether.core.event import Event
    from noether.core.schedules.gate import Interval
    from noether.core.state import Memory, TrainState

    _Ranking = tuple[tuple[float, int], ...]  # value and number of the pointer, the best first


@final
class BestCheckpointCallback(MetricWatcher):
    """Saves a checkpoint whenever a metric improves; the pointer `best_model.{metric}` follows it.

    In the pointer's name `/` becomes `.`, and other characters than letters, digits and `_-=` are escaped, as in
    `best_model.val.recall%4010` for `val/recall@10`; `noether eval --checkpoint` takes `best_model.val/recall@10` too.

    For each tolerance k, the pointer `best_model.{metric}.tolerance={k}` names the best checkpoint that a run with
    early stopping after k firings would have had. With `keep: k`, the pointers `top_1.{metric}` to `top_k.{metric}`
    name the k best checkpoints, in no order: a better one takes the pointer of the worst. Of equal values the first
    stays. Checkpoints that no pointer names are removed. Values that are not finite never improve. List this callback
    after the one that logs the metric.

    The pointers name the weights that were measured: for a metric whose key ends in the name of stored weights, such as
    `val/accuracy/ema=0.999`, a checkpoint `TAG.ema=0.999` of that average. A run cannot resume from an average, so the
    callback then saves a checkpoint of the run, too.

    Args:
        metric_key: The metric to watch, such as `val/accuracy`.
        mode: Whether `higher` or `lower` is better; None derives it from the key.
        min_delta: Improvement over the best value that is too small to count, >= 0.
        keep: Number of best checkpoints to keep, >= 1.
        tolerances: Numbers of firings in a row without improvement, each >= 1, without duplicates.
        missing: If the metric is not current at a firing: `raise` raises an error; `skip` saves nothing, and the firing
            does not count towards a tolerance.
        model_names: Sub-modules whose weights to save, by their name in the model; empty for all.
        weights_of: Name of the stored weights that were measured, such as `ema=0.999`, for a key that does not end in
            it; None reads it from the key.
        every_n_epochs: Epochs between firings, >= 1.
        every_n_updates: Updates between firings, >= 1.
        every_n_samples: Samples between firings, >= 1; give exactly one of the three.

    Raises:
        MetricError: If the metric is not current and `missing` is `raise`.

    ```yaml
    - kind: noether.core.callbacks.BestCheckpointCallback
      every_n_epochs: 1
      metric_key: val/accuracy
      tolerances: [3, 5]
    ```

    Example:
        >>> from noether import AfterEpoch, TrainState, log
        >>> callback = BestCheckpointCallback(every_n_epochs=1, metric_key="val/accuracy")
        >>> state, _ = log(TrainState().next_epoch(), AfterEpoch(), {"val/accuracy": 0.9})
        >>> callback(state, AfterEpoch())[1][0].pointers
        ('best_model.val.accuracy',)
    """

    min_delta: float = 0.0
    keep: int = 1
    tolerances: tuple[int, ...] = ()
    model_names: tuple[str, ...] = ()
    weights_of: str | None = None

    def problems(self) -> Iterator[Problem | None]:
        """Yield the problems of the settings."""
        yield from super().problems()
        yield min_delta_problem(self.min_delta)
        yield check_whole("keep", self.keep)
        yield from (check_whole("tolerances", tolerance) for tolerance in self.tolerances)
        if len(set(self.tolerances)) < len(self.tolerances):
            yield Problem("tolerances", f"{list(self.tolerances)} has duplicates; give each tolerance once")

    @property
    def produces(self) -> tuple[str, ...]:
        """The pointer as a key: a second callback that moves it is refused, as each would remove the other's saves.

        The key is in lower case, because some file systems ignore case.
        """
        return (f"checkpoints/{self.pointer.lower()}",)

    @property
    def consumes(self) -> tuple[str, ...]:
        """The metric, the weights that were measured, and whether the update was finite, where a callback logs that."""
        return (*super().consumes, *(() if self.weights_of is None else (memory_of(self.weights_of),)))

    @property
    def pointer(self) -> str:
        """Name of the pointer to the best checkpoint."""
        return best_pointer(self.metric_key)

    def init(self, state: TrainState) -> Mapping[str, Memory]:
        """Return a memory without a best value.

        Raises:
            SettingsError: If the model has no weights below one of `model_names`.
        """
        check_model_names(state, self.model_names)
        return {self.name: FrozenDict(best=None, since=0, longest=0)}

    def periodic_callback(self, state: TrainState, event: Event, interval: Interval) -> tuple[TrainState, Effects]:
        """Request a checkpoint if the metric improved, or is among the best."""
        if is_nonfinite(state):
            return state, ()
        value, memory = self.read_metric(state, self.metric_key), self.memory(state)
        if value is None:
            return state, ()
        number, top = self._rank(value, memory.get("top", ()))
        pointers = [] if number is None else [f"top_{number}.{self.pointer.partition('.')[2]}"]
        report: Effects = ()
        if improves(value, memory["best"], self.direction, self.min_delta):
            # Early stopping would have ended a run whose longest wait reached its tolerance.
            running = [k for k in self.tolerances if memory["longest"] < k]
            pointers = [*(best_pointer(self.metric_key, k) for k in (None, *running)), *pointers]
            memory = FrozenDict(best=value, since=0, longest=memory["longest"])
        else:
            report, since = self.report_infinity(state, value), memory["since"] + 1
            memory = FrozenDict(best=memory["best"], since=since, longest=max(since, memory["longest"]))
        state = state.remember(self.name, memory if self.keep == 1 else FrozenDict({**memory, "top": top}))
        return self._save(state, tuple(pointers)) if pointers else (state, report)

    def _rank(self, value: float, top: _Ranking) -> tuple[int | None, _Ranking]:
        """Return the number of the pointer to set if a value is among the best ones, or None, and those with it."""
        better = [each for each in top if not improves(value, each[0], self.direction)]
        if self.keep == 1 or len(better) >= self.keep or not math.isfinite(value):
            return None, top
        worse = top[len(better) :]
        number = len(top) + 1 if len(top) < self.keep else worse[-1][1]
        return number, (*better, (value, number), *worse)[: self.keep]

    def _save(self, state: TrainState, pointers: tuple[str, ...]) -> tuple[TrainState, Effects]:
        """Request a checkpoint of the weights that were measured."""
        save = SaveCheckpoint(models=self.model_names, pointers=pointers, retention=FrozenDict({self.name: 0}))
        weights = measured_weights(state, self.metric_key) if self.weights_of is None else self.weights_of
        if weights is None:
            return state, (save,)
        tag = f"{state.iteration}.{name_in_tags(weights)}"
        measured = replace(save, tag=tag, optimizer=False, weights_of=weights)
        return state, (measured,) if self.model_names else (replace(save, pointers=()), measured)
