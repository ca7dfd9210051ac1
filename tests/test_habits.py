"""Lint, format and types, so that `pytest` is every check there is."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "command", [["ruff", "check"], ["ruff", "format", "--check"], ["mypy"]], ids=["lint", "format", "types"]
)
def test_habit(command):
    run = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


TYPED = """
from noether import CheckpointCallback, TrainState, open_run
from noether.core.callbacks import ETA, PeriodicCallback
reveal_type(TrainState().iteration.epoch)
reveal_type(CheckpointCallback(every_n_epochs=1).keep)
reveal_type(ETA(every_n_epochs=1).interval_name)
TrainState().epochs
"""


def test_a_type_checker_knows_the_types(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(TYPED)
    command = [
        sys.executable,
        "-m",
        "mypy",
        str(file),
    ]  # with the settings of this checkout, and the cache of the test before
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert [line.partition("mine.py:")[2] for line in run.stdout.splitlines()[:-1]] == [
        '4: note: Revealed type is "int"',
        '5: note: Revealed type is "int | None"',
        '6: note: Revealed type is "str"',
        '7: error: "TrainState" has no attribute "epochs"  [attr-defined]',
    ]


def test_top_level_holds_nothing_else():
    expected = {"pyproject.toml", "README.md", "noether", "tests", "configs", "benchmarks"}
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    tracked = subprocess.run([git, "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    tops = {line.partition("/")[0] for line in tracked.splitlines()}
    assert {top for top in tops if not top.startswith(".")} <= expected
