"""A Keras model as a torch module that states can view, with stable names of its variables.

Keras numbers layers over a whole process (`dense`, `dense_1`, ...), so a model that is built twice has two sets of
names. Here each model numbers its layers itself, in order: the kernel of `dense_7`, the first dense layer of a second
model, is `dense.kernel`, as in the first model.
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
    """A module that shares its parameters and buffers with a Keras model, and computes the same outputs.

    Parameters are the trainable variables; buffers are all others: statistics, seeds of dropout, frozen layers. They
    share memory with the variables, which Keras updates in place.

    Args:
        model: A `keras.Model` that is built.

    Raises:
        ValueError: If the model is not built, so that it has no variables yet.

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
        self._keras = (model,)  # in a tuple, because torch would register a bare module as a submodule
        self._names = names_of(model)
        for variable in model.trainable_variables:
            owner, name = self._owner_and_name(self.name_of(variable))
            owner.register_parameter(name, nn.Parameter(variable.value.detach()))
        for variable in model.non_trainable_variables:
            owner, name = self._owner_and_name(self.name_of(variable))
            owner.register_buffer(name, variable.value.detach())

    def _get_name(self) -> str:
        """Return the name that torch and the panel of a run show."""
        return type(self.keras).__name__

    @property
    def keras(self) -> Any:
        """The Keras model."""
        return self._keras[0]

    def name_of(self, variable: Any) -> str:
        """Return the name of a variable of the model."""
        return self._names[id(variable)]

    def forward(self, inputs: Any) -> Any:
        """Return the outputs of the model with this module's parameters; in training, statistics are updated."""
        trainable, others = self._values(attrgetter)
        outputs, updated = self.keras.stateless_call(trainable, others, inputs, training=self.training)
        with torch.no_grad():
            for value, new in zip(others, updated, strict=True):
                if value is not new:
                    value.copy_(new)
        return outputs

    def evaluate(self, state: TrainState, batch: Any) -> tuple[Mapping[str, torch.Tensor], Any]:
        """Return the compiled loss of the model and its outputs, computed with the weights of a state.

        Args:
            state: The state whose weights to use.
            batch: `(inputs, targets)` or `(inputs, targets, sample weights)`.
        """
        inputs, targets, weights = keras.utils.unpack_x_y_sample_weight(batch)
        tensors = {**state.params, **state.buffers}
        trainable, others = self._values(lambda name: lambda _: tensors[name])
        metrics = [variable.value for variable in self.keras.metrics_variables]
        with torch.no_grad():
            outputs, others = self.keras.stateless_call(trainable, others, inputs, training=False)
            arguments = {"x": inputs, "y": targets, "y_pred": outputs, "sample_weight": weights, "training": False}
            loss, _ = self.keras.stateless_compute_loss(trainable, others, metrics, **arguments)
        return {"total": loss}, outputs

    def _values(self, getter: Callable[[str], Callable[[Any], Any]]) -> tuple[list[Any], list[Any]]:
        """Return the trainable and the other values in the order of Keras."""
        model = self.keras
        return (
            [getter(self.name_of(each))(self) for each in model.trainable_variables],
            [getter(self.name_of(each))(self) for each in model.non_trainable_variables],
        )

    def _owner_and_name(self, path: str) -> tuple[nn.Module, str]:
        """Return the submodule for the tensor at `path`, created if it is missing, and the name of the tensor in it."""
        *layers, name = path.split(".")
        owner: nn.Module = self
        for layer in layers:
            if layer not in dict(owner.named_children()):
                owner.add_module(layer, nn.Module())
            owner = owner.get_submodule(layer)
        return owner, name


def names_of(model: Any) -> dict[int, str]:
    """Return the name of each variable of a Keras model by the variable's id.

    A name joins the names of the layers from the outermost inwards, without their numbers; equal names are numbered in
    the order of the model. The paths of Keras depend on the models built before, and on whether the model was loaded.
    """
    names: dict[int, str] = {}
    _add_names(model, "", names, set())
    return names


def _add_names(layer: Any, prefix: str, names: dict[int, str], taken: set[str]) -> None:
    # Keras has no public access to the layers inside of a layer.
    inner = layer._flatten_layers(include_self=False, recursive=False)  # noqa: SLF001  # Keras has no public name for it
    of_inner = {id(variable) for each in inner for variable in each.variables}
    for variable in layer.variables:
        if id(variable) not in of_inner and id(variable) not in names:
            names[id(variable)] = _free_name(f"{prefix}{variable.name}", taken)
    for each in inner:
        if each.variables:
            _add_names(each, _free_name(f"{prefix}{_NUMBER.sub('', each.name)}", taken) + ".", names, taken)


def _free_name(name: str, taken: set[str]) -> str:
    candidates = (f"{name}_{number}" if number else name for number in count())
    free = next(each for each in candidates if each not in taken)
    taken.add(free)
    return free
