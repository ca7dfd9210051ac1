"""Private APIs of torch: all in one file, and each of them works with the installed version."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from noether.core.tensors import torch_internals
from noether.core.tensors.torch_internals import self_test

PACKAGE = Path(torch_internals.__file__).parents[2]
PRIVATE = re.compile(r"\btorch\.(\w+\.)*_\w+|(?<!self)\._(cdata|version|buffers|parameters|execution_engine)\b")


def test_every_private_api_works_with_this_torch():
    assert self_test() == []


def test_the_self_test_names_what_is_broken_and_what_uses_it(monkeypatch):
    monkeypatch.setattr(torch_internals, "foreach_add_", lambda tensors, number: None)
    monkeypatch.setattr(torch_internals, "run_backward", lambda loss, leaves: 1 / 0)
    broken = self_test()
    assert len(broken) == 2
    assert broken[0].startswith(
        f"run_backward (gradients of the step on the CPU) does not work with torch {torch.__version__}"
    )
    assert broken[1].startswith(
        "foreach_add_, foreach_copy_, foreach_lerp, foreach_lerp_ (step counters of Adam, averages of weights, "
        "gradients of several ranks)"
    )
    assert "expected [[1.0], [2.0, 2.0]], got [[0.0], [1.0, 1.0]]" in broken[1]


def test_a_name_that_torch_lost_fails_when_it_is_called():
    lost = torch_internals._find("nn._lost")  # noqa: SLF001  # no installed torch lacks a name
    message = f"torch {re.escape(torch.__version__)} has no torch.nn._lost: install a version"
    with pytest.raises(RuntimeError, match=message):
        lost(1, key=2)


def test_the_command_ends_without_an_error_where_everything_works(capsys):
    runpy.run_path(torch_internals.__file__, run_name="__main__")
    assert capsys.readouterr() == (f"all private APIs work with torch {torch.__version__}\n", "")


def test_no_other_file_uses_private_apis_of_torch():
    files = [path for path in PACKAGE.rglob("*.py") if path != Path(torch_internals.__file__)]
    used = {
        f"{path.relative_to(PACKAGE)}: {found[0]}"
        for path in files
        for line in path.read_text().splitlines()
        if (found := PRIVATE.search(line))
    }
    assert used == set()


def test_importing_it_does_not_import_the_compiler():
    code = f"import {torch_internals.__name__}, sys; print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
