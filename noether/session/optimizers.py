"""Live optimizers: their memory, their steps, the learning rates of these, and the gradients that they see.

Schedulers write learning rates into the optimizer, over any scale that is there. So `lr_scale` is multiplied in for
one step only and removed after it: a scheduler never sees it, and the learning rate of every update is the scheduler's
times the scale, as in noether's own trainer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, final

import torch

from noether.core.tensors.live.held_parameters import refuse_foreign_parameters, warn_of_unassigned_parameters
from noether.core.tensors.live.optimizer import (
    by_name,
    find_optimizer_problems,
    is_written,
    view_optimizer,
    write_optimizer,
)
from noether.core.tensors.tree import FrozenDict
from noether.session.errors import SessionError
from noether.session.optimizer_watch import MEASURED, OptimizerWatch, all_finite

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from torch import nn
    from torch.optim import Optimizer

    from noether.core.tensors.live.optimizer import Optimizers


class LiveOptimizer(Protocol):
    """An optimizer that a `Session` can stand on.

    Args:
        lr_scale: Multiplies the learning rate of every later step.
        measures: Costly readings that it can take from the gradients of a step.
    """

    lr_scale: float
    measures: frozenset[str]

    @property
    def opt_state(self) -> Mapping[str, Any]:
        """Its memory, current whenever it is read."""

    @property
    def steps(self) -> int:
        """The number of steps since it was wrapped."""

    @property
    def readings(self) -> Mapping[str, Any]:
        """Fields of `AfterUpdate` for this update: `lr`, `weight_decay`, and those that `watch` was asked for."""

    def find_problems(self, opt_state: Mapping[str, Any]) -> Iterable[str]:
        """Return the differences between a saved memory and the optimizer that prevent loading it."""

    def load(self, opt_state: Mapping[str, Any]) -> None:
        """Write a saved memory into the optimizer."""

    def watch(self, readings: Collection[str] = ()) -> None:
        """Start to count and scale steps, and to take `readings`; calling it again is a no-op."""

    def gradients_are_finite(self) -> bool | None:
        """Return whether the current gradients are finite; None without gradients, or without access to them."""

    def end_update(self) -> None:
        """Forget the readings of the update that was reported."""

    def release(self) -> None:
        """Stop watching the optimizer."""


@final
class TorchOptimizer:
    """One or several optimizers of `torch.optim`, watched by hooks on their steps.

    Args:
        model: Names their parameters.
        optimizer: The optimizer, or several by name.

    Raises:
        SessionError: If an optimizer holds a parameter that the model does not have, or cannot have its name.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1)
        >>> sgd = torch.optim.SGD(model.parameters(), lr=0.5)
        >>> live = TorchOptimizer(model, sgd)
        >>> live.watch({"finite"}); live.lr_scale = 0.5
        >>> model(torch.ones(1, 2)).sum().backward(); sgd.step()
        >>> live.steps, dict(live.readings["lr"]), sgd.param_groups[0]["lr"], live.readings["finite"]
        (1, {'default': 0.25}, 0.5, tensor(True))
    """

    measures: frozenset[str] = MEASURED

    def __init__(self, model: nn.Module, optimizer: Optimizers) -> None:
        refuse_foreign_parameters(model, optimizer, SessionError)
        self._model, self._optimizer = model, optimizer
        self._watches = [OptimizerWatch(each, model, name) for name, each in by_name(optimizer).items()]
        self.opt_state: Mapping[str, Any] = view_optimizer(model, optimizer)

    @property
    def optimizers(self) -> list[Optimizer]:
        """The optimizers."""
        return [each.optimizer for each in self._watches]

    @property
    def lr_scale(self) -> float:
        """Multiplies the learning rates of every later step."""
        return self._watches[0].lr_scale

    @lr_scale.setter
    def lr_scale(self, scale: float) -> None:
        for each in self._watches:
            each.lr_scale = scale

    @property
    def steps(self) -> int:
        """The number of steps of all optimizers since they were wrapped."""
        return sum([each.steps for each in self._watches])

    @property
    def readings(self) -> Mapping[str, Any]:
        """Readings of this update: of the last step of each optimizer; of one that made none, the rates of its next."""
        if len(self._watches) == 1:
            watch = self._watches[0]
            rates, measured = watch.rates, dict(watch.measurements)
        else:
            each_rates = [each.rates for each in self._watches]
            rates = {key: {name: r for rates in each_rates for name, r in rates[key].items()} for key in each_rates[0]}
            measured = _merge([each.measurements for each in self._watches if each.measurements])
        return {**{key: FrozenDict(by_group) for key, by_group in rates.items()}, **measured}

    def find_problems(self, opt_state: Mapping[str, Any]) -> Iterable[str]:
        """Return each difference in parameters, shapes and groups between a saved memory and the optimizers."""
        if not is_written(opt_state, self._optimizer):
            return ()
        return find_optimizer_problems(opt_state, self._model, self._optimizer)

    def load(self, opt_state: Mapping[str, Any]) -> None:
        """Write a saved memory into the optimizers, their learning rates without the scale."""
        write_optimizer(opt_state, self._model, self._optimizer, lr_scale=1.0)

    def watch(self, readings: Collection[str] = ()) -> None:
        """Register hooks on the steps, in place of those of an earlier run; warn of parameters that none holds."""
        warn_of_unassigned_parameters(self._model, self._optimizer)
        for each in self._watches:
            each.watch(readings)

    def measure(self, optimizer: Optimizer | None = None, scale: float | None = None) -> None:
        """Take the readings of the current gradients, in place of those that the next step sees.

        Args:
            optimizer: The optimizer; by default all of them.
            scale: What the gradients are multiplied by; None if it is 1.
        """
        for each in self._watches:
            if optimizer is None or each.optimizer.param_groups is optimizer.param_groups:  # a wrapper shares these
                each.measure(scale)

    def gradients_are_finite(self) -> bool | None:
        """Return whether the current gradients are finite; None without gradients."""
        gradients = [gradient for each in self._watches for gradient in each.gradients]
        return bool(all_finite(gradients)) if gradients else None

    def end_update(self) -> None:
        """Forget the readings of this update."""
        for each in self._watches:
            each.end_update()

    def release(self) -> None:
        """Remove the hooks of this run; those of a later run stay."""
        for each in self._watches:
            each.release()


def _merge(measured: list[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the readings of all gradients together from those of each optimizer that made a step."""
    if len(measured) <= 1:
        return dict(*measured)
    together: dict[str, Any] = {}
    for key in measured[0]:
        if key == "gradients":
            together[key] = FrozenDict({name: grad for each in measured for name, grad in each[key].items()})
            continue
        values = torch.stack([each[key].to(measured[0][key].device) for each in measured])
        together[key] = values.all() if key == "finite" else torch.linalg.vector_norm(values)
    return together


def is_skipped(
    optimizer: LiveOptimizer | None, steps: int, losses: Mapping[str, Any], *, lowered: bool = False
) -> bool:
    """Return whether an update was skipped: it has no losses, or the optimizer made no step for infinite gradients.

    Args:
        optimizer: The optimizer, if the run has one.
        steps: Its steps since the last update.
        losses: The losses of the update.
        lowered: Whether a gradient scaler lowered its scale.

    Raises:
        SessionError: If the optimizer made no step, and its gradients do not tell why.
    """
    if optimizer is None or steps or not losses:
        return not losses
    if lowered:
        return True
    finite = optimizer.gradients_are_finite()
    # A GradScaler leaves out infinite gradients; a loop may have zeroed them since.
    if finite is False or (finite is None and optimizer.steps):
        return True
    raise SessionError(
        "the optimizer made no step since the last update: call optimizer.step() before session.update(losses); if "
        "the loop left the step out, session.update(losses, skipped=True)"
    )
