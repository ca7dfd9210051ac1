"""Between a live model with its optimizer and a state: views of them, and the way back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import reduce
from operator import add
from typing import TYPE_CHECKING, Any, final

import torch
from torch.func import functional_call

from noether.core.tensors.batch import model_arguments
from noether.core.tensors.packing import unpack
from noether.core.tensors.tree import FrozenDict, freeze, map_tensors, move_to_device, tensors

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from noether.core.state import TrainState

Losses = Mapping[str, "Tensor"]


def params_of(model: nn.Module) -> FrozenDict:
    """Return the parameters of `model` by name; they share its memory."""
    return FrozenDict({name: parameter.detach() for name, parameter in model.named_parameters()})


def buffers_of(model: nn.Module) -> FrozenDict:
    """Return the buffers of `model` by name; they share its memory."""
    return FrozenDict(dict(model.named_buffers()))


def move_beside(model: nn.Module, tree: Any) -> Any:
    """Return `tree` with its tensors on the device of `model`; the same object where they are."""
    device = next((parameter.device for parameter in model.parameters()), None)
    if device is None or all(tensor.device == device for _, tensor in tensors(tree)):
        return tree
    return move_to_device(device, tree)


class BorrowedOptState(Mapping[str, Any]):
    """The memory of a live optimizer, by parameter name, as it is whenever it is read."""

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        self._names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
        self._optimizer = optimizer

    def _read(self) -> FrozenDict:
        state = {self._names[p]: freeze(dict(memory)) for p, memory in self._optimizer.state.items()}
        groups = [{k: v for k, v in group.items() if k != "params"} for group in self._optimizer.param_groups]
        return FrozenDict(state=FrozenDict(state), groups=freeze(groups))

    def views(self, optimizer: Optimizer) -> bool:
        """Return whether it is the memory of this very optimizer."""
        return self._optimizer is optimizer

    def __getitem__(self, key: str) -> Any:
        return self._read()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(("state", "groups"))

    def __len__(self) -> int:
        return 2


@torch.no_grad()
def write_into(state: TrainState, model: nn.Module, optimizer: Optimizer | None) -> None:
    """Write params, buffers, optimizer memory and the scaled learning rates of `state` into live objects.

    Raises:
        KeyError: If the state and the model do not have the same parameters and buffers.
    """
    _write_tensors("parameter", dict(model.named_parameters()), state.params)
    _write_tensors("buffer", dict(model.named_buffers()), state.buffers)
    if optimizer is not None:
        lr_scale = float(state.hyperparams.get("lr_scale", 1.0))
        write_optimizer(state.opt_state, model, optimizer, lr_scale=lr_scale)


@torch.no_grad()
def write_optimizer(opt_state: Mapping[str, Any], model: nn.Module, optimizer: Optimizer, *, lr_scale: float) -> None:
    """Write the memory of an optimizer into a live one, and multiply its learning rates by `lr_scale`, once.

    Args:
        opt_state: The memory; empty, or that of `optimizer` itself, for what it has.
        model: Gives the parameters by name.
        optimizer: The live optimizer.
        lr_scale: The scale that its learning rates have afterwards.
    """
    borrowed = isinstance(opt_state, BorrowedOptState) and opt_state.views(optimizer)
    if len(opt_state) and not borrowed:
        _write_opt_state(model, optimizer, opt_state)
    _scale_lr(optimizer, lr_scale)


def _write_tensors(what: str, live: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    odd = sorted(live.keys() ^ saved.keys())
    if odd:
        where = "the state" if odd[0] in live else "the model"
        raise KeyError(f"{what} {odd[0]!r} is not in {where}: the state was made from another model")
    for name, tensor in saved.items():
        if live[name].data_ptr() != tensor.data_ptr():
            live[name].copy_(tensor)


def _write_opt_state(model: nn.Module, optimizer: Optimizer, opt_state: Mapping[str, Any]) -> None:
    parameters = dict(model.named_parameters())
    optimizer.state.clear()  # a parameter that has no memory in the state keeps none
    for name, memory in opt_state.get("state", {}).items():
        optimizer.state[parameters[name]] = _placed(unpack(memory), parameters[name].device, optimizer)
    groups = opt_state.get("groups", ())
    if isinstance(groups, Mapping):  # a functional optimizer keeps them by name, in the same order
        groups = tuple(groups.values())
    for group, saved in zip(optimizer.param_groups, groups, strict=True):
        group.pop("lr_scale", None)  # the saved learning rate is scaled as the saved group says
        group.update(unpack(saved))


def _placed(memory: dict[str, Any], device: torch.device, optimizer: Optimizer) -> dict[str, Any]:
    """Return an optimizer's memory of a parameter where torch keeps it: on its device, most counters of steps aside."""
    fused = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
    return {
        key: value.to(device) if isinstance(value, torch.Tensor) and (fused or key != "step") else value
        for key, value in memory.items()
    }


def _scale_lr(optimizer: Optimizer, scale: float) -> None:
    # The group remembers the scale that its learning rate has, so that writing twice scales once.
    for group in optimizer.param_groups:
        applied = group.get("lr_scale", 1.0)
        if applied != scale:
            group["lr"] = group["lr"] * (scale / applied)
            group["lr_scale"] = scale


def forward(model: nn.Module, loss: Callable[[Any, Any], Losses], *, precision: torch.dtype | None = None) -> Forward:
    """Return a forward that calls `model` with the weights of a state, in evaluation mode and without gradients.

    Args:
        model: Gives the architecture; its own weights and its mode are left as they are, unless it changes them itself.
        loss: `(outputs, batch) -> {name: mean over samples}`, pure.
        precision: Autocast type of model and loss, or None.

    Returns:
        `(state, batch) -> (losses, outputs)`, where `losses["total"]` is the sum of the named losses.

    Example:
        >>> import noether, torch
        >>> model = torch.nn.Linear(2, 1)
        >>> predict = noether.forward(model, lambda outputs, batch: {"mse": (outputs - batch[1]).square().mean()})
        >>> state = noether.TrainState.from_module(model)
        >>> losses, outputs = predict(state, (torch.zeros(4, 2), torch.zeros(4, 1)))
        >>> sorted(losses), tuple(outputs.shape)
        (['mse', 'total'], (4, 1))
    """
    return Forward(model, loss, precision)


@final
class Forward:
    """Calls a model with the weights of a state, in evaluation mode and without gradients; made by `forward`."""

    def __init__(self, model: nn.Module, loss: Callable[[Any, Any], Losses], precision: torch.dtype | None) -> None:
        self._model = model
        self._loss = loss
        self._precision = precision
        self._own: Mapping[str, Tensor] | None = None  # the model's parameters, during an evaluation

    def __call__(self, state: TrainState, batch: Any) -> tuple[Losses, Any]:
        """Return losses and outputs of a batch."""
        if self._own is None or self._model.training:  # whoever loads the data may have trained it meanwhile
            with self.evaluating():
                return self(state, batch)
        with torch.no_grad():
            if self._precision is None:
                return self._evaluated(self._own, state, batch)
            with torch.autocast(_device_type(self._model), dtype=self._precision):
                return self._evaluated(self._own, state, batch)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Leave the model in evaluation mode until the end: of many batches, each need not change it there and back."""
        trained = [module for module in self._model.modules() if module.training]
        self._model.eval()
        # None of them under autocast: it remembers what it made of a parameter, whatever is written to that.
        self._own = {} if self._autocasts() else dict(self._model.named_parameters())
        try:
            yield
        finally:
            self._own = None
            for module in trained:
                module.training = True

    def _autocasts(self) -> bool:
        device_type = _device_type(self._model)
        known = torch.amp.is_autocast_available(device_type)
        return self._precision is not None or (known and torch.is_autocast_enabled(device_type))

    def _evaluated(self, own: Mapping[str, Tensor], state: TrainState, batch: Any) -> tuple[Losses, Any]:
        outputs = self._outputs(own, state, batch)
        losses = add_total(self._loss(outputs, batch))
        # What is a parameter as it is would be seen as the next update leaves it.
        detached = FrozenDict({name: loss.detach() for name, loss in losses.items()})
        return detached, map_tensors(torch.Tensor.detach, outputs)

    def _outputs(self, own: Mapping[str, Tensor], state: TrainState, batch: Any) -> Any:
        arguments, keywords = model_arguments(self._model, batch)
        # Copies of the buffers: a module may write to its own even in evaluation mode.
        weights = {name: buffer.clone() for name, buffer in state.buffers.items()}
        if not _are(own, state.params):
            weights |= state.params
        if not weights:  # the model's own, so that it can be called as it is, in less time
            return self._model(*arguments, **keywords)
        return functional_call(self._model, weights, arguments, keywords)


def _device_type(model: nn.Module) -> str:
    return next((parameter.device.type for parameter in model.parameters()), "cpu")


def _are(own: Mapping[str, Tensor], params: Mapping[str, Tensor]) -> bool:
    """Return whether the parameters of a model are `params`."""
    try:
        return len(own) == len(params) and all(
            name in own and own[name].is_set_to(param) for name, param in params.items()
        )
    except NotImplementedError:  # torch cannot tell of sparse tensors, and of those without memory
        return False


def add_total(losses: Losses) -> Losses:
    """Return named losses with their sum as `total`.

    Raises:
        ValueError: If there is none, or one is called `total` beside others.
    """
    if not losses or ("total" in losses and len(losses) > 1):
        raise ValueError(f"a loss function returns named losses, 'total' not among them; got {list(losses)}")
    total = reduce(add, losses.values())
    return FrozenDict({**losses, "total": total})
