"""What does noether add to the time that torch takes to start, and what does it do without waiting for torch?

Run as `python -m benchmarks.startup`. Each row is a fresh process, timed from its start to its end. All rows take
turns; a ratio is taken within each round, and the table shows medians over rounds with quartiles. What an import takes
beyond that of torch is timed inside the process, after torch is there: between processes it would be lost in the noise.
The names of noether are imported when they are first asked for, so that of all of them is the one that counts. A valid
configuration is one with an optimizer, and to make the first one torch imports its compiler; a row shows that, too.

Goals: less than 50 ms beyond torch's own import; help, and what is refused early, in a tenth of the time of torch.
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

from benchmarks.measuring import Table, markdown_option, quartiles, show

_ROOT = Path(__file__).parents[1]
_TORCH = "import torch"
_TIMED = "import torch, time; start_s = time.perf_counter(); {}; print(time.perf_counter() - start_s)"
# Bytecode is kept, as it is wherever a program is started more than once.
_ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


class Row(NamedTuple):
    """A process to start.

    Args:
        arguments: Those of Python.
        exit_code: How it is to end.
        timed: Whether it prints the seconds that something takes in it.
    """

    arguments: tuple[str, ...]
    exit_code: int = 0
    timed: bool = False


class Times(NamedTuple):
    """What one process took, in seconds, and what it timed itself."""

    whole_s: float
    beyond_s: float | None


def rows(bad: Path) -> dict[str, Row]:
    """Return what is measured; `bad` is a configuration that is refused before a class is looked for."""
    return {
        "python -c pass": Row(("-c", "pass")),
        _TORCH: Row(("-c", _TORCH)),
        "import torch, noether": Row(("-c", _TIMED.format("import noether")), timed=True),
        "import torch, every name of noether": Row(("-c", _TIMED.format("from noether import *")), timed=True),
        "import noether": Row(("-c", "import noether")),
        "import torch, make an optimizer": Row(("-c", f"{_TORCH}; torch.optim.SGD([torch.zeros(1)])")),
        "noether --help": Row(("-m", "noether", "--help")),
        "noether validate BAD": Row(("-m", "noether", "validate", str(bad)), exit_code=2),
        "noether validate configs/digits.yaml": Row(("-m", "noether", "validate", "configs/digits.yaml")),
    }


def timed(row: Row) -> Times:
    """Return what a process took.

    Raises:
        click.ClickException: If it does not end as it ought to.
    """
    command = [sys.executable, *row.arguments]
    start_s = time.perf_counter()
    done = subprocess.run(command, cwd=_ROOT, env=_ENVIRONMENT, capture_output=True, text=True, check=False)  # noqa: S603  # ours
    whole_s = time.perf_counter() - start_s
    if done.returncode != row.exit_code:
        raise click.ClickException(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr}")
    return Times(whole_s, float(done.stdout) if row.timed else None)


def measure(wanted: dict[str, Row], rounds: int) -> list[dict[str, Times]]:
    """Return what every row took in each round."""
    found = [{name: timed(row) for name, row in wanted.items()} for _ in range(rounds + 1 if rounds > 1 else 1)]
    return found[-rounds:]  # the first round warms up; one alone is a try


@click.command(help=__doc__)
@click.option("--rounds", default=10, show_default=True, type=click.IntRange(min=1), help="Rounds measured.")
@markdown_option
def main(rounds: int, *, markdown: bool) -> None:
    """Measure and print the table."""
    with tempfile.TemporaryDirectory() as folder:
        bad = Path(folder) / "bad.yaml"
        bad.write_text("modle: {}\n")
        found = measure(rows(bad), rounds)
    headings = ("", "ms", f"/ {_TORCH}", "beyond torch, ms", f"beyond torch / {_TORCH}")
    title = f"Start-up; torch {version('torch')}, Python {sys.version.split()[0]}"
    show(Table(title, headings, [(name, *_cells(name, found)) for name in found[0]]), markdown=markdown)


def _cells(name: str, found: list[dict[str, Times]]) -> tuple[str, ...]:
    whole_ms = [each[name].whole_s * 1e3 for each in found]
    ratios = [each[name].whole_s / each[_TORCH].whole_s for each in found]
    return quartiles(whole_ms, 0), quartiles(ratios), *_beyond(name, found)


def _beyond(name: str, found: list[dict[str, Times]]) -> tuple[str, str]:
    beyond = [(each[name].beyond_s, each[_TORCH].whole_s) for each in found]
    known = [(seconds, torch_s) for seconds, torch_s in beyond if seconds is not None]
    if not known:
        return "", ""
    return quartiles([s * 1e3 for s, _ in known], 1), quartiles([s / torch_s for s, torch_s in known], 4)


if __name__ == "__main__":
    main()
