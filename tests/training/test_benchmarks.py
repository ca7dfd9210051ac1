"""The benchmarks run, on a few updates: what they measure still exists, and does the same work."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_cost_of_a_step_is_measured():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.step", "--updates", "2", "--rounds", "2"],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if "noether step" in line or "mutable loop" in line]
    assert len(rows) == 6  # five, and the title
