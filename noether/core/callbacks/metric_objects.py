"""Metrics of torchmetrics in callbacks: their names and keys, what their `update` gets, and the numbers they give."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from numbers import Real
from typing import TYPE_CHECKING, Any, final

import torch

from noether.core.callables import accepts, positional_names
from noether.core.callbacks.metric_functions import MetricInputError, NamedMetric
from noether.core.callbacks.metric_states import Arguments, copy_metric, is_metric_class, is_own_class
from noether.core.errors import NoetherError
from noether.core.tensors.batch import target_of
from noether.core.tensors.calls import call_with_outputs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from noether.core.callbacks.metric_functions import MetricFunction


class MetricResultError(NoetherError, TypeError):
    """A metric gives no number that a log can take."""


@final
@dataclass(frozen=True, eq=False)
class MetricObject:
    """A metric of torchmetrics as a callback measures it.

    Args:
        name: Its name in metric keys.
        metric: The metric; it is copied, never changed.
        prepare: `(outputs, batch) -> arguments of update`, as a tuple or by name; None for outputs and targets.

    Example:
        >>> from torchmetrics.classification import MulticlassRecall
        >>> MetricObject("recall", MulticlassRecall(num_classes=3, average=None)).keys
        ('recall/0', 'recall/1', 'recall/2')
    """

    name: str
    metric: Any
    prepare: Callable[[Any, Any], Any] | None = None

    @property
    def problem(self) -> str | None:
        """Why the metric cannot be measured, as far as that is known before training."""
        if self.prepare is None and not _takes_targets(self.metric):
            names = ", ".join(positional_names(self.metric.update))
            return (
                f"{type(self.metric).__name__}.update takes ({names}), not outputs and targets alone: give `prepare`, "
                "a function of outputs and batch that returns its arguments, as a tuple or by name"
            )
        try:
            dict(numbers_of(self.name, {} if self._empty_result is None else self._empty_result))
        except MetricResultError as error:
            return str(error)
        return None

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """Names of its numbers: its own name, or that with the key or index of each of several results."""
        if self._empty_result is not None:
            return tuple(name for name, _ in numbers_of(self.name, self._empty_result))
        several = getattr(self.metric, "average", "") in (None, "none")
        return (f"{self.name}/*" if several else self.name,)

    @cached_property
    def _empty_result(self) -> Any:
        """What the metric gives for no samples, which has the keys of any result; None if it gives nothing then."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torchmetrics warns that there are no samples
            try:
                return copy_metric(self.metric).compute()
            except Exception:  # noqa: BLE001  # many metrics need samples
                return None

    def arguments(self, outputs: Any, batch: Any) -> Arguments:
        """Return what `update` gets for a batch.

        Raises:
            MetricInputError: If the outputs are a mapping, and `prepare` does not choose among them.
        """
        if self.prepare is not None:
            prepared = call_with_outputs(self.prepare, outputs, batch, f"`prepare` of the metric {self.name}")
        elif isinstance(outputs, Mapping):
            raise MetricInputError(
                f"the metric {self.name} needs one output, and the model returns {', '.join(map(str, outputs))}: give "
                "`prepare`, such as def prepare(outputs, batch): return outputs['logits'], batch['label']"
            )
        else:
            prepared = outputs, target_of(batch)
        if isinstance(prepared, Mapping):
            return Arguments((), prepared)
        return Arguments(tuple(prepared) if isinstance(prepared, (tuple, list)) else (prepared,), {})


def _takes_targets(metric: Any) -> bool:
    """Return whether outputs and targets are all that `update` needs, and it takes them for what they are.

    The second argument of some metrics of torchmetrics is something else, such as the weights of a mean.
    """
    if not accepts(metric.update, "outputs", "targets"):
        return False
    names = positional_names(metric.update)
    return not is_own_class(type(metric)) or not names or names[1:2] == ["target"]


def metric_objects(metric: str | MetricFunction) -> tuple[MetricObject, ...] | None:
    """Return the metrics of torchmetrics that a setting names: one, or all of a collection; None for a function."""
    given = metric if isinstance(metric, NamedMetric) else None
    found: Any = metric if given is None else given.function
    prepare = None if given is None else given.prepare
    if is_metric_class(type(found)):
        return (MetricObject(type(found).__name__ if given is None else given.name, found, prepare),)
    if not is_metric_class(type(found), "MetricCollection"):
        return None
    prefix = "" if given is None else f"{given.name}/"
    members = found.clone().items(keep_base=False, copy_state=True)
    return tuple(MetricObject(f"{prefix}{key}", each, prepare) for key, each in members)


def numbers_of(name: str, result: Any) -> Iterator[tuple[str, Any]]:
    """Yield the numbers in the result of a metric with their names: keys and indices come after its own name.

    Raises:
        MetricResultError: If there is something else in it, such as a matrix.

    Example:
        >>> dict(numbers_of("f1", {"macro": torch.tensor(0.5), "each": torch.tensor([0.25, 0.75])}))
        {'f1/macro': tensor(0.5000), 'f1/each/0': tensor(0.2500), 'f1/each/1': tensor(0.7500)}
    """
    if isinstance(result, Mapping):
        for key, value in result.items():
            yield from numbers_of(f"{name}/{key}", value)
    elif isinstance(result, torch.Tensor) and result.ndim == 1:
        for index, value in enumerate(result):
            yield f"{name}/{index}", value
    elif isinstance(result, Real) or (isinstance(result, torch.Tensor) and not result.ndim):
        yield name, result
    else:
        kind = type(result).__name__
        found = f"a tensor of shape {tuple(result.shape)}" if isinstance(result, torch.Tensor) else f"a {kind}"
        raise MetricResultError(
            f"the metric {name} gives {found}, and a log takes numbers: choose a metric that gives one number, or one "
            "for each class (average=None); to keep a matrix or a curve, write a PeriodicDataIteratorCallback whose "
            "process_results returns noether.SaveTensors"
        )
