"""Views of a live model and its optimizer, and writing values back into them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from noether.core.tensors.pytrees import register_mapping
from noether.core.tensors.step_counters import counts_on_device, move_memory
from noether.core.tensors.tree import (
    FrozenDict,
    freeze,
    map_leaves,
    move_to_device,
    pack,
    plain_number,
    tensors,
    unpack,
)

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer


def params_of(model: nn.Module) -> FrozenDict:
    """Return the parameters of `model` by name; the tensors share its memory."""
    return FrozenDict({name: parameter.detach() for name, parameter in model.named_parameters()})


def buffers_of(model: nn.Module) -> FrozenDict:
    """Return the buffers of `model` by name; the tensors share its memory."""
    return FrozenDict(dict(model.named_buffers()))


def device_of(tensors: Iterable[Tensor]) -> torch.device:
    """Return the device of the first of `tensors`; the CPU if it is empty.

    Example:
        >>> device_of(torch.nn.Linear(2, 1).parameters())
        device(type='cpu')
    """
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def move_to_model(model: nn.Module, tree: Any) -> Any:
    """Return `tree` with its tensors on the device of `model`; the same object if they already are."""
    device = device_of(model.parameters())
    if all(tensor.device == device for _, tensor in tensors(tree)):
        return tree
    return move_to_device(device, tree)


class BorrowedOptState(Mapping[str, Any]):
    """The memory of a live optimizer by parameter name, read from the optimizer at each access."""

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        self._names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
        self._optimizer = optimizer

    def _read(self) -> FrozenDict:
        memories = ((self._names[p], memory) for p, memory in self._optimizer.state.items())
        state = {name: freeze(pack(f"the optimizer's memory of {name}", memory)) for name, memory in memories}
        groups = [{k: v for k, v in group.items() if k != "params"} for group in self._optimizer.param_groups]
        return FrozenDict(state=FrozenDict(state), groups=freeze(map_leaves(plain_number, groups)))

    def views(self, optimizer: Optimizer) -> bool:
        """Return whether this is the memory of `optimizer` itself."""
        return self._optimizer is optimizer

    def __getitem__(self, key: str) -> Any:
        return self._read()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(("state", "groups"))

    def __len__(self) -> int:
        return 2


register_mapping(BorrowedOptState, dict, FrozenDict)


@torch.no_grad()
def write_weights(model: nn.Module, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> None:
    """Write params and buffers into a live model.

    Raises:
        KeyError: If the model does not have exactly these parameters and buffers.
    """
    _write_tensors("parameter", dict(model.named_parameters()), params)
    _write_tensors("buffer", dict(model.named_buffers()), buffers)


@torch.no_grad()
def write_optimizer(opt_state: Mapping[str, Any], model: nn.Module, optimizer: Optimizer, *, lr_scale: float) -> None:
    """Write saved memory into a live optimizer, and scale its learning rates; calling it twice scales once.

    Args:
        opt_state: The saved memory; if empty or a view of `optimizer`, its memory is left unchanged.
        model: The model, which names the parameters.
        optimizer: The live optimizer.
        lr_scale: The scale of its learning rates afterwards.
    """
    borrowed = isinstance(opt_state, BorrowedOptState) and opt_state.views(optimizer)
    if len(opt_state) and not borrowed:
        _write_opt_state(model, optimizer, opt_state)
    _scale_lr(optimizer, lr_scale)


def _write_tensors(kind: str, live: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    unmatched = sorted(live.keys() ^ saved.keys())
    if unmatched:
        where = "the state" if unmatched[0] in live else "the model"
        raise KeyError(f"{kind} {unmatched[0]!r} is not in {where}: the state belongs to another model")
    for name, tensor in saved.items():
        if live[name].data_ptr() != tensor.data_ptr():
            live[name].copy_(tensor)


def _write_opt_state(model: nn.Module, optimizer: Optimizer, opt_state: Mapping[str, Any]) -> None:
    parameters = dict(model.named_parameters())
    on_device = any(map(counts_on_device, optimizer.param_groups))
    optimizer.state.clear()  # a parameter without memory in the state loses the memory that it has
    for name, memory in opt_state.get("state", {}).items():
        parameter = parameters[name]
        optimizer.state[parameter] = move_memory(unpack(memory), parameter.device, on_device=on_device)
    groups = opt_state.get("groups", ())
    if isinstance(groups, Mapping):  # a functional optimizer stores them by name, in the same order
        groups = tuple(groups.values())
    for group, saved in zip(optimizer.param_groups, groups, strict=True):
        group.pop("lr_scale", None)  # the saved group says how its learning rate is scaled
        group.update(unpack(saved))


def _scale_lr(optimizer: Optimizer, scale: float) -> None:
    # The group stores the scale of its learning rate, so writing twice scales once.
    for group in optimizer.param_groups:
        applied = group.get("lr_scale", 1.0)
        if applied != scale:
            group["lr"] = group["lr"] * (scale / applied)
            group["lr_scale"] = scale
