"""A live optimizer: what it remembers, when it steps, and with which learning rate.

A framework's schedulers write the learning rate that they think right into the optimizer, over whatever is there. So
`lr_scale` is multiplied in for the time of one step only, and taken out again: no scheduler ever sees it, and the
learning rate of every update is what the scheduler says times the scale, as in noether's own trainer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Protocol, final

from noether.core.tensors.module import BorrowedOptState, write_optimizer
from noether.core.tensors.tree import FrozenDict

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn
    from torch.optim import Optimizer

_HOOKS: Final = "_noether_hooks"


class LiveOptimizer(Protocol):
    """What a run asks of an optimizer that is not its own.

    Args:
        opt_state: Its memory, as it is whenever it is read.
        lr_scale: What the learning rate of every later step is multiplied by.
        steps: How many steps it has made since it was wrapped.
    """

    lr_scale: float

    @property
    def opt_state(self) -> Mapping[str, Any]:
        """Its memory, as it is whenever it is read."""

    @property
    def steps(self) -> int:
        """How many steps it has made since it was wrapped."""

    @property
    def lr(self) -> Mapping[str, float]:
        """Learning rate of the last step by parameter group, the scale included."""

    @property
    def weight_decay(self) -> Mapping[str, float]:
        """Weight decay of the last step by parameter group."""

    def load(self, opt_state: Mapping[str, Any]) -> None:
        """Write a saved memory into it."""

    def watch(self) -> None:
        """Begin to count and scale its steps, once however often it is called."""

    def release(self) -> None:
        """Let go of it: what it does from now on is not watched."""


@final
class TorchOptimizer:
    """An optimizer of `torch.optim`, watched by hooks on its steps.

    Args:
        model: Names its parameters.
        optimizer: The optimizer.

    Raises:
        ValueError: If it holds a parameter that is not one of `model`.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1)
        >>> sgd = torch.optim.SGD(model.parameters(), lr=0.5)
        >>> live = TorchOptimizer(model, sgd)
        >>> live.watch(); live.lr_scale = 0.5
        >>> model(torch.ones(1, 2)).sum().backward(); sgd.step()
        >>> live.steps, dict(live.lr), sgd.param_groups[0]["lr"]
        (1, {'default': 0.25}, 0.5)
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        known = set(model.parameters())
        if strange := sum(p not in known for group in optimizer.param_groups for p in group["params"]):
            raise ValueError(
                f"{strange} parameters of the optimizer are not parameters of the model that the run watches: "
                "give it the module that holds them all"
            )
        self._model, self._optimizer = model, optimizer
        self.lr_scale = 1.0
        self.opt_state: Mapping[str, Any] = BorrowedOptState(model, optimizer)
        self.steps = 0
        self._readings: Mapping[str, Mapping[str, float]] | None = None
        self._unscaled: list[Any] | None = None

    @property
    def lr(self) -> Mapping[str, float]:
        """Learning rate of the last step by parameter group; of the next one before the first."""
        return (self._readings or self._read())["lr"]

    @property
    def weight_decay(self) -> Mapping[str, float]:
        """Weight decay of the last step by parameter group; empty for an optimizer that has none."""
        return (self._readings or self._read())["weight_decay"]

    def load(self, opt_state: Mapping[str, Any]) -> None:
        """Write a saved memory into it, its learning rates without the scale."""
        write_optimizer(opt_state, self._model, self._optimizer, lr_scale=1.0)

    def watch(self) -> None:
        """Register hooks on its steps, in place of those of a run before."""
        self.release()
        optimizer = self._optimizer
        hooks = (optimizer.register_step_pre_hook(self._before), optimizer.register_step_post_hook(self._after))
        setattr(optimizer, _HOOKS, hooks)  # where another run finds them, if an exception ends this one

    def release(self) -> None:
        """Remove the hooks."""
        for hook in getattr(self._optimizer, _HOOKS, ()):
            hook.remove()

    def _before(self, optimizer: Optimizer, *_: Any) -> None:
        self._restore()  # where the step before this one raised
        self._readings = self._read()
        self._unscaled = [group["lr"] for group in optimizer.param_groups]
        if self.lr_scale != 1.0:
            for group in optimizer.param_groups:
                group["lr"] = group["lr"] * self.lr_scale

    def _after(self, *_: Any) -> None:
        self._restore()
        self.steps += 1

    def _restore(self) -> None:
        if self._unscaled is not None:
            for group, lr in zip(self._optimizer.param_groups, self._unscaled, strict=True):
                group["lr"] = lr
        self._unscaled = None

    def _read(self) -> Mapping[str, Mapping[str, float]]:
        groups = self._optimizer.param_groups
        names = ["default"] if len(groups) == 1 else [str(g.get("name", index)) for index, g in enumerate(groups)]
        named = list(zip(names, groups, strict=True))
        return {
            "lr": FrozenDict({name: float(group["lr"] * self.lr_scale) for name, group in named}),
            "weight_decay": FrozenDict({n: float(g["weight_decay"]) for n, g in named if "weight_decay" in g}),
        }
