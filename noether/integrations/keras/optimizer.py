"""An optimizer of Keras as a state views it, and what multiplies its learning rate for the time of a step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, final

import torch

from noether.core.tensors.tree import FrozenDict

if TYPE_CHECKING:
    from collections.abc import Collection

    from noether.integrations.keras.module import KerasModule


@final
class KerasOptimizer:
    """The optimizer of a Keras model, for a `Session`.

    Its memory is `{"state": {param: {slot: tensor}}, "groups": {name: tensor}}`; the latter is what belongs to no
    param, such as the learning rate and the number of steps.

    Args:
        module: A module around the model.

    Raises:
        ValueError: If the model is not compiled.
    """

    def __init__(self, module: KerasModule) -> None:
        model = module.keras
        if getattr(model, "optimizer", None) is None:
            raise ValueError(f"{model.name} has no optimizer: call model.compile(optimizer=..., loss=...) first")
        self._module, self._optimizer = module, model.optimizer
        if not self._optimizer.built:
            self._optimizer.build(model.trainable_variables)
        self.lr_scale = 1.0
        self.measures: frozenset[str] = frozenset()
        self.opt_state: Mapping[str, Any] = _BorrowedOptState(self)
        self.steps = 0
        self._lr: Mapping[str, float] = FrozenDict()
        self._unscaled: Any = None

    @property
    def readings(self) -> Mapping[str, Any]:
        """Learning rate of the last step and weight decay; the latter is empty for an optimizer that has none."""
        decay = self._inner.weight_decay
        return {"lr": self._lr, "weight_decay": FrozenDict() if decay is None else FrozenDict(default=float(decay))}

    @property
    def accumulation_steps(self) -> int:
        """Batches of one update."""
        return self._inner.gradient_accumulation_steps or 1

    def belongs_to(self, model: Any) -> bool:
        """Return whether it is the optimizer of this very model."""
        return self._module.keras is model and self._optimizer is model.optimizer

    def check_whole(self) -> None:
        """Refuse an optimizer that holds the gradients of a part of an update.

        Raises:
            ValueError: If it does.
        """
        batches, steps = int(self.memory("groups")["iteration"]), self.accumulation_steps
        if batches % steps:
            raise ValueError(
                f"the optimizer holds gradients of {batches % steps} of {steps} batches of an update, left there by an "
                "earlier fit: compile the model anew, or load a checkpoint"
            )

    def batch_begins(self) -> None:
        """Multiply the learning rate by `lr_scale`."""
        self.batch_ended()  # where the batch before this one raised
        inner = self._inner
        rate = float(inner.learning_rate)
        self._lr = FrozenDict(default=rate * self.lr_scale)
        if self.lr_scale != 1.0:
            # A schedule can only be put back as what it is, and Keras gives out nothing but its value.
            self._unscaled = (rate, inner._learning_rate)  # noqa: SLF001
            inner.learning_rate = rate * self.lr_scale if self._is_number else lambda: rate * self.lr_scale

    def batch_ended(self) -> None:
        """Put the learning rate back."""
        if self._unscaled is not None:
            rate, held = self._unscaled
            self._inner.learning_rate = rate if self._is_number else held
            self._unscaled = None

    @torch.no_grad()
    def load(self, opt_state: Mapping[str, Any]) -> None:
        """Write a saved memory into the optimizer.

        Raises:
            KeyError: If the optimizer does not have these variables.
        """
        if not len(opt_state) or opt_state is self.opt_state:
            return
        saved = {("groups", name): tensor for name, tensor in opt_state["groups"].items()}
        for param, slots in opt_state["state"].items():
            saved |= {(param, name): tensor for name, tensor in slots.items()}
        live = {(param, name): each for param, slots in self._slots().items() for name, each in slots.items()}
        for param, name in live.keys() ^ saved.keys():
            where = "the state" if (param, name) in live else "the optimizer"
            raise KeyError(f"optimizer variable {name!r} of {param!r} is not in {where}: give the optimizer it was")
        for key, tensor in saved.items():
            if live[key].value.data_ptr() != tensor.data_ptr():
                live[key].value.copy_(tensor)

    def watch(self, readings: Collection[str] = ()) -> None:
        """Do nothing: the callback reports every batch."""

    def gradients_are_finite(self) -> bool | None:
        """Return None: Keras does not show the gradients."""
        return None

    def release(self) -> None:
        """Put the learning rate back."""
        self.batch_ended()

    def memory(self, part: str) -> FrozenDict:
        """Return `state` or `groups` of its memory, as it is now."""
        values = {
            param: FrozenDict({name: each.value.detach() for name, each in slots.items()})
            for param, slots in self._slots().items()
        }
        groups = values.pop("groups")
        return {"state": FrozenDict(values), "groups": groups}[part]

    @property
    def _inner(self) -> Any:
        return getattr(self._optimizer, "inner_optimizer", self._optimizer)  # in one that scales the loss

    @property
    def _is_number(self) -> bool:
        held = self._inner._learning_rate if self._unscaled is None else self._unscaled[1]  # noqa: SLF001  # as above
        return hasattr(held, "assign")

    def _slots(self) -> dict[str, dict[str, Any]]:
        """Return the optimizer's variables by param and slot; Keras names them `{path of the param}_{slot}`."""
        model = self._module.keras
        params: dict[str, list[str]] = {}  # two may have one path, and their slots then come in their order
        for each in (*model.trainable_variables, *model.non_trainable_variables):
            params.setdefault(each.path.replace("/", "_"), []).append(self._module.name_of(each))
        slots: dict[str, dict[str, Any]] = {"groups": {}}
        for variable in self._optimizer.variables:
            # The longest that fits: what begins with "dense_1_kernel" may begin with the path of another, too.
            path = max((path for path in params if variable.name.startswith(f"{path}_")), key=len, default="")
            slot = variable.name[len(path) + 1 :] if path else variable.name
            free = (param for param in params.get(path, ()) if slot not in slots.get(param, {}))
            held = slots.setdefault(next(free, "groups"), {})
            held[f"{slot}_{len(held)}" if slot in held else slot] = variable
        return slots


@final
class _BorrowedOptState(Mapping[str, Any]):
    """The variables of a live optimizer, as they are whenever they are read."""

    def __init__(self, optimizer: KerasOptimizer) -> None:
        self._optimizer = optimizer

    def __getitem__(self, key: str) -> Any:
        return self._optimizer.memory(key)

    def __iter__(self) -> Iterator[str]:
        return iter(("state", "groups"))

    def __len__(self) -> int:
        return 2
