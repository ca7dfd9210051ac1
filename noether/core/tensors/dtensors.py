"""Distributed tensors (DTensor): the shard that this rank stores, the whole, and values in the placement of another.

Torch has no operation on a DTensor and a plain tensor together, and none that compares the memory of two DTensors. A
state may have both kinds, such as the parameters of a module of `fully_shard` and its buffers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils import get_total_norm

if TYPE_CHECKING:
    from collections.abc import Sequence

_PLAIN: Final = (Tensor, Parameter)


def is_distributed(tensor: object) -> bool:
    """Return whether a tensor is a DTensor.

    Example:
        >>> is_distributed(torch.ones(2))
        False
    """
    return type(tensor) not in _PLAIN and hasattr(tensor, "placements")  # its class takes long to import


def local_part(tensor: Tensor) -> Tensor:
    """Return the tensor that this rank stores of a DTensor, not a copy; any other tensor as it is.

    Example:
        >>> tensor = torch.ones(2)
        >>> local_part(tensor) is tensor
        True
    """
    if type(tensor) is Tensor or not is_distributed(tensor):  # the first for speed: callbacks ask at every update
        return tensor
    distributed: Any = tensor
    with torch.no_grad():  # else it is a view with a gradient
        local: Tensor = distributed.to_local()
    return local


def whole_tensor(tensor: Tensor) -> Tensor:
    """Return all of a DTensor, which every rank has to ask for, without a gradient; any other tensor as it is."""
    if not is_distributed(tensor):
        return tensor
    distributed: Any = tensor
    with torch.no_grad():
        whole: Tensor = distributed.full_tensor()
    return whole


def with_local_part(like: Tensor, local: Tensor) -> Tensor:
    """Return the DTensor with the placement of `like` of which this rank stores `local`; `local` if `like` is plain.

    Args:
        like: Has the shape of the whole.
        local: The shard of this rank; it is not copied.
    """
    if type(like) is Tensor or not is_distributed(like):
        return local
    distributed: Any = like
    with torch.no_grad():
        built: Tensor = type(distributed).from_local(
            local,
            distributed.device_mesh,
            distributed.placements,
            run_check=False,
            shape=like.shape,
            stride=like.stride(),
        )
    return built


def place_like(value: Tensor, like: Tensor) -> Tensor:
    """Return a tensor in the placement of another of its shape; the same object if it has this placement.

    Args:
        value: A plain tensor that is the same on all ranks, or a DTensor. One in another placement is communicated, so
            every rank has to make the call.
        like: A DTensor, whose placement the result gets, or a plain tensor.

    Returns:
        A DTensor in the placement of `like`; the whole tensor if `like` is plain.
    """
    if type(value) is Tensor and type(like) is Tensor:
        return value
    if not is_distributed(like):
        return whole_tensor(value)
    source: Any = value
    target: Any = like
    if not is_distributed(value):
        source = type(target).from_local(value.detach().to(like.device), target.device_mesh, run_check=False)
    elif source.device_mesh != target.device_mesh:
        source = type(target).from_local(whole_tensor(value).to(like.device), target.device_mesh, run_check=False)
    elif source.placements == target.placements:
        return value
    with torch.no_grad():
        placed: Tensor = source.redistribute(placements=target.placements)
    return placed


def copy_into(target: Tensor, value: Tensor) -> None:
    """Write a value into a tensor in place, where either may be a DTensor; see `place_like`."""
    with torch.no_grad():
        local_part(target).copy_(local_part(place_like(value, target)))


def are_same_memory(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors are views of exactly the same memory; False for kinds that torch cannot compare.

    Example:
        >>> tensor = torch.ones(2)
        >>> are_same_memory(tensor, tensor.detach()), are_same_memory(tensor, tensor[:1])
        (True, False)
    """
    if type(a) not in _PLAIN or type(b) not in _PLAIN:  # nearly all are plain
        if is_distributed(a) is not is_distributed(b):
            return False
        a, b = local_part(a), local_part(b)
    try:
        return a.is_set_to(b)
    except NotImplementedError:  # torch cannot compare sparse and meta tensors
        return False


def total_norm(tensors: Sequence[Tensor], order: float = 2.0) -> Tensor:
    """Return the norm of all tensors together, as a plain tensor; every rank has to ask for that of DTensors.

    Args:
        tensors: Dense tensors, of which some may be DTensors.
        order: Order of the norm, such as 2 or infinity.

    Example:
        >>> total_norm([torch.tensor([3.0]), torch.tensor([4.0])])
        tensor(5.)
    """
    kinds: tuple[list[Tensor], list[Tensor]] = ([], [])
    for tensor in tensors:
        kinds[is_distributed(tensor)].append(tensor)
    if not kinds[True]:
        return get_total_norm(tensors, order)
    norms = [whole_tensor(get_total_norm(kind, order)) for kind in kinds if kind]
    return norms[0] if len(norms) == 1 else get_total_norm(norms, order)
