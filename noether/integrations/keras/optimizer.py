"""A Keras optimizer as a `Session` uses it: its state as tensors, and its learning rate times `lr_scale`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

import torch

from noether.core.tensors.live.views import LiveView
from noether.core.tensors.live.weights import find_differences, raise_mismatch
from noether.core.tensors.tree import FrozenDict, FrozenView

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    from noether.integrations.keras.module import KerasModule


@final
class KerasOptimizer:
    """The optimizer of a Keras model, for a `Session`.

    Its state is `{"state": {param: {slot: tensor}}, "groups": {name: tensor}}`; `groups` has the variables that belong
    to no param, such as the learning rate and the number of steps.

    Args:
        module: The module that wraps the model.
        optimizer: One of several optimizers of the model, which its first step builds; by default the only one, for
            all trainable variables.

    Raises:
        ValueError: If the model is not compiled.
    """

    def __init__(self, module: KerasModule, optimizer: Any = None) -> None:
        model = module.keras
        if optimizer is None and getattr(model, "optimizer", None) is None:
            raise ValueError(f"{model.name} has no optimizer: call model.compile(optimizer=..., loss=...) first")
        self._module, self._optimizer = module, model.optimizer if optimizer is None else optimizer
        if optimizer is None and not self._optimizer.built:
            self._optimizer.build(model.trainable_variables)
        self.lr_scale = 1.0
        self.measures: frozenset[str] = frozenset()
        self.opt_state: Mapping[str, Any] = _LiveOptState(self)
        self.steps = 0
        self._lr: Mapping[str, float] = FrozenDict()
        self._unscaled: Any = None

    @property
    def readings(self) -> Mapping[str, Any]:
        """Learning rate of the last step, and weight decay, which is empty for an optimizer without it."""
        decay = self._inner.weight_decay
        return {"lr": self._lr, "weight_decay": FrozenDict() if decay is None else FrozenDict(default=float(decay))}

    @property
    def accumulation_steps(self) -> int:
        """Batches of one update."""
        return self._inner.gradient_accumulation_steps or 1

    def belongs_to(self, model: Any) -> bool:
        """Return whether this is the optimizer of this same model object."""
        return self._module.keras is model and self._optimizer is model.optimizer

    def is_attribute(self, model: Any, name: str) -> bool:
        """Return whether a model has this optimizer as the attribute `name`."""
        return getattr(model, name, None) is self._optimizer

    @property
    def has_stepped(self) -> bool:
        """Whether the optimizer has made a step."""
        return int(self._inner.iterations) > 0

    def build_for(self, opt_state: Mapping[str, Any]) -> None:
        """Build an optimizer that has made no step yet for the variables of a saved state."""
        names = opt_state["state"]
        if not self._optimizer.built and names:
            variables = self._module.keras.trainable_variables
            self._optimizer.build([each for each in variables if self._module.name_of(each) in names])

    def check_update_boundary(self) -> None:
        """Refuse an optimizer that has accumulated the gradients of only a part of an update.

        Raises:
            ValueError: If the optimizer is within an update.
        """
        batches, steps = int(self.memory("groups")["iteration"]), self.accumulation_steps
        if batches % steps:
            raise ValueError(
                f"the optimizer has gradients of {batches % steps} of {steps} batches of an update, left by an earlier "
                "fit: compile the model again, or load a checkpoint"
            )

    def scale_lr(self) -> None:
        """Multiply the learning rate by `lr_scale`."""
        self.restore_lr()  # if the previous batch raised
        inner = self._inner
        rate = float(inner.learning_rate)
        self._lr = FrozenDict(default=rate * self.lr_scale)
        if self.lr_scale != 1.0:
            # A schedule has to be restored as an object, and the public attribute gives only its value.
            self._unscaled = (rate, inner._learning_rate)  # noqa: SLF001  # Keras has no public name for it
            inner.learning_rate = rate * self.lr_scale if self._is_number else lambda: rate * self.lr_scale

    def restore_lr(self) -> None:
        """Restore the learning rate."""
        if self._unscaled is not None:
            rate, original = self._unscaled
            self._inner.learning_rate = rate if self._is_number else original
            self._unscaled = None

    def find_problems(self, opt_state: Mapping[str, Any]) -> Iterator[str]:
        """Yield each difference in variables, shapes and dtypes between a saved state and the optimizer."""
        if not len(opt_state) or opt_state is self.opt_state:
            return
        live = {name: each.value for name, each in _by_slot(self._slots()).items()}
        for difference in find_differences("optimizer variable", live, _by_slot(_parts_of(opt_state))):
            yield f"{difference}: compile the model with the optimizer that the state was saved with"

    @torch.no_grad()
    def load(self, opt_state: Mapping[str, Any]) -> None:
        """Write a saved state into the optimizer.

        Raises:
            MismatchError: If the optimizer does not have these variables, with these shapes and dtypes.
        """
        if not len(opt_state) or opt_state is self.opt_state:
            return
        raise_mismatch(self.find_problems(opt_state))
        live = _by_slot(self._slots())
        for name, tensor in _by_slot(_parts_of(opt_state)).items():
            if live[name].value.data_ptr() != tensor.data_ptr():
                live[name].value.copy_(tensor)

    def watch(self, readings: Collection[str] = ()) -> None:
        """Do nothing: the callback reports every batch."""

    def gradients_are_finite(self) -> bool | None:
        """Return None: Keras does not show the gradients."""
        return None

    def end_update(self) -> None:
        """Do nothing: the learning rate is read at every batch."""

    def release(self) -> None:
        """Restore the learning rate."""
        self.restore_lr()

    def memory(self, part: str) -> FrozenDict:
        """Return `state` or `groups` of its current state."""
        values = {
            param: FrozenDict({name: each.value.detach() for name, each in slots.items()})
            for param, slots in self._slots().items()
        }
        groups = values.pop("groups")
        return {"state": FrozenDict(values), "groups": groups}[part]

    @property
    def _inner(self) -> Any:
        return getattr(self._optimizer, "inner_optimizer", self._optimizer)  # inside of a LossScaleOptimizer

    @property
    def _is_number(self) -> bool:
        rate = self._inner._learning_rate if self._unscaled is None else self._unscaled[1]  # noqa: SLF001  # as above
        return hasattr(rate, "assign")

    def _slots(self) -> dict[str, dict[str, Any]]:
        """Return the optimizer's variables by param and slot; Keras names them `{path of the param}_{slot}`."""
        model = self._module.keras
        params: dict[str, list[str]] = {}  # two params can share a path; their slots have the same order
        for each in (*model.trainable_variables, *model.non_trainable_variables):
            params.setdefault(each.path.replace("/", "_"), []).append(self._module.name_of(each))
        slots: dict[str, dict[str, Any]] = {"groups": {}}
        for variable in self._optimizer.variables:
            # The longest match, because "dense_1_kernel" may start with the path of another variable too.
            path = max((path for path in params if variable.name.startswith(f"{path}_")), key=len, default="")
            slot = variable.name[len(path) + 1 :] if path else variable.name
            free = (param for param in params.get(path, ()) if slot not in slots.get(param, {}))
            named = slots.setdefault(next(free, "groups"), {})
            named[f"{slot}_{len(named)}" if slot in named else slot] = variable
        return slots


def _parts_of(opt_state: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return the variables of a saved state by param and slot, as `_slots` has them."""
    return {**opt_state["state"], "groups": opt_state["groups"]}


def _by_slot(slots: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {f"{slot} of {param}": each for param, named in slots.items() for slot, each in named.items()}


@final
class _LiveOptState(LiveView, FrozenView):
    """The variables of a live optimizer, read at each access."""

    def __init__(self, optimizer: KerasOptimizer) -> None:
        self._optimizer = optimizer

    def read(self) -> FrozenDict:
        """Return the variables that the optimizer has now."""
        return FrozenDict({part: self._optimizer.memory(part) for part in self})

    def __getitem__(self, key: str) -> Any:
        return self._optimizer.memory(key)

    def __iter__(self) -> Iterator[str]:
        return iter(("state", "groups"))

    def __len__(self) -> int:
        return 2
