"""Run all benchmarks and write their tables into one file.

Run as `python -m benchmarks --out FILE.md`; it takes less than ten minutes. Each benchmark runs in a fresh process, one
after the other, so that they do not affect each other. Four are not included, because they take minutes each and
compare noether with itself: `display`, `kill`, `replay` and `report`, as in `python -m benchmarks.kill`.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import click

_ROOT = Path(__file__).parents[1]
# Arguments by module: of a measurement, and of --quick, which only checks that every benchmark runs.
_ALL = {
    "dispatch": ((), ("--rounds", "2")),
    "scaling": ((), ("--rounds", "2")),
    "step": ((), ("--rounds", "2", "--updates", "2")),
    "session": ((), ("--rounds", "2", "--updates", "2")),
    "training": ((), ("--rounds", "2", "--epochs", "3", "--network", "small")),
    "ranks": ((), ("--rounds", "2", "--updates", "2", "--epochs", "1")),
    "memory": ((), ("--rounds", "1", "--params", "100000")),
    "ema": ((), ("--rounds", "2", "--params", "100000")),
    "saving": ((), ("--rounds", "2", "--params", "1000")),
    "checkpoint": ((), ("--rounds", "2", "--params", "1000")),
    "reading": ((), ("--rounds", "2", "--lines", "1000")),
    "startup": ((), ("--rounds", "1")),
}


def machine() -> str:
    """Describe the machine and versions that the numbers depend on."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    system = f"{platform.system()} {platform.machine()}, {cores} cores"
    return f"{datetime.now(tz=UTC):%Y-%m-%d}, {system}, Python {platform.python_version()}, torch {version('torch')}"


def section(name: str, arguments: tuple[str, ...]) -> str:
    """Run a benchmark; return its Markdown output with a heading.

    Raises:
        click.ClickException: If the benchmark fails.
    """
    command = [sys.executable, "-m", f"benchmarks.{name}", "--markdown", *arguments]
    start_s = time.perf_counter()
    process = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=False)  # noqa: S603  # our own module
    if process.returncode:
        raise click.ClickException(f"benchmarks.{name} failed:\n{process.stderr}")
    click.echo(f"{name}: {time.perf_counter() - start_s:.0f} s", err=True)
    return f"## `python -m {' '.join((f'benchmarks.{name}', *arguments))}`\n\n{process.stdout.strip()}\n"


@click.command(help=__doc__)
@click.option("--out", type=click.Path(path_type=Path), help="Output file; by default, the standard output.")
@click.option("--quick", is_flag=True, help="Only check that every benchmark runs, with few rounds and little work.")
def main(out: Path | None, *, quick: bool) -> None:
    """Run all benchmarks and write their tables."""
    sections = [section(name, short if quick else full) for name, (full, short) in _ALL.items()]
    title = "# Benchmarks" + (", quick: not a measurement" if quick else "")
    text = "\n".join([f"{title}\n\n{machine()}. Medians, with quartiles beside them.\n", *sections])
    if out is None:
        click.echo(text)
    else:
        out.write_text(text)


if __name__ == "__main__":
    main()
