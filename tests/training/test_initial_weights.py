"""`run.init_from` takes weights from checkpoints and from files of torch and safetensors, under the names they have."""

import argparse
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tiny_runs import make_config
from torch import nn

from noether import AfterUpdate, SaveCheckpoint, TrainState, open_run
from noether.cli.main import main
from noether.config import ConfigError
from noether.config.init_settings import InitSettings
from noether.core.errors import SettingsError
from noether.effects import CheckpointError
from noether.training.initial_weights import load_weights
from noether.training.runs.train import train

WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.")


class Net(nn.Module):
    def __init__(self, classes=3, tie=False):  # noqa: FBT002  # a test's model
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, classes)
        if tie:
            self.head.weight = self.body.weight


def filled(model, value=7.0):
    return {name: torch.full_like(each, value) for name, each in model.state_dict().items()}


def prefixed(prefix, weights):
    return {prefix + name: each for name, each in weights.items()}


def save(path, content):
    if path.suffix == ".safetensors":
        save_file(content, path)
    else:
        torch.save(content, path)
    return path


def load(path, model=None, **more):
    model = model or Net()
    return load_weights(TrainState.from_module(model), InitSettings(path=str(path), **more), model)


def all_weights(state):
    return {**state.params, **state.buffers}


def are_filled(state, names=None, value=7.0):
    weights = all_weights(state)
    return all(bool((each == value).all()) for name, each in weights.items() if names is None or name in names)


@pytest.mark.parametrize("name", ["w.pt", "w.pth.tar", "W.PTH", "w", "w.bin", "w.ckpt", "w.safetensors"])
def test_a_file_with_a_state_dict_gives_all_weights(tmp_path, name):
    state, line = load(save(tmp_path / name, filled(Net())))
    assert are_filled(state)
    assert line == f"starts from {tmp_path / name}: 9 tensors taken"


@pytest.mark.parametrize("name", ["weights.safetensors", "model.safetensors", "pytorch_model.bin"])
def test_a_directory_gives_the_weights_in_its_file(tmp_path, name):
    save(tmp_path / name, filled(Net()))
    assert are_filled(load(tmp_path)[0])
    link = tmp_path / "link"
    link.mkdir()
    (link / name).symlink_to(tmp_path / name)  # as in a cache of downloads
    assert are_filled(load(link)[0])


@pytest.mark.parametrize("whole", ["model.safetensors", "pytorch_model.bin"])
def test_a_directory_gives_the_weights_in_several_files(tmp_path, whole):
    weights = filled(Net())
    names = {name: f"{index % 2}-{whole}" for index, name in enumerate(weights)}
    for file in set(names.values()):
        save(tmp_path / file, {name: each for name, each in weights.items() if names[name] == file})
    index = tmp_path / f"{whole}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": names}))
    assert are_filled(load(tmp_path)[0])
    for wrong in (f"2-{whole}", index.name):
        index.write_text(json.dumps({"weight_map": {**names, "head.bias": wrong}}))
        with pytest.raises(CheckpointError, match=f"lists '{wrong}', which is no file of weights in its directory"):
            load(tmp_path)
    index.write_text("{}")
    with pytest.raises(CheckpointError, match="does not list files of weights"):
        load(tmp_path)


@settings(max_examples=30)
@given(st.lists(st.sampled_from(WRAPPERS), max_size=3).map("".join), st.sampled_from(["", "net.", "a.b."]))
def test_parts_of_names_that_wrappers_and_prefixes_add_are_removed(tmp_path_factory, wrapper, prefix):
    weights = prefixed(wrapper + prefix, filled(Net()))
    if prefix:
        weights["other.weight"] = torch.zeros(1)
    path = save(tmp_path_factory.mktemp("w") / "w.safetensors", weights)
    if wrapper and prefix:  # a wrapper is in all names only if no other name is in the file
        del weights["other.weight"]
        save(path, weights)
    for written in {prefix, prefix.rstrip(".")}:
        assert are_filled(load(path, prefix=written)[0])


def test_a_part_that_the_model_has_itself_is_no_wrapper(tmp_path):
    model = nn.ModuleDict({"module": nn.Linear(2, 2)})
    path = save(tmp_path / "w.pt", filled(model))
    assert are_filled(load(path, nn.ModuleDict({"module": nn.Linear(2, 2)}))[0])
    with pytest.raises(CheckpointError, match=r"'module.weight' is not in the model.*'weight' is not in the file"):
        # not in all names
        load(save(tmp_path / "w.pt", {"module.weight": torch.ones(2, 2), "bias": torch.ones(2)}), nn.Linear(2, 2))


CONTAINERS = {
    "state_dict": lambda w: {"state_dict": w, "epoch": 3, "hyper_parameters": {"lr": 0.1}},
    "model": lambda w: {
        "model": w,
        "ema": filled(Net(), 1.0),
        "optimizer": {"state": {"w": {"exp_avg": w["body.bias"]}}},
    },
    "model_state_dict": lambda w: {"epoch": 3, "model_state_dict": w, "loss": torch.zeros(())},
    "nested.weights": lambda w: {"nested": {"weights": w}},
}


@pytest.mark.parametrize("key", CONTAINERS)
def test_the_state_dict_in_a_container_is_taken_and_named(tmp_path, key):
    path = save(tmp_path / "w.pt", CONTAINERS[key](filled(Net())))
    state, line = load(path)
    assert are_filled(state)
    assert line == f"starts from {path} ({key!r} in it): 9 tensors taken"


def test_one_of_several_state_dicts_is_chosen_by_its_key(tmp_path):
    path = save(tmp_path / "w.pt", {"student": filled(Net(), 1.0), "teacher": filled(Net())})
    with pytest.raises(CheckpointError, match="several state dicts: write key: with one of 'student', 'teacher'"):
        load(path)
    assert are_filled(load(path, key="teacher")[0])
    with pytest.raises(CheckpointError, match=r"no state dict 'techer'; it has 'student', .*; did you mean 'teacher'"):
        load(path, key="techer")
    with pytest.raises(CheckpointError, match="key: 'x' is for files of torch"):
        load(save(tmp_path / "w.safetensors", filled(Net())), key="x")


REFUSED = {
    "a whole model": (lambda path: torch.save(Net(), path), r"more than tensors \(.*Net\).* convert it .* torch.save"),
    "other objects": (
        lambda path: torch.save({"state_dict": {}, "args": argparse.Namespace()}, path), r"\(argparse.Namespace\)"
    ),
    "a program": (lambda path: torch.jit.save(torch.jit.script(nn.Linear(2, 1)), path), "a TorchScript program"),
    "text": (lambda path: path.write_text("text"), "w.pt is no file that torch saved"),
    "nothing": (lambda path: path.write_text(""), "w.pt is no file that torch saved"),
    "no state dict": (lambda path: torch.save({"epoch": 3}, path), "but a mapping with epoch: save model"),
    "a tensor": (lambda path: torch.save(torch.ones(1), path), "no state dict, but Tensor: save model.state_dict"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.torch.jit")
@pytest.mark.parametrize("what", REFUSED)
def test_a_file_without_plain_weights_is_refused_in_one_line(tmp_path, what):
    write, why = REFUSED[what]
    write(tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=why) as error:
        load(tmp_path / "w.pt")
    assert "\n" not in str(error.value)


def test_a_damaged_or_missing_file_is_refused(tmp_path):
    path = save(tmp_path / "w.safetensors", filled(Net()))
    with pytest.raises(CheckpointError, match=r"there is no such file; did you mean 'w.safetensors'"):
        load(tmp_path / "v.safetensors")
    with pytest.raises(CheckpointError, match=r"there is no such file$"):
        load(tmp_path / "best.pth.tar")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"w.safetensors is no safetensors file"):
        load(path)
    with pytest.raises(
        CheckpointError, match=r"has none of weights.safetensors, .*; give the file, such as .*w.safetensors$"
    ):
        load(tmp_path)


def test_a_new_head_starts_as_initialized(tmp_path):
    path, model = save(tmp_path / "w.pt", filled(Net(classes=10))), Net()
    first = TrainState.from_module(model).params["head.weight"].clone()
    with pytest.raises(CheckpointError) as error:
        load(path, model)
    written = str(error.value).partition("write init_from: ")[2]
    assert "parameter 'head.weight' has shape (10, 2) in the file and (3, 2) in the model" in str(error.value)
    assert yaml.safe_load(written) == {"path": str(path), "leave_out": ["head.*"]}
    state, line = load(path, model, leave_out=("head.*",))
    assert torch.equal(state.params["head.weight"], first)
    assert are_filled(state, set(all_weights(state)) - {"head.weight", "head.bias"})
    assert line == f"starts from {path}: 7 tensors taken; left as initialized: head.weight, head.bias"


@settings(max_examples=40)
@given(st.sets(st.sampled_from(sorted(Net().state_dict()))), st.sets(st.sampled_from(["fc.weight", "fc.bias", "x"])))
def test_the_settings_that_an_error_suggests_make_the_weights_fit(tmp_path_factory, missing, unexpected):
    weights = {name: each for name, each in filled(Net()).items() if name not in missing}
    assume(weights)
    path = save(tmp_path_factory.mktemp("w") / "w.pt", {**weights, **{name: torch.zeros(1) for name in unexpected}})
    if not missing | unexpected:
        assert are_filled(load(path)[0])
        return
    with pytest.raises(CheckpointError) as error:
        load(path)
    text = str(error.value)
    assert all(repr(name) in text for name in missing | unexpected) or " more; to " in text
    written = yaml.safe_load(text.partition("write init_from: ")[2])
    state, line = load(path, leave_out=tuple(written["leave_out"]))
    assert line.startswith(f"starts from {path}: {len(weights)} tensors taken")
    assert are_filled(state, weights)


def test_a_prefix_that_is_missing_is_named(tmp_path):
    path = save(tmp_path / "w.pt", {**prefixed("net.", filled(Net())), "loss.scale": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"write init_from: \{path: .*w.pt, prefix: \"net.\"\}"):
        load(path)
    assert load(path, prefix="net.")[1] == f"starts from {path}: 9 tensors taken; 1 outside of the prefix"
    with pytest.raises(SettingsError, match=r"prefix: no name in the file starts with 'nets.'; .* did you mean 'net.'"):
        load(path, prefix="nets.")


def written_in(error):
    return yaml.safe_load(str(error.value).partition("write init_from: ")[2])


def test_a_prefix_and_a_new_head_are_found_together(tmp_path):
    path = save(tmp_path / "w.pt", prefixed("net.", filled(Net(classes=10))))
    with pytest.raises(CheckpointError, match=r"to take the names .* with 'net.' and start without head.\*") as error:
        load(path)
    assert written_in(error) == {"path": str(path), "prefix": "net.", "leave_out": ["head.*"]}
    assert load(path, prefix="net.", leave_out=("head.*",))[1].startswith(f"starts from {path}: 7 tensors taken")


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_file_of_a_sub_module_is_taken_into_it(tmp_path, prefix):
    weights = {**filled(nn.BatchNorm1d(2)), "fc.weight": torch.ones(1)}
    path = save(tmp_path / "w.pt", prefixed(prefix, weights))
    if not prefix:
        with pytest.raises(CheckpointError, match=r"; to take them into 'norm' and start without norm.fc.*") as error:
            load(path)
        assert written_in(error) == {"path": str(path), "into": "norm", "leave_out": ["norm.fc.*"]}
    state, line = load(path, into="norm", leave_out=("norm.fc.*",))
    assert are_filled(state, {name for name in all_weights(state) if name.startswith("norm.")})
    assert not are_filled(state, {"body.bias"})
    assert line == (
        f"starts from {path}: 5 tensors taken; left as initialized: body.weight, body.bias, head.weight, head.bias; "
        "left out of the file: norm.fc.weight"
    )
    with pytest.raises(SettingsError, match=r"into: 'nrom' names no .*; the model has .*; did you mean 'norm'"):
        load(path, into="nrom")


def test_a_file_is_taken_into_a_module_with_a_tied_weight(tmp_path):
    path = save(tmp_path / "w.pt", filled(nn.Linear(2, 2)))
    state, _ = load(path, Net(classes=2, tie=True), into="head")
    assert are_filled(state, {"body.weight", "head.bias"})
    assert not are_filled(state, {"body.bias"})


def test_a_pattern_that_matches_nothing_is_refused(tmp_path):
    path = save(tmp_path / "w.pt", filled(Net()))
    with pytest.raises(SettingsError, match=r"leave_out.0: 'head' matches no .*; write 'head.\*' for all below it"):
        load(path, leave_out=("head",))
    with pytest.raises(SettingsError, match=r"leave_out.1: 'haed.weight' matches no .*; did you mean 'head.weight'"):
        load(path, leave_out=("head.*", "haed.weight"))
    with pytest.raises(CheckpointError, match="leaves nothing to take"):
        load(path, leave_out=("*",))


def test_only_a_conversion_that_loses_nothing_is_made(tmp_path):
    half = {name: each.half() if each.is_floating_point() else each for name, each in filled(Net()).items()}
    state, _ = load(save(tmp_path / "w.pt", half))
    assert are_filled(state)
    assert {each.dtype for each in state.params.values()} == {torch.float32}
    double = {name: each.double() if each.is_floating_point() else each for name, each in filled(Net()).items()}
    with pytest.raises(CheckpointError, match=r"'body.bias' is torch.float64 in the file and torch.float32 in"):
        load(save(tmp_path / "w.pt", double))


def test_tied_weights_may_have_any_or_all_of_their_names(tmp_path):
    tied = filled(Net(classes=2))
    for left_out in ("head.weight", "body.weight", None):
        weights = {name: each for name, each in tied.items() if name != left_out}
        assert are_filled(load(save(tmp_path / "w.pt", weights), Net(2, tie=True))[0])
    with pytest.raises(CheckpointError, match=r"'body.weight' and 'head.weight' have different values, and are one"):
        load(save(tmp_path / "w.pt", tied | {"head.weight": torch.zeros(2, 2)}), Net(2, tie=True))
    with pytest.raises(SettingsError, match=r"leave_out: 'head.weight' is tied to 'body.weight' in the model"):
        load(save(tmp_path / "w.pt", tied), Net(2, tie=True), leave_out=("head.*",))


class Counting(nn.Linear):
    calls = 0

    def get_extra_state(self):
        return {"calls": self.calls}

    def set_extra_state(self, state):
        self.calls = state["calls"]


def test_extra_state_in_a_file_of_torch_is_taken(tmp_path):
    saved, model = nn.Sequential(Counting(2, 2)), nn.Sequential(Counting(2, 2))
    saved[0].calls = 5
    path = save(tmp_path / "w.pt", prefixed("module.", saved.state_dict()))
    assert load(path, model)[0].extra_state == {"0": {"calls": 5}}
    assert "as initialized: 0._extra_state" in load(save(path, nn.Sequential(nn.Linear(2, 2)).state_dict()), model)[1]
    with pytest.raises(
        CheckpointError, match=r"extra state '0._extra_state' is not in the model; .*\[\"0._extra_state\"\]"
    ):
        load(save(path, saved.state_dict()), nn.Sequential(nn.Linear(2, 2)))


class Growing(nn.Module):
    """Has a cache that no checkpoint has, a buffer that forward makes, and one that it makes longer."""

    def __init__(self, length=2):
        super().__init__()
        self.lin = nn.Linear(2, 2)
        self.register_buffer("table", torch.ones(length), persistent=False)
        self.register_buffer("scale", None)
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x):
        self.scale = torch.full((3,), 5.0)
        self.seen = torch.cat([self.seen, torch.ones(1)])
        return self.lin(x)


def test_buffers_that_forward_makes_are_taken_and_caches_are_not(tmp_path):
    model = Growing()
    model(torch.ones(1, 2))
    weights = model.state_dict()
    path = save(tmp_path / "w.pt", {**weights, "table": torch.zeros(8)})
    with pytest.raises(CheckpointError, match=r"'seen' has shape \(2,\) in the file and \(1,\) in the model"):
        load(path, Growing(16))
    state, line = load(path, Growing(16), leave_out=("seen",))
    assert state.buffers["scale"].tolist() == [5.0] * 3
    assert line == f"starts from {path}: 3 tensors taken; left as initialized: seen"
    trained = Growing()
    saved = TrainState.from_module(trained)
    trained(torch.ones(1, 2))
    with open_run(tmp_path / "run") as directory:
        directory.interpreter([SaveCheckpoint(tag="x")], saved.advance(samples=1), AfterUpdate(samples=1))
    state, _ = load(tmp_path / "run/checkpoints/x", Growing(16))
    assert {name: each.tolist() for name, each in state.buffers.items()} == {"scale": [5.0] * 3, "seen": [0.0, 1.0]}
    assert torch.equal(state.non_persistent["table"], torch.ones(16))


def invoke(*arguments, code=0):
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == code, result.output
    return result.output


def tiny(init_from, **more):
    config = make_config(max_epochs=1, optimizer={"lr": 0.0})
    return config | {"run": {**config["run"], "init_from": init_from}, **more}


def test_a_run_starts_from_its_own_files_and_keeps_the_setting_as_written(tiny_module):
    torch.save({"net.weight": torch.full((1, 2), 7.0), "net.bias": torch.zeros(1)}, "pre.pt")
    setting = {"path": "pre.pt", "prefix": "net.", "leave_out": ["bias"]}
    run = train(tiny(setting))
    assert run.state.params["weight"].tolist() == [[7.0, 7.0]]
    assert yaml.safe_load((run.directory / "config.yaml").read_text())["run"]["init_from"] == setting
    newest = run.directory / "checkpoints/newest"
    for source in (newest, run.directory / "checkpoints/last", newest.parent / "E1_U2_S8/weights.safetensors"):
        again = train(tiny(str(source)))
        assert again.state.params["weight"].tolist() == [[7.0, 7.0]]
        assert yaml.safe_load((again.directory / "config.yaml").read_text())["run"]["init_from"] == str(source)
    copy = Path("elsewhere")
    shutil.copytree(run.directory / "checkpoints/E1_U2_S8", copy)
    (copy / "MANIFEST.json").unlink()
    assert train(tiny(copy)).state.params["weight"].tolist() == [[7.0, 7.0]]
    with pytest.raises(ConfigError, match=r"run.init_from: 'out/tiny/.*': it is a whole run: .*/checkpoints/newest"):
        train(tiny(str(run.directory)))
    with pytest.raises(ConfigError, match=r"it is a folder of checkpoints: .* such as .*/checkpoints/newest"):
        train(tiny(str(run.directory / "checkpoints")))
    Path("pre.pt").unlink()
    assert train(resume=run.directory, overrides=["trainer.max_epochs=2"]).finished


@pytest.mark.parametrize("command", [["validate"], ["plan"], ["train", "--smoke"], ["train"]], ids=" ".join)
def test_each_command_checks_the_file_before_it_writes_anything(tiny_module, command):
    Path("tiny.yaml").write_text(yaml.safe_dump(tiny({"path": "pre.pt", "leave_out": ["bais"]}), sort_keys=False))
    line = next(n for n, text in enumerate(Path("tiny.yaml").read_text().splitlines(), 1) if "bais" in text)
    torch.save({"weight": torch.ones(1, 2), "bias": torch.ones(1)}, "pre.pt")
    output = invoke(*command, "tiny.yaml", code=2)
    assert output.startswith(
        f"Error: tiny.yaml:{line}: run.init_from.leave_out[0]: 'bais' matches no name in the model"
    )
    output = invoke(*command, "tiny.yaml", "--set", "run.init_from=pre.pth", code=2)
    assert "run.init_from: 'pre.pth': there is no such file; did you mean 'pre.pt'?\n" in output
    assert not Path("out").exists()
    output = invoke(*command, "tiny.yaml", "--set", "run.init_from=pre.pt")
    assert ("starts from pre.pt: 2 tensors taken" in output) == (command in (["train"], ["validate"]))


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (3, "3 is not a path, and not a mapping such as {path: pre.pt, prefix: net.}"),
        ({"paht": "pre.pt"}, r"run.init_from.paht: .*did you mean 'path'"),
        ({"path": ""}, "run.init_from.path: '' is not a path"),
        ({"path": "a.pt", "leave_out": "head.*"}, "run.init_from.leave_out: 'head.*' is not a list"),
        ({"path": "a.pt", "leave_out": ["a", "a"]}, "run.init_from.leave_out: .* has duplicates"),
    ],
)
def test_wrong_settings_are_refused(tiny_module, value, why):
    with pytest.raises(ConfigError, match=why):
        train(tiny(value))
