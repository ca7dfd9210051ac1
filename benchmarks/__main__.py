"""Run all benchmarks and write their tables into one file.

Run as `python -m benchmarks --out FILE.md`; it takes less than ten minutes. Each benchmark runs in a fresh process, one
after the other, so that none meets what another left behind. Two are not among them, for they take minutes each and
compare noether with itself: `python -m benchmarks.kill` and `python -m benchmarks.replay`.
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
# By module: what it is called with, and what with --quick, which shows that all of them run and measures nothing.
_ALL = {
    "dispatch": ((), ("--rounds", "2")),
    "scaling": ((), ("--rounds", "2")),
    "step": ((), ("--rounds", "2", "--updates", "2")),
    "training": ((), ("--rounds", "2", "--epochs", "3", "--network", "small")),
    "memory": ((), ("--rounds", "1", "--params", "100000")),
    "ema": ((), ("--rounds", "2", "--params", "100000")),
    "saving": ((), ("--rounds", "2", "--params", "1000")),
    "checkpoint": ((), ("--rounds", "2", "--params", "1000")),
    "startup": ((), ("--rounds", "1")),
}


def machine() -> str:
    """Return what the numbers depend on."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    made = f"{platform.system()} {platform.machine()}, {cores} cores"
    return f"{datetime.now(tz=UTC):%Y-%m-%d}, {made}, Python {platform.python_version()}, torch {version('torch')}"


def section(name: str, arguments: tuple[str, ...]) -> str:
    """Return what a benchmark prints as Markdown, under its name.

    Raises:
        click.ClickException: If it fails.
    """
    command = [sys.executable, "-m", f"benchmarks.{name}", "--markdown", *arguments]
    start_s = time.perf_counter()
    done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=False)  # noqa: S603  # our own
    if done.returncode:
        raise click.ClickException(f"benchmarks.{name} failed:\n{done.stderr}")
    click.echo(f"{name}: {time.perf_counter() - start_s:.0f} s", err=True)
    return f"## `python -m {' '.join((f'benchmarks.{name}', *arguments))}`\n\n{done.stdout.strip()}\n"


@click.command(help=__doc__)
@click.option("--out", type=click.Path(path_type=Path), help="Where to write it; by default, to the standard output.")
@click.option("--quick", is_flag=True, help="A few rounds of little work: whether all run, and no measurement.")
def main(out: Path | None, *, quick: bool) -> None:
    """Run all, and write the file."""
    sections = [section(name, short if quick else full) for name, (full, short) in _ALL.items()]
    title = "# Benchmarks" + (", quick: these are no measurements" if quick else "")
    text = "\n".join([f"{title}\n\n{machine()}. Medians, with quartiles beside them.\n", *sections])
    if out is None:
        click.echo(text)
    else:
        out.write_text(text)


if __name__ == "__main__":
    main()
