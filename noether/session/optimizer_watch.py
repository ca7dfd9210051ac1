"""Hooks on the steps of one live optimizer: they count, scale and measure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, final

from noether.core.tensors.dtensors import total_norm
from noether.core.tensors.gradients import copy_gradients, dense_values
from noether.core.tensors.module import named_parameters
from noether.core.tensors.tree import FrozenDict

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from torch import Tensor, nn
    from torch.optim import Optimizer

_HOOKS: Final = "_noether_hooks"


@final
class OptimizerWatch:
    """Counts the steps of an optimizer, scales their learning rates, and measures the gradients that they see.

    A fused optimizer under a `GradScaler` gets scaled gradients, and is called even where it makes no step: the
    measures are of unscaled gradients, and such a call is no step.

    Args:
        optimizer: The optimizer.
        model: Names its parameters.
        name: Its name in a run with several, else empty.
    """

    def __init__(self, optimizer: Optimizer, model: nn.Module, name: str = "") -> None:
        self.optimizer, self.name, self._model = optimizer, name, model
        self.lr_scale = 1.0
        self.steps = 0
        self.has_stepped = False
        """Whether it made a step since `end_update`."""
        self._readings: frozenset[str] = frozenset()
        self._measured: dict[str, Any] = {}
        self._is_measured_early = False  # by `measure`, before the step
        self._rates: dict[str, dict[str, float]] = {}
        self._unscaled: list[tuple[dict[str, Any], Any]] = []
        self._hooks: tuple[Any, ...] = ()

    @property
    def rates(self) -> dict[str, dict[str, float]]:
        """Learning rate and weight decay by group: of the step of this update, or of the next step if it made none."""
        return self._rates if self.has_stepped else self._read_rates()

    @property
    def measurements(self) -> Mapping[str, Any]:
        """Readings of the gradients at the last step of this update; empty if it made none."""
        return self._measured if self.has_stepped else {}

    @property
    def gradients(self) -> list[Tensor]:
        """The values of the current gradients."""
        return [dense_values(grad) for grad in self._by_parameter().values()]

    def watch(self, readings: Collection[str]) -> None:
        """Register the hooks, in place of those of an earlier run."""
        for hook in getattr(self.optimizer, _HOOKS, ()):
            hook.remove()
        self._readings = MEASURED & frozenset(readings)
        self._hooks = (
            self.optimizer.register_step_pre_hook(self._before),
            self.optimizer.register_step_post_hook(self._after),
        )
        setattr(self.optimizer, _HOOKS, self._hooks)  # where a later run finds them if an exception ends this one
        self.has_stepped = False

    def measure(self, scale: float | Tensor | None = None) -> None:
        """Take the readings of the current gradients, in place of those that the next step sees.

        Args:
            scale: What the gradients are multiplied by; None if it is 1.
        """
        grads = self._by_parameter()
        if scale is not None:
            grads = {parameter: grad / scale for parameter, grad in grads.items()}
        values = [dense_values(grad) for grad in grads.values()]
        self._measured = {name: measure(values) for name, measure in MEASURES.items() if name in self._readings}
        if "gradients" in self._readings:
            names: dict[Any, str] = {parameter: name for name, parameter in named_parameters(self._model).items()}
            named = {names[parameter]: grad for parameter, grad in grads.items() if parameter in names}
            self._measured["gradients"] = FrozenDict(copy_gradients(named))
        self._is_measured_early = True

    def end_update(self) -> None:
        """Forget the readings of this update."""
        self.has_stepped = self._is_measured_early = False
        self._measured = {}

    def release(self) -> None:
        """Remove the hooks of this run; those of a later run stay."""
        for hook in self._hooks:
            hook.remove()

    def _before(self, optimizer: Optimizer, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> None:
        if self._unscaled:  # the step before this one raised
            self._restore_lr()
        self._rates = self._read_rates()
        closure = arguments[1] if len(arguments) > 1 else keywords.get("closure")
        if not self._is_measured_early:
            self._measured = {}
            if closure is None:
                self._measure_step()
        self._is_measured_early = False
        if self.lr_scale != 1.0:
            self._unscaled = [(group, group["lr"]) for group in optimizer.param_groups]
            for group in optimizer.param_groups:
                group["lr"] = group["lr"] * self.lr_scale

    def _after(self, optimizer: Optimizer, *_: Any) -> None:
        if self._unscaled:
            self._restore_lr()
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None and bool(found_inf):
            return
        self.steps += 1
        self.has_stepped = True
        if not self._measured:
            self._measure_step()  # a closure computed the gradients
        self._is_measured_early = False

    def _restore_lr(self) -> None:
        for group, lr in self._unscaled:
            group["lr"] = lr
        self._unscaled = []

    def _read_rates(self) -> dict[str, dict[str, float]]:
        groups = self.optimizer.param_groups
        named = list(zip(name_groups(groups, self.name), groups, strict=True))
        return {
            "lr": {name: float(group["lr"] * self.lr_scale) for name, group in named},
            "weight_decay": {name: float(g["weight_decay"]) for name, g in named if "weight_decay" in g},
        }

    def _measure_step(self) -> None:
        if self._readings:
            self.measure(getattr(self.optimizer, "grad_scale", None))

    def _by_parameter(self) -> dict[Any, Tensor]:
        """Return the current gradients by parameter."""
        parameters = [each for group in self.optimizer.param_groups for each in group["params"]]
        return {each: each.grad for each in parameters if each.grad is not None}


def name_groups(groups: list[dict[str, Any]], optimizer: str = "") -> list[str]:
    """Return a name for each parameter group of an optimizer; they differ, and a group that is added changes no other.

    Args:
        groups: The groups, of which some may have a `name`.
        optimizer: Name of the optimizer in a run with several, else empty.

    Example:
        >>> name_groups([{}]), name_groups([{}, {"name": "head"}, {"name": "head"}])
        (['default'], ['0', 'head', 'head/2'])
        >>> name_groups([{}, {"name": "head"}], "g")
        ['g', 'g/head']
    """
    if len(groups) == 1 and not optimizer:
        return ["default"]
    names: list[str] = []
    for index, group in enumerate(groups):
        name = str(group.get("name", index))
        if optimizer:
            name = optimizer if index == 0 and "name" not in group else f"{optimizer}/{name}"
        while name in names:
            name = f"{name}/{index}"
        names.append(name)
    return names


def all_finite(gradients: list[Tensor]) -> Tensor:
    """Return whether every entry of the gradients is finite."""
    # The largest absolute value is finite only if all are; unlike the 2-norm it does not overflow.
    return total_norm(gradients, float("inf")).isfinite()


MEASURES: Final[Mapping[str, Callable[[list[Tensor]], Tensor]]] = {
    "finite": all_finite,
    "grad_norm": total_norm,
}
"""Readings of the gradients of a step that are numbers, by name."""
MEASURED: Final = frozenset({*MEASURES, "gradients"})
"""Names of all readings of the gradients of a step."""
