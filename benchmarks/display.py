"""What the live display of a terminal costs a run.

Run as `python -m benchmarks.display`. In each round, two processes train `configs/digits.yaml` on a pseudo-terminal.
One writes lines only, as on the terminal of a CI job; the other also draws the live display. Seconds are those of
training with its evaluations and checkpoints, without the start of Python. The ratio of CPU time is 1 plus the
additional CPU seconds of the process with the display, divided by the training time of the other process. Our goal is
a ratio below 1.01. Notes say how many rounds are needed to detect 1 %, and what it costs to draw the display alone.
"""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import replace
from math import ceil
from pathlib import Path
from statistics import stdev
from typing import TYPE_CHECKING, NamedTuple

import click

from benchmarks.measurement import Table, markdown_option, quartiles, show
from noether.core.iteration import TrainingIteration
from noether.core.run import Run
from noether.core.text import count_of
from noether.effects.console.live.bottom_rows import BottomRows
from noether.effects.console.live.live_region import LiveRegion, TerminalStyle
from noether.effects.console.live.live_view import RunView
from noether.reports.reading.run_record import read_run

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_ROOT = Path(__file__).parents[1]
_MARGINS = re.compile(rb"\x1b\[1;\d+r")  # only the display sets them
_LINES, _DISPLAY = "lines only", "live display"
_RESOLUTION = 0.01
_VARIABLES = {
    _LINES: {"CI": "true"},
    _DISPLAY: {"CI": "", "SLURM_JOB_ID": ""},
}


class Times(NamedTuple):
    """Training time and CPU time of one run in seconds, and its output on the terminal."""

    train_s: float
    cpu_s: float
    output: bytes


def run_on_terminal(name: str, epochs: int) -> Times:
    """Train in another process, whose standard output is a pseudo-terminal.

    Raises:
        click.ClickException: If the run fails, draws a display that it should not draw, or draws none.
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
    reader = threading.Thread(target=_read_all, args=[ours, pieces], name="terminal")
    reader.start()
    process = subprocess.Popen(command, cwd=_ROOT, env=variables, stdin=theirs, stdout=theirs, stderr=theirs)  # noqa: S603  # our own module
    os.close(theirs)
    code = process.wait()
    reader.join()
    os.close(ours)
    return code, b"".join(pieces)


def _read_all(terminal: int, pieces: list[bytes]) -> None:
    with suppress(OSError):  # on Linux, reading fails if the other end is closed
        while piece := os.read(terminal, 65536):
            pieces.append(piece)


def measure_drawing(count: int = 400) -> float:
    """Return the CPU time in seconds that drawing a display of five lines on a pseudo-terminal takes."""
    view, at = RunView(), TrainingIteration(epoch=3, update=120, sample=3800)
    view.begin(
        Run(end=TrainingIteration(epoch=30), updates_per_epoch=38, samples_per_epoch=1205, effective_batch_size=32)
    )
    view.log({"loss/online/cross_entropy/E1": 0.3, "loss/val/cross_entropy": 0.2, "loss/val/total": 0.2}, at)
    ours, theirs = pty.openpty()
    reader = threading.Thread(target=_read_all, args=[ours, []], name="terminal")
    reader.start()
    with os.fdopen(theirs, "w") as file:
        rows = BottomRows(file, lambda: (120, 40))
        region = LiveRegion(view, rows, lambda: (120, 40), TerminalStyle(has_colors=True, has_unicode=True))
        before = time.process_time()
        for number in range(count):
            view.newest = replace(at, update=at.update + number), at
            region.redraw()
        cpu_s = time.process_time() - before
        if not rows.are_shown:
            raise click.ClickException("nothing was drawn: another library shows a bar in this process")
        rows.remove()
    reader.join()
    os.close(ours)
    return cpu_s / count


@click.command(help=__doc__)
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(min=2), help="Rounds measured.")
@click.option("--epochs", default=30, show_default=True, type=click.IntRange(min=2), help="Epochs of each run.")
@markdown_option
def main(rounds: int, epochs: int, *, markdown: bool) -> None:
    """Measure and print the table."""
    orders = [list(_VARIABLES), list(reversed(_VARIABLES))]  # so that neither always runs first
    measured = [{name: run_on_terminal(name, epochs) for name in orders[turn % 2]} for turn in range(rounds)]
    rows = [
        (
            name,
            quartiles(each[name].train_s for each in measured),
            quartiles((each[name].train_s / each[_LINES].train_s for each in measured), 3),
            quartiles((_cpu_ratio(each, name) for each in measured), 3),
            quartiles((len(each[name].output) / 1e3 for each in measured), 0),
        )
        for name in _VARIABLES
    ]
    headings = ("", "seconds", f"/ {_LINES}", "CPU time", "kB of output")
    title = f"configs/digits.yaml, {epochs} epochs, on a pseudo-terminal"
    drawing_s = measure_drawing()
    notes = [
        _describe_resolution([_cpu_ratio(each, _DISPLAY) for each in measured]),
        f"Drawing takes {drawing_s * 1e3:.2f} ms, so four times a second {4 * drawing_s:.2%} of a core.",
    ]
    show(Table(title, headings, rows, notes), markdown=markdown)


def _cpu_ratio(measured: Mapping[str, Times], name: str) -> float:
    lines = measured[_LINES]
    return 1 + (measured[name].cpu_s - lines.cpu_s) / lines.train_s


def _describe_resolution(ratios: Sequence[float]) -> str:
    """Return a note: how many rounds are needed so that three standard errors of the mean ratio are below 1 %."""
    deviation = stdev(ratios)
    rounds = max(2, ceil((3 * deviation / _RESOLUTION) ** 2))
    return (
        f"Between rounds, the ratio of CPU time has a standard deviation of {deviation:.3f}: "
        f"it takes {count_of(rounds, 'round')} to detect {_RESOLUTION:.0%} (three standard errors)."
    )


if __name__ == "__main__":
    main()
