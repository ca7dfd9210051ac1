"""Start-up time that noether adds to the import of torch, and of commands that do not import torch.

Run as `python -m benchmarks.startup`. Each row is a fresh process, timed from its start to its end. All rows take
turns; a ratio is taken within each round, and the table shows medians over rounds with quartiles. The time of an import
beyond torch is measured inside the process, after the import of torch: between processes it would be lost in the noise.
noether imports its names lazily, so the row that imports every name is the one that counts. A valid configuration has
an optimizer, and torch imports its compiler to create the first one; a row shows that, too.

Goals: less than 50 ms beyond the import of torch; help and early errors in a tenth of the time of importing torch.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import click

from benchmarks.measurement import Table, markdown_option, quartiles, show

_ROOT = Path(__file__).parents[1]
_TORCH = "import torch"
_TIMED = "import torch, time; start_s = time.perf_counter(); {}; print(time.perf_counter() - start_s)"
# Bytecode is cached, as for any program that is started more than once.
_ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


class Row(NamedTuple):
    """A process to start.

    Args:
        arguments: Arguments of Python.
        exit_code: Expected exit code.
        prints_seconds: Whether the process measures a part of its work and prints the seconds.
    """

    arguments: tuple[str, ...]
    exit_code: int = 0
    prints_seconds: bool = False


class Times(NamedTuple):
    """Seconds of one process from start to end, and the seconds that it measured inside."""

    whole_s: float
    beyond_s: float | None


def rows(bad: Path) -> dict[str, Row]:
    """Return the measured processes; `bad` is a configuration that is refused before any class is imported."""
    return {
        "python -c pass": Row(("-c", "pass")),
        _TORCH: Row(("-c", _TORCH)),
        "import torch, noether": Row(("-c", _TIMED.format("import noether")), prints_seconds=True),
        "import torch, every name of noether": Row(("-c", _TIMED.format("from noether import *")), prints_seconds=True),
        "import noether": Row(("-c", "import noether")),
        "import torch, make an optimizer": Row(("-c", f"{_TORCH}; torch.optim.SGD([torch.zeros(1)])")),
        "noether --help": Row(("-m", "noether", "--help")),
        "noether validate BAD": Row(("-m", "noether", "validate", str(bad)), exit_code=2),
        "noether validate configs/digits.yaml": Row(("-m", "noether", "validate", "configs/digits.yaml")),
    }


def time_process(row: Row) -> Times:
    """Run a process and return its times.

    Raises:
        click.ClickException: If the process has another exit code than expected.
    """
    command = [sys.executable, *row.arguments]
    start_s = time.perf_counter()
    process = subprocess.run(command, cwd=_ROOT, env=_ENVIRONMENT, capture_output=True, text=True, check=False)  # noqa: S603  # our own command
    whole_s = time.perf_counter() - start_s
    if process.returncode != row.exit_code:
        raise click.ClickException(f"{' '.join(command)} ended with {process.returncode}:\n{process.stderr}")
    return Times(whole_s, float(process.stdout) if row.prints_seconds else None)


def measure(processes: dict[str, Row], rounds: int) -> list[dict[str, Times]]:
    """Return the times of every row in each round."""
    measured = [
        {name: time_process(row) for name, row in processes.items()} for _ in range(rounds + 1 if rounds > 1 else 1)
    ]
    return measured[-rounds:]  # the first of several rounds warms up


@click.command(help=__doc__)
@click.option("--rounds", default=10, show_default=True, type=click.IntRange(min=1), help="Rounds measured.")
@markdown_option
def main(rounds: int, *, markdown: bool) -> None:
    """Measure and print the table."""
    with tempfile.TemporaryDirectory() as folder:
        bad = Path(folder) / "bad.yaml"
        bad.write_text("modle: {}\n")
        measured = measure(rows(bad), rounds)
    headings = ("", "ms", f"/ {_TORCH}", "beyond torch, ms", f"beyond torch / {_TORCH}")
    title = f"Start-up; torch {version('torch')}, Python {sys.version.split()[0]}"
    show(Table(title, headings, [(name, *_cells(name, measured)) for name in measured[0]]), markdown=markdown)


def _cells(name: str, measured: list[dict[str, Times]]) -> tuple[str, ...]:
    whole_ms = [each[name].whole_s * 1e3 for each in measured]
    ratios = [each[name].whole_s / each[_TORCH].whole_s for each in measured]
    return quartiles(whole_ms, 0), quartiles(ratios), *_beyond(name, measured)


def _beyond(name: str, measured: list[dict[str, Times]]) -> tuple[str, str]:
    beyond = [(each[name].beyond_s, each[_TORCH].whole_s) for each in measured]
    known = [(seconds, torch_s) for seconds, torch_s in beyond if seconds is not None]
    if not known:
        return "", ""
    return quartiles([s * 1e3 for s, _ in known], 1), quartiles([s / torch_s for s, torch_s in known], 4)


if __name__ == "__main__":
    main()
