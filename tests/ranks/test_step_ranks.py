"""Updates of real ranks: those of one process with all samples, the same on all ranks, and the same when repeated."""

import pytest
import torch
import torch.distributed as dist
from processes import run_on_ranks
from test_gradients import make_step, train
from torch import nn

from noether.core.shares import share_of
from noether.distributed.ranks import join
from noether.training.replicated.step import ReplicatedStep

ADAMW = torch.optim.AdamW
SIZES = [(2, 2, 2), (3,), (1, 2), (2, 1, 1, 2), ()]
"""Micro-batches of each update: some have fewer than ranks, the last has none."""


class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


class Double(Net):
    def __init__(self):
        super().__init__()
        self.double()


def mse(outputs, batch):
    return {"mse": (outputs - batch[:, :2]).square().mean()}


def make_updates(dtype):
    generator = torch.Generator().manual_seed(1)
    return [[torch.randn(size, 4, generator=generator).to(dtype) for size in sizes] for sizes in SIZES]


def share(updates, ranks):
    return [[batches[i] for i in share_of(ranks.rank, ranks.world_size, len(batches))] for batches in updates]


class Calls:
    """Counts the collectives of torch.distributed."""

    NAMES = ("all_reduce", "all_gather", "broadcast", "barrier", "all_gather_into_tensor", "reduce_scatter_tensor")

    def __init__(self):
        self.made = []
        for name in self.NAMES:
            setattr(dist, name, self._count(name, getattr(dist, name)))

    def _count(self, name, function):
        def call(*arguments, **keywords):
            self.made.append(name)
            return function(*arguments, **keywords)

        return call


def train_plain_models():
    calls = Calls()
    ranks = join(timeout_s=30)
    results = {}
    for model, dtype in ((Net, torch.float32), (Double, torch.float64)):
        updates = share(make_updates(dtype), ranks)
        for repetition in range(2):
            step, state = make_step(ADAMW, model, mse, donate=True, clip_grad_norm=0.5)
            calls.made.clear()
            results[model.__name__, repetition] = train(ReplicatedStep(step, ranks), state, updates)
            results[model.__name__, "calls"] = list(calls.made)
    return results


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_train_as_one_process_and_repeat_bit_for_bit(world_size):
    by_rank = run_on_ranks(train_plain_models, world_size)
    for model, dtype, tolerance in ((Net, torch.float32, 2e-5), (Double, torch.float64, 1e-12)):
        expected, expected_events = train(*make_step(ADAMW, model, mse, clip_grad_norm=0.5), make_updates(dtype))
        first, first_events = by_rank[0][model.__name__, 0]
        for results in by_rank:
            for repetition in range(2):
                params, events = results[model.__name__, repetition]
                assert events == first_events
                assert all(torch.equal(params[name], first[name]) for name in first)
        for name, param in first.items():
            torch.testing.assert_close(param, expected[name], rtol=tolerance, atol=tolerance)
        for (samples, losses, _, skipped), other in zip(first_events, expected_events, strict=True):
            assert (samples, skipped) == (other[0], other[3])
            assert losses == pytest.approx(other[1], rel=tolerance)
