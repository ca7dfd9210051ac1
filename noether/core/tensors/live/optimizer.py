"""The memory of one or several live optimizers by parameter name, and writing a saved one into them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakSet

import torch

from noether.core.errors import StateWarning
from noether.core.tensors.dtensors import place_like
from noether.core.tensors.live.groups import MEMBERS, find_group_problems, read_groups, saved_groups, write_groups
from noether.core.tensors.live.views import LiveView
from noether.core.tensors.live.weights import match_names, raise_mismatch
from noether.core.tensors.module import named_parameters
from noether.core.tensors.step_counters import counts_on_device, move_memory
from noether.core.tensors.torch_internals import select_view
from noether.core.tensors.tree import FrozenDict, FrozenView, freeze, map_leaves, pack, unpack

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

    Optimizers = Optimizer | Mapping[str, Optimizer]

OPT_STATE_PARTS: Final = frozenset({"state", "groups", "shared", "attributes"})
"""Entries of the memory of one optimizer, which no optimizer of several may have as its name."""
_ELEMENTWISE: Final = frozenset(
    {"acc_delta", "ax", "exp_avg", "exp_avg_sq", "exp_inf", "grad_avg", "max_exp_avg_sq", "momentum_buffer", "prev",
     "square_avg", "step_size", "sum"}
)  # fmt: skip
"""Memory of torch's optimizers that has one value for each value of the parameter."""
_WARNED_OPTIMIZERS: WeakSet[Any] = WeakSet()
"""Optimizers of which a warning said that they hold parameters that the model no longer has."""


class OptimizerView(LiveView, FrozenView):
    """The memory of a live optimizer by parameter name, read from the optimizer and the model at each access."""

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        self._model, self._optimizer = model, optimizer

    def read(self) -> FrozenDict:
        """Return the memory that the optimizer has now: `state` by parameter name, and `groups`."""
        names: dict[Any, str] = {parameter: name for name, parameter in named_parameters(self._model).items()}
        _warn_of_replaced(self._optimizer, names)
        state = {
            names[parameter]: freeze(pack(f"the optimizer's memory of {names[parameter]}", memory))
            for parameter, memory in self._optimizer.state.items()
            if parameter in names
        }
        # Views: the number of users of a storage then shows whether something else still holds the tensor.
        return FrozenDict(state=map_leaves(_view, state), groups=read_groups(self._optimizer.param_groups, names))

    def views(self, optimizer: Optimizers) -> bool:
        """Return whether this is the memory of `optimizer` itself."""
        return self._optimizer is optimizer

    def __getitem__(self, key: str) -> Any:
        return self.read()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(("state", "groups"))

    def __len__(self) -> int:
        return 2


class OptimizersView(LiveView, FrozenView):
    """The memory of several live optimizers, each under its name."""

    def __init__(self, model: nn.Module, optimizers: Mapping[str, Optimizer]) -> None:
        self._views = {name: OptimizerView(model, optimizer) for name, optimizer in optimizers.items()}

    def read(self) -> FrozenDict:
        """Return the memory that each optimizer has now."""
        return FrozenDict({name: view.read() for name, view in self._views.items()})

    def views(self, optimizer: Optimizers) -> bool:
        """Return whether this is the memory of these same optimizers."""
        return (
            isinstance(optimizer, Mapping)
            and optimizer.keys() == self._views.keys()
            and all(view.views(optimizer[name]) for name, view in self._views.items())
        )

    def __getitem__(self, key: str) -> Any:
        return self._views[key].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self._views)

    def __len__(self) -> int:
        return len(self._views)


def view_optimizer(model: nn.Module, optimizer: Optimizers) -> OptimizerView | OptimizersView:
    """Return the memory of a live optimizer, or of several by name, read at each access."""
    return OptimizersView(model, optimizer) if isinstance(optimizer, Mapping) else OptimizerView(model, optimizer)


def by_name(optimizer: Optimizers) -> Mapping[str, Optimizer]:
    """Return optimizers by name; the name of a single one is empty."""
    return optimizer if isinstance(optimizer, Mapping) else {"": optimizer}


@torch.no_grad()
def write_optimizer(opt_state: Mapping[str, Any], model: nn.Module, optimizer: Optimizers, *, lr_scale: float) -> None:
    """Write saved memory into live optimizers, and scale their learning rates; calling it twice scales once.

    Parameter groups that the saved run added while it trained are added, and the members of all groups get the
    `requires_grad` that they had.

    Args:
        opt_state: The saved memory; if empty or a view of `optimizer`, its memory is left unchanged.
        model: The model, which names the parameters.
        optimizer: The live optimizer, or several by name.
        lr_scale: The scale of the learning rates afterwards.

    Raises:
        MismatchError: If the memory belongs to other parameters, shapes or groups; nothing is written then.
    """
    is_new = is_written(opt_state, optimizer)
    if is_new:
        raise_mismatch(find_optimizer_problems(opt_state, model, optimizer))
    for name, each in by_name(optimizer).items():
        if is_new:
            _write_memory(model, each, opt_state[name] if name else opt_state)
        _scale_lr(each, lr_scale)


def is_written(opt_state: Mapping[str, Any], optimizer: Optimizers) -> bool:
    """Return whether loading writes a memory into `optimizer`: it is not empty, and not that of `optimizer`."""
    borrowed = isinstance(opt_state, (OptimizerView, OptimizersView)) and opt_state.views(optimizer)
    return bool(len(opt_state)) and not borrowed


def find_optimizer_problems(opt_state: Mapping[str, Any], model: nn.Module, optimizer: Optimizers) -> Iterator[str]:
    """Yield each difference in parameters, shapes and groups between a saved memory and live optimizers."""
    saved = {"": opt_state} if not OPT_STATE_PARTS.isdisjoint(opt_state) else opt_state
    live = by_name(optimizer)
    if saved.keys() != live.keys():
        yield f"the state has the memory of {_list_names(saved)}, and the run has {_list_names(live)}"
        return
    for name, each in live.items():
        prefix = f"optimizer {name!r}: " if name else ""
        yield from (prefix + problem for problem in _find_problems(saved[name], model, each))


def _list_names(optimizers: Mapping[str, Any]) -> str:
    if "" in optimizers:
        return "one optimizer without a name"
    return f"optimizers named {', '.join(map(repr, optimizers))}"


def _find_problems(opt_state: Mapping[str, Any], model: nn.Module, optimizer: Optimizer) -> Iterator[str]:
    parameters = named_parameters(model)
    names = {parameter: name for name, parameter in parameters.items()}
    if replaced := _describe_replaced(optimizer, names):
        yield f"the optimizer does not hold {replaced}, set after it was made: make the optimizer after the model"
    for name, memory in match_names(opt_state.get("state", {}), parameters).items():
        if name not in parameters:
            yield f"the optimizer's memory of {name!r} is of a parameter that is not in the model"
        else:
            yield from _find_memory_problems(name, memory, parameters[name], optimizer.state.get(parameters[name], {}))
    yield from find_group_problems(saved_groups(opt_state), optimizer.param_groups, names)


def _find_memory_problems(
    name: str, saved: Mapping[str, Any], parameter: Tensor, live: Mapping[str, Any]
) -> Iterator[str]:
    for key, value in saved.items():
        ours = parameter if key in _ELEMENTWISE else live.get(key)
        if isinstance(value, torch.Tensor) and isinstance(ours, torch.Tensor) and value.shape != ours.shape:
            of = "the parameter" if ours is parameter else "the optimizer's"
            yield f"{key} of {name!r} has shape {tuple(value.shape)} in the state, and {of} has {tuple(ours.shape)}"


def _write_memory(model: nn.Module, optimizer: Optimizer, opt_state: Mapping[str, Any]) -> None:
    parameters = named_parameters(model)
    memories = unpack(match_names(opt_state.get("state", {}), parameters))  # before the memory that it may view is gone
    on_device = any(map(counts_on_device, optimizer.param_groups))
    write_groups(saved_groups(opt_state), optimizer, parameters)
    optimizer.state.clear()  # a parameter without memory in the state loses the memory that it has
    for name, memory in memories.items():
        parameter = parameters[name]
        placed = {key: _place(value, parameter) for key, value in memory.items()}
        optimizer.state[parameter] = move_memory(placed, parameter.device, on_device=on_device)


def _place(value: Any, parameter: Tensor) -> Any:
    """Return a memory that has one value for each value of its parameter in the placement of the parameter."""
    is_elementwise = isinstance(value, torch.Tensor) and value.shape == parameter.shape
    return place_like(value, parameter) if is_elementwise else value


def _scale_lr(optimizer: Optimizer, scale: float) -> None:
    # The group stores the scale of its learning rate, so writing twice scales once.
    for group in optimizer.param_groups:
        applied = group.get("lr_scale", 1.0)
        if applied != scale:
            group["lr"] = group["lr"] * (scale / applied)
            group["lr_scale"] = scale


def _describe_replaced(optimizer: Optimizer, names: Mapping[Any, str]) -> str:
    """Return the names of the parameters that took the place of others that the optimizer still holds, or nothing."""
    held = {parameter for group in optimizer.param_groups for parameter in group[MEMBERS]}
    lost = [parameter.shape for parameter in held if parameter not in names]
    if not lost:
        return ""
    missing = [name for parameter, name in names.items() if parameter not in held and parameter.shape in lost]
    return ", ".join(map(repr, missing)) or f"{len(lost)} parameters of the model"


def _warn_of_replaced(optimizer: Optimizer, names: Mapping[Any, str]) -> None:
    if optimizer not in _WARNED_OPTIMIZERS and (replaced := _describe_replaced(optimizer, names)):
        _WARNED_OPTIMIZERS.add(optimizer)
        warnings.warn(
            f"the optimizer does not train {replaced}: the model got a new parameter there after the optimizer was "
            "made, as by load_state_dict(assign=True), and the memory of the former one is not saved; make the "
            "optimizer again after such a change",
            StateWarning,
            stacklevel=4,
        )


def _view(leaf: Any) -> Any:
    return select_view()(leaf) if isinstance(leaf, torch.Tensor) else leaf
