"""A Keras model as a module of torch, so that states can view it: its variables under names that stay.

Keras numbers layers over a whole process (`dense`, `dense_1`, ...), so a model that is built twice has two sets of
names. Here the number of a layer is given anew in the order of each model: the kernel of `dense_7`, the first of its
kind in a second model, is `dense.kernel`, as in the first.
"""

from __future__ import annotations

import re
from itertools import count
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Final, final

import torch
from torch import nn

from noether.integrations.keras.backend import keras

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from noether.core.state import TrainState

_NUMBER: Final = re.compile(r"_\d+$")


@final
class KerasModule(nn.Module):
    """A module that shares its parameters and buffers with a Keras model, and computes what the model computes.

    Parameters are the trainable variables, buffers all others: statistics, seeds of dropout, layers that are frozen.
    They share memory with the variables, which Keras writes to in place.

    Args:
        model: A `keras.Model` that is built.

    Raises:
        ValueError: If it is not built, and has no variables yet.

    Example:
        >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2), keras.layers.BatchNormalization()])
        >>> module = KerasModule(model)
        >>> [name for name, _ in module.named_parameters()]
        ['dense.kernel', 'dense.bias', 'batch_normalization.gamma', 'batch_normalization.beta']
        >>> [name for name, _ in module.named_buffers()]
        ['batch_normalization.moving_mean', 'batch_normalization.moving_variance']
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        if not model.built:
            raise ValueError(f"{model.name} has no variables yet: give keras.Input, or call it on a batch first")
        self._keras = (model,)  # in a tuple, for it is a module itself and must not become a part of this one
        self._names = names_of(model)
        for variable in model.trainable_variables:
            holder, name = self._holder(self.name_of(variable))
            holder.register_parameter(name, nn.Parameter(variable.value.detach()))
        for variable in model.non_trainable_variables:
            holder, name = self._holder(self.name_of(variable))
            holder.register_buffer(name, variable.value.detach())

    @property
    def keras(self) -> Any:
        """The Keras model."""
        return self._keras[0]

    def name_of(self, variable: Any) -> str:
        """Return the name of a variable of the model."""
        return self._names[id(variable)]

    def forward(self, inputs: Any) -> Any:
        """Return the outputs of the model, with the parameters that the module has; statistics move in training."""
        trainable, others = self._values(attrgetter)
        outputs, moved = self.keras.stateless_call(trainable, others, inputs, training=self.training)
        with torch.no_grad():
            for value, new in zip(others, moved, strict=True):
                if value is not new:
                    value.copy_(new)
        return outputs

    def evaluate(self, state: TrainState, batch: Any) -> tuple[Mapping[str, torch.Tensor], Any]:
        """Return the loss that the model was compiled with, and its outputs, with the weights of a state.

        Args:
            state: Whose weights.
            batch: `(inputs, targets)` or `(inputs, targets, sample weights)`.
        """
        inputs, targets, weights = keras.utils.unpack_x_y_sample_weight(batch)
        held = {**state.params, **state.buffers}
        trainable, others = self._values(lambda name: lambda _: held[name])
        metrics = [variable.value for variable in self.keras.metrics_variables]
        with torch.no_grad():
            outputs, others = self.keras.stateless_call(trainable, others, inputs, training=False)
            asked = {"x": inputs, "y": targets, "y_pred": outputs, "sample_weight": weights, "training": False}
            loss, _ = self.keras.stateless_compute_loss(trainable, others, metrics, **asked)
        return {"total": loss}, outputs

    def _values(self, getter: Callable[[str], Callable[[Any], Any]]) -> tuple[list[Any], list[Any]]:
        """Return trainable and other values in the order of Keras."""
        model = self.keras
        return (
            [getter(self.name_of(each))(self) for each in model.trainable_variables],
            [getter(self.name_of(each))(self) for each in model.non_trainable_variables],
        )

    def _holder(self, path: str) -> tuple[nn.Module, str]:
        *layers, name = path.split(".")
        holder: nn.Module = self
        for layer in layers:
            if layer not in dict(holder.named_children()):
                holder.add_module(layer, nn.Module())
            holder = holder.get_submodule(layer)
        return holder, name


def names_of(model: Any) -> dict[int, str]:
    """Return the name of each variable of a Keras model by the variable's id.

    It is made of the names of layers from the outermost in, without their numbers; what then reads alike is numbered
    in the order of the model. Keras' own paths depend on what was built before, and on whether the model was loaded.
    """
    names: dict[int, str] = {}
    _name_within(model, "", names, set())
    return names


def _name_within(layer: Any, above: str, names: dict[int, str], taken: set[str]) -> None:
    # Keras gives out the layers of a model, but those inside of a layer only so.
    inner = layer._flatten_layers(include_self=False, recursive=False)  # noqa: SLF001
    theirs = {id(variable) for each in inner for variable in each.variables}
    for variable in layer.variables:
        if id(variable) not in theirs and id(variable) not in names:
            names[id(variable)] = _free(f"{above}{variable.name}", taken)
    for each in inner:
        if each.variables:
            _name_within(each, _free(f"{above}{_NUMBER.sub('', each.name)}", taken) + ".", names, taken)


def _free(name: str, taken: set[str]) -> str:
    candidates = (f"{name}_{number}" if number else name for number in count())
    free = next(each for each in candidates if each not in taken)
    taken.add(free)
    return free
