"""A whole update, compiled: forward pass, gradients, clipping and optimizer in one graph of `torch.compile`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, NamedTuple, final

import torch
from torch import Tensor
from torch.func import functional_call, grad_and_value

from noether.core.tensors.batch import model_arguments
from noether.core.tensors.containers import map_tensors
from noether.core.tensors.gradients import copy_gradients
from noether.core.tensors.losses import read_losses
from noether.core.tensors.means import Mean
from noether.core.tensors.torch_internals import (
    CompiledGraph,
    Trace,
    refuse_to_compile,
    set_grad_enabled,
)
from noether.training.step import kernels
from noether.training.step.accumulation import add_terms
from noether.training.step.gradients import traceable_total_norm

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from noether.core.state import TrainState
    from noether.training.step.step import Step
    from noether.training.step.update_settings import UpdateSettings

_WATCHED: Final = ("self._step.model", "self._step.loss", "buffer_tensors", "calls", "samples")
"""What torch checks before it calls a graph; `CompiledUpdate` compares the form of all other tensors."""

_Call = tuple[Any, tuple[Any, ...], dict[str, Any]]
"""A batch, and the arguments of the model for it."""


class UpdateResult(NamedTuple):
    """Result of a compiled update, without the tensors that it writes to."""

    losses: Mapping[str, Tensor]
    outputs: tuple[Any, ...]
    buffers: Mapping[str, Tensor]
    grad_norm: Tensor | None
    gradients: Mapping[str, Tensor] | None
    finite: Tensor


@final
class CompiledUpdate:
    """Makes updates in one compiled graph, in place.

    Each shape of batch has a separate graph, so that a resumed run computes with the same kernels; torch compiles up
    to eight shapes. Results differ from those of the step in the last bits. Random numbers come from the same seed, but
    the graph draws different ones than the step, in dropout for example.

    Args:
        step: The step to compile.
        state: Gives the names of params, optimizer memory and buffers.
    """

    def __init__(self, step: Step, state: TrainState) -> None:
        self._step, self._copies_gradients = step, step.gradients is not None
        params, memory = state.params, state.opt_state.get("state", {})
        self._trainable = step.optimizer.trainable(params)
        # Only constant schedules: `_obstacle` refuses the others.
        decay = {group: {"weight_decay": schedule(0)} for group, schedule in step.weight_decay.items()}
        members = step.optimizer.members(params).items()
        self._groups = {group: ({**settings, **decay.get(group, {})}, names) for group, (settings, names) in members}
        self._names = tuple(params)
        self._places = tuple((name, key) for name, tensors in memory.items() for key in tensors)
        self._buffers = tuple(step.buffers.collect(state))
        self._lr = [torch.tensor(torch.nan) for _ in self._groups]
        self._rates: list[float] = []
        self._graphs: dict[tuple[Any, ...], CompiledGraph] = {}  # by the form of the params and memory
        self._last: list[Tensor] = []  # params and memory of the last call

    def __call__(
        self,
        params: Mapping[str, Tensor],
        opt_state: Mapping[str, Any],
        buffers: Mapping[str, Tensor],
        batches: Sequence[Any],
        samples: tuple[int, ...],
        settings: UpdateSettings,
        begin: Callable[[], object],
    ) -> UpdateResult:
        """Write one update to `params` and `opt_state`.

        Args:
            params: Parameters by name.
            opt_state: The optimizer's memory, complete.
            buffers: The model's buffers by name.
            batches: The micro-batches.
            samples: Samples of each.
            settings: Settings of the optimizer for this update.
            begin: Is called right before the first write.

        Raises:
            NewGraphError: If a graph had to be compiled for it; then nothing is written.
            RefusedGraphError: If it cannot be compiled so that it computes the same; then nothing is written.
        """
        calls = [(batch, *model_arguments(self._step.model, batch)) for batch in batches]
        memory = opt_state.get("state", {})
        # Lists: torch would compare the keys of dicts before every update.
        param_tensors = [params[name] for name in self._names]
        memory_tensors = [memory[name][key] for name, key in self._places]
        graph = self._graph_for(param_tensors + memory_tensors)
        self._set_rates([settings.lr[group] for group in self._groups])
        buffer_tensors = [buffers[name] for name in self._buffers]
        arguments = (param_tensors, memory_tensors, buffer_tensors, calls, samples, self._lr)
        is_enabled = torch.is_grad_enabled()
        set_grad_enabled(False)
        try:
            return UpdateResult(*graph(*arguments, begin=begin))
        finally:
            set_grad_enabled(is_enabled)

    def _graph_for(self, tensors: list[Tensor]) -> CompiledGraph:
        """Return the graph for params and memory of this form."""
        if list(map(id, tensors)) != list(map(id, self._last)):
            self._last = tensors
            form = tuple(map(_describe_form, tensors))
            if form not in self._graphs:
                self._graphs[form] = CompiledGraph(self._update, watched=_WATCHED, refuse=self._refuse)
            self._graph = self._graphs[form]
        return self._graph

    def _set_rates(self, rates: list[float]) -> None:
        """Set the learning rates; they are tensors, because torch would compile a graph for each float."""
        if rates != self._rates:
            for tensor, rate in zip(self._lr, rates, strict=True):
                tensor.fill_(rate)
            self._rates = rates

    def _refuse(self, trace: Trace) -> str | None:
        """Return why updates that do this are not compiled, or None."""
        if trace.changes:
            changed = ", ".join(dict.fromkeys(map(_shorten_name, trace.changes)))
            return f"forward or the loss changes {changed}, which a graph may read as it was when it was compiled"
        unused = frozenset.intersection(*trace.unused)  # over the micro-batches
        # Compiled gradients are zero there, so the optimizer would decay and move the parameter.
        return f"the parameter {self._trainable[min(unused)]!r} gets no gradient" if unused else None

    def _update(
        self,
        param_tensors: list[Tensor],
        memory_tensors: list[Tensor],
        buffer_tensors: list[Tensor],
        calls: Sequence[_Call],
        samples: tuple[int, ...],
        lr: list[Tensor],
    ) -> tuple[Any, ...]:
        """Return the fields of `UpdateResult`; a tuple, because torch would guard its class."""
        params = dict(zip(self._names, param_tensors, strict=True))
        buffers: Mapping[str, Tensor] = dict(zip(self._buffers, buffer_tensors, strict=True))
        memory: dict[str, dict[str, Tensor]] = {name: {} for name, _ in self._places}
        for (name, key), tensor in zip(self._places, memory_tensors, strict=True):
            memory[name][key] = tensor
        grads: dict[str, Tensor | None] = {}
        losses: dict[str, Tensor] = {}
        outputs: list[Any] = []
        for call, size in zip(calls, samples, strict=True):
            weight = size / sum(samples)
            part_grads, part_losses, part_outputs, buffers = self._run_backward(params, buffers, call, weight)
            if losses and losses.keys() != part_losses.keys():
                raise ValueError("some micro-batches of an update have other losses than the others")
            add_terms(grads, part_grads)
            add_terms(losses, {name: loss if weight == 1 else loss * weight for name, loss in part_losses.items()})
            outputs.append(part_outputs)
        copies = copy_gradients(grads) if self._copies_gradients else None
        grads, grad_norm = self._step.clip(grads, traceable_total_norm)
        for rate, (settings, names) in zip(lr, self._groups.values(), strict=True):
            kernels.write_traceable(
                self._step.optimizer.optimizer,
                {**settings, "lr": rate},
                [params[name] for name in names],
                [grad for grad in map(grads.get, names) if grad is not None],
                [memory.get(name, {}) for name in names],
            )
        total = losses["total"]
        return losses, tuple(outputs), buffers, grad_norm, copies, total - total == 0

    def _run_backward(
        self, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor], call: _Call, weight: float
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], Any, Mapping[str, Tensor]]:
        """Return weighted gradients, losses, outputs of one micro-batch, and the buffers after it."""
        batch, arguments, keywords = call

        def total(trained: dict[str, Tensor]) -> tuple[Tensor, Any]:
            weights = {**params, **trained, **{name: buffer.clone() for name, buffer in buffers.items()}}
            with self._step.autocast(params):
                outputs = functional_call(self._step.model, weights, arguments, keywords)
                result = self._step.loss(outputs, batch)
                if Mean in map(type, result.values() if isinstance(result, Mapping) else [result]):
                    refuse_to_compile("the loss function gives weights (noether.Mean), which are read at each update")
                losses = read_losses(result, self._step.loss)
            return losses["total"] * weight, (dict(losses), outputs, {name: weights[name] for name in buffers})

        grads, (_, (losses, outputs, new_buffers)) = grad_and_value(total, has_aux=True)(
            {name: params[name] for name in self._trainable}
        )
        # Copies: an output that is a parameter would otherwise show the value after the update.
        return grads, losses, map_tensors(torch.clone, outputs), new_buffers


def _describe_form(tensor: Tensor) -> tuple[Any, ...]:
    """Return all of a tensor that a graph is compiled for; only its values may differ at the next call."""
    layout = (tensor.stride(), tensor.is_conj(), tensor.is_neg()) if tensor.layout is torch.strided else tensor.layout
    return type(tensor), tensor.dtype, tensor.device, tensor.shape, layout, tensor.requires_grad


def _shorten_name(name: str) -> str:
    """Return the place of an object, as torch writes it, in the words of its user.

    Example:
        >>> _shorten_name("L['self']._step.model._modules['head'].calls")
        'model.head.calls'
    """
    name = re.sub(r"^L\['calls'\]\[\d+\]\[0\]", "batch", name.removeprefix("L['self']._step."))
    return re.sub(r"(?:\._modules|\bG)?\['(?:__import_)?(\w+)'\]", r".\1", name).lstrip(".")
