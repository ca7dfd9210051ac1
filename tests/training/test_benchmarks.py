"""Every benchmark runs on a few updates, and prints its rows."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


QUICK = [
    ("session", ("--rounds", "2", "--updates", "2"), {"bare loop": 1, "Session": 1}),
    ("replay", ("--rounds", "2", "--updates", "200"), {"callbacks that decide": 1, "and two that look": 1}),
]
SLOW = [
    ("report", ("--rounds", "2", "--updates", "200"), {"read the log": 1, "read it and write the report": 1}),
    ("scaling", ("--rounds", "2"), {"1,000 callbacks": 2, "1,000,000,000 updates": 1}),
    ("ema", ("--rounds", "2", "--params", "1000"), {"torch": 1, "noether": 2}),
    ("step", ("--rounds", "2", "--updates", "2"), {"mutable loop": 2, "noether step": 4}),
    ("training", ("--rounds", "2", "--network", "small", "--epochs", "3"), {"bare loop": 2, "noether": 4}),
    ("dispatch", ("--rounds", "2"), {"noether": 3}),
    (
        "ranks",
        ("--rounds", "2", "--updates", "2", "--epochs", "1"),
        {"the job": 1, "noether's step": 3, "DDP, two ranks": 1, "rank 1": 1, "gradients": 2, "time of AfterEpoch": 2},
    ),
    ("memory", ("--rounds", "1", "--params", "1000"), {"mutable loop": 1, "noether": 2}),
    ("saving", ("--rounds", "2", "--params", "1000"), {"one copy": 1, "noether": 2}),
    ("checkpoint", ("--rounds", "2", "--params", "1000"), {"torch.save": 3, "distributed": 2, "noether": 2}),
    ("display", ("--rounds", "2", "--epochs", "2"), {"lines only": 1, "live display": 1}),
    ("startup", ("--rounds", "1"), {"noether --help": 1, "noether validate": 2, "import torch, every name": 1}),
]


@pytest.mark.parametrize(
    ("name", "arguments", "rows"), [*QUICK, *(pytest.param(*each, marks=pytest.mark.slow) for each in SLOW)]
)
def test_a_benchmark_measures(name, arguments, rows):
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", "--markdown", *arguments],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert {row: sum(line.startswith(f"| {row}") for line in lines) for row in rows} == rows


@pytest.mark.parametrize("name", [name for name, *_ in SLOW])
def test_the_names_of_a_benchmark_exist(monkeypatch, name):
    """What a benchmark imports from the package is there; the slow tests run it."""
    monkeypatch.syspath_prepend(ROOT)
    assert callable(importlib.import_module(f"benchmarks.{name}").main)
