"""A module of `fully_shard` is trained, saved by all ranks, and resumed in any number of them, or in one process."""

import pytest
import torch
from processes import run_on_ranks
from torch import nn

from noether import AfterUpdate, Run, SaveCheckpoint, TrainState, open_run
from noether.core.tensors.dtensors import whole_tensor
from noether.core.tensors.tree import map_leaves
from noether.distributed.ranks import join
from noether.effects.checkpoints.reader import CheckpointReader
from noether.testing import same

TREES = ("params", "buffers", "opt_state", "callback_states")


def make_model(seed, ranks=None, mesh_shape=None):
    """Return a model and an optimizer; on several ranks, its parameters are sharded."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    if ranks is not None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        shape = mesh_shape or (ranks.world_size,)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
        for module in (model[0], model):
            fully_shard(module, mesh=mesh)
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def update(model, optimizer, seed):
    inputs = torch.randn(8, 6, generator=torch.Generator().manual_seed(seed))
    model(inputs).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def whole_of(state):
    """Return the parts of a state that may be sharded, whole."""

    def whole(leaf):
        return whole_tensor(leaf).clone() if isinstance(leaf, torch.Tensor) else leaf

    return {name: map_leaves(whole, getattr(state, name)) for name in TREES}


def train_and_save(folder, mesh_shape):
    ranks = join(timeout_s=60)
    model, optimizer = make_model(0, ranks, mesh_shape)
    run = Run(rank=ranks.rank, world_size=ranks.world_size)
    with open_run(folder, ranks=ranks, asynchronous=True) as directory:
        update(model, optimizer, seed=1)
        state = TrainState.from_module(model, optimizer).advance(samples=8)
        state = state.remember("weights/ema=0.9", {"params": {**state.params}, "buffers": {}})
        directory.interpreter([SaveCheckpoint(pointers=("latest",))], state, AfterUpdate(run=run, samples=8))
        saved = whole_of(state)
        update(model, optimizer, seed=2)  # while the state before is written
    return saved


def load_on_ranks(folder):
    ranks = join(timeout_s=60)
    model, optimizer = make_model(5, ranks)
    reader = CheckpointReader(folder)
    saved = reader.load(reader.find("latest"), TrainState.from_module(model, optimizer))
    return whole_of(saved.into_module(model, optimizer))


@pytest.mark.parametrize(
    ("mesh_shape", "loading", "shards"),
    [pytest.param(None, 3, 6, id="shards"), pytest.param((2, 1), 2, 0, id="replicas", marks=pytest.mark.slow)],
)
def test_a_sharded_module_is_resumed(tmp_path, mesh_shape, loading, shards):
    saved = run_on_ranks(train_and_save, 2, tmp_path / "run", mesh_shape)
    folder = tmp_path / "run/checkpoints"
    reader = CheckpointReader(folder)
    manifest = reader.find("latest")
    assert len([name for name in manifest.parts if "-of-00002" in name]) == shards
    state = reader.load(manifest)
    assert all(same(each, {name: getattr(state, name) for name in TREES}) for each in saved)
    model, optimizer = make_model(7)
    assert same(whole_of(state.into_module(model, optimizer)), saved[0])
    assert all(same(loaded, saved[0]) for loaded in run_on_ranks(load_on_ranks, loading, folder))
