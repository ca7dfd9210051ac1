"""Logs losses and metrics over a whole dataset, in one pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, final

import torch

from noether.core.callables import without_partial
from noether.core.callback import OptionalKey
from noether.core.callbacks.data_iterator import PeriodicDataIteratorCallback
from noether.core.callbacks.metric_functions import METRICS, MetricFunction, NamedMetric, mean_of_output
from noether.core.callbacks.metric_objects import MetricObject, metric_objects, numbers_of
from noether.core.callbacks.metric_states import MetricStates, is_metric_class
from noether.core.errors import OutputError, Problem, suggest
from noether.core.metric_keys import patterns_containing
from noether.core.metrics import is_current, log
from noether.core.tensors.calls import call_with_outputs
from noether.core.tensors.losses import loss_weights, name_of, sum_as_total
from noether.core.tensors.means import Mean

if TYPE_CHECKING:
    from collections.abc import Iterator

    from noether.core.callback import Effects
    from noether.core.callbacks.metric_states import Accumulator
    from noether.core.event import Event
    from noether.core.run import Run
    from noether.core.state import TrainState


class _Evaluation(PeriodicDataIteratorCallback):
    """Logs means over a dataset; a subclass chooses losses, metrics and outputs."""

    @cached_property
    def _logs_losses(self) -> bool:
        return False

    @property
    def _measures(self) -> tuple[str | MetricFunction, ...]:
        """The metrics of the settings."""
        return ()

    @cached_property
    def _metrics(self) -> Mapping[str, MetricFunction | MetricObject]:
        return {name: metric for measure in self._measures for name, metric in _metrics_in(measure)}

    @property
    def _output_patterns(self) -> tuple[str, ...]:
        return ()

    def process_data(self, state: TrainState, batch: Any, forward: Callable[..., Any]) -> Mapping[str, Any]:
        """Return the losses, metrics and outputs of a batch."""
        losses, outputs = _call_forward(forward, state, batch)
        results: dict[str, Any] = _mean_losses(losses) if self._logs_losses else {}
        for name, metric in self._metrics.items():
            if isinstance(metric, MetricObject):
                results[f"metric/{name}"] = metric.arguments(outputs, batch)
                continue
            value = call_with_outputs(metric, outputs, batch, f"metric {name}")
            results[f"metric/{name}"] = value if isinstance(value, Mean) else Mean(value)
        if self._output_patterns:
            results |= _mean_outputs(outputs, self._output_patterns)
        return results

    def process_results(
        self, state: TrainState, event: Event, results: Mapping[str, Any]
    ) -> tuple[TrainState, Effects]:
        """Log the means, and the differences to the online losses."""
        means = {kind: _select(results, kind) for kind in ("loss", "metric")}
        if "weighted" in results:
            means["loss"] = sum_as_total(means["loss"])
        values: dict[str, Any] = {}
        for name, value in means["loss"].items():
            values |= {self._loss_key(name): value, **self._difference(state, name, value)}
        for name, value in means["metric"].items():
            numbers = numbers_of(name, value) if isinstance(self._metrics.get(name), MetricObject) else [(name, value)]
            values |= {self.key(part): number for part, number in numbers}
        return log(state, event, values)

    def _accumulators(self, run: Run) -> Mapping[str, Accumulator]:
        objects = (metric for metric in self._metrics.values() if isinstance(metric, MetricObject))
        return {
            f"metric/{each.name}": MetricStates(
                each.metric, f"the metric {each.name} of {self.name}", keep=run.world_size > 1
            )
            for each in objects
        }

    def _loss_key(self, name: str, prefix: str = "loss") -> str:
        return "/".join((prefix, self.dataset_key, name, *((self.weights,) if self.weights else ())))

    def _difference(self, state: TrainState, name: str, mean: torch.Tensor) -> dict[str, torch.Tensor]:
        online = f"loss/online/{name}/{self.interval_name}"
        if not is_current(state, online):
            return {}
        return {self._loss_key(name, "lossdiff"): mean - state.metrics[online].value}

    @property
    def produces(self) -> tuple[str, ...]:
        """The keys of losses, metrics and outputs."""
        losses = (self._loss_key("*"), self._loss_key("*", "lossdiff")) if self._logs_losses else ()
        outputs = (name for pattern in self._output_patterns for name in patterns_containing(pattern))
        metrics = (key for name, each in self._metrics.items() for key in getattr(each, "keys", (name,)))
        return (*losses, *(self.key(name) for name in (*metrics, *outputs)))

    @property
    def consumes(self) -> tuple[str, ...]:
        """The weights that it evaluates, and the online loss of the same interval where it is current."""
        online = (OptionalKey(f"loss/online/*/{self.interval_name}"),) if self._logs_losses else ()
        return (*super().consumes, *online)


@final
class OfflineLossCallback(_Evaluation):
    """Logs `loss/{dataset}/{name}`: the mean of each loss over the batches of a dataset that have it.

    The batches are weighted by their samples, or by the weights that the loss function gives (`noether.Mean`); with
    such weights `total` is the sum of the means of the other losses.

    If an `OnlineLossCallback` with the same interval stands before it, it also logs `lossdiff/{dataset}/{name}`, this
    loss minus the online loss. With `weights: ema=0.999`, the keys end in `/ema=0.999`.

    Args:
        dataset_key: Name of the dataset to evaluate.
        output_patterns_to_log: Parts of names of model outputs whose mean is logged, too, as `{dataset}/{output}`.
        batch_size: Samples per batch, >= 1; None for that of the trainer.
        weights: Name of the weights to evaluate, such as `ema=0.999`; None for those in training.
        every_n_epochs: Epochs between firings, >= 1.
        every_n_updates: Updates between firings, >= 1.
        every_n_samples: Samples between firings, >= 1; give exactly one of the three.

    ```yaml
    - kind: noether.core.callbacks.OfflineLossCallback
      every_n_epochs: 1
      dataset_key: val
    ```

    Example:
        >>> OfflineLossCallback(every_n_epochs=1, dataset_key="val").produces
        ('loss/val/*', 'lossdiff/val/*')
    """

    output_patterns_to_log: tuple[str, ...] = ()

    @cached_property
    def _logs_losses(self) -> bool:
        return True

    @property
    def _output_patterns(self) -> tuple[str, ...]:
        return self.output_patterns_to_log


@final
class MetricCallback(_Evaluation):
    """Logs `{dataset}/{metric}`, such as `val/accuracy`: a metric over a dataset.

    Of a function it logs the mean, and keeps sums only, so memory does not grow with the dataset. With
    `weights: ema=0.999`, the key ends in `/ema=0.999`.

    A metric of torchmetrics (`pip install 'noether[metrics]'`) gets the outputs and `target_of(batch)`. Where its
    `update` needs something else, such as probabilities, one of several outputs, or `indexes`, `prepare` returns that:
    a function of outputs and batch, in YAML a setting beside those of the metric, in Python
    `NamedMetric(name, metric, prepare)`. Several numbers, such as those of each class with `average=None`, are logged
    as `val/f1/0`, `val/f1/1`; a `MetricCollection` logs each of its metrics. The metric is copied, never changed. Its
    states are merged batch by batch, or, if torchmetrics does not say how (`full_state_update` is not False), it gets
    all batches in order; several ranks then exchange what it gets of all batches, so that takes memory.

    Args:
        dataset_key: Name of the dataset to evaluate.
        metric: `accuracy`, `binary_accuracy`, a metric of torchmetrics, or a pure function of outputs and batch (in
            YAML its dotted path, or `{kind: mine.within, tol: 0.03, name: within_3}`) that returns one value per
            sample, `(batch,)`, or the mean over the batch, `()`.
        batch_size: Samples per batch, >= 1; None for that of the trainer.
        weights: Name of the weights to evaluate, such as `ema=0.999`; None for those in training.
        every_n_epochs: Epochs between firings, >= 1.
        every_n_updates: Updates between firings, >= 1.
        every_n_samples: Samples between firings, >= 1; give exactly one of the three.

    ```yaml
    - kind: noether.core.callbacks.MetricCallback
      every_n_epochs: 1
      dataset_key: val
      metric: accuracy
    - kind: noether.core.callbacks.MetricCallback
      every_n_epochs: 1
      dataset_key: val
      metric: {kind: torchmetrics.classification.MulticlassF1Score, num_classes: 10, average: macro, name: f1}
    ```

    Example:
        >>> MetricCallback(every_n_epochs=1, dataset_key="val", metric="accuracy").produces
        ('val/accuracy',)
        >>> from torchmetrics.classification import MulticlassF1Score
        >>> from noether.core.callbacks.metric_functions import NamedMetric
        >>> f1 = NamedMetric("f1", MulticlassF1Score(num_classes=10, average="macro"))
        >>> MetricCallback(every_n_epochs=1, dataset_key="val", metric=f1).produces
        ('val/f1',)
    """

    metric: str | MetricFunction

    def problems(self) -> Iterator[Problem | None]:
        """Yield the problems of the settings."""
        yield from super().problems()
        yield _metric_problem("metric", self.metric)

    @property
    def _measures(self) -> tuple[str | MetricFunction, ...]:
        return (self.metric,)

    def name_parts(self) -> tuple[str, ...]:
        """Return the interval, the dataset and the metric."""
        return (*super().name_parts(), metric_name(self.metric))


@final
class EvaluateCallback(_Evaluation):
    """Logs several losses and metrics over one dataset, in one pass; `trainer.evaluate` adds it.

    The keys are those of `OfflineLossCallback` and `MetricCallback`.

    Args:
        dataset_key: Name of the dataset to evaluate.
        measures: `loss`, and metrics as for `MetricCallback`, those of torchmetrics too; at least one, without
            duplicates.
        batch_size: Samples per batch, >= 1; None for that of the trainer.
        weights: Name of the weights to evaluate, such as `ema=0.999`; None for those in training.
        every_n_epochs: Epochs between firings, >= 1.
        every_n_updates: Updates between firings, >= 1.
        every_n_samples: Samples between firings, >= 1; give exactly one of the three.

    ```yaml
    - kind: noether.core.callbacks.EvaluateCallback
      every_n_epochs: 1
      dataset_key: val
      measures: [loss, accuracy]
    ```

    Example:
        >>> EvaluateCallback(every_n_epochs=1, dataset_key="val", measures=("loss", "accuracy")).produces
        ('loss/val/*', 'lossdiff/val/*', 'val/accuracy')
    """

    measures: tuple[str | MetricFunction, ...]

    @property
    def consumes(self) -> tuple[str, ...]:
        """The weights that it evaluates. The trainer chooses its place, so no optional key has to come before it."""
        return tuple(key for key in super().consumes if not isinstance(key, OptionalKey))

    def problems(self) -> Iterator[Problem | None]:
        """Yield the problems of the settings."""
        yield from super().problems()
        names = ["loss"] * sum(map(_is_loss, self.measures))
        names += [f"metric {name}" for measure in self._measures for name, _ in _metrics_in(measure)]
        if not names or len(set(names)) < len(names):
            yield Problem(
                "measures", f"{list(self.measures)} is not a list of different measures, like [loss, accuracy]"
            )
        yield from (_metric_problem("measures", measure) for measure in self._measures)

    @cached_property
    def _logs_losses(self) -> bool:
        return any(map(_is_loss, self.measures))

    @property
    def _measures(self) -> tuple[str | MetricFunction, ...]:
        return tuple(measure for measure in self.measures if not _is_loss(measure))


def metric_name(metric: str | MetricFunction) -> str:
    """Return the name of a metric in keys."""
    if isinstance(metric, str):
        return metric
    if isinstance(metric, NamedMetric):
        return metric.name
    function = metric if hasattr(metric, "__name__") else without_partial(metric)
    return str(getattr(function, "__name__", type(function).__name__))


def _is_loss(measure: object) -> bool:
    return isinstance(measure, str) and measure == "loss"  # a metric of torchmetrics makes a metric of `==`


def _metrics_in(metric: str | MetricFunction) -> Iterator[tuple[str, MetricFunction | MetricObject]]:
    """Yield the name and the function of a metric, or those of each metric in a collection of torchmetrics."""
    objects = metric_objects(metric)
    if objects is None:
        function: Any = METRICS.get(metric) if isinstance(metric, str) else metric
        yield metric_name(metric), function
    else:
        yield from ((each.name, each) for each in objects)


def _metric_problem(setting: str, metric: Any) -> Problem | None:
    if isinstance(metric, type) and is_metric_class(metric):
        return Problem(setting, f"{metric.__name__} is a class: give a metric, {metric.__name__}(...)")
    if not callable(metric) and metric not in METRICS:
        known = ", ".join(map(repr, METRICS))
        fix = f"a function of outputs and batch, or a metric of torchmetrics{suggest(str(metric), METRICS)}"
        return Problem(setting, f"{metric!r} is not {known}, {fix}")
    objects = metric_objects(metric)
    if objects is None and getattr(metric, "prepare", None) is not None:
        name = metric_name(metric)
        return Problem(setting, f"{name} is a function, which gets outputs and batch: leave `prepare` out")
    found = next((each.problem for each in objects or () if each.problem is not None), None)
    return None if found is None else Problem(setting, found)


def _call_forward(forward: Callable[..., Any], state: TrainState, batch: Any) -> tuple[Mapping[str, Any], Any]:
    """Return the losses of a batch by name, and the outputs of the model."""
    result = forward(state, batch)
    fix = "return (losses, outputs), where losses is {name: loss}"
    if not isinstance(result, (tuple, list)) or len(result) != 2:  # noqa: PLR2004  # losses and outputs
        raise TypeError(f"{name_of(forward)}, the forward of the run, returned a {type(result).__name__}: {fix}")
    losses, outputs = result
    if not isinstance(losses, (dict, Mapping)):  # testing for a dict is faster
        if not isinstance(losses, (torch.Tensor, Mean)):
            raise TypeError(
                f"{name_of(forward)}, the forward of the run, returned losses as a {type(losses).__name__}: {fix}"
            )
        losses = {"loss": losses}
    return losses, outputs


def _select(results: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Return the results of a kind, by name."""
    return {name.removeprefix(f"{kind}/"): value for name, value in results.items() if name.startswith(f"{kind}/")}


def _mean_losses(losses: Mapping[str, Any]) -> dict[str, Any]:
    """Return the mean over the batch of each loss, and the result `weighted` if one has a weight."""
    weights = loss_weights(losses)
    results: dict[str, Any] = {}
    for name, loss in losses.items():
        mean = loss if isinstance(loss, Mean) else Mean(loss, weights.get(name))
        results[f"loss/{name}"] = mean
        if mean.weight is not None:
            results["weighted"] = 1
    return results


def _mean_outputs(outputs: Any, patterns: tuple[str, ...]) -> dict[str, Mean]:
    """Return the mean over the batch of each output whose name contains one of `patterns`."""
    if not isinstance(outputs, Mapping):
        raise OutputError(
            f"output_patterns_to_log needs a model that returns a dict; it returns {type(outputs).__name__}"
        )
    chosen = [name for name in outputs if any(pattern in name for pattern in patterns)]
    return {f"metric/{name}": Mean(mean_of_output(name, outputs[name])) for name in chosen}
