"""A live optimizer: its memory, its steps, their learning rates, and the gradients that they see.

Schedulers write learning rates into the optimizer, over any scale that is there. So `lr_scale` is multiplied in for
one step only and removed after it: a scheduler never sees it, and the learning rate of every update is the scheduler's
times the scale, as in noether's own trainer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Protocol, final

from torch.nn.utils import get_total_norm

from noether.core.tensors.live.optimizer import OptimizerView, find_optimizer_problems, is_written, write_optimizer
from noether.core.tensors.tree import FrozenDict
from noether.session.errors import SessionError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping

    from torch import Tensor, nn
    from torch.optim import Optimizer

_HOOKS: Final = "_noether_hooks"


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
        """Fields of `AfterUpdate` for the last step: `lr`, `weight_decay`, and those that `watch` was asked for."""

    def find_problems(self, opt_state: Mapping[str, Any]) -> Iterable[str]:
        """Return the differences between a saved memory and the optimizer that prevent loading it."""

    def load(self, opt_state: Mapping[str, Any]) -> None:
        """Write a saved memory into the optimizer."""

    def watch(self, readings: Collection[str] = ()) -> None:
        """Start to count and scale steps, and to take `readings`; calling it again is a no-op."""

    def gradients_are_finite(self) -> bool | None:
        """Return whether the current gradients are finite; None without gradients, or without access to them."""

    def release(self) -> None:
        """Stop watching the optimizer."""


@final
class TorchOptimizer:
    """An optimizer of `torch.optim`, watched by hooks on its steps.

    Args:
        model: Names its parameters.
        optimizer: The optimizer.

    Raises:
        SessionError: If the optimizer holds a parameter that the model does not have.

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

    measures: frozenset[str] = frozenset({"finite", "grad_norm"})

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        known = set(model.parameters())
        if strange := sum(p not in known for group in optimizer.param_groups for p in group["params"]):
            raise SessionError(
                f"{strange} parameters of the optimizer are not parameters of the model: pass model= the module that "
                "holds them all, and make the optimizer once that module is complete"
            )
        self._model, self._optimizer = model, optimizer
        self.lr_scale = 1.0
        self.opt_state: Mapping[str, Any] = OptimizerView(model, optimizer)
        self.steps = 0
        self._measures: list[tuple[str, Callable[[list[Tensor]], Tensor]]] = []
        self._readings: dict[str, Any] | None = None
        self._unscaled: list[Any] | None = None
        self._hooks: tuple[Any, ...] = ()

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's parameter groups."""
        return self._optimizer.param_groups

    @property
    def readings(self) -> Mapping[str, Any]:
        """Readings of the last step; before the first, learning rate and weight decay of the next one."""
        return self._read_rates() if self._readings is None else self._readings

    def find_problems(self, opt_state: Mapping[str, Any]) -> Iterable[str]:
        """Return each difference in parameters, shapes and groups between a saved memory and the optimizer."""
        if not is_written(opt_state, self._optimizer):
            return ()
        return find_optimizer_problems(opt_state, self._model, self._optimizer)

    def load(self, opt_state: Mapping[str, Any]) -> None:
        """Write a saved memory into the optimizer, its learning rates without the scale."""
        write_optimizer(opt_state, self._model, self._optimizer, lr_scale=1.0)

    def watch(self, readings: Collection[str] = ()) -> None:
        """Register hooks on the optimizer's steps, in place of those of an earlier run."""
        for hook in getattr(self._optimizer, _HOOKS, ()):
            hook.remove()
        self._measures = [(name, measure) for name, measure in _MEASURES.items() if name in readings]
        optimizer = self._optimizer
        self._hooks = (optimizer.register_step_pre_hook(self._before), optimizer.register_step_post_hook(self._after))
        setattr(optimizer, _HOOKS, self._hooks)  # where a later run finds them if an exception ends this one

    def gradients_are_finite(self) -> bool | None:
        """Return whether the current gradients are finite; None without gradients."""
        gradients = self._gradients()
        return bool(_all_finite(gradients)) if gradients else None

    def release(self) -> None:
        """Remove the hooks of this run; those of a later run stay."""
        for hook in self._hooks:
            hook.remove()

    def _before(self, optimizer: Optimizer, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> None:
        self._restore_lr()  # if the step before this one raised
        self._readings = self._read_rates()
        closure = arguments[1] if len(arguments) > 1 else keywords.get("closure")
        if self._measures and closure is None:
            self._measure()
        self._unscaled = [group["lr"] for group in optimizer.param_groups]
        if self.lr_scale != 1.0:
            for group in optimizer.param_groups:
                group["lr"] = group["lr"] * self.lr_scale

    def _after(self, *_: Any) -> None:
        self._restore_lr()
        self.steps += 1
        if self._measures and self._measures[0][0] not in (self._readings or {}):
            self._measure()  # a closure computed the gradients

    def _restore_lr(self) -> None:
        if self._unscaled is not None:
            for group, lr in zip(self._optimizer.param_groups, self._unscaled, strict=True):
                group["lr"] = lr
        self._unscaled = None

    def _read_rates(self) -> dict[str, Any]:
        groups = self._optimizer.param_groups
        names = ["default"] if len(groups) == 1 else [str(g.get("name", index)) for index, g in enumerate(groups)]
        named = list(zip(names, groups, strict=True))
        return {
            "lr": FrozenDict({name: float(group["lr"] * self.lr_scale) for name, group in named}),
            "weight_decay": FrozenDict({n: float(g["weight_decay"]) for n, g in named if "weight_decay" in g}),
        }

    def _measure(self) -> None:
        assert self._readings is not None  # noqa: S101  # read as the step begins
        gradients = self._gradients()
        self._readings.update((name, measure(gradients)) for name, measure in self._measures)

    def _gradients(self) -> list[Tensor]:
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        return [grad.coalesce().values() if grad.is_sparse else grad for grad in gradients]


def is_skipped(optimizer: LiveOptimizer | None, steps: int, losses: Mapping[str, Any]) -> bool:
    """Return whether an update was skipped: it has no losses, or the optimizer made no step for infinite gradients.

    Args:
        optimizer: The optimizer, if the run has one.
        steps: Its steps since the last update.
        losses: The losses of the update.

    Raises:
        SessionError: If the optimizer made no step, and its gradients do not tell why.
    """
    if optimizer is None or steps or not losses:
        return not losses
    finite = optimizer.gradients_are_finite()
    # A GradScaler leaves out infinite gradients; a loop may have zeroed them since.
    if finite is False or (finite is None and optimizer.steps):
        return True
    raise SessionError(
        "the optimizer made no step since the last update: call optimizer.step() before session.update(losses); if "
        "the loop left the step out, session.update(losses, skipped=True)"
    )


def _all_finite(gradients: list[Tensor]) -> Tensor:
    # The largest absolute value is finite only if all are; unlike the 2-norm it does not overflow.
    return get_total_norm(gradients, float("inf")).isfinite()


_MEASURES: Final[Mapping[str, Callable[[list[Tensor]], Tensor]]] = {
    "finite": _all_finite,
    "grad_norm": get_total_norm,
}
