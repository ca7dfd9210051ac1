"""Compares a run that is killed and resumed many times with an uninterrupted run.

Run as `python -m benchmarks.kill`. One `noether train` runs to its end. Another is killed with SIGKILL at random
moments and resumed, `--kills` times, and then runs to its end. Weights and the memory of the optimizer and of every
callback must be equal bit for bit, and the logs must have the same lines except for the time; otherwise the command
fails.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import click

from benchmarks.measurement import Table, markdown_option, show

# Frequent saves of a network that is large for its task, so that many kills happen during a save.
_CONFIG = """\
run: {name: killed, output: OUTPUT}
model: {kind: noether.examples.digits.ConvNet, width: 64, dropout: 0.2}
data:
  train: {kind: noether.examples.digits.Digits, split: train, shift: 1}
  val: {kind: noether.examples.digits.Digits, split: val}
optimizer: {kind: torch.optim.AdamW, lr: 2e-3}
trainer:
  max_updates: UPDATES
  effective_batch_size: 32
  loss: noether.examples.digits.cross_entropy
  evaluate: {val: [loss, accuracy], every_n_updates: 10}
callbacks:
  - {kind: noether.core.callbacks.NanGuardCallback, every_n_updates: 20, tolerance: 3}
  - {kind: noether.core.callbacks.OnlineLossCallback, every_n_updates: 3}
  - {kind: noether.core.callbacks.EMACallback, every_n_updates: 25, target_factors: [0.9]}
  - {kind: noether.core.callbacks.BestMetricCallback, every_n_updates: 10, metric_key: val/accuracy}
  - kind: noether.core.callbacks.BestCheckpointCallback
    every_n_updates: 10
    metric_key: val/accuracy
    tolerances: [2]
  - kind: noether.core.callbacks.ReduceLROnPlateauCallback
    every_n_updates: 10
    metric_key: val/accuracy
    tolerance: 1
  - {kind: noether.core.callbacks.MetricEarlyStopping, every_n_updates: 10, metric_key: val/accuracy, tolerance: 1000}
  - {kind: noether.core.callbacks.CheckpointCallback, every_n_updates: 2, save_weights: true, save_optim: true, keep: 2}
"""
_EARLY_SHARE = 0.25  # of the kills happen while the process starts, the others after it has trained
_MAX_START_S = 4.0
_MAX_TRAINING_S = 0.6
_WEIGHTS = ("weights.safetensors", "optimizer.safetensors", "state.safetensors")


class Kill(NamedTuple):
    """State of the run directory at a kill."""

    newest: str
    lines: int
    saving: bool


def train(folder: Path, *arguments: object) -> subprocess.Popen[str]:
    """Start `noether train` in a new process group."""
    return subprocess.Popen(  # noqa: S603  # our own command line
        [sys.executable, "-m", "noether", "train", *map(str, arguments)],
        cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def wait_for_success(process: subprocess.Popen[str]) -> None:
    """Wait for the end of a run.

    Raises:
        click.ClickException: If the run failed.
    """
    output, _ = process.communicate()
    if process.returncode:
        raise click.ClickException(f"a run failed:\n{output}")


def only_run(folder: Path, output: str) -> Path | None:
    """Return the run directory in an output folder, or None if it does not exist yet."""
    return next((path.parent for path in (folder / output / "killed").glob("*/config.yaml")), None)


def kill_run(process: subprocess.Popen[str], folder: Path, chance: random.Random) -> Kill | None:
    """Kill a run at a random moment; return its state, or None if it ended before."""
    before = _size(folder)
    if chance.random() < _EARLY_SHARE:
        time.sleep(chance.uniform(0, _MAX_START_S))
    else:
        while process.poll() is None and _size(folder) <= before:
            time.sleep(0.01)
        time.sleep(chance.uniform(0, _MAX_TRAINING_S))
    if process.poll() is not None:
        wait_for_success(process)
        return None
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    run = only_run(folder, "killed")
    if run is None:
        return Kill("nothing yet", 0, saving=False)
    checkpoints = run / "checkpoints"
    newest = max((path.name for path in checkpoints.glob("E*")), key=lambda tag: int(tag.split("_")[1][1:]), default="")
    log = run / "metrics.jsonl"
    lines = len(log.read_bytes().splitlines()) if log.exists() else 0
    return Kill(newest or "nothing yet", lines, saving=any(checkpoints.glob(".tmp-*")))


def _size(folder: Path) -> int:
    run = only_run(folder, "killed")
    log = run / "metrics.jsonl" if run else folder
    return log.stat().st_size if log.is_file() else 0


def differences(one: Path, other: Path) -> list[str]:
    """Return the names of files and entries that differ between the last checkpoints and the logs of two runs."""
    tags = [(run / "checkpoints/last").read_text().split()[0] for run in (one, other)]
    a, b = (run / "checkpoints" / tag for run, tag in zip((one, other), tags, strict=True))
    differing = [name for name in _WEIGHTS if (a / name).read_bytes() != (b / name).read_bytes()]
    states = [json.loads((each / "state.json").read_text()) for each in (a, b)]
    differing += [f"state.json: {key}" for key in states[0] if states[0][key] != states[1][key]]
    logs = [[_without_time(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (one, other)]
    return differing + (["metrics.jsonl"] if logs[0] != logs[1] else [])


def _without_time(line: str) -> dict[str, object]:
    return {key: value for key, value in json.loads(line).items() if key not in ("run", "time_s")}


@click.command(help=__doc__)
@click.option("--kills", default=20, show_default=True, type=click.IntRange(min=1), help="Number of kills.")
@click.option("--seed", default=0, show_default=True, help="Seed of the random moments.")
@markdown_option
def main(kills: int, seed: int, *, markdown: bool) -> None:
    """Kill, compare and print the table."""
    chance = random.Random(seed)  # noqa: S311  # no secrets
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for output in ("whole", "killed"):
            (folder / f"{output}.yaml").write_text(
                _CONFIG.replace("OUTPUT", output).replace("UPDATES", str(100 + 35 * kills))
            )
        wait_for_success(train(folder, "whole.yaml"))
        observed: list[Kill] = []
        arguments: tuple[object, ...] = ("killed.yaml",)
        while len(observed) < kills:
            kill = kill_run(train(folder, *arguments), folder, chance)
            run = only_run(folder, "killed")
            arguments = ("killed.yaml",) if run is None else ("--resume", run)
            if kill is None:
                break
            observed.append(kill)
        wait_for_success(train(folder, *arguments))
        whole, run = only_run(folder, "whole"), only_run(folder, "killed")
        differing = differences(whole, run) if whole and run else ["a run is missing"]
        saves = len(list((run / "checkpoints").glob("E*"))) if run else 0
    rows = [
        (str(number), kill.newest, str(kill.lines), "yes" if kill.saving else "")
        for number, kill in enumerate(observed, 1)
    ]
    headings = ("kill", "newest checkpoint", "lines logged", "during a save")
    show(Table("State of the run at each kill", headings, rows), markdown=markdown)
    if differing:
        raise click.ClickException(f"after {len(observed)} kills these differ: {', '.join(differing)}")
    click.echo(f"after {len(observed)} kills, weights, memory and log equal those of the uninterrupted run")
    click.echo(f"{sum(kill.saving for kill in observed)} kills happened during a save; {saves} checkpoints remain")


if __name__ == "__main__":
    main()
