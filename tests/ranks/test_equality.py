"""The jobs of `configs/` on several ranks equal the same jobs in one process, and themselves bit for bit."""

import contextlib
import hashlib
import json
import math
from pathlib import Path

import pytest
import torch
from processes import run_on_ranks
from safetensors.torch import load_file
from torch import nn
from torch.utils import _pytree

import noether
from noether.config import load
from noether.config.serialization import resolve_config
from noether.examples.digits import ConvNet
from noether.examples.heat import HeatFields

CONFIGS = Path(__file__).parents[2] / "configs"
JOBS = ("digits", "heat")
WORLDS = (2, 3)
FILES = ("weights.safetensors", "optimizer.safetensors", "state.safetensors")


def small_job(name, folder):
    """Return the configuration of a job, made so small that it trains in half a second."""
    config = resolve_config(load(CONFIGS / f"{name}.yaml"))
    config["trainer"] |= {"max_epochs": 2, "rank_timeout_s": 60}
    for callback in config["callbacks"]:
        callback |= {key: 1 for key in callback if key == "every_n_epochs"}
    if name == "digits":
        config["model"] = {"kind": "test_equality.make_net", "width": 2}
        config["data"]["train"]["split"] = "test"  # 296 samples: the last update of an epoch has 40
        config["trainer"]["effective_batch_size"] = 64
        return config
    config["model"] |= {"width": 4, "modes": 3}
    for split, samples in SAMPLES.items():
        config["data"][split] |= {"size": 8, "samples": samples, "cache": str(folder / "cache")}
    config["trainer"]["eval_batch_size"] = 2
    return config


SAMPLES = {"train": 33, "val": 7, "test": 2}
"""With 2 or 3 ranks, all but one have no sample in the last update of an epoch, or no batch of the test set."""


def make_net(width: int) -> nn.Module:
    """Return the network without batch norm and dropout, which depend on the number of ranks."""
    net = ConvNet(width, dropout=0.0)
    for index, layer in enumerate(net.features):
        if isinstance(layer, nn.BatchNorm2d):
            net.features[index] = nn.GroupNorm(1, layer.num_features)
    return net


def train_jobs(folder, names):
    """Train each job once for each name; return the run directories, and a hash of all tensors of the last states."""
    folders, hashes = {}, []
    with contextlib.chdir(folder):
        for job in JOBS:
            for name in names:
                run = noether.train(small_job(job, folder), output=f"out/{name}", allow=["test_equality"])
                folders[job, name] = folder / run.directory
                leaves = [each for each in _pytree.tree_leaves(run.state) if isinstance(each, torch.Tensor)]
                hashes.append(hashlib.sha256(b"".join(each.numpy().tobytes() for each in leaves)).hexdigest())
    return folders, hashes


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return the run directory of each job by number of ranks, and of a repeated run on 2 ranks as `again`."""
    folder = tmp_path_factory.mktemp("equality")
    for split, samples in SAMPLES.items():
        HeatFields(split, size=8, samples=samples, cache=str(folder / "cache"))
    names = {1: [1], 2: [2, "again"], 3: [3]}
    folders = {}
    for world_size, of_runs in names.items():
        results = run_on_ranks(train_jobs, world_size, folder, of_runs)
        assert [result == results[0] for result in results] == [True] * world_size  # ranks have the same bits
        folders |= results[0][0]
    return folders


def lines(run):
    """Return the lines of metrics.jsonl without run and time."""
    read = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if key not in ("run", "time_s")} for line in read]


def summary(run):
    entries = json.loads((run / "summary.json").read_text())
    return {key: value for key, value in entries.items() if key not in {"world_size", "phases", "processes"}}


def paths(run):
    """Return the files of a run, and what its pointers to checkpoints name."""
    files = [path for path in run.rglob("*") if path.is_file()]
    pointers = [path for path in files if path.parent == run / "checkpoints"]
    return {path.relative_to(run): path.read_text().split()[0] if path in pointers else None for path in files}


def checkpoints(run):
    """Return the bytes of the tensors in all checkpoints."""
    return {path.relative_to(run): path for path in run.rglob("*.safetensors")}


def assert_close(one, several, where=""):
    """Check that two trees have the same keys and close numbers."""
    assert type(one) is type(several), where
    if isinstance(one, dict):
        assert one.keys() == several.keys(), where
        for key in one:
            assert_close(one[key], several[key], f"{where}/{key}")
    elif isinstance(one, list):
        assert len(one) == len(several), where
        for index, (first, second) in enumerate(zip(one, several, strict=True)):
            assert_close(first, second, f"{where}[{index}]")
    elif isinstance(one, float):
        assert math.isclose(one, several, rel_tol=1e-4, abs_tol=1e-6), (where, one, several)
    else:
        assert one == several, where


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("job", JOBS)
def test_a_job_on_ranks_equals_that_in_one_process(job, world_size, trained):
    one, several = trained[job, 1], trained[job, world_size]
    assert paths(one) == paths(several)  # the same checkpoints are the best, and no file is that of a rank
    assert (one / "config.yaml").read_text().replace("out/1", "") == (several / "config.yaml").read_text().replace(
        f"out/{world_size}", ""
    )
    assert_close(lines(one), lines(several))
    assert_close(summary(one), summary(several))
    for name, path in checkpoints(one).items():
        torch.testing.assert_close(load_file(several / name), load_file(path), rtol=1e-4, atol=1e-5, msg=str(name))


@pytest.mark.parametrize("job", JOBS)
def test_a_repeated_run_on_ranks_has_the_same_bits(job, trained):
    first, again = trained[job, 2], trained[job, "again"]
    assert lines(first) == lines(again)
    assert summary(first) == summary(again)
    tensors = checkpoints(first)
    assert {*FILES} <= {path.name for path in tensors}
    assert [(again / name).read_bytes() == path.read_bytes() for name, path in tensors.items()] == [True] * len(tensors)


@pytest.mark.parametrize("job", JOBS)
def test_the_summary_says_how_many_ranks_trained(job, trained):
    sizes = [json.loads((trained[job, world] / "summary.json").read_text()).get("world_size") for world in (1, 2, 3)]
    assert sizes == [None, {"E0_U0_S0": 2}, {"E0_U0_S0": 3}]
