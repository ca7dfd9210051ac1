"""One optimizer update as a function: `(state, micro-batches) -> (state, event)`."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Literal, final

import torch
from torch import Tensor, nn

from noether.core.event import AfterAccumulationStep
from noether.core.tensors.batch import batch_size
from noether.core.tensors.calls import call_model, compute_losses
from noether.core.tensors.containers import map_tensors
from noether.core.tensors.gradients import copy_gradients
from noether.core.tensors.hidden_parameters import check_buffers, find_held_tensors, refuse_parameters
from noether.core.tensors.live.buffers import BufferPlaces
from noether.core.tensors.live.extra_state import read_extra_state, set_extra_state
from noether.core.tensors.losses import detach_losses
from noether.core.tensors.module import names_in_model
from noether.core.tensors.torch_internals import reparametrize, write_counts
from noether.core.tensors.tree import FrozenDict
from noether.session.hidden_state import generators_of_model
from noether.session.randomness import seed_all, update_seed
from noether.training.step.accumulation import Accumulation, BackwardResult, Gradients, RegroupError, drop_empty
from noether.training.step.apply import apply_gradients
from noether.training.step.gradients import (
    all_finite,
    clip_norm,
    clip_values,
    compute_gradients,
    describe_nonfinite,
    refuse_constants,
    refuse_writes,
    total_norm,
)
from noether.training.step.model_tensors import ModelTensors
from noether.training.step.parallel_modules import refuse_parallel_modules
from noether.training.step.part_times import PartTimes
from noether.training.step.plain_update import PlainUpdate
from noether.training.step.sharded import apply_to_shards
from noether.training.step.update_event import make_event
from noether.training.step.update_settings import SettingsSchedule

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from contextlib import AbstractContextManager

    from noether.core.event import AfterUpdate
    from noether.core.state import TrainState
    from noether.core.tensors.hidden_parameters import HeldTensor
    from noether.core.tensors.losses import Losses, LossResult
    from noether.distributed.sharding import Sharding
    from noether.training.step.accumulation import Grads, Groups
    from noether.training.step.loss_scaling import LossScaling
    from noether.training.step.optimizer import FunctionalOptimizer
    from noether.training.step.update_settings import UpdateSettings
    from noether.training.value_schedules import ValueSchedule

    Observer = Callable[[TrainState, AfterAccumulationStep], TrainState]
    Objectives = Callable[[Losses], Sequence[Tensor]]

Nonfinite = Literal["apply", "skip", "raise"]


@final
@dataclass(frozen=True, kw_only=True)
class Step:
    """One optimizer update. A call writes to no tensor of the state that it is given, unless `donate` is set.

    Its random numbers are a function of `(seed, update, rank)`; the learning rate of update u is
    `lr[group](u - 1) * state.hyperparams["lr_scale"]`.

    Args:
        model: The architecture, whose modules have the modes in which they train; the step does not use its weights.
        loss: `(outputs, batch) -> {name: mean over samples}` or one loss, pure. A `Mean` gives a loss its weight in the
            mean over micro-batches; several micro-batches whose losses differ in weights, or in names, take one
            backward pass for each group of losses of equal weights.
        optimizer: Computes new params from gradients.
        lr: Learning rate by parameter group, as a function of the number of completed updates.
        weight_decay: Weight decay by parameter group, likewise; empty for an optimizer that has none.
        precision: Autocast dtype of forward pass and loss, or None.
        loss_scaling: Scales losses in the backward pass, for float16; None to leave them. Losses, gradient norms and
            limits are of unscaled gradients. An update whose gradients are not finite is skipped.
        clip_grad_norm: Largest 2-norm of all gradients together, or None.
        clip_grad_value: Largest absolute value of a gradient's entry, or None.
        nonfinite: Reaction to a loss or gradient that is not finite. `apply` makes the update and does not check the
            gradients; `skip` and `raise` check loss and gradients before the update, and wait for the device.
        grad_norm: Whether to measure the 2-norm of the gradients even if `clip_grad_norm` is None.
        gradients: Whether the event of an update has a copy of the gradients, as a function of the state after it, of
            which only the counters are known; None for no update.
        finite: Whether to check that the loss is finite even if `nonfinite` is `apply`.
        rank: Index of this process.
        elapsed_s: Clock for the seconds of forward, backward and optimizer; None leaves them out. An accelerator
            computes asynchronously, so there they are only the seconds of the calls.
        batch_size: `batch -> number of samples`, for batches that do not come from noether's own data.
        donate: Whether an update may write to the tensors of a state that an update returned; that state cannot be read
            afterwards. It is faster, needs less memory, and gives the same bits. The model's own weights are then those
            of the newest state. Only Adam, AdamW and SGD write in place; with other classes it has no effect.
        sharding: Where the parameters are, if they are sharded over several ranks; only a `ReplicatedStep` of these
            ranks makes such updates.

    Raises:
        HiddenParameterError: If the model or the loss holds a parameter in a list, a closure or another object.
        ParallelModuleError: If the model was prepared by `DistributedDataParallel` or FSDP.

    Example:
        >>> from noether import TrainState
        >>> from noether.training.step.optimizer import FunctionalOptimizer
        >>> model = nn.Linear(2, 1)
        >>> step = Step(
        ...     model=model,
        ...     loss=lambda outputs, batch: {"mse": (outputs - batch[1]).square().mean()},
        ...     optimizer=FunctionalOptimizer(torch.optim.SGD, {"lr": 0.1}),
        ...     lr={"default": lambda position: 0.1},
        ... )
        >>> state, event = step(TrainState.from_module(model), [(torch.ones(4, 2), torch.ones(4, 1))])
        >>> event.samples, sorted(event.losses), dict(event.lr)
        (4, ['mse', 'total'], {'default': 0.1})
    """

    model: nn.Module
    loss: Callable[[Any, Any], LossResult]
    optimizer: FunctionalOptimizer
    lr: Mapping[str, ValueSchedule]
    weight_decay: Mapping[str, ValueSchedule] = field(default_factory=dict)
    precision: torch.dtype | None = None
    loss_scaling: LossScaling | None = None
    clip_grad_norm: float | None = None
    clip_grad_value: float | None = None
    nonfinite: Nonfinite = "apply"
    grad_norm: bool = False
    gradients: Callable[[TrainState], bool] | None = None
    finite: bool = True
    rank: int = 0
    elapsed_s: Callable[[], float] | None = None
    batch_size: Callable[[Any], int] = batch_size
    donate: bool = False
    sharding: Sharding | None = None

    def __post_init__(self) -> None:
        refuse_parallel_modules(self.model)
        refuse_parameters(self._held_tensors)
        _ = self.buffers  # before a call changes what the constructor of the model made

    def __call__(
        self, state: TrainState, batches: Sequence[Any], observe: Observer | None = None
    ) -> tuple[TrainState, AfterUpdate]:
        """Return the state after one update on all of `batches`, with the same counters, and the event.

        Args:
            state: Params, buffers and opt_state to start from.
            batches: The micro-batches of the update; those without samples are left out.
            observe: Runs after the backward pass of each micro-batch and returns the state with callbacks' memory.

        Returns:
            The state, and the event without the run and the times, which the loop adds. If no micro-batch has samples,
            or all losses have weight 0, the state is the same and the update is skipped.

        Raises:
            FloatingPointError: If `nonfinite` is `raise` and a loss or gradient is not finite.
            ValueError: If the model writes to its parameters, or the loss is not one real number.
            HiddenParameterError: If the model holds a buffer a second time that differs from the one in the state.
        """
        if not torch.is_grad_enabled():
            with torch.enable_grad():
                return self(state, batches, observe)
        batches, samples = drop_empty(batches, self.batch_size)
        if not batches:
            return state, make_event(FrozenDict(), (), (), self.settings_for(state), skipped=True)
        self.prepare(state)
        times = None if self.elapsed_s is None else PartTimes(self.elapsed_s)
        if len(batches) > 1 or observe is not None:
            state, accumulation, buffers = self.accumulate(state, batches, samples, times, observe)
            gradients = Gradients(accumulation.grads, accumulation.losses, buffers, sum(samples))
            return self.apply(state, gradients, tuple(accumulation.outputs), samples, times)
        if self._plain_update is not None and not state.extra_state:
            tensors = ModelTensors.of(state, self.model, self.optimizer)
            if tensors is not None:
                return self._plain_update(tensors, state, batches[0], samples)
        objectives = self._scale(state, _total)
        result = self._run_backward(state, self.buffers.collect(state), batches[0], objectives, times)
        grads, losses, outputs, buffers = result
        gradients = Gradients(grads[0] if grads else {}, losses, buffers, samples[0])
        return self.apply(state, gradients, (outputs,), samples, times)

    def accumulate(
        self,
        state: TrainState,
        batches: Sequence[Any],
        samples: Sequence[int],
        times: PartTimes | None,
        observe: Observer | None,
        groups: Groups | None = None,
    ) -> tuple[TrainState, Accumulation, Mapping[str, Tensor]]:
        """Return the state with callbacks' memory, the means over the micro-batches, and the new buffers.

        Args:
            state: The state, for which `prepare` was called.
            batches: Micro-batches with samples.
            samples: Samples of each.
            times: Counts the seconds.
            observe: As for a call.
            groups: Groups of losses that get a gradient each; None to find them.
        """
        start = self.buffers.collect(state)
        accumulation, buffers, index, observed = Accumulation(sum(samples), groups), start, 0, 0
        while index < len(batches):
            batch, size = batches[index], samples[index]
            try:
                objectives = self._scale(state, partial(accumulation.objectives, samples=size))
                result = self._run_backward(state, buffers, batch, objectives, times)
            except RegroupError as error:  # computes the gradients again, with the same random numbers
                accumulation, buffers, index = Accumulation(sum(samples), error.groups), start, 0
                self.prepare(state)
                continue
            accumulation.add(result)
            buffers = result.buffers
            if observe is not None and index == observed:
                event = AfterAccumulationStep.of(
                    losses=result.losses,
                    outputs=result.outputs,
                    samples=size,
                    accumulation_step=index,
                    accumulation_steps=len(batches),
                )
                state = observe(state, event)
                observed += 1
            index += 1
            if times is not None:
                times.start()
        return state, accumulation, buffers

    def prepare(self, state: TrainState) -> None:
        """Seed the random numbers of the next update of `state`, set its extra state, and check held buffers.

        Raises:
            HiddenParameterError: If the model holds a buffer a second time that differs from the one in the state.
        """
        seed_all(update_seed(state.seed, state.iteration.update, self.rank), self._generators)
        if state.extra_state:
            set_extra_state(self.model, state.extra_state)
        if self._held_tensors:
            check_buffers(self._held_tensors, self.buffers.collect(state))

    @cached_property
    def _plain_update(self) -> PlainUpdate | None:
        return PlainUpdate(self) if PlainUpdate.is_possible(self) else None

    @cached_property
    def _generators(self) -> list[Any]:
        """Generators that the model and the loss hold, beside the global ones."""
        return generators_of_model(self.model, self.loss)

    @cached_property
    def _held_tensors(self) -> list[HeldTensor]:
        """Second references to parameters and buffers; the parameters among them are refused."""
        return find_held_tensors(self.model, self.loss)

    def find_unused(self, state: TrainState, batch: Any) -> list[str]:
        """Return the names of the trained parameters that have no gradient for a batch."""
        grads = self.compute_result(state, batch).grads
        return [name for name, grad in grads[0].items() if grad is None] if grads else []

    @torch.enable_grad()
    def compute_result(self, state: TrainState, batch: Any) -> BackwardResult:
        """Return the result of one batch, without an update."""
        return self._run_backward(state, self.buffers.collect(state), batch, _total, None)

    def _run_backward(
        self,
        state: TrainState,
        buffers: Mapping[str, Tensor],
        batch: Any,
        objectives: Objectives,
        times: PartTimes | None,
    ) -> BackwardResult:
        """Return gradients of the objectives, losses, outputs and new buffers."""
        model_tensors = ModelTensors.of(state, self.model, self.optimizer)
        if model_tensors is not None:
            model_tensors.bind()
            self.buffers.place(buffers)
            result = self._differentiate(batch, model_tensors.parameters, model_tensors.leaves, objectives, times)
            return BackwardResult(*result, self.buffers.read())
        params = {name: param.detach() for name, param in state.params.items()}
        leaves = {name: params[name].requires_grad_() for name in self.optimizer.trainable(params)}
        names = self._names_in_model
        weights = {names.get(name, name): tensor for name, tensor in params.items()} if names else dict(params)
        with self.buffers.exchange(buffers), reparametrize(self.model, weights, tie_weights=True):
            result = self._differentiate(batch, params, leaves, objectives, times)
            return BackwardResult(*result, self.buffers.read())

    @cached_property
    def buffers(self) -> BufferPlaces:
        """The places of the model's buffers."""
        return BufferPlaces(self.model)

    @cached_property
    def _names_in_model(self) -> dict[str, str]:
        return names_in_model(self.model)

    def _differentiate(
        self,
        batch: Any,
        params: Mapping[str, Tensor],
        leaves: Mapping[str, Tensor],
        objectives: Objectives,
        times: PartTimes | None,
    ) -> tuple[list[Grads], Losses, Any]:
        """Return gradients of the objectives, losses and outputs; `params` are in the model already."""
        losses, outputs = self.run_forward(batch, params)
        terms = objectives(losses)
        if times is not None:
            times.stop("forward_s")
        # torch.func.grad_and_value gives the same bits, but takes longer: see benchmarks/step.py.
        inputs, last = list(leaves.values()), len(terms) - 1
        if terms and True not in [term.requires_grad for term in terms]:
            refuse_constants(losses, self.loss)
        grads = [compute_gradients(term, inputs, keep_graph=index < last) for index, term in enumerate(terms)]
        if times is not None:
            times.stop("backward_s")
        return (
            [dict(zip(leaves, each, strict=True)) for each in grads],
            detach_losses(losses),
            map_tensors(Tensor.detach, outputs),
        )

    def run_forward(self, batch: Any, params: Mapping[str, Tensor]) -> tuple[Losses, Any]:
        """Return losses and outputs of a batch, with their graphs.

        Args:
            batch: The batch.
            params: The parameters, which the model has already.

        Raises:
            ValueError: If the model writes to its parameters.
        """
        counts = write_counts(params.values())
        if self.precision is None:
            result = self._forward(batch)
        else:
            with self.autocast(params):
                result = self._forward(batch)
        if write_counts(params.values()) != counts:
            refuse_writes(params, counts)
        return result

    def _forward(self, batch: Any) -> tuple[Losses, Any]:
        outputs = call_model(self.model, batch)
        return compute_losses(self.loss, outputs, batch), outputs

    def apply(
        self,
        state: TrainState,
        result: Gradients,
        outputs: tuple[Any, ...],
        samples: tuple[int, ...],
        times: PartTimes | None,
    ) -> tuple[TrainState, AfterUpdate]:
        """Apply the gradients unless the update is skipped; return the state and the event.

        Args:
            state: The state before the update.
            result: Gradients, losses, and the buffers after the update, with the samples of all ranks.
            outputs: Outputs of each micro-batch.
            samples: Samples of each.
            times: Counts the seconds.
        """
        if not result.losses:  # all have weight 0
            return state, make_event(result.losses, outputs, samples, self.settings_for(state), skipped=True)
        grads = result.grads if self.loss_scaling is None else self.loss_scaling.unscale(state, result.grads)
        finite, skipped = self._check_finite(result.losses, result.grads)
        if skipped and self.nonfinite == "raise" and not self._may_overflow(state, result.losses):
            raise FloatingPointError(
                f"update {state.iteration.update + 1}: {describe_nonfinite(result.losses, grads)}; nothing was "
                "applied. Lower the learning rate, clip gradients, or skip such updates with trainer.nonfinite: skip"
            )
        is_read = self.gradients is not None and self.gradients(state.advance(samples=result.samples))
        copies = self._copy_gradients(grads) if is_read and not skipped else None
        grads, grad_norm = self.clip(grads, total_norm if self.sharding is None else self.sharding.total_norm)
        settings = self.settings_for(state)
        if not skipped:
            fields = self.buffers.split(result.buffers)
            how: dict[str, Any] = {"optimizer": self.optimizer, "donate": self.donate}
            if self.sharding is None:
                state = apply_gradients(state, grads, settings.by_group, fields, model=self.model, **how)
            else:
                state = apply_to_shards(state, grads, settings.by_group, fields, sharding=self.sharding, **how)
            if state.extra_state:
                state = state.replace(extra_state=read_extra_state(self.model))
        if self.loss_scaling is not None:
            state = self.loss_scaling.advance(state, finite=not skipped or bool(self._all_finite(result.grads)))
        seconds = {} if times is None else times.stop("optimizer_s")
        readings = {"grad_norm": grad_norm, "gradients": copies, "finite": finite, "skipped": skipped, **seconds}
        return state, make_event(result.losses, outputs, samples, settings, **readings)

    def _copy_gradients(self, grads: Grads) -> FrozenDict:
        """Return the gradients as the event has them; those of shards as DTensors."""
        copies = copy_gradients(grads)
        return FrozenDict(
            copies if self.sharding is None else {name: self.sharding.wrap(name, each) for name, each in copies.items()}
        )

    def _all_finite(self, grads: Grads) -> Tensor | bool:
        return all_finite(grads) if self.sharding is None else self.sharding.all_finite(grads)

    def settings_for(self, state: TrainState) -> UpdateSettings:
        """Return the scheduled settings of the optimizer for the next update of `state`."""
        return self._settings(state.iteration.update, state.hyperparams["lr_scale"])

    @cached_property
    def _settings(self) -> SettingsSchedule:
        return SettingsSchedule(self.lr, self.weight_decay)

    def _check_finite(self, losses: Losses, grads: Grads) -> tuple[Tensor | bool | None, bool]:
        """Return whether losses and checked gradients are finite, None if unknown; and whether to skip the update."""
        if not self.finite and not self.checks_gradients:
            return None, False
        total = losses["total"]
        finite = total - total == 0  # `isfinite` takes four times as long
        if not self.checks_gradients:
            return finite, False
        gradients = self._all_finite(grads)
        both = bool(finite & gradients)
        return both, not both if self.nonfinite != "apply" else not bool(gradients)

    @property
    def checks_gradients(self) -> bool:
        """Whether an update whose gradients are not finite is left out, which is decided in the middle of it."""
        return self.nonfinite != "apply" or self.loss_scaling is not None

    def _may_overflow(self, state: TrainState, losses: Losses) -> bool:
        """Return whether gradients that are not finite may be an overflow, which a lower scale avoids."""
        scaling = self.loss_scaling
        return scaling is not None and scaling.scale(state) > 1 and bool(losses["total"].isfinite())

    def _scale(self, state: TrainState, objectives: Objectives) -> Objectives:
        return objectives if self.loss_scaling is None else self.loss_scaling.scale_objectives(state, objectives)

    def clip(
        self, grads: Grads, norm_of: Callable[[Mapping[str, Tensor | None]], Tensor] = total_norm
    ) -> tuple[Grads, Tensor | None]:
        """Return clipped gradients and their norm before clipping, None where nothing measures it.

        Args:
            grads: Gradients by name; they are not written to.
            norm_of: Measures the 2-norm.
        """
        norm = norm_of(grads) if self.grad_norm else None
        if self.clip_grad_value is not None:
            grads = clip_values(grads, self.clip_grad_value)
        if self.clip_grad_norm is None:
            return grads, norm
        current_norm = norm if norm is not None and self.clip_grad_value is None else norm_of(grads)
        return clip_norm(grads, current_norm, self.clip_grad_norm), current_norm if norm is None else norm

    def autocast(self, params: Mapping[str, Tensor]) -> AbstractContextManager[Any]:
        """Return the context of forward pass and loss."""
        if self.precision is None:
            return nullcontext()
        device = next(iter(params.values())).device.type
        return torch.autocast(device, dtype=self.precision)


def _total(losses: Losses) -> Sequence[Tensor]:
    """Return the objectives of an update with one micro-batch."""
    return [losses["total"]] if losses else []
