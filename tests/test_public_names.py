"""The public names of the package: listed once, imported at their first use, and the same for type checkers."""

import ast
import importlib.metadata
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import noether
from noether.core import callbacks
from noether.core.callbacks.registry import EXPORTS, SHIPPED
from noether.core.exports import read_exports

PUBLIC = {**read_exports("noether"), **SHIPPED}
ROOT = Path(noether.__file__).parents[1]


@pytest.mark.parametrize("export", PUBLIC.values(), ids=lambda export: export.name)
def test_a_name_is_what_its_module_defines(export):
    found = getattr(noether, export.name)
    assert found is getattr(import_module(export.module), export.name)
    assert getattr(found, "__module__", export.module) == export.module


def names_for_type_checkers(stub):
    """Return the names and modules that a type checker finds in a stub, and in the stubs that it imports whole."""
    found = {}
    for node in ast.parse(stub.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.names[0].name == "*":
            found |= names_for_type_checkers(ROOT / f"{node.module.replace('.', '/')}.pyi")
        elif isinstance(node, ast.ImportFrom):
            assert all(alias.asname == alias.name for alias in node.names), "only `X as X` is exported by a stub"
            found |= {alias.name: node.module for alias in node.names}
    return found


@pytest.mark.parametrize(("package", "exports"), [(noether, PUBLIC), (callbacks, EXPORTS)])
def test_type_checkers_find_the_same_names(package, exports):
    expected = {name: export.module for name, export in exports.items()}
    assert names_for_type_checkers(Path(package.__file__).with_suffix(".pyi")) == expected
    assert sorted(package.__all__) == sorted(expected)


def test_dir_shows_public_names_only():
    assert dir(noether) == sorted([*PUBLIC, "__version__"])
    assert dir(callbacks) == sorted(EXPORTS)


def test_the_version_is_that_of_the_distribution():
    assert noether.__version__ == importlib.metadata.version("noether")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("TrainStates", "; did you mean 'TrainState'?"),
        ("CheckpointCalback", "; did you mean 'CheckpointCallback'?"),
        ("Gate", "; there is noether.core.schedules.gate.Gate"),
        ("no_such_thing", ""),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(name, hint):
    assert not hasattr(noether, name)
    with pytest.raises(AttributeError) as refused:
        getattr(noether, name)
    assert str(refused.value) == f"module 'noether' has no attribute {name!r}{hint}"
    with pytest.raises(ImportError, match=f"cannot import name '{name}' from 'noether'"):
        exec(f"from noether import {name}")  # noqa: S102  # the names are from noether itself


def imported_modules(code):
    command = [sys.executable, "-c", f"{code}; import sys; print(*sys.modules)"]
    return set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())


def test_what_needs_no_torch_is_imported_without_it():
    assert (
        imported_modules("import noether, noether.core.callbacks.registry") & {"torch", "numpy", "noether.core.state"}
        == set()
    )
    assert "torch" not in imported_modules("from noether import EveryNEpochs, TrainingIteration, next_move")


def test_a_star_brings_every_name():
    modules = imported_modules("from noether import *; TrainState, log, when")
    assert {export.module for export in PUBLIC.values()} <= modules
