"""Sums over ranks: exact parts of numbers, buckets with a fixed layout, and the laws of means over ranks."""

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rank_threads import run_in_threads
from torch import nn

from noether import Mean, TrainState
from noether.core.shares import share_of
from noether.core.tensors.tree import clone_tensors
from noether.distributed.exact import join_amount, join_numbers, split_amount, split_numbers
from noether.distributed.gradients import GradientReduction, plan_buckets
from noether.training.replicated.step import ReplicatedStep
from noether.training.step.optimizer import FunctionalOptimizer
from noether.training.step.step import Step

SPECIAL = [0.0, -0.0, math.nan, math.inf, -math.inf, 5e-324, -2.5e-308, 1.7e308, 0.1]


class _Done:
    def wait(self):
        pass


def bits_of(tensor):
    return tensor.view(torch.int64).tolist()


@given(st.lists(st.one_of(st.sampled_from(SPECIAL), st.floats())), st.integers(1, 4))
def test_a_float_arrives_with_all_its_bits(numbers, world_size):
    sent = torch.tensor(numbers, dtype=torch.float64)
    parts = [split_numbers(sent).float(), *[torch.zeros(3 * len(numbers))] * (world_size - 1)]
    for order in (parts, parts[::-1]):
        assert bits_of(join_numbers(sum(order), torch.float64)) == bits_of(sent)


@given(st.lists(st.integers(-(2**63), 2**63 - 1)))
def test_an_integer_arrives_with_all_its_bits(numbers):
    sent = torch.tensor(numbers, dtype=torch.int64)
    assert torch.equal(join_numbers(split_numbers(sent).float(), torch.int64), sent)


@given(st.lists(st.integers(0, 2**36 - 1), min_size=1, max_size=50))
def test_whole_amounts_are_summed_exactly(amounts):
    parts = torch.tensor([split_amount(amount) for amount in amounts]).sum(dim=0)
    assert join_amount(parts.tolist()) == sum(amounts)


@given(st.floats(0, 1e12))
def test_an_amount_is_the_sum_of_its_parts(amount):
    assert join_amount(split_amount(amount)) == amount


DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.complex128]
SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)


@st.composite
def params_and_grads(draw):
    params, grads = {}, {}
    for index in range(draw(st.integers(1, 6))):
        dtype = draw(st.sampled_from(DTYPES))
        shape = draw(SHAPES)
        param = torch.zeros(shape, dtype=dtype)
        if len(shape) > 1 and draw(st.booleans()):
            param = torch.zeros(shape[::-1], dtype=dtype).permute(*reversed(range(len(shape))))
        params[f"p{index}"] = param
        whole = torch.randint(-8, 9, shape).to(dtype)
        grads[f"p{index}"] = whole if draw(st.booleans()) else None
    return params, grads


@given(params_and_grads(), st.integers(1, 200), st.sampled_from([1, 2, 4]))
def test_one_rank_gets_its_own_gradients_back(drawn, bucket_bytes, weight):
    params, grads = drawn
    reduction = GradientReduction(params, 3, lambda bucket: _Done(), bucket_bytes=bucket_bytes)
    for _ in range(2):  # the buckets are used again
        tail = reduction.sum_over_ranks(grads, weight, lambda place: place.fill_(2.0))
        assert tail.tolist() == [2.0] * 3
        present = {name for name, grad in grads.items() if grad is not None}
        result = reduction.divide(present, by=weight)
        assert result.keys() == params.keys()
        for name, grad in grads.items():
            assert (result[name] is None) == (grad is None)
            if grad is not None:
                assert result[name].dtype == params[name].dtype
                assert result[name].stride() == torch.empty_like(params[name]).stride()
                assert torch.equal(result[name], grad)


@given(params_and_grads(), st.integers(1, 200), st.booleans())
def test_buckets_have_disjoint_places_and_double_precision_last(drawn, bucket_bytes, is_double):
    params, _ = drawn
    plan = plan_buckets(params, is_double=is_double, bucket_bytes=bucket_bytes)
    taken = set()
    for name, (bucket, start, size) in plan.places.items():
        numbers = {(bucket, number) for number in range(start, start + size)}
        assert not taken & numbers
        assert start + size <= plan.ends[bucket]
        assert (plan.dtypes[bucket] is torch.float64) == (params[name].dtype in (torch.float64, torch.complex128))
        taken |= numbers
    assert plan.dtypes == sorted(plan.dtypes, key=str)
    assert not is_double or plan.dtypes[-1] is torch.float64


def test_a_rank_of_weight_zero_adds_nothing_even_if_it_is_not_finite():
    reduction = GradientReduction({"w": torch.zeros(2)}, 1, lambda bucket: _Done())
    reduction.sum_over_ranks({"w": torch.tensor([math.nan, math.inf])}, 0.0, lambda place: place)
    assert reduction.divide({"w"}, by=1)["w"].tolist() == [0.0, 0.0]


def test_a_sparse_gradient_is_refused_with_its_fix():
    reduction = GradientReduction({"table": torch.zeros(3, 2)}, 1, lambda bucket: _Done())
    sparse = torch.sparse_coo_tensor([[1]], [[1.0, 1.0]], (3, 2), check_invariants=True)
    with pytest.raises(ValueError, match=re.escape("the gradient of 'table' is sparse")):
        reduction.sum_over_ranks({"table": sparse}, 1.0, lambda place: place)


class Heads(nn.Module):
    """Has a parameter that only some losses use, and one that none uses."""

    def __init__(self):
        super().__init__()
        self.body, self.head, self.unused = nn.Linear(2, 3), nn.Linear(3, 1), nn.Parameter(torch.ones(1))
        self.double()

    def forward(self, x):
        hidden = self.body(x[:, :2]).tanh()
        return {"hidden": hidden, "head": self.head(hidden)}


def heads_loss(outputs, batch):
    """Return losses that a column of the batch chooses, with weights from another."""
    kinds, weights = batch[:, 2], batch[:, 3]
    losses = {"mse": (outputs["hidden"] - 1).square().mean()}
    if bool((kinds == 1).any()):
        losses["head"] = outputs["head"].square().mean()
    if bool((kinds == 2).any()):
        losses["tokens"] = Mean((outputs["hidden"].mean(dim=1) * weights).sum() / weights.sum(), weight=weights.sum())
    return losses


def make_step(optimizer=torch.optim.SGD, model=Heads, loss=heads_loss, **settings):
    torch.manual_seed(0)
    network = model()
    functional = FunctionalOptimizer(optimizer, {"lr": 0.1})
    step = Step(model=network, loss=loss, optimizer=functional, lr={"default": lambda _: 0.1}, **settings)
    return step, TrainState.from_module(network)


def train(step, state, updates):
    """Return what all ranks have after the updates."""
    events = []
    for batches in updates:
        state, event = step(state, batches)
        state = state.advance(samples=event.samples)
        losses = {name: float(loss) for name, loss in event.losses.items()}
        events.append((event.samples, losses, dict(event.loss_weights), event.skipped))
    return clone_tensors(dict(state.params)), events


MICRO_BATCHES = st.lists(st.tuples(st.integers(1, 3), st.sampled_from([0, 1, 2])), max_size=4)


@given(st.lists(MICRO_BATCHES, min_size=1, max_size=4), st.integers(1, 3), st.randoms(use_true_random=False))
@settings(max_examples=25)
def test_ranks_make_the_update_of_one_process_with_all_samples(sizes, world_size, random):
    generator = torch.Generator().manual_seed(random.randrange(2**32))

    def make_batch(samples, kind):
        batch = torch.randn(samples, 4, generator=generator, dtype=torch.float64)
        batch[:, 2], batch[:, 3] = kind, torch.randint(1, 4, (samples,), generator=generator)
        return batch

    updates = [[make_batch(samples, kind) for samples, kind in update] for update in sizes]
    expected, expected_events = train(*make_step(), updates)

    made = [make_step() for _ in range(world_size)]  # threads share the random generator

    def run(thread):
        step, state = made[thread.ranks.rank]
        shares = [[batches[i] for i in share_of(thread.ranks.rank, world_size, len(batches))] for batches in updates]
        return train(ReplicatedStep(step, thread.ranks, thread.start), state, shares)

    results = run_in_threads(run, world_size)
    for params, events in results:
        assert events == results[0][1]
        for name, param in params.items():
            assert torch.equal(param, results[0][0][name])
            torch.testing.assert_close(param, expected[name], rtol=1e-12, atol=1e-12)
        for (samples, losses, _, skipped), other in zip(events, expected_events, strict=True):
            assert (samples, skipped) == (other[0], other[3])
            assert losses == pytest.approx(other[1], rel=1e-12)
