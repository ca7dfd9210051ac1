# ruff: noqa: E501 - a payload stays in one piece
"""The command line refuses runs and configurations that were made to do harm, with a message and an exit code."""

import hashlib
import io
import os
import pickle
from dataclasses import replace

import pytest
import torch
from audit import dangerous_events, record_audit
from command import PATIENCE_S, SMALL, invoke, noether, start

from noether.effects.checkpoints.manifest import Manifest, Part


class Executed:
    """Creates a directory when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


def torch_file():
    content = io.BytesIO()
    torch.save({"w": Executed()}, content)
    return content.getvalue()


def forge(run, name, content):
    """Replace one file of every checkpoint, and correct sizes, hashes and pointers."""
    checkpoints = run / "checkpoints"
    tags = {path.parent.name for path in checkpoints.glob("*/MANIFEST.json")}
    pointers = [path for path in checkpoints.iterdir() if path.is_file()]
    for tag in tags:
        path = checkpoints / tag / "MANIFEST.json"
        manifest = Manifest.loads(path.read_text())
        part = Part(size_bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
        changed = replace(manifest, parts={**manifest.parts, name: part})
        (checkpoints / tag / name).write_bytes(content)
        path.write_text(changed.dumps())
        for pointer in pointers:
            pointer.write_text(pointer.read_text().replace(manifest.sha256, changed.sha256))
    return tags


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("weights.safetensors", torch_file()),
        ("state.json", b'{"a":' * 100_000),
        ("state.json", pickle.dumps(Executed())),
        ("optimizer.safetensors", (2**63).to_bytes(8, "little")),
    ],
    ids=["torch", "deep", "pickle", "header"],
)
def test_a_hostile_checkpoint_is_named_in_one_line(finished_run, tmp_path, name, content):
    tags = forge(finished_run, name, content)
    with record_audit() as events:
        evaluated = invoke("eval", "out/small/" + finished_run.name, cwd=tmp_path, code=1)
        resumed = invoke("train", "--resume", "out/small/" + finished_run.name, cwd=tmp_path, code=1)
    assert [event for event, _ in dangerous_events(events) if "pickle" in event or "os.system" in event] == []
    assert evaluated.startswith(f"Error: out/small/{finished_run.name}/checkpoints/")
    assert " does not hold a state: " in evaluated
    first, *reasons = resumed.splitlines()
    assert first.startswith(f"Error: the run cannot resume from any of the {len(tags)} checkpoints in ")
    assert len(reasons) == len(tags)
    assert all(name in line for line in (evaluated, *reasons))
    assert not (tmp_path / "executed").exists()


def test_a_hostile_run_in_separate_processes(finished_run, tmp_path):
    run = f"out/small/{finished_run.name}"
    forge(finished_run, "weights.safetensors", torch_file())
    for process in [start(*argv, cwd=tmp_path) for argv in (["eval", run], ["train", "--resume", run])]:
        output, errors = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 1
        assert "Traceback" not in output + errors
        assert "weights.safetensors: SafetensorError: " in errors
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("noether.examples.digits.ConvNet", "!!python/object/apply:os.mkdir [executed]", "the tag !!python/object/apply:os.mkdir is refused"),
        ("noether.examples.digits.ConvNet", "os.system", "'os' is not an allowed prefix"),
        ("noether.examples.digits.cross_entropy", "torch.hub.urlopen", "'urllib' is not an allowed prefix"),
        ("run:\n", "allow: [os]\nrun:\n", "allow: unknown setting"),
        ("width: 4", f"width: {'[' * 90}1{']' * 90}", "is not a whole number"),
        ("width: 4", f"width: 0x{'f' * 5000}", "does not fit its tag !!int"),
        ("output: out", 'output: "a\\0b"', "cannot be the name of a file"),
        ("output: out", 'output: "\\ud800"', "does not fit its tag !!str"),
    ],
)  # fmt: skip
def test_a_hostile_configuration_is_named_in_one_line(tmp_path, old, new, message):
    (tmp_path / "hostile.yaml").write_text(SMALL.replace(old, new, 1))
    for command in ("train", "validate"):
        output = invoke(command, "hostile.yaml", cwd=tmp_path, code=2)
        assert output.startswith("Error: hostile.yaml:")
        assert message in output
    assert [path.name for path in tmp_path.iterdir()] == ["hostile.yaml"]


def test_a_hostile_configuration_in_a_separate_process(tmp_path):
    text = SMALL.replace("noether.examples.digits.ConvNet", "torch.fx.graph_module.reduce_graph_module", 1)
    code = 'import_block: "import os; os.mkdir(\'executed\')\\n"\n  body: {_code: "def forward(self): pass"}'
    (tmp_path / "hostile.yaml").write_text(text.replace("width: 4\n  dropout: 0.2", code))
    done = noether("train", "hostile.yaml", cwd=tmp_path, code=2)
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith(
        "Error: hostile.yaml:5: model.kind: 'torch.fx.graph_module.reduce_graph_module' is a function"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["hostile.yaml"]


@pytest.mark.parametrize("command", [["eval"], ["train", "--resume"]], ids=["eval", "resume"])
def test_a_hostile_configuration_in_a_run(finished_run, tmp_path, command):
    path = finished_run / "config.yaml"
    path.write_text(path.read_text().replace("noether.examples.digits.ConvNet", "!!python/name:os.system"))
    output = invoke(*command, f"out/small/{finished_run.name}", cwd=tmp_path, code=2)
    assert output.startswith(f"Error: out/small/{finished_run.name}/config.yaml:")
    assert "the tag !!python/name:os.system is refused" in output


def test_a_named_pipe_as_configuration_does_not_block(finished_run, tmp_path):
    (finished_run / "config.yaml").unlink()
    os.mkfifo(finished_run / "config.yaml")
    output = invoke("eval", f"out/small/{finished_run.name}", cwd=tmp_path, code=2)
    assert "is not the directory of a run" in output
