"""One optimizer update of a module that the user prepared for several ranks, by DDP or `fully_shard`."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from noether.core.event import AfterAccumulationStep, AfterUpdate
from noether.core.tensors.batch import batch_size
from noether.core.tensors.calls import call_model, compute_losses
from noether.core.tensors.containers import map_tensors
from noether.core.tensors.dtensors import total_norm
from noether.core.tensors.fully_sharded import is_fully_sharded
from noether.core.tensors.gradients import copy_gradients
from noether.core.tensors.losses import detach_losses, loss_weights, name_of
from noether.core.tensors.module import device_of, named_parameters
from noether.core.tensors.tree import FrozenDict
from noether.distributed.ranks import ONE_PROCESS, Ranks
from noether.session.hidden_state import generators_of_model
from noether.session.live_state import LiveState
from noether.session.optimizer_watch import name_groups
from noether.session.optimizers import TorchOptimizer
from noether.session.randomness import seed_all, update_seed
from noether.training.step.accumulation import drop_empty

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from contextlib import AbstractContextManager

    from torch.optim import Optimizer

    from noether.core.state import TrainState
    from noether.core.tensors.losses import Losses, LossResult
    from noether.training.value_schedules import ValueSchedule

    Observer = Callable[[TrainState, AfterAccumulationStep], TrainState]


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class PreparedStep:
    """One update of a live module that is wrapped in DDP or that `fully_shard` was called on.

    The module reduces its gradients in `backward()`; `Step` cannot train it, because `torch.autograd.grad` does not
    reduce them. The state that a call returns views the module and the optimizer, so it shows what they have whenever
    it is read: keep a copy with `noether.lease(state)`. The next call writes a state that callbacks changed, or a
    loaded one, into them.

    Each rank passes the micro-batches of its own samples. Gradients and losses are means over the samples of all ranks,
    also if the ranks have different numbers of samples.

    Args:
        model: The module; it is in training mode.
        loss: `(outputs, batch) -> {name: mean over samples}` or one loss.
        optimizer: Its optimizer.
        ranks: The ranks over which the module reduces its gradients.
        lr: Learning rate by parameter group, as a function of the number of completed updates; empty to leave the
            rates that the optimizer has. A group without a name has its index as its name, a single one `default`.
        precision: Autocast dtype of forward pass and loss, or None.
        clip_grad_norm: Largest 2-norm of all gradients together, or None.
        grad_norm: Whether to measure the 2-norm of the gradients even if `clip_grad_norm` is None.
        gradients: Whether the event has a copy of the gradients.
        batch_size: `batch -> number of samples`.

    Raises:
        SessionError: If the optimizer holds a parameter that the model does not have.

    Example:
        >>> from noether import TrainState
        >>> model = nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> mse = lambda outputs, batch: {"mse": (outputs - batch[1]).square().mean()}
        >>> step = PreparedStep(model=model, loss=mse, optimizer=optimizer)
        >>> state, event = step(TrainState.from_module(model, optimizer), [(torch.ones(4, 2), torch.ones(4, 1))])
        >>> event.samples, sorted(event.losses), dict(event.lr)
        (4, ['mse', 'total'], {'default': 0.1})
    """

    model: nn.Module
    loss: Callable[[Any, Any], LossResult]
    optimizer: Optimizer
    ranks: Ranks = ONE_PROCESS
    lr: Mapping[str, ValueSchedule] = field(default_factory=dict)
    precision: torch.dtype | None = None
    clip_grad_norm: float | None = None
    grad_norm: bool = False
    gradients: bool = False
    batch_size: Callable[[Any], int] = batch_size

    def __post_init__(self) -> None:
        names = name_groups(self.optimizer.param_groups)
        if self.lr and self.lr.keys() != set(names):
            raise ValueError(f"lr has the groups {sorted(self.lr)}, and the optimizer has {sorted(names)}")
        self._watched.watch()

    def __call__(
        self, state: TrainState, batches: Sequence[Any], observe: Observer | None = None
    ) -> tuple[TrainState, AfterUpdate]:
        """Return the state after one update on the `batches` of all ranks, with the same counters, and the event.

        Args:
            state: The state to start from; what it has in place of views is written into module and optimizer.
            batches: The micro-batches of this rank; those without samples are left out.
            observe: Runs after the backward pass of each micro-batch and returns the state with callbacks' memory.

        Returns:
            The state, and the event without the run and the times, which the loop adds. Its samples and losses are
            those of all ranks; `outputs` and `accumulated` are those of this rank.

        Raises:
            ValueError: If a rank has no samples, the ranks have different numbers of micro-batches and the module
                gathers its parameters in each forward pass, or a loss has a separate weight.
        """
        batches, samples = drop_empty(batches, self.batch_size)
        total = self._agree_on_samples(samples)
        before = self._live.view(state)
        self._live.write_changes(before, state)
        state = before
        seed_all(update_seed(state.seed, state.iteration.update, self.ranks.rank), self._generators)
        self.optimizer.zero_grad()
        self._live.copy_buffers()
        try:
            state, losses, outputs = self._run_backward(state, batches, samples, total, observe)
        except BaseException:  # the state that the caller has views the module
            self._live.write_changes(before, self._live.view_before_update(before))
            raise
        copies = self._copy_gradients() if self.gradients else None
        norm = self._clip()
        for name, group in zip(name_groups(self.optimizer.param_groups), self.optimizer.param_groups, strict=True):
            if self.lr:
                group["lr"] = self.lr[name](state.iteration.update)
        self.optimizer.step()
        rates = self._watched.readings
        self._watched.end_update()
        event = AfterUpdate.of(
            samples=total,
            losses=self._reduce(losses, sum(samples)),
            outputs=tuple(outputs),
            accumulated=tuple(samples),
            grad_norm=norm,
            gradients=copies,
            **rates,
        )
        return state, event

    def _agree_on_samples(self, samples: Sequence[int]) -> int:
        """Return the samples of all ranks; refuse shares with which the ranks would not make the same collectives."""
        counts = {"micro-batches": len(samples)}
        reduced = self.ranks.control.reduce(
            "samples of an update",
            sums={"samples": sum(samples)},
            largest=counts,
            smallest={**{f"fewest {name}": count for name, count in counts.items()}, "fewest samples": sum(samples)},
        )
        if not reduced["fewest samples"]:
            raise ValueError(
                "a rank has no samples in this update, and a module that reduces its gradients in backward() needs "
                "some on each rank: leave out the last update of an epoch (drop_last), or take more samples per update"
            )
        if self._fully_sharded and reduced["micro-batches"] != reduced["fewest micro-batches"]:
            raise ValueError(
                "ranks have different numbers of micro-batches in this update, and a module of fully_shard gathers its "
                "parameters in each of them: cut the samples of each rank into equally many"
            )
        return int(reduced["samples"])

    def _run_backward(
        self,
        state: TrainState,
        batches: Sequence[Any],
        samples: Sequence[int],
        total: int,
        observe: Observer | None,
    ) -> tuple[TrainState, dict[str, float], list[Any]]:
        """Write the gradients of the mean over all ranks; return the state, the losses of this rank, and outputs."""
        means: dict[str, float] = {}
        outputs: list[Any] = []
        for index, (batch, size) in enumerate(zip(batches, samples, strict=True)):
            with self._reduce_gradients(is_last=index == len(batches) - 1):
                losses, output = self._forward(batch)
                # The module takes the mean over ranks, each of which counts with its samples.
                torch.autograd.backward(losses["total"] * (self.ranks.world_size * size / total))
            losses, output = detach_losses(losses), map_tensors(Tensor.detach, output)
            if index and losses.keys() != means.keys():
                raise ValueError(f"micro-batches of one update have other losses: {sorted(means)}, {sorted(losses)}")
            share = size / sum(samples)
            means = {name: means.get(name, 0.0) + share * float(value) for name, value in losses.items()}
            outputs.append(output)
            if observe is not None:
                facts = {"accumulation_step": index, "accumulation_steps": len(batches), "samples": size}
                state = observe(state, AfterAccumulationStep.of(losses=losses, outputs=output, **facts))
        return state, means, outputs

    def _forward(self, batch: Any) -> tuple[Losses, Any]:
        with self._autocast():
            outputs = call_model(self.model, batch)
            losses = compute_losses(self.loss, outputs, batch)
        if loss_weights(losses):
            raise ValueError(
                f"{name_of(self.loss)} gives losses separate weights (noether.Mean), and a module that reduces its "
                "gradients in backward() averages them by samples: return plain means, or train without DDP and "
                "fully_shard"
            )
        return losses, outputs

    def _reduce(self, losses: Mapping[str, float], samples: int) -> FrozenDict:
        """Return the means over all ranks."""
        means = {name: (value, float(samples)) for name, value in losses.items()}
        reduced = self.ranks.control.reduce("losses of an update", means=means)
        return FrozenDict({name: torch.tensor(reduced[name]) for name in losses})

    def _copy_gradients(self) -> FrozenDict:
        parameters = named_parameters(self.model)
        return FrozenDict(copy_gradients({name: parameter.grad for name, parameter in parameters.items()}))

    def _clip(self) -> Tensor | None:
        if self.clip_grad_norm is None and not self.grad_norm:
            return None
        parameters = [each for each in self.model.parameters() if each.grad is not None]
        norm = total_norm([each.grad for each in parameters if each.grad is not None])
        if self.clip_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.clip_grad_norm, norm)
        return norm

    def _reduce_gradients(self, *, is_last: bool) -> AbstractContextManager[Any]:
        """Return the context of a forward and backward pass: only that of the last micro-batch reduces gradients."""
        if isinstance(self.model, DistributedDataParallel):
            return nullcontext() if is_last else self.model.no_sync()
        for module in self._fully_sharded:
            module.set_requires_gradient_sync(is_last)
        return nullcontext()

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.precision is None:
            return nullcontext()
        return torch.autocast(device_of(self.model.parameters()).type, dtype=self.precision)

    @cached_property
    def _fully_sharded(self) -> list[Any]:
        """The modules of `fully_shard`, which gather their parameters in each forward pass."""
        return [module for module in self.model.modules() if is_fully_sharded(module)]

    @cached_property
    def _watched(self) -> TorchOptimizer:
        return TorchOptimizer(self.model, self.optimizer)

    @cached_property
    def _live(self) -> LiveState:
        return LiveState(self.model, self._watched)

    @cached_property
    def _generators(self) -> list[Any]:
        return generators_of_model(self.model, self.loss)
