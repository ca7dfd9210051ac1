"""What the live display of a terminal costs a run.

Run as `python -m benchmarks.display`. Processes train `configs/digits.yaml` on a pseudo-terminal, in turns: one writes
lines only, as on the terminal of a CI job; the other also draws the live display. Times are those of the training, its
evaluations and checkpoints included, without the start of Python; the CPU time is that of the whole process. Our goal
is a ratio below 1.01.
"""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import click

from benchmarks.measurement import Table, markdown_option, quartiles, show
from noether.reports.reading.run_record import read_run

_ROOT = Path(__file__).parents[1]
_MARGINS = re.compile(rb"\x1b\[1;\d+r")  # that the display sets
_LINES, _DISPLAY = "lines only", "live display"
_VARIABLES = {
    _LINES: {"CI": "true"},
    _DISPLAY: {"CI": "", "SLURM_JOB_ID": ""},
}


class Times(NamedTuple):
    """What one run took, and what it wrote to the terminal."""

    train_s: float
    cpu_s: float
    output: bytes


def run_on_terminal(name: str, epochs: int) -> Times:
    """Train in a process of its own, whose standard output is a pseudo-terminal.

    Raises:
        click.ClickException: If the run fails, or has a display where it should have none, or the reverse.
    """
    with tempfile.TemporaryDirectory() as folder:
        settings = [f"run.output={folder}", f"trainer.max_epochs={epochs}"]
        config = str(_ROOT / "configs" / "digits.yaml")
        options = [option for setting in settings for option in ("--set", setting)]
        command = [sys.executable, "-m", "noether", "train", config, *options]
        variables = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "120", "LINES": "40", **_VARIABLES[name]}
        before = os.times()
        code, output = _wait_on_terminal(command, variables)
        after = os.times()
        if code:
            raise click.ClickException(f"{' '.join(command)} ended with {code}:\n{output.decode(errors='replace')}")
        (path,) = Path(folder).glob("*/*/summary.json")
        seconds = sum(phase["total_s"] for phase in read_run(path.parent).summary["phases"].values())
    if bool(_MARGINS.search(output)) != (name == _DISPLAY):
        raise click.ClickException(f"the run '{name}' wrote this to the terminal: {output[:2000]!r}")
    cpu_s = after.children_user + after.children_system - before.children_user - before.children_system
    return Times(seconds, cpu_s, output)


def _wait_on_terminal(command: list[str], variables: dict[str, str]) -> tuple[int, bytes]:
    """Run a command on a pseudo-terminal; return its exit code and output."""
    ours, theirs = pty.openpty()
    pieces: list[bytes] = []

    def read() -> None:
        with suppress(OSError):  # Linux reports so that the other end is closed
            while piece := os.read(ours, 65536):
                pieces.append(piece)

    reader = threading.Thread(target=read, name="terminal")
    reader.start()
    process = subprocess.Popen(command, cwd=_ROOT, env=variables, stdin=theirs, stdout=theirs, stderr=theirs)  # noqa: S603  # our own module
    os.close(theirs)
    code = process.wait()
    reader.join()
    os.close(ours)
    return code, b"".join(pieces)


@click.command(help=__doc__)
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(min=2), help="Rounds measured.")
@click.option("--epochs", default=30, show_default=True, type=click.IntRange(min=2), help="Epochs of each run.")
@markdown_option
def main(rounds: int, epochs: int, *, markdown: bool) -> None:
    """Measure and print the table."""
    orders = [list(_VARIABLES), list(reversed(_VARIABLES))]  # what runs first has no advantage
    measured = [{name: run_on_terminal(name, epochs) for name in orders[turn % 2]} for turn in range(rounds)]
    rows = [
        (
            name,
            quartiles(each[name].train_s for each in measured),
            quartiles((each[name].train_s / each[_LINES].train_s for each in measured), 3),
            quartiles((each[name].cpu_s / each[_LINES].cpu_s for each in measured), 3),
            quartiles((len(each[name].output) / 1e3 for each in measured), 0),
        )
        for name in _VARIABLES
    ]
    headings = ("", "seconds", f"/ {_LINES}", "CPU time", "kB of output")
    show(Table(f"configs/digits.yaml, {epochs} epochs, on a pseudo-terminal", headings, rows), markdown=markdown)


if __name__ == "__main__":
    main()
