"""`RunRecord.load_into`: weights of any checkpoint in a live model, all or none."""

import copy

import pytest
import torch
from torch import nn

import noether
from noether import AfterUpdate, SaveCheckpoint, TrainState, open_run
from noether.core.tensors.live.weights import MismatchError
from noether.effects import CheckpointError


class Model(nn.Module):
    """Parameters, a buffer that training changes, and extra state."""

    def __init__(self, width=3):
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(2, width), nn.BatchNorm1d(width), nn.Linear(width, 1)
        self.register_buffer("table", torch.zeros(2), persistent=False)
        self.calls = 0

    def get_extra_state(self):
        return {"calls": self.calls}

    def set_extra_state(self, state):
        self.calls = state["calls"]


AVERAGED = "ema=0.9"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run with the checkpoints E0_U1_S4 and E0_U2_S8, and the model at each."""
    models = {}
    with open_run(tmp_path_factory.mktemp("runs") / "run") as directory:
        torch.manual_seed(0)
        model = Model()
        state = TrainState.from_module(model)  # from now on, buffers that change are saved
        for update in (1, 2):
            with torch.no_grad():
                for tensor in (*model.parameters(), model.norm.running_mean, model.table):
                    tensor.add_(torch.randn_like(tensor))
            model.calls = update
            state = TrainState.from_module(model).replace(iteration=noether.TrainingIteration(0, update, 4 * update))
            average = {name: 2 * tensor for name, tensor in state.params.items()}
            state = state.remember(f"weights/{AVERAGED}", {"params": average, "buffers": {}})
            pointers = ("latest",) if update == 2 else ("latest", "best_model.val.accuracy")
            directory.interpreter([SaveCheckpoint(pointers=pointers)], state, AfterUpdate(time_s=0.0))
            models[f"E0_U{update}_S{4 * update}"] = copy.deepcopy(model)
        part = SaveCheckpoint(tag="head", models=("head",), optimizer=False)
        directory.interpreter([part], state, AfterUpdate(time_s=0.0))
    return noether.read_run(directory.path), models


def same(model, other):
    pairs = zip(model.state_dict().items(), other.state_dict().items(), strict=True)
    return all(a == b and (torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y) for (a, x), (b, y) in pairs)


@pytest.mark.parametrize(
    ("name", "tag"),
    [
        ("E0_U1_S4", "E0_U1_S4"),
        ("U1", "E0_U1_S4"),
        ("best_model.val.accuracy", "E0_U1_S4"),
        ("best_model.val/accuracy", "E0_U1_S4"),
        ("best", "E0_U1_S4"),
        ("latest", "E0_U2_S8"),
        ("newest", "E0_U2_S8"),
    ],
)
@pytest.mark.parametrize("wrap", [lambda model: model, torch.compile, nn.DataParallel], ids=["plain", "compile", "dp"])
def test_any_name_and_any_wrapper(saved, name, tag, wrap):
    run, models = saved
    model = Model().eval()
    model.body.requires_grad_(requires_grad=False)
    manifest = run.load_into(wrap(model), name)
    assert (manifest.tag, str(manifest.iteration)) == (tag, tag)
    assert same(model, models[tag])
    assert torch.equal(model.table, models[tag].table)
    assert model.calls == models[tag].calls
    assert not model.training
    assert not model.body.weight.requires_grad


def test_averaged_weights(saved):
    run, models = saved
    model = Model()
    run.load_into(model, "latest", weights=AVERAGED)
    assert torch.equal(model.head.weight, 2 * models["E0_U2_S8"].head.weight)
    assert torch.equal(model.norm.running_mean, models["E0_U2_S8"].norm.running_mean)


@pytest.mark.parametrize(
    ("model", "arguments", "error", "text"),
    [
        (Model(4), {}, MismatchError, "parameter 'body.weight' has shape (3, 2) in the state and (4, 2) in the model"),
        (Model().double(), {}, MismatchError, "convert the model first, with model.to(torch.float32)"),
        (nn.Linear(2, 1), {}, MismatchError, "'body.weight' is not in the model"),
        (Model(), {"checkpoint": "E9"}, CheckpointError, "no checkpoint 'E9' in "),
        (Model(), {"checkpoint": "head"}, CheckpointError, "head has the weights below head only; "),
        (Model(), {"weights": "ema=0.99"}, CheckpointError, "no weights 'ema=0.99' are stored; stored: ema=0.9"),
    ],
    ids=["shape", "dtype", "names", "checkpoint", "part", "weights"],
)
def test_nothing_is_written_if_something_does_not_fit(saved, model, arguments, error, text):
    before = {name: copy.deepcopy(value) for name, value in model.state_dict().items()}
    with pytest.raises(error) as raised:
        saved[0].load_into(model, **arguments)
    assert text in str(raised.value)
    assert "--" not in str(raised.value)
    for name, value in model.state_dict().items():
        assert not isinstance(value, torch.Tensor) or torch.equal(value, before[name])


def test_a_damaged_checkpoint_is_named(tmp_path):
    model = nn.Linear(2, 1)
    with open_run(tmp_path / "run") as directory:
        state = TrainState.from_module(model).advance(samples=4)
        directory.interpreter([SaveCheckpoint(pointers=("latest",))], state, AfterUpdate(time_s=0.0))
    file = tmp_path / "run/checkpoints/E0_U1_S4/weights.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match=r"weights.safetensors is damaged"):
        noether.read_run(tmp_path / "run").load_into(model)
