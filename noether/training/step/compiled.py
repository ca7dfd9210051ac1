"""A whole update, compiled: forward pass, gradients, clipping and optimizer in one graph of `torch.compile`."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, NamedTuple, final

import torch
from torch import Tensor
from torch.func import functional_call, grad_and_value

from noether.core.tensors.batch import SizedBatches, model_arguments
from noether.core.tensors.containers import map_tensors
from noether.core.tensors.live.extra_state import modules_with_extra_state
from noether.core.tensors.losses import WeightedLosses, read_losses
from noether.core.tensors.module import names_in_model
from noether.core.tensors.torch_internals import compile_graph
from noether.core.tensors.tree import FrozenDict
from noether.training.step import kernels
from noether.training.step.accumulation import add_terms, drop_empty
from noether.training.step.gradients import traceable_total_norm
from noether.training.step.model_tensors import ModelTensors
from noether.training.step.update_event import make_event
from noether.training.value_schedules import Constant

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from noether.core.event import AfterUpdate
    from noether.core.state import TrainState
    from noether.training.step.accumulation import BackwardResult
    from noether.training.step.step import Observer, Settings, Step

_LOGGER: Final = logging.getLogger(__name__)
_WORDS: Final = 60
"""Largest number of words of a compiler's message to log; some messages take pages."""

_FIXED: Final = ("self._groups", "self._names", "self._places", "self._buffers", "self._trainable")
"""Attributes of a `CompiledUpdate` that never change."""

_Call = tuple[Any, tuple[Any, ...], dict[str, Any]]
"""A batch, and the arguments of the model for it."""


class _Part(NamedTuple):
    """Weighted gradients, losses, outputs of one micro-batch, and the buffers after it."""

    grads: dict[str, Tensor]
    losses: dict[str, Tensor]
    outputs: Any
    buffers: Mapping[str, Tensor]


class UpdateResult(NamedTuple):
    """Result of a compiled update, without the tensors that it writes to."""

    losses: Mapping[str, Tensor]
    outputs: tuple[Any, ...]
    buffers: Mapping[str, Tensor]
    grad_norm: Tensor | None
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
        self._step = step
        params, memory = state.params, state.opt_state.get("state", {})
        self._trainable = step.optimizer.trainable(params)
        # Only constant schedules: `_obstacle` refuses the others.
        decay = {group: {"weight_decay": schedule(0)} for group, schedule in step.weight_decay.items()}
        members = step.optimizer.members(params).items()
        self._groups = {group: ({**settings, **decay.get(group, {})}, names) for group, (settings, names) in members}
        self._names = tuple(params)
        self._places = tuple((name, key) for name, tensors in memory.items() for key in tensors)
        self._buffers = tuple(state.buffers)
        self._lr = [torch.tensor(torch.nan) for _ in self._groups]
        self._rates: list[float] = []
        self._shapes: set[Any] = set()
        self._graph: Callable[..., UpdateResult] = compile_graph(self._update, fixed=_FIXED)

    def __call__(
        self,
        params: Mapping[str, Tensor],
        opt_state: Mapping[str, Any],
        buffers: Mapping[str, Tensor],
        batches: Sequence[Any],
        samples: tuple[int, ...],
        settings: Settings,
    ) -> UpdateResult:
        """Write one update to `params` and `opt_state`.

        Args:
            params: Parameters by name.
            opt_state: The optimizer's memory, complete.
            buffers: The model's buffers by name.
            batches: The micro-batches.
            samples: Samples of each.
            settings: Settings of the optimizer for this update, by group.
        """
        calls = [(batch, *model_arguments(self._step.model, batch)) for batch in batches]
        memory = opt_state.get("state", {})
        # Lists: torch would compare the keys of dicts before every update.
        memory_tensors = [memory[name][key] for name, key in self._places]
        with torch.no_grad():
            self._set_rates([settings[group]["lr"] for group in self._groups])
            param_tensors = [params[name] for name in self._names]
            buffer_tensors = [buffers[name] for name in self._buffers]
            return self._graph(param_tensors, memory_tensors, buffer_tensors, calls, samples, self._lr)

    def _set_rates(self, rates: list[float]) -> None:
        """Set the learning rates; they are tensors, because torch would compile a graph for each float."""
        if rates != self._rates:
            for tensor, rate in zip(self._lr, rates, strict=True):
                tensor.fill_(rate)
            self._rates = rates

    def is_new_shape(self, batches: Sequence[Any], samples: tuple[int, ...]) -> bool:
        """Return whether this is the first call with batches of these shapes and numbers of samples."""
        shapes = _shapes(batches), samples
        if shapes in self._shapes:
            return False
        self._shapes.add(shapes)
        return True

    def _update(
        self,
        param_tensors: list[Tensor],
        memory_tensors: list[Tensor],
        buffer_tensors: list[Tensor],
        calls: Sequence[_Call],
        samples: tuple[int, ...],
        lr: list[Tensor],
    ) -> UpdateResult:
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
            part = self._run_backward(params, buffers, call, weight)
            if losses and losses.keys() != part.losses.keys():
                raise ValueError("some micro-batches of an update have other losses than the others")
            add_terms(grads, part.grads)
            add_terms(losses, {name: loss if weight == 1 else loss * weight for name, loss in part.losses.items()})
            outputs.append(part.outputs)
            buffers = part.buffers
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
        return UpdateResult(losses, tuple(outputs), buffers, grad_norm, total - total == 0)

    def _run_backward(
        self, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor], call: _Call, weight: float
    ) -> _Part:
        batch, arguments, keywords = call

        def total(trained: dict[str, Tensor]) -> tuple[Tensor, Any]:
            weights = {**params, **trained, **{name: buffer.clone() for name, buffer in buffers.items()}}
            with self._step.autocast(params):
                outputs = functional_call(self._step.model, weights, arguments, keywords)
                losses = read_losses(self._step.loss(outputs, batch), self._step.loss)
            return losses["total"] * weight, (dict(losses), outputs, {name: weights[name] for name in buffers})

        grads, (_, (losses, outputs, new_buffers)) = grad_and_value(total, has_aux=True)(
            {name: params[name] for name in self._trainable}
        )
        # Copies: an output that is a parameter would otherwise show the value after the update.
        return _Part(grads, losses, map_tensors(torch.clone, outputs), new_buffers)


@final
class CompiledStep:
    """A step that makes its updates in one compiled graph; where it cannot, it warns once and calls the plain step.

    The plain step makes the first update, because the optimizer's class makes the first memory. Batches of new shapes
    are compiled on copies of the state, so that nothing is lost where compilation fails.

    Args:
        eager: The plain step.
    """

    def __init__(self, eager: Step) -> None:
        self.eager, self.model = eager, eager.model
        self._compiled: CompiledUpdate | None = None
        self._is_disabled = False

    def __call__(
        self, state: TrainState, batches: Sequence[Any], observe: Observer | None = None
    ) -> tuple[TrainState, AfterUpdate]:
        """Return the state after one update and the event, as `Step` does up to the last bits."""
        eager = self.eager
        batches, samples = drop_empty(batches, eager.batch_size)
        batches = SizedBatches(batches, samples)  # the plain step must not count them again
        update = (
            None
            if self._is_disabled or not batches
            else self._find_update(state, batches, observed=observe is not None)
        )
        if update is None:
            return eager(state, batches, observe)
        settings = eager.settings_for(state)
        if update.is_new_shape(batches, samples) and not self._compile(update, state, batches, settings):
            return eager(state, batches, observe)
        eager.prepare(state)
        model_tensors = ModelTensors.of(state, eager.model) if eager.donate else None
        if model_tensors is None:
            params, opt_state = _copy(state.params), _copy(state.opt_state)
        else:
            model_tensors.take_from(state)
            model_tensors.unshare()
            params, opt_state = model_tensors.params, model_tensors.opt_state
        result = update(params, opt_state, state.buffers, batches, samples, settings)
        if eager.donate:
            model_tensors = model_tensors or ModelTensors(
                eager.model, eager.optimizer.trainable(params), params, opt_state
            )
            state = model_tensors.donate_to(state, result.buffers)
        else:
            state = state.replace(params=params, opt_state=opt_state, buffers=result.buffers)
        readings = {"grad_norm": result.grad_norm, "finite": result.finite}
        return state, make_event(FrozenDict(result.losses), result.outputs, samples, settings, **readings)

    def _find_update(self, state: TrainState, batches: Sequence[Any], *, observed: bool) -> CompiledUpdate | None:
        """Return the compiled update, or None if the plain step has to make the next update."""
        if self._compiled is not None and not observed and ModelTensors.of(state, self.eager.model) is not None:
            return self._compiled
        optimizer = self.eager.optimizer
        reason = "a callback listens to accumulation steps" if observed else _obstacle(self.eager)
        trained = {name: state.params[name] for name in optimizer.trainable(state.params)}
        if reason is None and not optimizer.can_write(trained, state.opt_state, state.params):
            if not state.opt_state.get("state"):
                return None  # the first update: the optimizer's class makes the first memory
            reason = "the optimizer has no memory of a parameter that got no gradient"
        if reason is None and self._compiled is None:
            reason = _obstacle_in(self.eager.compute_result(state, batches[0]))
        if reason is not None:
            self._disable(reason)
            return None
        self._compiled = self._compiled or CompiledUpdate(self.eager, state)
        return self._compiled

    def _compile(self, update: CompiledUpdate, state: TrainState, batches: SizedBatches, settings: Settings) -> bool:
        """Compile the update for these shapes and return whether that succeeds.

        It updates copies. The caller seeds afterwards, because the compiler draws random numbers.
        """
        try:
            update(_copy(state.params), _copy(state.opt_state), state.buffers, batches, batches.sizes, settings)
        except Exception as error:  # noqa: BLE001  # whatever it is, the plain step makes the update or names the problem
            self._disable(str(error))
            return False
        return True

    def _disable(self, reason: str) -> None:
        self._is_disabled = True
        short = " ".join(reason.split()[:_WORDS])
        _LOGGER.warning("updates are not compiled: %s; training continues as with trainer.compile: false", short)


def _obstacle(step: Step) -> str | None:
    """Return why no update of `step` can be compiled as a whole, or None."""
    if not kernels.has_kernel(step.optimizer.optimizer):
        return f"torch.compile can trace Adam, AdamW and SGD, not {step.optimizer.optimizer.__name__}"
    if step.nonfinite != "apply":
        return f"nonfinite: {step.nonfinite} decides in the middle of an update"
    if any(not isinstance(schedule, Constant) for schedule in step.weight_decay.values()):
        return "the weight decay has a schedule"
    if names_in_model(step.model):
        return "a module of the model is compiled already, or wrapped"
    for path, module in modules_with_extra_state(step.model):
        return f"{path or 'the model'} ({type(module).__name__}) keeps extra state, which a graph would not change"
    return None


def _obstacle_in(result: BackwardResult) -> str | None:
    """Return why an update with this result of a micro-batch cannot be compiled, or None."""
    if not result.losses or isinstance(result.losses, WeightedLosses):
        return "the loss function gives weights (noether.Mean), which are read at each update"
    unused = [name for name, grad in result.grads[0].items() if grad is None]
    # Compiled gradients are zero there, so the optimizer would decay and move the parameter.
    return f"the parameter {unused[0]!r} gets no gradient" if unused else None


def _copy(tree: Any) -> Any:
    """Return a copy of a tree, with cloned tensors in plain dicts, so that an update can write to it."""
    if isinstance(tree, Mapping):
        return {key: _copy(value) for key, value in tree.items()}
    return tree.clone() if isinstance(tree, Tensor) else tree


def _shapes(batch: Any) -> Any:
    if isinstance(batch, Tensor):
        return batch.shape, batch.dtype
    parts = batch if isinstance(batch, (list, tuple)) else batch.values() if isinstance(batch, Mapping) else ()
    return tuple(map(_shapes, parts))
