"""Finds parameters and buffers that a model holds where a functional call cannot exchange them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from noether.core.errors import NoetherError
from noether.core.object_graph import walk, walk_model
from noether.core.tensors.module import named_buffers, named_parameters
from noether.core.tensors.torch_internals import storage_handle

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence


class HiddenParameterError(NoetherError, ValueError):
    """A model computes with a tensor that a functional call cannot exchange for the one in a state."""


class HeldTensor(NamedTuple):
    """A tensor that a model, or a function, holds beside its registered parameters and buffers.

    Args:
        attribute: The attribute by which the model holds it, or the name of the function.
        name: The parameter or buffer whose memory it shares; None for a parameter that is not registered.
        tensor: The tensor.
        buffer: The registered buffer whose memory it shares; None if that is a parameter.
    """

    attribute: str
    name: str | None
    tensor: Tensor
    buffer: Tensor | None


def find_held_tensors(model: nn.Module, *functions: Any) -> list[HeldTensor]:
    """Return the tensors in lists, closures and other objects that share memory with parameters or buffers.

    Parameters that require a gradient and are not registered at all are among them.

    Args:
        model: The model.
        functions: Functions to search, too, such as a loss.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 1, bias=False))
        >>> model.penalized = list(model.parameters())
        >>> [(held.attribute, held.name) for held in find_held_tensors(model)]
        [('penalized', '0.weight')]
    """
    buffers = named_buffers(model)
    registered = (*buffers.items(), *named_parameters(model).items())
    names = {handle: name for name, tensor in registered for handle in _storage_of(tensor)}
    found = []
    for attribute, tensor in _candidates(model, functions):
        name = next((names[handle] for handle in _storage_of(tensor) if handle in names), None)
        if name is not None or (isinstance(tensor, nn.Parameter) and tensor.requires_grad):
            found.append(HeldTensor(attribute, name, tensor, None if name is None else buffers.get(name)))
    return found


def refuse_parameters(held: Sequence[HeldTensor]) -> None:
    """Refuse parameters that a functional call cannot exchange.

    Second references to buffers are accepted, because most such buffers are constant; see `check_buffers`.

    Raises:
        HiddenParameterError: If one of the tensors is a parameter, or shares its memory.
    """
    for each in held:
        if each.buffer is None:
            raise HiddenParameterError(_describe(each))


def check_buffers(held: Sequence[HeldTensor], buffers: Mapping[str, Tensor]) -> None:
    """Refuse second references to buffers that a state has other values of.

    Raises:
        HiddenParameterError: If the buffer of one of the tensors differs from that in `buffers`.
    """
    for each in held:
        if each.name is not None and each.buffer is not None and not _is_equal(buffers[each.name], each.buffer):
            raise HiddenParameterError(_describe(each))


def _is_equal(a: Tensor, b: Tensor) -> bool:
    return a.is_meta or (a.shape == b.shape and torch.equal(a, b.to(a)))


def _describe(held: HeldTensor) -> str:
    """Return what is wrong with a tensor that a model holds, and what to write instead."""
    if held.name is None:
        return (
            f"{held.attribute} holds a parameter of shape {tuple(held.tensor.shape)} that is not registered in the "
            "model, so it is neither trained nor saved: keep modules in nn.ModuleList or nn.ModuleDict, parameters in "
            "nn.ParameterList; for a constant, call requires_grad_(False)"
        )
    return (
        f"{held.attribute} holds {held.name!r} a second time, in a list, a closure or another object, where an update "
        "of the state does not reach it: read it from its module in forward, such as "
        f"`self.get_parameter({held.name!r})`, or keep names or modules in place of tensors"
    )


def _candidates(model: nn.Module, functions: tuple[Any, ...]) -> Iterator[tuple[str, Tensor]]:
    modules = set(map(id, model.modules()))
    for attribute, held in walk_model(model):
        if isinstance(held.value, Tensor):
            yield attribute, held.value
    for function in functions:
        name = getattr(function, "__qualname__", type(function).__name__)
        for held in walk(function, leave_out=modules):
            if isinstance(held.value, Tensor):
                yield name, held.value


def _storage_of(tensor: Tensor) -> tuple[int, ...]:
    """Return the handle of the memory of a tensor; nothing for one without memory of its own, such as a sparse one."""
    try:
        return (storage_handle(tensor.untyped_storage()),)
    except (NotImplementedError, RuntimeError, ValueError):
        return ()
