"""Several Keras optimizers of one model, as of a GAN that steps them in its `train_step`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

from noether.core.tensors.live.views import LiveView
from noether.core.tensors.live.weights import raise_mismatch
from noether.core.tensors.tree import FrozenDict, FrozenView
from noether.integrations.keras.backend import keras
from noether.integrations.keras.optimizer import KerasOptimizer

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    from noether.integrations.keras.module import KerasModule


def wrap_optimizers(module: KerasModule) -> KerasOptimizer | KerasOptimizers:
    """Return the optimizer of a Keras model, or all of them if it has others in attributes, such as `d_optimizer`.

    Raises:
        ValueError: If the model has no optimizer, or several of which one accumulates gradients.
    """
    others = _others(module.keras)
    return KerasOptimizers(module, others) if others else KerasOptimizer(module)


def _others(model: Any) -> dict[str, Any]:
    """Return the optimizers that a model has in attributes beside `optimizer`."""
    return {
        name: each
        for name, each in vars(model).items()
        if isinstance(each, keras.optimizers.Optimizer) and each is not model.optimizer and not name.startswith("_")
    }


@final
class KerasOptimizers:
    """Several optimizers of a Keras model, for a `Session`; each has the name of its attribute.

    Keras builds an optimizer with the variables of its first step. `model.compile()` without arguments makes an
    `optimizer` that nothing steps; its learning rate is not reported.

    Args:
        module: The module that wraps the model.
        others: The optimizers beside `model.optimizer`, by attribute.

    Raises:
        ValueError: If one of them accumulates gradients.
    """

    def __init__(self, module: KerasModule, others: Mapping[str, Any]) -> None:
        main = getattr(module.keras, "optimizer", None)
        named = {**others, **({} if main is None else {"optimizer": main})}
        self._module = module
        self._members = {name: KerasOptimizer(module, each) for name, each in named.items()}
        for name, each in self._members.items():
            if each.accumulation_steps > 1:
                raise ValueError(
                    f"{name} accumulates gradients, and with several optimizers each batch is an update: set "
                    "gradient_accumulation_steps=None"
                )
        self.measures: frozenset[str] = frozenset()
        self.accumulation_steps = 1
        self.opt_state: Mapping[str, Any] = _LiveOptStates(self._members)
        self.steps = 0

    @property
    def lr_scale(self) -> float:
        """Multiplies the learning rates of every later step."""
        return next(iter(self._members.values())).lr_scale

    @lr_scale.setter
    def lr_scale(self, scale: float) -> None:
        for each in self._members.values():
            each.lr_scale = scale

    @property
    def readings(self) -> Mapping[str, Any]:
        """Learning rate and weight decay of each optimizer that has made a step."""
        read = {name: each.readings for name, each in self._members.items() if each.has_stepped}
        return {
            key: FrozenDict({name: rate for name, each in read.items() for rate in each[key].values()})
            for key in ("lr", "weight_decay")
        }

    def belongs_to(self, model: Any) -> bool:
        """Return whether these are the optimizers of this same model object."""
        names = {*_others(model), *(["optimizer"] if getattr(model, "optimizer", None) is not None else [])}
        return self._module.keras is model and names == self._members.keys() and all(
            each.is_attribute(model, name) for name, each in self._members.items()
        )  # fmt: skip

    def check_update_boundary(self) -> None:
        """Do nothing: none of them accumulates gradients."""

    def scale_lr(self) -> None:
        """Multiply the learning rates by `lr_scale`."""
        for each in self._members.values():
            each.scale_lr()

    def restore_lr(self) -> None:
        """Restore the learning rates."""
        for each in self._members.values():
            each.restore_lr()

    def find_problems(self, opt_state: Mapping[str, Any]) -> Iterator[str]:
        """Yield each difference in names, variables, shapes and dtypes between a saved state and the optimizers."""
        if not len(opt_state) or opt_state is self.opt_state:
            return
        if opt_state.keys() != self._members.keys():
            yield (
                f"the state has the optimizers {', '.join(opt_state)}, and the model {', '.join(self._members)}: give "
                "the model the attributes that it had"
            )
            return
        for name, each in self._members.items():
            each.build_for(opt_state[name])
            yield from (f"{name}: {problem}" for problem in each.find_problems(opt_state[name]))

    def load(self, opt_state: Mapping[str, Any]) -> None:
        """Write a saved state into the optimizers.

        Raises:
            MismatchError: If they do not have these variables, with these shapes and dtypes.
        """
        if not len(opt_state) or opt_state is self.opt_state:
            return
        raise_mismatch(self.find_problems(opt_state))
        for name, each in self._members.items():
            each.load(opt_state[name])

    def watch(self, readings: Collection[str] = ()) -> None:
        """Do nothing: the callback reports every batch."""

    def gradients_are_finite(self) -> bool | None:
        """Return None: Keras does not show the gradients."""
        return None

    def end_update(self) -> None:
        """Do nothing: the learning rates are read at every batch."""

    def release(self) -> None:
        """Restore the learning rates."""
        self.restore_lr()


@final
class _LiveOptStates(LiveView, FrozenView):
    """The variables of several live optimizers, read at each access."""

    def __init__(self, members: Mapping[str, KerasOptimizer]) -> None:
        self._members = members

    def read(self) -> FrozenDict:
        """Return the variables that each optimizer has now."""
        return FrozenDict({name: self[name] for name in self})

    def __getitem__(self, key: str) -> Any:
        member = self._members[key]
        return FrozenDict({part: member.memory(part) for part in ("state", "groups")})

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def __len__(self) -> int:
        return len(self._members)
