"""The names of the package: imported when they are asked for, and the same for whoever reads and whoever runs."""

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import noether

SOURCE = Path(noether.__file__).read_text()


@pytest.mark.parametrize("name", noether.__all__)
def test_a_name_is_what_its_module_defines(name):
    found = getattr(noether, name)
    assert found is getattr(import_module(noether._HOMES[name]), name)  # noqa: SLF001  # the table is what is tested
    assert getattr(found, "__module__", noether._HOMES[name]) == noether._HOMES[name]  # noqa: SLF001


def test_a_type_checker_reads_what_is_imported():
    (block,) = [node for node in ast.parse(SOURCE).body if isinstance(node, ast.If) and isinstance(node.test, ast.Name)]
    read = {alias.name: node.module for node in block.body for alias in node.names}
    assert read == noether._HOMES  # noqa: SLF001
    assert sorted(read) == sorted(noether.__all__)


def test_every_name_is_listed():
    assert set(noether.__all__) <= set(dir(noether))


def test_a_name_that_there_is_not():
    assert not hasattr(noether, "TrainStates")
    with pytest.raises(AttributeError, match="module 'noether' has no attribute 'TrainStates'"):
        noether.TrainStates  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'TrainStates' from 'noether'"):
        from noether import TrainStates  # noqa: F401


def loaded_by(code):
    command = [sys.executable, "-c", f"{code}; import sys; print(*sys.modules)"]
    return set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())


def test_what_needs_no_torch_is_imported_without_it():
    assert loaded_by("import noether") & {"torch", "noether.core"} == set()
    assert "torch" not in loaded_by("from noether import EveryNEpochs, TrainingIteration, next_move")


def test_a_star_brings_every_name():
    modules = loaded_by("from noether import *; TrainState, log, when")
    assert {*noether._HOMES.values()} <= modules  # noqa: SLF001
