"""Updates of real ranks: those of one process with all samples, the same on all ranks, and the same when repeated."""

import contextlib
import dataclasses
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import LIMIT_S, run_on_ranks
from recorded_runs import Fields, make_config
from test_rank_gradients import make_step, train
from torch import nn

import noether
from noether.core.shares import share_of
from noether.core.tensors.tree import clone_tensors
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


class Dropping(nn.Sequential):
    """Draws random numbers, and has statistics of batches."""

    def __init__(self):
        super().__init__(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2))


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
    pairs = [[torch.randn(2 + rank, 4, generator=torch.Generator().manual_seed(rank))] for rank in range(3)]
    for repetition in range(2):
        step, state = make_step(ADAMW, Dropping, mse)
        step = ReplicatedStep(dataclasses.replace(step, rank=ranks.rank), ranks)
        params, _ = train(step, state, [pairs[ranks.rank]] * 2)
        results["Dropping", repetition] = params
    return results


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_train_as_one_process_and_repeat_bit_for_bit(world_size):
    by_rank = run_on_ranks(train_plain_models, world_size)
    for results in by_rank:
        assert results["Net", "calls"] == results["Double", "calls"] == ["all_reduce"] * len(SIZES)
        for repetition in range(2):
            random = by_rank[0]["Dropping", 0]
            assert all(torch.equal(param, random[name]) for name, param in results["Dropping", repetition].items())
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


class Blocking(Fields):
    """On rank 1, the process that loads samples interrupts the run at one of them, and does not return."""

    def __getitem__(self, index):
        self.asked = getattr(self, "asked", 0) + 1
        if os.environ["RANK"] == "1" and self.asked == 9:
            while not Path("updated").exists():  # samples are loaded ahead, also before the first update
                time.sleep(0.01)
            os.kill(int(os.environ["TRAINING_PROCESS"]), signal.SIGTERM)
            threading.Event().wait(LIMIT_S)
        return super().__getitem__(index)


@noether.on(noether.AfterUpdate)
def note_update(state, event):
    Path("updated").touch()
    return state, ()


def train_until_blocked(folder):
    config = make_config(num_workers=1, max_batch_size=4, effective_batch_size=8)
    config["callbacks"] = [{"kind": "test_step_ranks.note_update"}]
    config["data"]["train"] = {"kind": "test_step_ranks.Blocking"}
    os.environ["TRAINING_PROCESS"] = str(os.getpid())
    with contextlib.chdir(folder):
        run = noether.train(config, allow=["recorded_runs", "test_step_ranks"])
    return run.finished, str(run.state.iteration), clone_tensors(dict(run.state.params))


@pytest.mark.slow
def test_a_rank_that_is_interrupted_while_it_waits_for_data_stops_all_at_the_same_update(tmp_path):
    (finished, iteration, params), other = run_on_ranks(train_until_blocked, 2, tmp_path)
    assert not finished
    assert other[:2] == (finished, iteration)
    assert 0 < int(iteration.split("_")[1].removeprefix("U")) <= 2
    assert all(torch.equal(param, other[2][name]) for name, param in params.items())
