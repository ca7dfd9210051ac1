"""The benchmarks run, on a few updates: what they measure still exists, and does the same work."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("name", "arguments", "row", "rows"),
    [
        ("step", ("--updates", "2", "--rounds", "2"), ("noether step", "mutable loop"), 7),  # six, and the title
        (
            "checkpoint",
            ("--params", "1000", "--rounds", "2"),
            ("noether", "torch.save", "distributed"),
            8,
        ),  # seven, and the heading
        ("replay", ("--updates", "200", "--rounds", "2"), ("callbacks that decide", "look at every update"), 2),
        ("startup", ("--rounds", "2"), ("noether --help", "noether validate", "every name"), 4),
    ],
)
def test_a_benchmark_measures(name, arguments, row, rows):
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", *arguments],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len([line for line in done.stdout.splitlines() if any(each in line for each in row)]) == rows
