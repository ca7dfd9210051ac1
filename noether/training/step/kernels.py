"""torch's kernels of Adam, AdamW and SGD, called without their classes, to the same bits.

An update through the class takes 1.2 to 2.0 times as long as through its kernel (150 parameters of 8 x 8 and 64 x 64,
one CPU thread); fused AdamW and fused SGD gain the most.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch
from torch.optim.adam import adam
from torch.optim.sgd import sgd

from noether.core.tensors import torch_internals
from noether.core.tensors.step_counters import STEP_COUNTER, counts_on_device, make_increment

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from torch import Tensor
    from torch.optim.optimizer import Optimizer

    from noether.training.step.layout import UpdateCopies

    Memory = Mapping[str, Mapping[str, Any]]


def has_kernel(cls: type[Optimizer]) -> bool:
    """Return whether torch has a kernel for `cls`."""
    return cls in _KERNELS


def can_run(cls: type[Optimizer], grads: Mapping[str, Tensor], memory: Memory) -> bool:
    """Return whether a kernel can make an update of `cls` with these gradients and this memory."""
    if cls not in _KERNELS or any(grad.is_sparse for grad in grads.values()):
        return False
    return cls is torch.optim.SGD or _has_memory(grads, memory)  # the other classes make the first memory themselves


def has_all_memory(settings: Iterable[Mapping[str, Any]], grads: Mapping[str, Tensor], memory: Memory) -> bool:
    """Return whether all memory that a kernel writes to exists already.

    Args:
        settings: Settings of each group.
        grads: Gradients by name of parameter.
        memory: Memory by name of parameter.
    """
    has_no_memory = not any(each.get("momentum", True) for each in settings)  # SGD without momentum
    return has_no_memory or _has_memory(grads, memory)


def first_memory(cls: type[Optimizer], settings: Mapping[str, Any], param: Tensor) -> dict[str, Tensor]:
    """Return the memory that the class makes of a parameter before its first update, as in `torch.optim.Adam.step`.

    For SGD it is empty: the first update stores the gradient as its memory.
    """
    if cls is torch.optim.SGD:
        return {}
    device = param.device if counts_on_device(settings) else torch.device("cpu")
    is_double = torch.get_default_dtype() == torch.float64 and not settings["fused"]
    step = torch.zeros((), dtype=torch.float64 if is_double else torch.float32, device=device)
    means = ("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if settings["amsgrad"] else ()))
    return {STEP_COUNTER: step, **{name: torch.zeros_like(param) for name in means}}


def step_kernel(cls: type[Optimizer], copies: UpdateCopies, opt_state: Mapping[str, Any]) -> dict[str, Any] | None:
    """Write one update to the copies and return the optimizer's memory, or None where only the class can do it."""
    # These classes never change entries of a group. If `opt_state` has changed ones, only the class can use them.
    if any(opt_state.get("groups", {}).values()) or not can_run(cls, copies.grads, copies.memory):
        return None
    memory = copies.memory
    for group, names in copies.layout.members.items():
        present = [name for name in names if name in copies.grads]
        params, grads = [copies.params[name] for name in present], [copies.grads[name] for name in present]
        memories = [memory.get(name, {}) for name in present]
        _KERNELS[cls](copies.settings[group], params, grads, memories)
        memory |= dict(zip(present, memories, strict=True))
    state = {name: tensors for name, tensors in memory.items() if tensors}
    return {"state": state, "groups": {group: {} for group in copies.layout.members}}


def make_writer(
    cls: type[Optimizer], settings: Mapping[str, Any], params: list[Tensor], memory: list[dict[str, Any]]
) -> Callable[[Mapping[str, Any], list[Tensor]], None]:
    """Return `write(settings, grads)`, which writes updates to the same tensors each time.

    Args:
        cls: The class of the optimizer.
        settings: All settings; those of a call override them.
        params: Parameters.
        memory: The memory of each of them, complete.
    """
    takes_one_call = len({(param.device, param.dtype) for param in params}) == 1
    if cls is not torch.optim.SGD and settings["fused"] and not settings["amsgrad"] and takes_one_call:
        return _make_fused_adam_writer(settings, params, memory)

    def write(changes: Mapping[str, Any], grads: list[Tensor]) -> None:
        _KERNELS[cls]({**settings, **changes}, params, grads, memory)

    return write


def preserves_gradients(cls: type[Optimizer]) -> bool:
    """Return whether the class surely writes to no gradient; SGD with nesterov adds the momentum to them."""
    return cls in _KERNELS and cls is not torch.optim.SGD


def write_traceable(
    cls: type[Optimizer],
    settings: Mapping[str, Any],
    params: list[Tensor],
    grads: list[Tensor],
    memory: list[dict[str, Any]],
) -> None:
    """Write one update in a form that `torch.compile` can trace: settings may be tensors."""
    _KERNELS[cls]({**settings, "fused": False, "foreach": True, "capturable": True}, params, grads, memory)


def _make_fused_adam_writer(
    settings: Mapping[str, Any], params: list[Tensor], memory: list[dict[str, Any]]
) -> Callable[[Mapping[str, Any], list[Tensor]], None]:
    """Return a writer that calls the fused kernel as `torch.optim.adam.adam` does, without sorting the tensors."""
    means, squares, steps = ([tensors[key] for tensors in memory] for key in ("exp_avg", "exp_avg_sq", STEP_COUNTER))
    kernel = torch_internals.fused_adamw_ if settings["decoupled_weight_decay"] else torch_internals.fused_adam_
    beta1, beta2 = settings["betas"]
    fixed = {"beta1": beta1, "beta2": beta2, **{name: settings[name] for name in _FUSED_SETTINGS}}
    count_step = make_increment(steps)

    def write(changes: Mapping[str, Any], grads: list[Tensor]) -> None:
        count_step()
        kernel(params, grads, means, squares, [], steps, **{**fixed, **changes})

    return write


def _has_memory(grads: Mapping[str, Tensor], memory: Memory) -> bool:
    return all(memory.get(name) for name in grads)


def _adam(settings: Mapping[str, Any], params: list[Tensor], grads: list[Tensor], memory: list[dict[str, Any]]) -> None:
    """Write one update of Adam or AdamW to `params` and `memory`; as in `torch.optim.Adam.step`."""
    beta1, beta2 = settings["betas"]
    adam(
        params,
        grads,
        [tensors["exp_avg"] for tensors in memory],
        [tensors["exp_avg_sq"] for tensors in memory],
        [tensors["max_exp_avg_sq"] for tensors in memory] if settings["amsgrad"] else [],
        [tensors[STEP_COUNTER] for tensors in memory],
        has_complex=any(param.is_complex() for param in params),
        beta1=beta1,
        beta2=beta2,
        **{name: settings[name] for name in _ADAM_SETTINGS},
    )


def _sgd(settings: Mapping[str, Any], params: list[Tensor], grads: list[Tensor], memory: list[dict[str, Any]]) -> None:
    """Write one update of SGD to `params` and `memory`; as in `torch.optim.SGD.step`."""
    buffers = [tensors.get("momentum_buffer") for tensors in memory] if settings["momentum"] != 0 else []
    if settings["nesterov"]:
        grads = [grad.clone() for grad in grads]  # the foreach kernel adds the momentum to them in place
    sgd(params, grads, buffers, **{name: settings[name] for name in _SGD_SETTINGS})
    for tensors, buffer in zip(memory, buffers, strict=False):
        tensors["momentum_buffer"] = buffer


_KERNELS: Final[Mapping[type[Optimizer], Callable[..., None]]] = {
    torch.optim.Adam: _adam,
    torch.optim.AdamW: _adam,
    torch.optim.SGD: _sgd,
}
_ADAM_SETTINGS: Final = (
    *("lr", "eps", "weight_decay", "amsgrad", "maximize", "foreach", "fused"),
    *("capturable", "differentiable", "decoupled_weight_decay"),
)
_FUSED_SETTINGS: Final = ("lr", "eps", "weight_decay", "amsgrad", "maximize")
_SGD_SETTINGS: Final = (
    *("lr", "momentum", "dampening", "weight_decay", "nesterov"),
    *("maximize", "foreach", "fused"),
)
