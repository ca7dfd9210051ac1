"""Imports go down, never up."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "noether"
FILES = sorted(ROOT.rglob("*.py"))

# The rooms from the ground up: a module imports its own room, and all rooms of the levels below except those left out.
LEVELS = (
    ("core",),
    ("core.callbacks",),
    ("effects",),
    ("distributed", "config"),
    ("session", "testing"),
    ("training",),
    ("planning",),
    ("integrations", "reports"),
    ("cli",),
)
LEFT_OUT = {
    "effects": {"core.callbacks"},
    "session": {"config"},
    "testing": {"config"},
    "planning": {"session"},
    "integrations": {"training", "planning"},
    "cli": {"integrations"},
}
"""Beside `testing`, which no room imports."""


def allowed_imports():
    """Return the rooms that a module of each room imports, by room."""
    allowed, below = {}, set()
    for level in LEVELS:
        allowed |= {room: below - {"testing"} - LEFT_OUT.get(room, set()) for room in level}
        below |= {*level}
    allowed |= {"docs": {"cli"}, "examples": {"core"}}
    inner_first = sorted(allowed, key=len, reverse=True)  # a module of `core.callbacks` is in `core`, too
    return {f"noether.{room}": {f"noether.{each}" for each in allowed[room]} for room in inner_first}


ROOMS = allowed_imports()


def room_of(module):
    return next((room for room in ROOMS if module == room or module.startswith(f"{room}.")), None)


def module_of(path):
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield node.module


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_go_down(path):
    room = room_of(module_of(path))
    for module in imported(path):
        other = room_of(module)
        if room is not None and other not in {None, room}:
            assert other in ROOMS[room], f"{module_of(path)} is in {room} and imports {module}"


def test_every_module_has_a_room():
    assert {module_of(path) for path in FILES if room_of(module_of(path)) is None} == {"noether", "noether.__main__"}


def test_core_does_not_touch_the_world():
    forbidden = {"os", "io", "pathlib", "time", "socket", "subprocess", "random", "logging", "tempfile", "shutil"}
    for path in FILES:
        if room_of(module_of(path)) in {"noether.core", "noether.core.callbacks"}:
            assert not forbidden & {module.partition(".")[0] for module in imported(path)}, path


def test_importing_the_core_brings_no_outer_room():
    code = "import noether; from noether.core.callbacks import *; import noether.core.reducer, sys; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = run.stdout.split()
    assert "noether.core.reducer" in loaded
    outer = [room for room in ROOMS if not room.startswith("noether.core")]
    assert [module for module in loaded if room_of(module) in outer] == []


def test_a_framework_is_imported_by_its_own_adapter_only():
    frameworks = {"lightning", "ignite", "transformers", "accelerate", "keras", "torchmetrics"}
    code = "import noether, noether.integrations, noether.session.session, sys; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = run.stdout.split()
    assert "noether.session.session" in loaded
    assert not frameworks & set(loaded)
    for path in FILES:
        found = frameworks & {module.partition(".")[0] for module in imported(path)}
        assert not found or room_of(module_of(path)) == "noether.integrations", path


def test_nothing_unpickles():
    for path in FILES:
        text = path.read_text()
        assert not {"pickle", "shelve", "marshal"} & set(imported(path)), path
        calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
        loads = [call for call in calls if ast.unparse(call.func) in {"torch.load", "torch.serialization.load"}]
        assert not loads or path.name == "weight_files.py", path
        assert "from torch import load" not in text, path
        assert all("weights_only=True" in map(ast.unparse, call.keywords) for call in loads), path
        assert "yaml.load(" not in text, path
        assert "allow_pickle=True" not in text, path
