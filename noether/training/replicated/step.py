"""One optimizer update of several ranks that hold the same model, each on its share of the samples."""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple, final

import torch

from noether.core.event import AfterAccumulationStep
from noether.core.tensors.live.extra_state import modules_with_extra_state
from noether.core.tensors.losses import with_total
from noether.core.tensors.tree import FrozenDict
from noether.distributed.gradients import GradientReduction, start_all_reduce
from noether.distributed.sharded_sums import ShardedReduction
from noether.training.data.interruptible import DataInterrupt
from noether.training.replicated.agreement import CAUSE, RankStateError
from noether.training.replicated.buffers import NormBuffers, OtherBuffers, any_change, find_changes
from noether.training.replicated.losses import GatheredLosses, LossNames, RankLosses, digest_of
from noether.training.replicated.tail import MAX_LOSSES, RankNumbers, Tail
from noether.training.step import kernels
from noether.training.step.accumulation import Gradients, drop_empty
from noether.training.step.part_times import PartTimes
from noether.training.step.sharded import gather_state, place_state

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from noether.core.event import AfterUpdate
    from noether.core.state import TrainState
    from noether.distributed.gradients import Work
    from noether.distributed.ranks import Ranks
    from noether.training.replicated.tail import AllNumbers
    from noether.training.step.accumulation import Accumulation, Grads, Groups, Losses
    from noether.training.step.step import Observer, Step


_LOGGER: Final = logging.getLogger(__name__)


class RankReport(NamedTuple):
    """What the loop of a rank sends to all ranks together with the gradients of an update.

    Args:
        is_interrupted: Whether the rank got a signal, or its time is over.
        is_abandoned: Whether it has no data for the update, because it is interrupted.
        is_stopping: Whether it makes no update, because a callback stopped the run.
        times: Seconds of `AfterUpdate` by field; those of rank 0 count.
    """

    is_interrupted: bool = False
    is_abandoned: bool = False
    is_stopping: bool = False
    times: Mapping[str, float | None] = FrozenDict()


class _Local(NamedTuple):
    """What this rank computed: means over its micro-batches, its buffers, and the micro-batches."""

    accumulation: Accumulation
    buffers: Mapping[str, Tensor]
    steps: list[AfterAccumulationStep]
    samples: tuple[int, ...]


class _Layout(NamedTuple):
    """Where gradients, other numbers and statistics of batch norms are in the buckets; the same for all updates."""

    reduction: GradientReduction | ShardedReduction
    tail: Tail
    norms: NormBuffers


class _Update(NamedTuple):
    """What an update starts from: the state, the micro-batches and the report of this rank, and all buffers."""

    state: TrainState
    batches: Sequence[Any]
    buffers: Mapping[str, Tensor]
    report: RankReport
    layout: _Layout


class _Sum(NamedTuple):
    """Gradients and losses of all ranks."""

    grads: Grads
    losses: Mapping[str, Tensor]
    numbers: AllNumbers


@final
class ReplicatedStep:
    """Makes an update of several ranks, each of which has its share of the samples and the same state.

    The gradients of all ranks are added in flat buckets, weighted by samples or by the weights of the losses, so the
    update is that of one process with all samples, up to rounding. A rank without samples takes part. The state and the
    event have the same values on all ranks, except for `outputs` and `accumulated` of the event, which are those of
    this rank.

    Statistics of batch norms are averaged over ranks, weighted by samples. An exchange of its own is needed only for
    losses with different weights, for other buffers that forward changes, and for extra state of modules.

    Args:
        eager: The step of one process; its `rank` is that of this process.
        ranks: The ranks.
        start: Begins to sum a tensor over all ranks, in place; `dist.all_reduce` by default.
    """

    def __init__(self, eager: Step, ranks: Ranks, start: Callable[[Tensor], Work] | None = None) -> None:
        self.eager, self.model = eager, eager.model
        self.is_interrupted = False
        """Whether a rank was interrupted, as all ranks know since the last update."""
        self._ranks = ranks
        self._start = start or start_all_reduce(ranks.training)
        self._layout_of_model: _Layout | None = None
        self._others = OtherBuffers(ranks.control.gather, warns=ranks.is_first)
        self._known = LossNames()
        self._groups: Groups | None = None  # of the last update whose losses were gathered
        self._gathers_first = False
        self._optimizer_s = 0.0
        self._has_extra_state = next(modules_with_extra_state(self.model), None) is not None
        self._has_warned_of_extra_state = False

    def __call__(
        self,
        state: TrainState,
        batches: Sequence[Any],
        observe: Observer | None = None,
        report: Callable[[], RankReport] = RankReport,
    ) -> tuple[TrainState, AfterUpdate]:
        """Return the state after one update of all ranks, and the event.

        Args:
            state: The same on all ranks.
            batches: The micro-batches of this rank; there may be none.
            observe: Called for each micro-batch of each rank, in their order, after the backward passes; the event has
                no outputs. Given on all ranks or on none.
            report: Called right before the reduction.

        Raises:
            DataInterrupt: If a rank abandons the update, or a callback stopped the run on all ranks.
            FloatingPointError: As for `Step`, on all ranks.
            RankStateError: If a callback stopped the run on some of the ranks, on all.
            ValueError: As for `Step`.
        """
        if not torch.is_grad_enabled():
            with torch.enable_grad():
                return self(state, batches, observe, report)
        eager = self.eager
        batches, samples = drop_empty(batches, eager.batch_size)
        times = None if eager.elapsed_s is None else PartTimes(eager.elapsed_s)
        if eager.sharding is not None:
            state = place_state(state, eager.sharding)
        whole = state if eager.sharding is None else gather_state(state, eager.sharding)
        local = self._run(whole, batches, samples, times, self._groups)
        if observe is not None:
            state = self._observe_all(state, local, observe)
        own = report()
        if times is not None:
            own = own._replace(times={**own.times, **times.seconds, "optimizer_s": self._optimizer_s})
        before = eager.buffers.collect(state)
        update = _Update(whole, batches, before, own, self._layout(state.params, before))
        total = self._sum_over_ranks(update, local)
        self.is_interrupted = total.numbers.is_interrupted
        if times is not None:
            times.start()
        buffers = self._combine_buffers(update, local, total.numbers)
        result = Gradients(total.grads, total.losses, buffers, total.numbers.samples)
        state, event = eager.apply(state, result, tuple(local.accumulation.outputs), samples, times)
        if times is not None:
            self._optimizer_s = times.seconds.get("optimizer_s", 0.0)
        times_of_rank_0 = {name: total.numbers.times[name] for name in own.times}
        return self._combine_extra_state(state, sum(samples)), event.complete(
            samples=total.numbers.samples, **times_of_rank_0
        )

    def _run(
        self,
        state: TrainState,
        batches: Sequence[Any],
        samples: tuple[int, ...],
        times: PartTimes | None,
        groups: Groups | None,
    ) -> _Local:
        """Run the micro-batches of this rank forward and backward, with a gradient for each group of losses."""
        steps: list[AfterAccumulationStep] = []

        def collect(state: TrainState, event: AfterAccumulationStep) -> TrainState:
            steps.append(event)
            return state

        self.eager.prepare(state)
        _, accumulation, buffers = self.eager.accumulate(state, batches, samples, times, collect, groups)
        return _Local(accumulation, buffers, steps, samples)

    def _observe_all(self, state: TrainState, local: _Local, observe: Observer) -> TrainState:
        """Return the state after callbacks have seen the micro-batches of all ranks."""
        own = tuple((step.samples, step.losses, getattr(step.losses, "weights", {})) for step in local.steps)
        steps = [step for steps in self._ranks.control.gather("micro-batches", own) for step in steps]
        for index, (samples, losses, weights) in enumerate(steps):
            known = {name: loss for name, loss in losses.items() if name != "total" or len(losses) == 1}
            event = AfterAccumulationStep.of(
                losses=with_total(known, weights),
                samples=samples,
                accumulation_step=index,
                accumulation_steps=len(steps),
            )
            state = observe(state, event)
        return state

    def _sum_over_ranks(self, update: _Update, local: _Local) -> _Sum:
        """Return gradients and losses of all ranks.

        One reduction is enough if all losses of a rank have the same weights, and all ranks the same losses. Otherwise
        the ranks gather weights and means of their losses, and sum the gradients again if these need other factors.
        The bits do not depend on whether the first reduction was tried.
        """
        losses = RankLosses.of(local.steps, local.accumulation.losses)
        numbers = None
        if not self._gathers_first:
            numbers = self._reduce(update, local, losses)
            if not (numbers.needs_exchange or numbers.weight):  # no rank has losses
                return _Sum({}, FrozenDict(), numbers)
            if not (numbers.needs_exchange or numbers.is_unknown) and numbers.have_same_losses:
                self._known = losses.known if losses.known.names else self._known
                return _Sum(self._divide(update, numbers, numbers.weight), _read_losses(numbers, self._known), numbers)
        gathered = GatheredLosses.of(self._ranks.control.gather("losses", losses.pack()))
        groups = gathered.groups if len(gathered.groups) > 1 else None
        if groups != self._groups and update.batches:
            local = self._run(update.state, update.batches, local.samples, None, groups)
        self._known = gathered.known if gathered.known.names else self._known
        self._groups = groups
        self._gathers_first = groups is not None or len(gathered.known.names) > MAX_LOSSES
        if groups is not None:
            numbers = self._reduce(update, local, losses, gathered.shares(self._ranks.rank))
            means = gathered.to(numbers.losses.device)
            return _Sum(self._divide(update, numbers, 1), with_total(means, gathered.total_weights), numbers)
        numbers = numbers or self._reduce(update, local, losses)
        all_means = gathered.to(numbers.losses.device) if self._gathers_first else None
        return _Sum(
            self._divide(update, numbers, numbers.weight), _read_losses(numbers, gathered.known, all_means), numbers
        )

    def _reduce(
        self,
        update: _Update,
        local: _Local,
        losses: RankLosses,
        shares: Mapping[tuple[str, ...], float] | None = None,
    ) -> AllNumbers:
        """Sum what the ranks computed.

        Args:
            update: The update.
            local: What this rank computed.
            losses: Its losses.
            shares: Share of this rank in the mean of each group of losses, if there are several groups.

        Raises:
            DataInterrupt: If a rank abandons the update, or all ranks stop.
            RankStateError: If some of the ranks stop.
        """
        if shares is not None:
            grads, weight = local.accumulation.weighted_grads(shares), 1.0
        else:
            grads, weight = local.accumulation.grads, losses.weight if losses.have_one_weight else 0.0
        known = losses.known if losses.known.names else self._known
        reduction, tail, norms = update.layout
        own = RankNumbers(
            present=[weight > 0 and grads.get(name) is not None for name in reduction.names],
            digest=digest_of(known) if known.names else None,
            samples=sum(local.samples),
            weight=weight,
            needs_exchange=not losses.have_one_weight or len(losses.known.names) > MAX_LOSSES,
            is_interrupted=update.report.is_interrupted,
            is_abandoned=update.report.is_abandoned,
            is_stopping=update.report.is_stopping,
            times=update.report.times,
            losses=[losses.means[name] for name in sorted(losses.means)],
            changed=any_change(find_changes(update.buffers, local.buffers, norms.names)),
            counters=norms.read_counters(local.buffers),
            statistics=norms.changes(update.buffers, local.buffers, sum(local.samples)),
        )
        with self._ranks.failures.explain("sum of the gradients"):
            numbers = tail.read(reduction.sum_over_ranks(grads, weight, lambda place: tail.write(place, own)))
        if numbers.stopping:
            self._check_stop(update.state, numbers.stopping)
        if numbers.is_abandoned or numbers.stopping:
            raise DataInterrupt
        return numbers

    def _check_stop(self, state: TrainState, stopping: int) -> None:
        """Refuse that some ranks stop the run and others do not.

        Raises:
            RankStateError: On all ranks.
        """
        if stopping == self._ranks.world_size:
            return
        reasons = self._ranks.control.gather("stop", state.stop)
        rank, reason = next((rank, reason) for rank, reason in enumerate(reasons) if reason is not None)
        raise RankStateError(
            f"at {state.iteration}, rank {rank} stops the run ({reason!r}), and rank {reasons.index(None)} does not. "
            f"{CAUSE}"
        )

    def _layout(self, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> _Layout:
        """Return the layout of the buckets, which all ranks make alike at the first update."""
        if self._layout_of_model is None:
            trained = {name: params[name] for name in self.eager.optimizer.trainable(params)}
            norms = NormBuffers(self.model, buffers)
            sizes = {"trained": len(trained), "counters": norms.counters, "statistics": norms.size}
            tail = Tail(self._ranks.rank, self._ranks.world_size, **sizes)
            make = GradientReduction if (by := self.eager.sharding) is None else partial(ShardedReduction, by)
            reduction = make(trained, tail.size, self._start, is_double=norms.is_double)
            self._layout_of_model = _Layout(reduction, tail, norms)
        return self._layout_of_model

    def _divide(self, update: _Update, numbers: AllNumbers, by: float) -> Grads:
        """Return the gradients of all ranks, None for parameters that no rank uses."""
        reduction = update.layout.reduction
        present = {name for name, is_present in zip(reduction.names, numbers.present, strict=True) if is_present}
        grads = reduction.divide(present, by=by)
        if kernels.has_kernel(self.eager.optimizer.optimizer):
            return grads
        # The class may keep a gradient, and the next reduction overwrites the buckets.
        return {name: None if grad is None else grad.clone() for name, grad in grads.items()}

    def _combine_buffers(self, update: _Update, local: _Local, numbers: AllNumbers) -> Mapping[str, Tensor]:
        """Return the buffers that all ranks have after the update."""
        if not numbers.samples:
            return update.buffers
        norms = update.layout.norms
        combined = norms.combine(update.buffers, numbers.statistics, numbers.counters, numbers.samples)
        if numbers.is_changed:
            changes = find_changes(update.buffers, local.buffers, norms.names)
            combined |= self._others.combine(update.buffers, local.buffers, changes, sum(local.samples))
        return FrozenDict({**local.buffers, **combined})

    def _combine_extra_state(self, state: TrainState, samples: int) -> TrainState:
        """Return the state with extra state of modules that all ranks have: that of the last rank with samples."""
        if not self._has_extra_state:
            return state
        if self._ranks.is_first and not self._has_warned_of_extra_state:
            _LOGGER.warning(
                "extra state of %s: ranks may change it differently, so all continue with that of the last rank that "
                "has samples; each update gathers it",
                ", ".join(path or "the model" for path in state.extra_state),
            )
        self._has_warned_of_extra_state = True
        own = {"samples": samples, "values": state.extra_state}
        ranks = [each for each in self._ranks.control.gather("extra state of modules", own) if each["samples"]]
        return state.replace(extra_state=ranks[-1]["values"]) if ranks else state


def _read_losses(numbers: AllNumbers, known: LossNames, means: Mapping[str, Tensor] | None = None) -> Losses:
    """Return the mean losses of all ranks, which have one weight, with their total.

    Args:
        numbers: What was summed with the gradients.
        known: Names of the losses.
        means: The losses, if there are too many to be summed with the gradients.
    """
    if not numbers.weight:
        return FrozenDict()
    if means is None:
        sums = dict(zip(sorted(known.names), numbers.losses.unbind(), strict=False))
        dtypes = zip(known.names, known.dtypes, strict=True)
        means = {name: (sums[name] / numbers.weight).to(getattr(torch, dtype)) for name, dtype in dtypes}
    return with_total(means, dict.fromkeys(sorted(known.weighted), numbers.weight))
