"""One optimizer update as a function: `(state, micro-batches) -> (state, outputs)`."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, final

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from noether.core.tensors.batch import batch_size, model_arguments
from noether.core.tensors.donation import DonatedTree
from noether.core.tensors.module import add_total
from noether.core.tensors.torch_internals import reparametrize, write_counts
from noether.core.tensors.tree import FrozenDict, map_tensors
from noether.session.randomness import derive, seed_torch
from noether.training.step.gradients import gradients_of
from noether.training.step.outputs import Accumulated, outputs_of
from noether.training.step.owned import OwnedTensors
from noether.training.step.sums import Sums

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from contextlib import AbstractContextManager

    from noether.core.state import TrainState
    from noether.training.step.optimizer import FunctionalOptimizer
    from noether.training.step.outputs import StepOutputs
    from noether.training.value_schedules import ValueSchedule

    Losses = Mapping[str, Tensor]
    Grads = dict[str, Tensor | None]

_SHOWN: Final = 3

Nonfinite = Literal["apply", "skip", "raise"]


class _Found(NamedTuple):
    """What is known of an update, or of one of its micro-batches, before it is applied."""

    grads: Grads
    losses: FrozenDict
    outputs: Any
    buffers: Mapping[str, Tensor]


@final
@dataclass(frozen=True, kw_only=True)
class Step:
    """One optimizer update. Calling it writes to no tensor of the state that it is given, unless it is to be donated.

    Its random numbers are a function of `(seed, update, rank)`; the learning rate of update u is
    `lr[group](u - 1) * state.hyperparams["lr_scale"]`.

    Args:
        model: Gives the architecture, in training mode; its own weights are not used.
        loss: `(outputs, batch) -> {name: mean over samples}`, pure.
        optimizer: Makes new params of gradients.
        lr: Learning rate by parameter group, as a function of the number of completed updates.
        weight_decay: Weight decay by parameter group, likewise; empty for an optimizer that has none.
        precision: Autocast type of forward pass and loss, or None.
        clip_grad_norm: Largest 2-norm of all gradients together, or None.
        clip_grad_value: Largest absolute value of a gradient's entry, or None.
        nonfinite: What to do with an update whose losses or gradients are not finite. `apply` does not look at the
            gradients; `skip` and `raise` do, before anything is applied, and wait for the device to tell.
        grad_norm: Whether to measure the 2-norm of the gradients even where nothing clips it.
        finite: Whether to look if the loss is finite even where nothing follows from it.
        rank: Index of this process.
        elapsed_s: Where the seconds of forward, backward and optimizer are read; None leaves them out. An accelerator
            computes on after a call, so there they are the seconds of the calls.
        donate: Whether an update may write to the tensors of a state that an update returned; that state cannot be read
            then. It is faster, needs less memory, and gives the same bits. The model's own weights are then those of
            the newest state. Adam, AdamW and SGD write; with other classes, it has no effect.

    Example:
        >>> from noether import TrainState
        >>> from noether.training.step.optimizer import FunctionalOptimizer
        >>> model = nn.Linear(2, 1)
        >>> step = StepDecay(
        ...     model=model,
        ...     loss=lambda outputs, batch: {"mse": (outputs - batch[1]).square().mean()},
        ...     optimizer=FunctionalOptimizer(torch.optim.SGD, {"lr": 0.1}),
        ...     lr={"default": lambda position: 0.1},
        ... )
        >>> state, outputs = step(TrainState.from_module(model), [(torch.ones(4, 2), torch.ones(4, 1))])
        >>> outputs.samples, sorted(outputs.losses), dict(outputs.lr)
        (4, ['mse', 'total'], {'default': 0.1})
    """

    model: nn.Module
    loss: Callable[[Any, Any], Losses]
    optimizer: FunctionalOptimizer
    lr: Mapping[str, ValueSchedule]
    weight_decay: Mapping[str, ValueSchedule] = field(default_factory=dict)
    precision: torch.dtype | None = None
    clip_grad_norm: float | None = None
    clip_grad_value: float | None = None
    nonfinite: Nonfinite = "apply"
    grad_norm: bool = False
    finite: bool = True
    rank: int = 0
    elapsed_s: Callable[[], float] | None = None
    donate: bool = False

    def __call__(
        self,
        state: TrainState,
        batches: Sequence[Any],
        observe: Callable[[TrainState, Accumulated], TrainState] | None = None,
    ) -> tuple[TrainState, StepOutputs]:
        """Return the state after one update on all of `batches`, its counters as they were.

        Args:
            state: Params, buffers and opt_state to start from.
            batches: The micro-batches of the update, at least one.
            observe: Called with the gradients of each micro-batch there and nothing applied; returns the state with
                what a callback remembered.

        Raises:
            FloatingPointError: If `nonfinite` is `raise` and a loss or gradient is not finite.
            ValueError: If the model writes to its parameters, or the loss is not one real number.
        """
        if not torch.is_grad_enabled():
            with torch.enable_grad():
                return self(state, batches, observe)
        self.seed(state)
        samples = tuple(map(batch_size, batches))
        times = None if self.elapsed_s is None else _Times(self.elapsed_s)
        if len(batches) == 1 and observe is None:  # most updates, without what only sums need
            found = self._gradients(state, state.buffers, batches[0], 1.0, times)
            return self._applied(state, found, (found.outputs,), samples, times)
        state, found, outputs = self._accumulated(state, batches, samples, times, observe)
        return self._applied(state, found, outputs, samples, times)

    def _accumulated(
        self,
        state: TrainState,
        batches: Sequence[Any],
        samples: Sequence[int],
        times: _Times | None,
        observe: Callable[[TrainState, Accumulated], TrainState] | None,
    ) -> tuple[TrainState, _Found, tuple[Any, ...]]:
        """Return what callbacks remembered, the weighted sums over the micro-batches, and the outputs of each."""
        grads, losses, outputs, buffers, update = Sums(), Sums(), [], state.buffers, sum(samples)
        for index, (batch, size) in enumerate(zip(batches, samples, strict=True)):
            weight = size / update
            found = self._gradients(state, buffers, batch, weight, times)
            grads.add(found.grads)
            losses.add(found.losses if weight == 1 else {name: loss * weight for name, loss in found.losses.items()})
            outputs.append(found.outputs)
            buffers = found.buffers
            if observe is not None:
                seen = Accumulated(
                    losses=found.losses,
                    outputs=found.outputs,
                    samples=size,
                    accumulation_step=index,
                    accumulation_steps=len(batches),
                )
                state = observe(state, seen)
            if times is not None:
                times.begin()
        return state, _Found(grads.values, FrozenDict(losses.values), None, buffers), tuple(outputs)

    def seed(self, state: TrainState) -> None:
        """Seed the random numbers of the next update of `state`."""
        seed_torch(derive(state.seed, "update", state.iteration.update, self.rank))

    @torch.enable_grad()
    def without_gradient(self, state: TrainState, batch: Any) -> list[str]:
        """Return the names of trained parameters that have no gradient for a batch; nothing comes of the call."""
        found = self._gradients(state, state.buffers, batch, 1.0, None)
        return [name for name, grad in found.grads.items() if grad is None]

    def _gradients(
        self, state: TrainState, buffers: Mapping[str, Tensor], batch: Any, weight: float, times: _Times | None
    ) -> _Found:
        """Return gradients of the weighted total loss, losses, outputs and new buffers."""
        owned = OwnedTensors.of(state, self.model)
        if owned is not None:
            owned.place(buffers)
            return _Found(*self._computed(batch, owned.parameters, owned.leaves, weight, times), owned.placed(buffers))
        params = {name: param.detach() for name, param in state.params.items()}
        leaves = {name: params[name].requires_grad_() for name in self.optimizer.trainable(params)}
        weights = {**params, **{name: buffer.clone() for name, buffer in buffers.items()}}
        # Not `functional_call`: checkpointed parts of a model are called again in the backward pass.
        with reparametrize(self.model, weights, tie_weights=True):
            computed = self._computed(batch, params, leaves, weight, times)
        # Batch norm writes to its copies, another module assigns: `weights` has either way what is there now.
        return _Found(*computed, FrozenDict({name: weights[name].detach() for name in buffers}))

    def _computed(
        self,
        batch: Any,
        params: Mapping[str, Tensor],
        leaves: Mapping[str, Tensor],
        weight: float,
        times: _Times | None,
    ) -> tuple[Grads, FrozenDict, Any]:
        """Return gradients of the weighted total loss, losses and outputs of the model, which has `params` in it."""
        counts = write_counts(params.values())
        if self.precision is None:
            losses, outputs = self._forward(batch)
        else:
            with self.autocast(params):
                losses, outputs = self._forward(batch)
        total = losses["total"] if weight == 1 else losses["total"] * weight
        if write_counts(params.values()) != counts:
            _refuse_writing(params, counts)
        if times is not None:
            times.end("forward_s")
        # Not torch.func.grad_and_value: it takes longer, to the same bits; see benchmarks/step.py.
        grads = gradients_of(total, list(leaves.values()))
        if times is not None:
            times.end("backward_s")
        return (
            dict(zip(leaves, grads, strict=True)),
            FrozenDict({name: loss.detach() for name, loss in losses.items()}),
            map_tensors(Tensor.detach, outputs),
        )

    def _forward(self, batch: Any) -> tuple[Losses, Any]:
        arguments, keywords = model_arguments(self.model, batch)
        outputs = self.model(*arguments, **keywords)
        return add_total(self.loss(outputs, batch)), outputs

    def _applied(
        self,
        state: TrainState,
        found: _Found,
        outputs: tuple[Any, ...],
        accumulated: tuple[int, ...],
        times: _Times | None,
    ) -> tuple[TrainState, StepOutputs]:
        """Return the state with the gradients applied, or as it was if they are to be skipped."""
        finite = self._finite(found.losses, found.grads)
        skipped = self.nonfinite != "apply" and not finite
        if skipped and self.nonfinite == "raise":
            raise FloatingPointError(_nonfinite_message(state, found.losses, found.grads))
        grads, grad_norm = self.clipped(found.grads)
        settings = self.settings_for(state)
        if not skipped:
            state = self._updated(state, grads, settings, found.buffers)
        spent = {} if times is None else times.ended("optimizer_s")
        return state, outputs_of(
            found.losses, outputs, accumulated, settings, grad_norm=grad_norm, finite=finite, skipped=skipped, **spent
        )

    def _updated(
        self,
        state: TrainState,
        grads: Grads,
        settings: Mapping[str, Mapping[str, Any]],
        buffers: Mapping[str, Tensor],
    ) -> TrainState:
        """Return the state with new params and optimizer memory, written in place where it is asked for and can be."""
        present = {name: grad for name, grad in grads.items() if grad is not None}
        owned = self._taken(state, present) if self.donate else None
        if owned is not None:
            owned.write(self.optimizer, present, settings)
            return owned.given_to(state, buffers)
        params, opt_state = self.optimizer.update(present, state.opt_state, state.params, settings=settings)
        if self.donate and self.optimizer.writes(present, opt_state, params):
            owned = OwnedTensors(self.model, self.optimizer.trainable(params), params, opt_state)
            return owned.given_to(state, buffers)
        return state.replace(params=params, opt_state=opt_state, buffers=buffers)

    def _taken(self, state: TrainState, grads: Mapping[str, Tensor]) -> OwnedTensors | None:
        """Return the tensors of the state, taken from it to be written to, or None if they cannot be."""
        owned = OwnedTensors.of(state, self.model)
        if owned is not None:
            return owned.taken_from(state) if owned.can_write(self.optimizer, grads) else None
        params, opt_state = state.params, state.opt_state
        if not isinstance(params, DonatedTree) or not isinstance(opt_state, DonatedTree) or params.owner is not None:
            return None
        # A run begins or goes on. The memory that the class would make first is made here, for the class copies.
        if not self.optimizer.writes(grads, self.optimizer.remembering(opt_state, params, grads), params):
            return None
        taken = params.take()
        remembered = self.optimizer.remembering(opt_state.take(), taken, grads)
        return OwnedTensors(self.model, self.optimizer.trainable(taken), taken, remembered)

    def settings_for(self, state: TrainState) -> dict[str, dict[str, float]]:
        """Return the settings of the optimizer that the schedules give for the next update of `state`, by group."""
        position, scale = state.iteration.update, state.hyperparams["lr_scale"]
        settings = {group: {"lr": schedule(position) * scale} for group, schedule in self.lr.items()}
        for group, schedule in self.weight_decay.items():
            settings[group]["weight_decay"] = schedule(position)
        return settings

    def _finite(self, losses: Losses, grads: Grads) -> Tensor | bool | None:
        if not self.finite and self.nonfinite == "apply":
            return None
        total = losses["total"]
        finite = total - total == 0  # as `isfinite`, which takes four times as long
        if self.nonfinite == "apply":
            return finite
        entries = [_entries(grad) for grad in grads.values() if grad is not None]
        largest = [torch.linalg.vector_norm(values, torch.inf) for values in entries if values.numel()]
        return bool(finite & torch.stack(largest).isfinite().all()) if largest else bool(finite)

    def clipped(self, grads: Grads) -> tuple[Grads, Tensor | None]:
        """Return clipped gradients and their norm before.

        Out of place, for two may be the same tensor.
        """
        norm = _total_norm(grads) if self.grad_norm else None
        if self.clip_grad_value is not None:
            limit = self.clip_grad_value
            grads = {name: None if grad is None else grad.clamp(-limit, limit) for name, grad in grads.items()}
        if self.clip_grad_norm is None:
            return grads, norm
        size = norm if norm is not None and self.clip_grad_value is None else _total_norm(grads)
        factor = torch.clamp(self.clip_grad_norm / (size + 1e-6), max=1.0)  # as torch.nn.utils.clip_grad_norm_
        # `to`: of a gradient without dimensions, a factor of higher precision would make one of its own type.
        clipped = {n: None if grad is None else (grad * factor).to(grad.dtype) for n, grad in grads.items()}
        return clipped, size if norm is None else norm

    def autocast(self, params: Mapping[str, Tensor]) -> AbstractContextManager[Any]:
        """Return the context in which forward pass and loss are computed."""
        if self.precision is None:
            return nullcontext()
        device = next(iter(params.values())).device.type
        return torch.autocast(device, dtype=self.precision)


def _entries(grad: Tensor) -> Tensor:
    """Return the numbers that a gradient holds; torch has no norms of sparse tensors."""
    return grad.coalesce().values() if grad.is_sparse else grad


def _total_norm(grads: Grads) -> Tensor:
    return get_total_norm([_entries(grad) for grad in grads.values() if grad is not None])


class _Times:
    """The seconds that the parts of one update take."""

    def __init__(self, elapsed_s: Callable[[], float]) -> None:
        self._elapsed_s = elapsed_s
        self._spent: dict[str, float] = {}
        self.begin()

    def begin(self) -> None:
        self._since_s = self._elapsed_s()

    def end(self, part: str) -> None:
        """Count the time since the last part began or ended to `part`."""
        now_s = self._elapsed_s()
        self._spent[part] = self._spent.get(part, 0.0) + now_s - self._since_s
        self._since_s = now_s

    def ended(self, part: str) -> Mapping[str, float]:
        """Return the seconds of all parts, after that of the last one."""
        self.end(part)
        return self._spent


def _refuse_writing(params: Mapping[str, Tensor], counts: Sequence[int]) -> None:
    now = write_counts(params.values())
    changed = (name for name, count, before in zip(params, now, counts, strict=True) if count != before)
    raise ValueError(
        f"the model writes to its parameter {next(changed)!r} in forward, and a tensor in a state is never written to: "
        "compute with a clamped or renormalized copy, or make it a buffer"
    )


def _nonfinite_message(state: TrainState, losses: Losses, grads: Grads) -> str:
    wrong = [f"loss {name!r} is {loss.item()}" for name, loss in losses.items() if not loss.isfinite()]
    wrong += [
        f"the gradient of {name!r} is not finite"
        for name, grad in grads.items()
        if grad is not None and not _entries(grad).isfinite().all()
    ]
    first, others = wrong[:_SHOWN], len(wrong) - _SHOWN
    more = f" (and {others} more)" if others > 0 else ""
    return (
        f"update {state.iteration.update + 1}: {', '.join(first)}{more}; nothing was applied. "
        "Lower the learning rate, clip gradients, or leave such updates out with trainer.nonfinite: skip"
    )
