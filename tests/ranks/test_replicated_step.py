"""What an update of several ranks does beside adding gradients. The ranks are threads, so models draw no numbers."""

import logging
import math
import re

import pytest
import torch
from rank_threads import run_in_threads
from test_rank_gradients import make_step
from torch import nn

from noether import Mean
from noether.core.event import AfterAccumulationStep
from noether.core.tensors.tree import clone_tensors
from noether.session.timing import Clock
from noether.training.data.interruptible import DataInterrupt
from noether.training.replicated.loop import ReplicatedUpdates
from noether.training.replicated.step import RankReport, ReplicatedStep
from noether.training.step.loss_scaling import LossScaling
from noether.training.step.parallel_modules import ParallelModuleError, refuse_cpu_sync_norms

SGD, ADAMW = torch.optim.SGD, torch.optim.AdamW


class Line(nn.Linear):
    def __init__(self):
        super().__init__(2, 1)


def square(outputs, batch):
    return {"square": outputs.square().mean()}


def run_on(world_size, work, **settings):
    """Return `work(step, state, thread)` of each rank, for steps of one model."""
    settings = {"model": Line, "loss": square} | settings
    # Not in the threads, which share the random generator.
    made = [make_step(**settings) for _ in range(world_size)]

    def run(thread):
        step, state = made[thread.ranks.rank]
        return work(ReplicatedStep(step, thread.ranks, thread.start), state, thread)

    return run_in_threads(run, world_size)


def batch_of(*rows):
    return torch.tensor(rows, dtype=torch.float32)


def update(step, state, *batches, **keywords):
    state, event = step(state, list(batches), **keywords)
    return state.advance(samples=event.samples), event


# Collectives


def test_an_idle_update_takes_one_reduction_and_no_exchange():
    def work(step, state, thread):
        counts = []
        for _ in range(4):
            state, _ = update(step, state, batch_of([1.0, 2.0]))
            counts.append((thread.reductions, len(thread.gathered)))
        return counts

    assert run_on(2, work, loss=weighted) == [[(1, 0), (2, 0), (3, 0), (4, 0)]] * 2


def weighted(outputs, batch):
    """Return one loss with a weight, as that of a language model, which needs no exchange."""
    return {"ce": Mean(outputs.square().mean(), weight=batch.abs().sum())}


def two_weights(outputs, batch):
    return {"mean": outputs.square().mean(), "ce": Mean(outputs.square().mean(), weight=float(batch.abs().sum()))}


def test_losses_of_two_weights_take_one_exchange_and_one_reduction():
    def work(step, state, thread):
        counts = []
        for _ in range(3):
            state, event = update(step, state, batch_of([1.0, thread.ranks.rank]))
            counts.append((thread.reductions, len(thread.gathered)))
        return counts, dict(event.loss_weights)

    # The first update tries without an exchange.
    assert run_on(2, work, loss=two_weights) == [([(2, 1), (3, 2), (4, 3)], {"mean": 2, "ce": 3})] * 2


def many_losses(outputs, batch):
    return {f"loss_{index}": (outputs * index).square().mean() for index in range(20)}


@pytest.mark.parametrize("loss", [two_weights, many_losses, weighted])
def test_bits_do_not_depend_on_whether_a_reduction_was_tried_first(loss):
    data = [[batch_of([1.0, rank + update / 3], [0.5, 0.1 * update]) for rank in range(3)] for update in range(4)]
    data[3] = data[3][:1]  # two ranks have no samples

    def work(step, state, thread):
        whole = []
        for number, batches in enumerate(data):
            share = batches[thread.ranks.rank : thread.ranks.rank + 1]
            restarted = ReplicatedStep(step.eager, thread.ranks, thread.start)
            again, other = update(restarted, state, *share)  # a process that knows of no update before
            state, event = update(step, state, *share)
            for name, param in state.params.items():
                assert torch.equal(param, again.params[name])
            assert {n: float(v) for n, v in event.losses.items()} == {n: float(v) for n, v in other.losses.items()}
            assert [str(loss.dtype) for loss in event.losses.values()] == ["torch.float32"] * len(event.losses)
            whole.append((number, event.samples, event.loss_weights))
        return whole

    results = run_on(3, work, loss=loss)
    assert results[0] == results[1] == results[2]


# Decisions that all ranks make alike


def steep_on_last(outputs, batch):
    """Return a loss whose gradient is not finite for a batch that begins with a negative number."""
    return {"root": (outputs - outputs.detach() + batch[0, 0].clamp(min=0)).sqrt().mean()}


def test_an_overflow_on_one_rank_is_skipped_on_all():
    def work(step, state, thread):
        before = clone_tensors(dict(state.params))
        scales = []
        for first in (-1.0, 1.0):
            batch = batch_of([first if thread.ranks.rank else 1.0, 1.0])
            state, event = update(step, state, batch)
            scales.append((event.skipped, step.eager.loss_scaling.scale(state)))
            if first < 0:
                assert all(torch.equal(param, before[name]) for name, param in state.params.items())
        return scales

    scaling = LossScaling(init_scale=8.0)
    assert run_on(2, work, loss=steep_on_last, loss_scaling=scaling) == [[(True, 4.0), (False, 4.0)]] * 2


def test_a_nonfinite_gradient_of_one_rank_raises_the_same_error_on_all():
    def work(step, state, thread):
        with pytest.raises(FloatingPointError) as caught:
            update(step, state, batch_of([-1.0 if thread.ranks.rank else 1.0, 1.0]))
        return str(caught.value)

    first, second = run_on(2, work, loss=steep_on_last, nonfinite="raise")
    assert first == second
    assert "the gradient of 'weight' is not finite" in first


def test_the_gradient_is_clipped_and_measured_after_the_sum():
    def work(step, state, thread):
        state, event = update(step, state, batch_of([100.0 * (1 - 2 * thread.ranks.rank), 0.0]))
        return float(event.grad_norm), clone_tensors(dict(state.params))

    def bare(outputs, batch):
        return {"mean": outputs.mean()}

    for norm, params in run_on(2, work, loss=bare, clip_grad_norm=2.0):
        assert norm == pytest.approx(1.0)  # the gradients of the weight cancel each other
        torch.testing.assert_close(params["bias"], make_step(model=Line)[1].params["bias"] - 0.1)


def at_all_samples(state):
    return state.iteration.sample % 3 == 0


def test_the_gradients_of_an_event_are_those_of_all_samples_and_stay_as_they_are():
    rows = [[[1.0, 2.0], [0.5, -1.0]], [[3.0, 0.25]], []]  # the last rank has no samples

    def work(step, state, thread):
        batches = [batch_of(*rows[thread.ranks.rank])] if rows[thread.ranks.rank] else []
        state, event = update(step, state, *batches)
        before = clone_tensors(dict(event.gradients))
        update(step, state, *batches)
        return dict(event.gradients), before

    results = run_on(3, work, optimizer=ADAMW, gradients=at_all_samples, clip_grad_norm=0.1)
    alone, state = make_step(model=Line, loss=square, optimizer=ADAMW, gradients=at_all_samples)
    expected = alone(state, [batch_of(*rows[0], *rows[1])])[1].gradients
    for gradients, before in results:
        assert gradients.keys() == expected.keys() == {"weight", "bias"}
        for name, grad in gradients.items():
            torch.testing.assert_close(grad, expected[name])
            assert torch.equal(grad, before[name])
            assert torch.equal(grad, results[0][0][name])


def test_an_abandoned_update_is_left_by_all_ranks_before_it_is_applied():
    def work(step, state, thread):
        state, _ = update(step, state, batch_of([1.0, 2.0]))
        kept = clone_tensors(dict(state.params))
        is_last = thread.ranks.rank == thread.ranks.world_size - 1
        batches = [] if is_last else [batch_of([1.0, 2.0])]
        with pytest.raises(DataInterrupt):
            update(step, state, *batches, report=lambda: RankReport(is_abandoned=is_last))
        assert all(torch.equal(param, kept[name]) for name, param in state.params.items())
        return thread.reductions

    assert run_on(3, work, donate=True) == [2] * 3


def test_a_rank_that_is_interrupted_while_it_waits_for_data_leaves_with_all_others():
    def work(step, state, thread):
        updates = ReplicatedUpdates(step, Clock(lambda: 5.0, lambda: 1.0), lambda: False)

        def next_batches(state):
            if state.iteration.update == 2 and thread.ranks.rank == 1:
                raise DataInterrupt
            return state, [batch_of([1.0, 2.0])]

        for _ in range(2):
            state, event = updates.make(state, next_batches, None)
            state = state.advance(samples=event.samples)
        with pytest.raises(DataInterrupt):
            updates.make(state, next_batches, None)
        return event.time_s, event.duration_s, event.step_s, thread.reductions

    assert run_on(3, work) == [(5.0, 0.0, 0.0, 3)] * 3


def test_a_rank_that_is_interrupted_is_heard_by_all_after_the_update():
    def work(step, state, thread):
        updates = ReplicatedUpdates(step, Clock(), lambda: thread.ranks.rank == 1)
        before = updates.are_interrupted()
        updates.make(state, lambda state: (state, [batch_of([1.0, 2.0])]), None)
        return before, updates.are_interrupted()

    assert run_on(2, work) == [(False, True)] * 2


def test_rank_0_says_the_time_and_any_rank_that_it_is_interrupted():
    def work(step, state, thread):
        rank, heard = thread.ranks.rank, []
        for interrupted in (None, 1):
            report = RankReport(
                is_interrupted=rank == interrupted,
                times={"time_s": 1e9 + 0.1 + rank, "duration_s": rank + 1, "data_s": None},
            )
            state, event = update(step, state, batch_of([1.0, 2.0]), report=lambda report=report: report)
            heard.append((event.time_s, event.duration_s, event.data_s, step.is_interrupted))
        return heard

    assert run_on(2, work) == [[(1e9 + 0.1, 1, None, False), (1e9 + 0.1, 1, None, True)]] * 2


def test_seconds_of_the_parts_are_those_of_rank_0():
    def work(step, state, thread):
        state, first = update(step, state, batch_of([1.0, 2.0]))
        state, second = update(step, state, batch_of([1.0, 2.0]))
        return [(event.forward_s, event.backward_s, event.optimizer_s) for event in (first, second)]

    ticks = [iter(range(100)), iter(range(1000, 100000, 7))]
    made = [make_step(model=Line, loss=square, elapsed_s=lambda clock=clock: float(next(clock))) for clock in ticks]

    def run(thread):
        step, state = made[thread.ranks.rank]
        return work(ReplicatedStep(step, thread.ranks, thread.start), state, thread)

    first, second = run_in_threads(run, 2)
    assert first == second
    assert first == [(1.0, 1.0, 0.0), (1.0, 1.0, 1.0)]  # the seconds of an optimizer are those of the update before


# Micro-batches


def test_callbacks_see_the_micro_batches_of_all_ranks_in_their_order():
    def work(step, state, thread):
        seen = []

        def observe(state, event):
            assert isinstance(event, AfterAccumulationStep)
            seen.append((event.samples, float(event.losses["mean"]), event.accumulation_step, event.accumulation_steps))
            return state

        rank = thread.ranks.rank
        update(step, state, *[batch_of(*[[rank, index]] * (index + 1)) for index in range(rank)], observe=observe)
        return seen

    def mean(outputs, batch):
        return {"mean": outputs.mean() * 0 + batch.sum()}

    expected = [(1, 1.0, 0, 3), (1, 2.0, 1, 3), (2, 6.0, 2, 3)]
    assert run_on(3, work, loss=mean) == [expected] * 3


def test_an_update_without_samples_on_any_rank_is_skipped():
    def work(step, state, thread):
        after, event = step(state, [])
        return event.skipped, event.samples, dict(event.losses), after is state

    assert run_on(2, work) == [(True, 0, {}, True)] * 2


# Buffers and extra state


class Norms(nn.Sequential):
    def __init__(self):
        super().__init__(nn.BatchNorm1d(2), nn.BatchNorm1d(2, momentum=None), nn.Linear(2, 1))
        self[1].eval()
        self[1].running_mean.copy_(torch.tensor([0.1, 0.3]))


def test_statistics_of_batch_norms_are_averaged_by_samples():
    inputs = [torch.randn(size, 2, generator=torch.Generator().manual_seed(size)) for size in (2, 3)]

    def work(step, state, thread):
        state, _ = update(step, state, *[inputs[rank - 1] for rank in (thread.ranks.rank,) if rank])
        return clone_tensors(dict(state.buffers))

    results = run_on(3, work, model=Norms)
    for buffers in results:
        assert all(torch.equal(buffer, results[0][name]) for name, buffer in buffers.items())
    buffers = results[0]
    variance = sum(len(each) * each.var(dim=0) for each in inputs) / 5
    torch.testing.assert_close(buffers["0.running_mean"], 0.1 * torch.cat(inputs).mean(dim=0))
    torch.testing.assert_close(buffers["0.running_var"], 0.9 + 0.1 * variance)
    assert buffers["0.num_batches_tracked"] == 1  # rank 0 had no samples
    assert buffers["1.running_mean"].tolist() == torch.tensor([0.1, 0.3]).tolist()  # in evaluation mode


class Counting(nn.Linear):
    """Changes buffers in forward, alike and differently on the ranks, and registers one at the first call."""

    def __init__(self):
        super().__init__(2, 1)
        self.register_buffer("largest", torch.zeros(()))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("fixed", torch.tensor([math.nan, 1.0]))

    def forward(self, x):
        self.largest = torch.maximum(self.largest, x.detach().max())
        self.seen += len(x)
        self.calls += 1
        if "late" not in dict(self.named_buffers()):
            self.register_buffer("late", torch.ones(2))
        return super().forward(x)


def test_other_buffers_agree_and_those_that_differed_are_named_once(caplog):
    def work(step, state, thread):
        for _ in range(2):
            state, _ = update(step, state, *[batch_of(*[[rank, 0.0]] * rank) for rank in (thread.ranks.rank,) if rank])
        return {name: buffer.tolist() for name, buffer in state.buffers.items() if name != "fixed"}, thread.gathered

    with caplog.at_level(logging.WARNING):
        results = run_on(3, work, model=Counting)
    assert results == [results[0]] * 3
    buffers, gathered = results[0]
    assert gathered.count("buffers that forward changed") == 2
    assert buffers["largest"] == pytest.approx((1 * (5 / 3) + 2 * 2) / 3)
    assert (buffers["seen"], buffers["calls"], buffers["late"]) == (4, 2, [1.0, 1.0])
    warned = [record.getMessage() for record in caplog.records]
    assert len(warned) == 1
    assert warned[0].startswith("forward changes the buffers 'largest', 'seen' differently on each rank")


class Extra(nn.Linear):
    def __init__(self):
        super().__init__(2, 1)
        self.total = 0.0

    def forward(self, x):
        self.total += float(x.sum())
        return super().forward(x)

    def get_extra_state(self):
        return {"total": self.total}

    def set_extra_state(self, state):
        self.total = state["total"]


def test_extra_state_is_that_of_the_last_rank_with_samples(caplog):
    def work(step, state, thread):
        for count in (3, 2):
            batches = [batch_of([rank, 1.0]) for rank in (thread.ranks.rank,) if rank < count]
            state, _ = update(step, state, *batches)
        return state.extra_state[""]["total"]

    with caplog.at_level(logging.WARNING):
        assert run_on(3, work, model=Extra) == [3.0 + 2.0] * 3
    (record,) = caplog.records
    assert record.getMessage().startswith("extra state of the model")


# Gradients that something keeps, and that are missing


class Keeping(torch.optim.Optimizer):
    """Moves by the gradient of the update before, which it keeps as it got it."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    before = self.state[param].get("before")
                    if before is not None:
                        param.sub_(group["lr"] * before)
                    self.state[param]["before"] = param.grad


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("optimizer", [Keeping, SGD, ADAMW])
def test_no_memory_shares_the_buckets(optimizer, donate):
    data = [batch_of([1.0, 2.0]), batch_of([3.0, -1.0]), batch_of([-2.0, 0.5])]
    settings = {"optimizer": optimizer, "model": Line, "loss": square, "donate": donate, "clip_grad_value": 50.0}
    step, state = make_step(**settings)
    for batch in data:
        state, _ = update(step, state, batch)
    expected = clone_tensors(dict(state.params))

    def work(step, state, thread):
        for batch in data:
            state, _ = update(step, state, batch)
        return clone_tensors(dict(state.params))

    for params in run_on(2, work, **settings):
        for name, param in params.items():
            torch.testing.assert_close(param, expected[name])


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.none = (nn.Parameter(torch.ones(2)) for _ in range(3))

    def forward(self, x):
        return (x * (self.one if x[0, 0] > 0 else self.two)).sum(dim=1)


def test_a_parameter_that_some_ranks_use_is_trained_and_one_that_none_uses_is_not():
    def work(step, state, thread):
        for _ in range(2):
            state, _ = update(step, state, batch_of([1.0 - 2 * thread.ranks.rank, 1.0]))
        return set(state.opt_state["state"]), clone_tensors(dict(state.params))

    for memory, params in run_on(2, work, model=Branches, optimizer=ADAMW):
        assert memory == {"one", "two"}
        assert params["none"].tolist() == [1.0, 1.0]
        assert params["one"].tolist() != [1.0, 1.0] != params["two"].tolist()


# Refusals


def test_a_module_that_reduces_its_gradients_itself_is_refused():
    wrapped = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(wrapped)  # without a process group, which its constructor needs
    wrapped.module = Line()
    message = "0 (DistributedDataParallel) was prepared by DistributedDataParallel, whose gradients are reduced in"
    with pytest.raises(ParallelModuleError, match=re.escape(message)):
        make_step(model=lambda: nn.Sequential(wrapped), loss=square)


def test_synchronized_norms_are_refused_on_the_cpu():
    model = nn.Sequential(nn.Linear(2, 2), nn.SyncBatchNorm(2))
    with pytest.raises(ParallelModuleError, match=re.escape("1 is a SyncBatchNorm, which torch has for accelerators")):
        refuse_cpu_sync_norms(model, torch.device("cpu"))
    refuse_cpu_sync_norms(model, torch.device("cuda"))
