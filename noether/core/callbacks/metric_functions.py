"""Metrics of a batch that callbacks know by name, and means of outputs: pure functions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol, final

import torch

from noether.core.callbacks.metric_states import is_metric_class
from noether.core.errors import NoetherError, OutputError
from noether.core.tensors.batch import target_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from noether.core.tensors.means import Mean


class MetricFunction(Protocol):
    """A pure function `(outputs, batch)` that returns one value per sample, `(batch,)`, or their mean, `()`.

    It returns `Mean(value, weight=n)` if that is the mean over something else than samples. In YAML a setting of this
    type is a dotted path, or a `kind` with settings and a `name`; it becomes a `NamedMetric`. `MetricCallback` and
    `EvaluateCallback` also take a metric of torchmetrics.
    """

    def __call__(self, outputs: Any, batch: Any, /) -> torch.Tensor | Mean:
        """Return the values, or their mean."""


@final
@dataclass(frozen=True)
class NamedMetric:
    """A metric with the name that it has in metric keys.

    Args:
        name: The name.
        function: The metric: a function, or a metric of torchmetrics.
        prepare: For a metric of torchmetrics, a pure function of outputs and batch that returns the arguments of its
            `update`, as a tuple or by name; None for the outputs and `target_of(batch)`.

    Example:
        >>> half = NamedMetric("half", lambda outputs, batch: outputs / 2)
        >>> half(torch.tensor([3.0]), None)
        tensor([1.5000])
    """

    name: str
    function: MetricFunction
    prepare: Callable[[Any, Any], Any] | None = None

    def __call__(self, outputs: Any, batch: Any) -> torch.Tensor | Mean:
        """Return the result of a function.

        Raises:
            TypeError: If the metric is one of torchmetrics, which a call would change.
        """
        if any(is_metric_class(type(self.function), base) for base in ("Metric", "MetricCollection")):
            raise TypeError(
                f"{self.name} is a metric of torchmetrics, which a call would change: give it to MetricCallback or "
                "EvaluateCallback, which measure with a copy of it"
            )
        return self.function(outputs, batch)


_GIVE_FUNCTION: Final = "give a function of outputs and batch that returns one value per sample, (batch,)"


class MetricInputError(NoetherError, ValueError):
    """A metric has no meaning for these outputs and targets; the message says which shapes and values it needs."""


def accuracy(outputs: torch.Tensor, batch: Any) -> torch.Tensor:
    """Return for each sample whether the target has the highest score.

    Args:
        outputs: Scores `(batch, classes)` of two or more classes.
        batch: A batch with targets `(batch,)` or `(batch, 1)`, whole numbers in `[0, classes)`, or one-hot targets
            `(batch, classes)`; see `target_of`.

    Returns:
        `(batch,)`, 1.0 or 0.0; NaN where a score is NaN.

    Raises:
        MetricInputError: If outputs or targets have another shape, or targets another value. One score per sample is
            refused, because it may be a logit or a probability: see `binary_accuracy`.

    Example:
        >>> accuracy(torch.tensor([[0.1, 0.9], [0.8, 0.2]]), (None, torch.tensor([1, 1])))
        tensor([1., 0.])
    """
    scores, targets = _read("accuracy", outputs, batch)
    shape = tuple(scores.shape)
    if shape and shape[1:] in ((), (1,)):
        raise MetricInputError(
            f"accuracy needs scores of two or more classes, but the outputs have shape {shape}: for one logit per "
            "sample, use binary_accuracy; for one probability per sample, give a function of outputs and batch that "
            "returns `((outputs > 0.5) == batch[1]).float()`"
        )
    if len(shape[1:]) != 1 or not shape[1]:
        raise MetricInputError(
            f"accuracy needs scores of shape (batch, classes), but the outputs have shape {shape}: {_GIVE_FUNCTION}"
        )
    if targets.shape == scores.shape:
        classes = _classes_of_one_hot(targets)
    else:
        classes = _class_numbers("accuracy", targets, shape[0], one_hot=shape)
        _check_values("accuracy", classes, shape[1])
    return _where_not_nan(scores, scores.argmax(dim=1) == classes)


def binary_accuracy(outputs: torch.Tensor, batch: Any) -> torch.Tensor:
    """Return for each sample whether its logit is on the side of its target: above zero for 1, else for 0.

    Args:
        outputs: Logits `(batch,)` or `(batch, 1)` of class 1, as `binary_cross_entropy_with_logits` takes them; not
            probabilities, all of which are above zero.
        batch: A batch with targets `(batch,)` or `(batch, 1)`, each 0 or 1 in any dtype; see `target_of`.

    Returns:
        `(batch,)`, 1.0 or 0.0; NaN where a logit is NaN.

    Raises:
        MetricInputError: If outputs or targets have another shape, or targets another value.

    Example:
        >>> binary_accuracy(torch.tensor([[1.5], [-0.5]]), (None, torch.tensor([1.0, 1.0])))
        tensor([1., 0.])
    """
    logits, targets = _read("binary_accuracy", outputs, batch)
    shape = tuple(logits.shape)
    if not shape or shape[1:] not in ((), (1,)):
        use = "; for scores of several classes, use accuracy" if len(shape[1:]) == 1 else ""
        raise MetricInputError(
            f"binary_accuracy needs logits of shape (batch,) or (batch, 1), but the outputs have shape {shape}{use}"
        )
    logits, classes = logits.reshape(-1), _class_numbers("binary_accuracy", targets, shape[0])
    _check_values("binary_accuracy", classes, 2)
    return _where_not_nan(logits, (logits > 0) == classes.bool())


METRICS: Final[dict[str, MetricFunction]] = {"accuracy": accuracy, "binary_accuracy": binary_accuracy}


def mean_of_output(name: str, output: Any) -> torch.Tensor:
    """Return the mean of a model's output over all its elements, in double precision.

    Raises:
        OutputError: If the output is complex, or no tensor or number.

    Example:
        >>> mean_of_output("drift", [1, 2])
        tensor(1.5000, dtype=torch.float64)
    """
    try:
        tensor = to_tensor(output)
    except (TypeError, ValueError, RuntimeError):
        raise OutputError(f"the output {name!r} is of type {type(output).__name__}, which has no mean") from None
    if tensor.is_complex():
        raise OutputError(f"the output {name!r} is complex, so its mean is no real number: return its absolute value")
    return tensor.double().mean()


def to_tensor(value: Any) -> torch.Tensor:
    """Return a value as a tensor without a graph; a Python float stays exact."""
    return torch.as_tensor(value, dtype=torch.float64 if isinstance(value, float) else None).detach()


def _read(metric: str, outputs: Any, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scores and targets, refusing what is not a tensor of real numbers."""
    targets = target_of(batch)
    for name, value in (("outputs", outputs), ("targets", targets)):
        if not isinstance(value, torch.Tensor):
            kind = type(value).__name__
            raise MetricInputError(f"{metric} needs a tensor of {name}, but they are of type {kind}: {_GIVE_FUNCTION}")
        if value.is_complex() or (name == "outputs" and value.dtype == torch.bool):
            raise MetricInputError(f"{metric} cannot compare {name} of {value.dtype}: {_GIVE_FUNCTION}")
    return outputs, targets


def _class_numbers(
    metric: str, targets: torch.Tensor, samples: int, one_hot: tuple[int, ...] | None = None
) -> torch.Tensor:
    """Return targets `(samples,)` or `(samples, 1)` as `(samples,)`; `one_hot` is another shape that is accepted."""
    if targets.shape not in ((samples,), (samples, 1)):
        other = "" if one_hot is None else f", or one-hot targets of shape {one_hot}"
        raise MetricInputError(
            f"{metric} needs targets of shape ({samples},) or ({samples}, 1){other}, but they have shape "
            f"{tuple(targets.shape)}"
        )
    return targets if targets.ndim == 1 else targets.reshape(-1)


def _check_values(metric: str, targets: torch.Tensor, classes: int) -> None:
    """Refuse targets that are not class numbers, such as soft targets or an index that a loss ignores."""
    if targets.dtype is torch.int64 and targets.numel():  # fewer operations, for nearly all data sets
        lowest, highest = targets.aminmax()
        if lowest.item() >= 0 and highest.item() < classes:
            return
    is_class = (targets >= 0) & (targets < classes)
    if targets.is_floating_point():
        is_class &= targets == targets.floor()
    if not is_class.all():
        wrong = targets[~is_class][0].item()
        raise MetricInputError(
            f"{metric} needs targets that are whole numbers from 0 to {classes - 1}, but one of them is {wrong}: "
            f"{_GIVE_FUNCTION}"
        )


def _classes_of_one_hot(targets: torch.Tensor) -> torch.Tensor:
    """Return the class of each one-hot target."""
    is_one_hot = ((targets == 0) | (targets == 1)).all(dim=1) & (targets.sum(dim=1) == 1)
    if not is_one_hot.all():
        wrong = [round(value, 4) for value in targets[~is_one_hot][0].tolist()]
        raise MetricInputError(
            f"accuracy needs one class per sample, but a target is {wrong}, which is not one-hot: {_GIVE_FUNCTION}"
        )
    return targets.to(torch.uint8).argmax(dim=1)


def _where_not_nan(scores: torch.Tensor, is_right: torch.Tensor) -> torch.Tensor:
    """Return 1.0 or 0.0 for each sample, NaN where one of its scores is NaN: its highest class would be arbitrary."""
    right = is_right.float()
    if not scores.is_floating_point() or not math.isnan(scores.sum().item()):  # one operation where no score is NaN
        return right
    return right.masked_fill(scores.reshape(len(scores), -1).isnan().any(dim=1), torch.nan)
