"""A whole update, compiled: forward pass, gradients, clipping and optimizer in one graph of `torch.compile`."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, NamedTuple, final

import torch
from torch import Tensor
from torch.func import functional_call, grad_and_value

from noether.core.tensors.batch import batch_size, model_arguments
from noether.core.tensors.module import add_total
from noether.core.tensors.torch_internals import compile_graph
from noether.core.tensors.tree import FrozenDict, map_tensors
from noether.training.step import kernels
from noether.training.step.outputs import outputs_of
from noether.training.step.owned import OwnedTensors
from noether.training.step.sums import Sums
from noether.training.value_schedules import Constant

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from noether.core.state import TrainState
    from noether.training.step.outputs import Accumulated, StepOutputs
    from noether.training.step.step import Step

_LOGGER: Final = logging.getLogger(__name__)
_WORDS: Final = 60
_FIXED: Final = ("self._groups", "self._names", "self._places", "self._buffers", "self._trainable")
"""Attributes of a `CompiledUpdate` that never change."""


class Updated(NamedTuple):
    """What a compiled update gives beside the tensors that it writes to."""

    losses: Mapping[str, Tensor]
    outputs: tuple[Any, ...]
    buffers: Mapping[str, Tensor]
    grad_norm: Tensor | None
    finite: Tensor


@final
class CompiledUpdate:
    """Writes updates in one compiled graph.

    Every shape of batch is compiled for itself, so that a run that is gone on with computes with the kernels that it
    had; torch takes up to eight shapes. Results differ from those of the step in the last bits. Random numbers come
    from the same seed of the update, but the graph draws others than the step, in dropout for example.

    Args:
        step: What is compiled.
        state: Whose params, optimizer memory and buffers are updated; only their names matter.
    """

    def __init__(self, step: Step, state: TrainState) -> None:
        self._step = step
        params, memory = state.params, state.opt_state.get("state", {})
        self._trainable = step.optimizer.trainable(params)
        decay = {group: {"weight_decay": schedule(0)} for group, schedule in step.weight_decay.items()}  # it stays
        members = step.optimizer.members(params).items()
        self._groups = {group: ({**given, **decay.get(group, {})}, names) for group, (given, names) in members}
        self._names = tuple(params)
        self._places = tuple((name, key) for name, kept in memory.items() for key in kept)
        self._buffers = tuple(state.buffers)
        self._lr = [torch.tensor(torch.nan) for _ in self._groups]
        self._rates: list[float] = []
        self._seen: set[Any] = set()
        self._whole: Callable[..., Updated] = compile_graph(self._update, fixed=_FIXED)

    def __call__(
        self,
        params: Mapping[str, Tensor],
        opt_state: Mapping[str, Any],
        buffers: Mapping[str, Tensor],
        batches: Sequence[Any],
        settings: Mapping[str, Mapping[str, float]],
    ) -> Updated:
        """Write one update to `params` and `opt_state`.

        Args:
            params: Parameters by name.
            opt_state: What the optimizer remembers, all of it there.
            buffers: The model's buffers by name.
            batches: The micro-batches.
            settings: What holds for this update, by group.
        """
        calls = [(batch, *model_arguments(self._step.model, batch)) for batch in batches]
        memory = opt_state.get("state", {})
        # Lists: names would be compared before every update.
        remembered = [memory[name][key] for name, key in self._places]
        with torch.no_grad():
            self._set_rates([settings[group]["lr"] for group in self._groups])
            own, held = [params[name] for name in self._names], [buffers[name] for name in self._buffers]
            return self._whole(own, remembered, held, calls, self._lr)

    def _set_rates(self, rates: list[float]) -> None:
        """Set the learning rates: tensors, for a number would be part of the graph, and each be compiled for itself."""
        if rates != self._rates:
            for tensor, rate in zip(self._lr, rates, strict=True):
                tensor.fill_(rate)
            self._rates = rates

    def is_new(self, batches: Sequence[Any]) -> bool:
        """Return whether it is asked for the first time about batches of these shapes."""
        shapes = _shapes(batches)
        if shapes in self._seen:
            return False
        self._seen.add(shapes)
        return True

    def _update(
        self,
        tensors: list[Tensor],
        remembered: list[Tensor],
        buffer_tensors: list[Tensor],
        calls: Sequence[tuple[Any, tuple[Any, ...], dict[str, Any]]],
        lr: list[Tensor],
    ) -> Updated:
        params = dict(zip(self._names, tensors, strict=True))
        buffers: Mapping[str, Tensor] = dict(zip(self._buffers, buffer_tensors, strict=True))
        memory: dict[str, dict[str, Tensor]] = {name: {} for name, _ in self._places}
        for (name, key), tensor in zip(self._places, remembered, strict=True):
            memory[name][key] = tensor
        sizes = [batch_size(batch) for batch, _, _ in calls]
        gradients, total_losses, outputs = Sums(), Sums(), []
        for call, size in zip(calls, sizes, strict=True):
            weight = size / sum(sizes)
            grads, losses, output, buffers = self._gradients(params, buffers, call, weight)
            gradients.add(grads)
            total_losses.add(losses if weight == 1 else {name: loss * weight for name, loss in losses.items()})
            # Copies: what is handed on as it is would be seen as the update leaves it.
            outputs.append(map_tensors(torch.clone, output))
        clipped, grad_norm = self._step.clipped(gradients.values)
        for rate, (given, names) in zip(lr, self._groups.values(), strict=True):
            written, kept = [params[name] for name in names], [memory.get(name, {}) for name in names]
            kernels.traced(
                self._step.optimizer.optimizer,
                {**given, "lr": rate},
                written,
                [grad for name in names if (grad := clipped[name]) is not None],
                kept,
            )
        total = total_losses.values["total"]
        return Updated(total_losses.values, tuple(outputs), buffers, grad_norm, total - total == 0)

    def _gradients(
        self,
        params: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        call: tuple[Any, tuple[Any, ...], dict[str, Any]],
        weight: float,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], Any, dict[str, Tensor]]:
        batch, arguments, keywords = call

        def total(trained: dict[str, Tensor]) -> tuple[Tensor, Any]:
            weights = {**params, **trained, **{name: buffer.clone() for name, buffer in buffers.items()}}
            with self._step.autocast(params):
                outputs = functional_call(self._step.model, weights, arguments, keywords)
                losses = add_total(self._step.loss(outputs, batch))
            return losses["total"] * weight, (dict(losses), outputs, {name: weights[name] for name in buffers})

        grads, (_, (losses, outputs, written)) = grad_and_value(total, has_aux=True)(
            {name: params[name] for name in self._trainable}
        )
        return grads, losses, outputs, written


@final
class CompiledStep:
    """A step that makes its updates in one compiled graph; where that cannot be, it says why once, and is as it was.

    The first update is never compiled, for it is the optimizer's class that makes the first memory. Batches of new
    shapes are compiled on copies of the state, so that nothing is lost where that fails.

    Args:
        eager: The step.
    """

    def __init__(self, eager: Step) -> None:
        self.eager = eager
        self._update: CompiledUpdate | None = None
        self._given_up = False

    def __call__(
        self,
        state: TrainState,
        batches: Sequence[Any],
        observe: Callable[[TrainState, Accumulated], TrainState] | None = None,
    ) -> tuple[TrainState, StepOutputs]:
        """Return the state after one update, as `StepDecay` does up to the last bits."""
        update = None if self._given_up else self._ready(state, batches, observed=observe is not None)
        if update is None:
            return self.eager(state, batches, observe)
        settings = self.eager.settings_for(state)
        if update.is_new(batches) and not self._compiles(update, state, batches, settings):
            return self.eager(state, batches, observe)
        self.eager.seed(state)
        owned = OwnedTensors.of(state, self.eager.model) if self.eager.donate else None
        if owned is not None:
            owned.taken_from(state).unshare()
            params, opt_state = owned.params, owned.opt_state
        else:
            params, opt_state = thawed(state.params), thawed(state.opt_state)
        updated = update(params, opt_state, state.buffers, batches, settings)
        if self.eager.donate:
            trainable = self.eager.optimizer.trainable(params)
            owned = owned or OwnedTensors(self.eager.model, trainable, params, opt_state)
            state = owned.given_to(state, updated.buffers)
        else:
            state = state.replace(params=params, opt_state=opt_state, buffers=updated.buffers)
        sizes = tuple(map(batch_size, batches))
        readings = {"grad_norm": updated.grad_norm, "finite": updated.finite}
        outputs = outputs_of(FrozenDict(updated.losses), updated.outputs, sizes, settings, **readings)
        return state, outputs

    def _compiles(self, update: CompiledUpdate, state: TrainState, batches: Sequence[Any], settings: Any) -> bool:
        """Return whether batches of these shapes can be compiled, on copies: the compiler draws random numbers."""
        try:
            update(thawed(state.params), thawed(state.opt_state), state.buffers, batches, settings)
        except Exception as error:  # noqa: BLE001  # whatever it is: the step itself does it, or says what is wrong
            self._give_up(str(error))
            return False
        return True

    def _ready(self, state: TrainState, batches: Sequence[Any], *, observed: bool) -> CompiledUpdate | None:
        """Return what makes the next update, or None if the step itself has to."""
        if self._update is not None and not observed and OwnedTensors.of(state, self.eager.model) is not None:
            return self._update
        why = "a callback listens to accumulation steps" if observed else obstacle(self.eager)
        trained = {name: state.params[name] for name in self.eager.optimizer.trainable(state.params)}
        if why is None and not self.eager.optimizer.writes(trained, state.opt_state, state.params):
            if not state.opt_state.get("state"):
                return None  # not yet: the class makes the first memory
            why = "the optimizer remembers nothing of a parameter that got no gradient"
        if why is None and self._update is None:
            lost = self.eager.without_gradient(state, batches[0])
            # Torch's compiled gradients are zero there, and zeros decay and move what no gradient leaves as it is.
            why = f"the parameter {lost[0]!r} gets no gradient" if lost else None
        if why is not None:
            self._give_up(why)
            return None
        self._update = self._update or CompiledUpdate(self.eager, state)
        return self._update

    def _give_up(self, why: str) -> None:
        self._given_up = True
        said = " ".join(why.split()[:_WORDS])  # a compiler's message goes on for pages
        _LOGGER.warning("updates are not compiled: %s; training goes on as with trainer.compile: false", said)


def obstacle(step: Step) -> str | None:
    """Return why no update of `step` can be compiled as a whole, or None."""
    if not kernels.known(step.optimizer.optimizer):
        return f"{step.optimizer.optimizer.__name__} is none of the optimizers whose kernels can be traced"
    if step.nonfinite != "apply":
        return f"nonfinite: {step.nonfinite} decides in the middle of an update"
    if any(not isinstance(schedule, Constant) for schedule in step.weight_decay.values()):
        return "the weight decay has a schedule"
    return None


def thawed(tree: Any) -> Any:
    """Return a copy of a tree that may be written to."""
    if isinstance(tree, Mapping):
        return {key: thawed(value) for key, value in tree.items()}
    return tree.clone() if isinstance(tree, Tensor) else tree


def _shapes(batch: Any) -> Any:
    if isinstance(batch, Tensor):
        return batch.shape, batch.dtype
    parts = batch if isinstance(batch, (list, tuple)) else batch.values() if isinstance(batch, Mapping) else ()
    return tuple(map(_shapes, parts))
