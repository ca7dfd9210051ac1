"""`noether export`: one plain file with the weights of a checkpoint, and clear refusals that leave nothing behind."""

import errno
import os

import pytest
import torch
from command import contents, invoke
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from noether import AfterUpdate, SaveCheckpoint, TrainState, open_run
from noether.effects.checkpoints.weight_files import read_weights
from noether.effects.disk.calls import DISK
from noether.effects.disk.tensor_files import tensor_pieces

AVERAGE = "ema=0.9"


class Counter(nn.Module):
    """A module with extra state that is no tensor."""

    def get_extra_state(self):
        return {"calls": 3}

    def set_extra_state(self, state):
        self.calls = state["calls"]


def make_model():
    model = nn.ModuleDict({"emb": nn.Embedding(3, 2), "head": nn.Linear(2, 3, bias=False), "norm": nn.BatchNorm1d(2)})
    model["head"].weight = model["emb"].weight
    return model


@pytest.fixture
def run(tmp_path):
    """A run with checkpoints of its weights, of averages, and of a part of the model; no configuration can be built."""
    model = make_model()
    state = TrainState.from_module(model)
    average = {"params": {name: each + 1 for name, each in state.params.items()}, "buffers": dict(state.buffers)}
    state = state.remember(f"weights/{AVERAGE}", average).advance(samples=4)
    folder = tmp_path / "run"
    with open_run(folder) as directory:
        saves = (
            SaveCheckpoint(pointers=("latest",)),
            SaveCheckpoint(tag="average", weights_of=AVERAGE, optimizer=False),
            SaveCheckpoint(tag="part", models=("norm",), optimizer=False),
            SaveCheckpoint(tag="rest", weights=False),
        )
        directory.interpreter(saves, state, AfterUpdate(samples=4))
    (folder / "config.yaml").write_text("model: {kind: not.importable.Model}\n")
    return folder, model.state_dict()


def check_file(path, expected):
    """Check that a file has exactly the expected tensors, and no metadata but their origin."""
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    found = load_file(path)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], each) for name, each in expected.items())


def test_the_model_takes_an_exported_file(run, tmp_path):
    folder, expected = run
    before = contents(folder)
    output = invoke("export", "run", "--to", "model.safetensors", cwd=tmp_path)
    assert output.startswith("model.safetensors: 7 tensors, 0.0 MB; the weights of E0_U1_S4")
    check_file(tmp_path / "model.safetensors", expected)
    make_model().load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert read_weights(tmp_path / "model.safetensors").values.keys() == expected.keys()
    assert contents(folder) == before


@pytest.mark.parametrize("options", [["--weights", AVERAGE], ["--checkpoint", "average"]], ids=["memory", "checkpoint"])
def test_averages_are_exported(run, tmp_path, options):
    _, expected = run
    output = invoke("export", "run", "--to", "average.safetensors", *options, cwd=tmp_path)
    assert "the weights of ema=0.9 of " in output
    trained = {"emb.weight", "head.weight", "norm.weight", "norm.bias"}
    check_file(
        tmp_path / "average.safetensors",
        {name: each + 1 if name in trained else each for name, each in expected.items()},
    )


def test_a_part_of_the_model_is_named(run, tmp_path):
    _, expected = run
    output = invoke("export", "run", "--to", "part.safetensors", "--checkpoint", "part", cwd=tmp_path)
    assert "below norm only" in output
    check_file(tmp_path / "part.safetensors", {name: each for name, each in expected.items() if "norm" in name})


def test_extra_state_that_is_no_tensor_is_named(tmp_path):
    state = TrainState.from_module(nn.ModuleDict({"body": nn.Linear(1, 1), "counter": Counter()})).advance(samples=4)
    with open_run(tmp_path / "run") as directory:
        directory.interpreter([SaveCheckpoint(pointers=("latest",))], state, AfterUpdate(samples=4))
    (tmp_path / "run/config.yaml").touch()
    output = invoke("export", "run", "--to", "model.safetensors", cwd=tmp_path)
    assert "left out, because the file can hold only tensors: counter._extra_state" in output
    assert load_file(tmp_path / "model.safetensors").keys() == {"body.weight", "body.bias"}


REFUSALS = {
    "no run": (["nowhere", "--to", "x.safetensors"], "is not the directory of a run", 2),
    "no checkpoint": (["run", "--to", "x.safetensors", "--checkpoint", "E9"], "E9", 2),
    "no weights of this name": (["run", "--to", "x.safetensors", "--weights", "ema=0.5"], "stored: ema=0.9", 2),
    "no weights": (["run", "--to", "x.safetensors", "--checkpoint", "rest"], "rest has no weights", 1),
    "another kind of file": (["run", "--to", "x.pt"], "write x.safetensors", 2),
    "an existing file": (["run", "--to", "there.safetensors"], "the file exists", 2),
    "a folder": (["run", "--to", "."], "is a folder; give the path of a file", 2),
    "no folder": (["run", "--to", "new/x.safetensors"], "'new' does not exist", 2),
}


@pytest.mark.parametrize(("arguments", "message", "code"), REFUSALS.values(), ids=REFUSALS)
def test_a_refusal_writes_nothing(run, tmp_path, arguments, message, code):
    (tmp_path / "there.safetensors").write_text("mine")
    before = contents(tmp_path)
    assert message in invoke("export", *arguments, cwd=tmp_path, code=code)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("function", [os.write, os.fsync, os.rename])
def test_an_error_of_the_disk_leaves_no_part_of_a_file(run, tmp_path, monkeypatch, function):
    def fail(called, *arguments):
        if called is function or called.__name__ == function.__name__:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return called(*arguments)

    before = contents(tmp_path)
    monkeypatch.setattr(DISK, "_call", fail)
    assert "No space left on device" in invoke("export", "run", "--to", "model.safetensors", cwd=tmp_path, code=1)
    assert contents(tmp_path) == before


def test_a_damaged_checkpoint_is_not_exported(run, tmp_path):
    folder, _ = run
    damaged = folder / "checkpoints/E0_U1_S4/weights.safetensors"
    damaged.write_bytes(b"".join(tensor_pieces({})))
    output = invoke("export", "run", "--to", "model.safetensors", cwd=tmp_path, code=1)
    assert "weights.safetensors is damaged" in output
    assert not (tmp_path / "model.safetensors").exists()
