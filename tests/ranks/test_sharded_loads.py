"""Sharded checkpoints are read by any number of ranks, whole or in other shards, and by torch itself."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from processes import run_on_ranks
from sharded_states import full_tensors, sharded_tensors, state_of

from noether import AfterUpdate, Run, SaveCheckpoint, TrainState, open_run
from noether.cli.main import main
from noether.core.tensors.dtensors import is_distributed, whole_tensor
from noether.core.tensors.tree import map_leaves
from noether.distributed.ranks import join
from noether.effects.checkpoints.file_names import shard_name
from noether.effects.checkpoints.listing import CheckpointError
from noether.effects.checkpoints.manifest import Manifest, ManifestError
from noether.effects.checkpoints.reader import CheckpointReader
from noether.effects.checkpoints.weight_files import read_weights
from noether.effects.disk.calls import Disk
from noether.testing import same


def save_on_ranks(folder):
    ranks = join(timeout_s=60)
    state = state_of(sharded_tensors(ranks.world_size, replicated=("counts",)))
    run = Run(rank=ranks.rank, world_size=ranks.world_size)
    with open_run(folder, ranks=ranks) as directory:
        directory.interpreter([SaveCheckpoint(pointers=("latest",))], state, AfterUpdate(run=run, samples=4))


def whole_of(leaf):
    return whole_tensor(leaf) if isinstance(leaf, torch.Tensor) else leaf


def load_on_ranks(folder):
    """Load the checkpoint of other ranks in shards, by our reader and by torch; return the names of equal tensors."""
    import torch.distributed.checkpoint as dcp

    ranks = join(timeout_s=60)
    sharded, full = sharded_tensors(ranks.world_size), full_tensors()
    reader = CheckpointReader(folder)
    state = reader.load(reader.find("latest"), TrainState(params=sharded, tied_names={"head": "uneven"}))
    moments = [each["exp_avg"] for each in state.opt_state["state"].values()]
    averages = state.callback_states["weights/ema=0.9"]["params"].values()
    assert all(map(is_distributed, [*state.params.values(), *moments, *averages]))
    trees = "params", "opt_state", "callback_states"
    whole = state.replace(**{name: map_leaves(whole_of, getattr(state, name)) for name in trees})
    assert same(whole, state_of(full))
    # These two are not in the format: one has other bytes, and torch finds no shape of a tensor that no rank stores.
    targets = {name: torch.zeros_like(each) for name, each in sharded.items() if name not in {"complex", "empty"}}
    targets["running_mean"], targets["scale"] = torch.zeros(4), torch.tensor(0.0)
    dcp.load(targets, storage_reader=dcp.HuggingFaceStorageReader(folder / str(state.iteration)))
    expected = {**full, **state_of(full).buffers}
    return [name for name, each in targets.items() if torch.equal(whole_tensor(each), expected[name])]


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)])
def checkpoints(request, tmp_path_factory):
    """The checkpoints of a run on some ranks, and how many there are."""
    folder = tmp_path_factory.mktemp("saved") / "run"
    run_on_ranks(save_on_ranks, request.param, folder)
    return folder / "checkpoints", request.param


def test_other_ranks_load_their_shards(checkpoints):
    folder, saving = checkpoints
    loading = 5 - saving
    names = ["uneven", "one_row", "image", "half", "counts", "mask", "running_mean", "scale"]
    assert run_on_ranks(load_on_ranks, loading, folder) == [names] * loading


def read_names(folder, like):
    """Load a checkpoint; return the state, and which files were read as a whole."""
    opened, read = [], set()

    def call(function, *arguments):
        if function is os.open:
            opened.append(arguments[0].name)
        result = function(*arguments)
        if function is os.read and result[8 + int.from_bytes(result[:8], "little") :]:  # more than a header
            read.add(opened[-1])
        return result

    reader = CheckpointReader(folder, Disk(call))
    return reader.load(reader.find("latest"), like), {name for name in read if name.endswith(".safetensors")}


def read_shards_of_one_rank(folder):
    """Return which files a rank reads for its shards if it saved them, and the error if one of them is damaged."""
    ranks = join(timeout_s=60)
    _, read = read_names(folder, TrainState(params=sharded_tensors(ranks.world_size), tied_names={"head": "uneven"}))
    return sorted(read)


def test_a_rank_reads_the_first_files_and_its_shards_only(checkpoints):
    folder, saving = checkpoints
    found = run_on_ranks(read_shards_of_one_rank, saving, folder)
    parts = "optimizer", "state", "weights"
    for rank, read in enumerate(found):
        files = sorted({0, rank})
        assert read == [f"{part}-{each + 1:05}-of-{saving:05}.safetensors" for part in parts for each in files]


def damage(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("change", [damage, Path.unlink], ids=["a changed bit", "no file"])
def test_a_damaged_shard_is_refused(checkpoints, tmp_path, change):
    folder = shutil.copytree(checkpoints[0], tmp_path / "checkpoints")
    reader = CheckpointReader(folder)
    manifest = reader.find("latest")
    change(folder / manifest.tag / shard_name("weights.safetensors", 1, checkpoints[1]))
    with pytest.raises(CheckpointError, match=r"weights-00002-of-0000\d\.safetensors is (damaged|missing)"):
        reader.load(manifest)


def test_a_manifest_without_one_of_the_shards_is_damaged(checkpoints):
    manifest = CheckpointReader(checkpoints[0]).find("latest")
    assert Manifest.loads(manifest.dumps()) == manifest
    name = shard_name("optimizer.safetensors", 0, checkpoints[1])
    fewer = replace(manifest, parts={each: part for each, part in manifest.parts.items() if each != name})
    with pytest.raises(ManifestError, match=f"its shards are incomplete: {name} is missing"):
        Manifest.loads(fewer.dumps())
    with pytest.raises(ManifestError, match="do not fit its format"):
        Manifest.loads(replace(manifest, format=3).dumps())


def test_weights_of_a_sharded_checkpoint_are_exported_and_start_a_run(checkpoints, tmp_path):
    folder, _ = checkpoints
    (folder.parent / "config.yaml").touch()
    file = tmp_path / "model.safetensors"
    expected = {**full_tensors(), **state_of({}).buffers, "head": full_tensors()["uneven"]}
    assert same(read_weights(folder / "latest").values, expected)
    lone = tmp_path / "lone"
    lone.mkdir()
    for path in (folder / "E0_U1_S4").glob("weights-*"):
        shutil.copy(path, lone)
    assert same(read_weights(lone).values, expected)
    with pytest.raises(CheckpointError, match="only the shards that one rank saved: give the folder"):
        read_weights(next(lone.iterdir()))
    next(lone.iterdir()).unlink()
    with pytest.raises(CheckpointError, match="is missing beside"):
        read_weights(lone)
    result = CliRunner().invoke(main, ["export", str(folder.parent), "--to", str(file)])
    assert result.exit_code == 1
    assert "complex is of type torch.complex128, which safetensors files do not have" in result.output
    assert not [*tmp_path.glob("*.safetensors")]
