"""Kills runs with SIGKILL at calls of the disk, resumes them, and compares them with an uninterrupted run.

Run as `python -m benchmarks.kill`. One run trains to its end and records its calls of the disk. Each cycle starts the
same run in a new process that kills itself at a random one of these calls: in training; or there and again after
`--resume`; or there and in two resumed processes. Then the run is resumed to its end. Weights, optimizer, memories,
log, summary with the best metric, pointers and the kept checkpoints must equal those of the uninterrupted run, the
pointers by iteration and weights; otherwise the command fails.
"""

from __future__ import annotations

import json
import logging
import operator
import os
import random
import shutil
import signal
import sys
import tempfile
from collections import Counter
from itertools import count
from multiprocessing import get_context
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import click

from benchmarks.measurement import Table, markdown_option, show
from noether.effects import CheckpointStore
from noether.effects.checkpoints.file_names import WEIGHTS
from noether.effects.disk.calls import DISK, fsync
from noether.testing import same
from noether.training.runs.train import train

if TYPE_CHECKING:
    from collections.abc import Callable

_CONFIG = """\
run: {name: run, output: OUTPUT}
model: {kind: noether.examples.digits.ConvNet, width: 2, dropout: 0.2}
data:
  train: {kind: noether.examples.digits.Digits, split: val, shift: 1}
  val: {kind: noether.examples.digits.Digits, split: test}
optimizer: {kind: torch.optim.AdamW, lr: 2e-2}
trainer:
  max_epochs: 7
  effective_batch_size: 74
  loss: noether.examples.digits.cross_entropy
  evaluate: {val: [loss, accuracy], every_n_epochs: 1}
callbacks:
  - {kind: noether.core.callbacks.OnlineLossCallback, every_n_updates: 3}
  - {kind: noether.core.callbacks.EMACallback, every_n_epochs: 1, target_factors: [0.9], save_latest_weights: true}
  - {kind: noether.core.callbacks.BestMetricCallback, every_n_epochs: 1, metric_key: val/accuracy}
  - {kind: noether.core.callbacks.BestCheckpointCallback, every_n_epochs: 1, metric_key: val/accuracy, tolerances: [2]}
  - {kind: noether.core.callbacks.MetricEarlyStopping, every_n_epochs: 1, metric_key: val/accuracy, tolerance: 2}
  - {kind: noether.core.callbacks.CheckpointCallback, every_n_epochs: 1, keep: 2}
"""
_CHANGES: Final = (os.write, os.mkdir, os.rename, os.unlink, os.rmdir, os.ftruncate, fsync)
"""Calls that change the disk; between two of them a kill leaves the same as at the second one."""
_PHASES: Final = ("train", "resume", "second resume")
_OF_PROCESSES: Final = {"phases", "processes"}  # entries of the summary that measure each process
_EXTRA_CALLS: Final = 40  # that a resumed process makes beside those of the uncut run


class Kill(NamedTuple):
    """A kill that happened.

    Args:
        phase: Index in the processes of a run: 0 for the first.
        call: Name of the call of the disk at which the process killed itself.
    """

    phase: int
    call: str


def _train_in_child(folder: Path, arguments: dict[str, Any], kill_at: int | None, calls_file: Path) -> None:
    """Train, and write the names of the calls that change the disk; the process kills itself at one of them."""
    logging.disable()
    names, lock = [], Lock()

    def call(function: Callable[..., Any], *arguments: Any) -> Any:
        if function in _CHANGES:
            with lock:
                names.append(function.__name__)
                if len(names) == kill_at:
                    calls_file.write_text(json.dumps(names))
                    if function is os.write:  # half of the content is written
                        os.write(arguments[0], arguments[1][: len(arguments[1]) // 2])
                    os.kill(os.getpid(), signal.SIGKILL)
        return operator.call(function, *arguments)

    os.chdir(folder)
    sys.stdout = sys.stderr = (folder / "output").open("w")
    DISK._call = call  # noqa: SLF001  # the one place through which all calls of the disk go
    train(**arguments)
    calls_file.write_text(json.dumps(names))


class Runner:
    """Trains in processes that start within milliseconds, because they are forks of one with all modules loaded.

    Args:
        folder: A directory for all runs.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._context = get_context("forkserver")
        self._context.set_forkserver_preload(["noether.training.runs.train", "noether.testing"])

    def train(self, output: str, kill_at: int | None = None, *, asynchronous: bool = False) -> list[str]:
        """Start or resume the run in an output folder; return the names of its calls that change the disk.

        Raises:
            click.ClickException: If the run failed.
        """
        config = self._folder / f"{output}.yaml"
        config.write_text(_CONFIG.replace("OUTPUT", output))
        run = self.find_run(output)
        arguments: dict[str, Any] = {"config": str(config)} if run is None else {"resume": str(run)}
        arguments["overrides"] = [f"trainer.checkpoints.async={json.dumps(asynchronous)}"]
        calls_file = self._folder / "calls"
        process = self._context.Process(target=_train_in_child, args=(self._folder, arguments, kill_at, calls_file))
        process.start()
        process.join()
        if process.exitcode not in (0, -signal.SIGKILL):
            raise click.ClickException(
                f"a run failed, see {self._folder}/output:\n{(self._folder / 'output').read_text()}"
            )
        names: list[str] = json.loads(calls_file.read_text())
        return names

    def find_run(self, output: str) -> Path | None:
        """Return the directory of the run in an output folder, or None if it has no configuration yet."""
        return next((path.parent for path in (self._folder / output).glob("run/*/config.yaml")), None)

    def run_with_kills(self, output: str, calls: int, kills: int, chance: random.Random) -> list[Kill]:
        """Kill a run up to `kills` times at random calls, then let it end; return the kills that happened."""
        found: list[Kill] = []
        last = calls + _EXTRA_CALLS
        asynchronous = chance.random() < 0.5  # noqa: PLR2004  # a half
        for phase in range(kills):
            at = chance.randint(1, max(last, 1))
            names = self.train(output, at, asynchronous=asynchronous)
            if len(names) < at:  # it ended before
                return found
            found.append(Kill(phase, names[-1]))
            last -= at
        self.train(output, asynchronous=asynchronous)
        return found


def describe_run(run: Path) -> dict[str, Any]:
    """Return what has to be equal after a run, by name; equal checkpoints of one moment count once."""
    store = CheckpointStore(run / "checkpoints", "run")
    manifests = {manifest.tag: manifest for manifest in store.manifests()}
    contents = {
        tag: (*map(str, each.slot), sorted(each.parts), getattr(each.parts.get(WEIGHTS), "sha256", None))
        for tag, each in manifests.items()
    }
    recovered = store.recover()
    summary = json.loads((run / "summary.json").read_text())
    return {
        "state": None if recovered is None else recovered[0],
        "pointers": {name: contents[tag] for name, tag in store.pointers().items()},
        "checkpoints": set(map(str, contents.values())),
        "summary.json": {name: each for name, each in summary.items() if name not in _OF_PROCESSES},
        "metrics.jsonl": [_without_time(line) for line in (run / "metrics.jsonl").read_text().splitlines()],
        "unfinished files": [str(path) for path in run.rglob(".tmp-*")],
    }


def differences(uncut: Path, run: Path) -> list[str]:
    """Return the names of what differs between two runs."""
    a, b = describe_run(uncut), describe_run(run)
    equal = {name: same(a[name], b[name]) if name == "state" else a[name] == b[name] for name in a}
    return [name for name, is_equal in equal.items() if not is_equal]


def _without_time(line: str) -> dict[str, object]:
    return {key: value for key, value in json.loads(line).items() if key not in ("run", "time_s")}


def _rows(kills: list[Kill]) -> list[tuple[str, ...]]:
    counts = Counter(kills)
    names = sorted({kill.call for kill in kills})
    return [(name, *(str(counts[Kill(phase, name)]) for phase in range(len(_PHASES)))) for name in names] + [
        ("all", *(str(sum(kill.phase == phase for kill in kills)) for phase in range(len(_PHASES))))
    ]


@click.command(help=__doc__)
@click.option("--kills", default=200, show_default=True, type=click.IntRange(min=1), help="Number of kills.")
@click.option("--seed", default=0, show_default=True, help="Seed of the random calls.")
@markdown_option
def main(kills: int, seed: int, *, markdown: bool) -> None:
    """Kill, compare and print the table."""
    chance = random.Random(seed)  # noqa: S311  # no secrets
    found: list[Kill] = []
    wrong: list[str] = []
    wrong_kills = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        runner = Runner(folder)
        calls = len(runner.train("uncut"))
        uncut = runner.find_run("uncut")
        for number in count():
            if len(found) >= kills or uncut is None:
                break
            output = f"killed{number}"
            wanted = min(1 + number % len(_PHASES), kills - len(found))
            happened = runner.run_with_kills(output, calls, wanted, chance)
            run = runner.find_run(output)
            differing = ["the run is missing"] if run is None else differences(uncut, run)
            if differing:
                wrong.append(f"{output}, killed at {happened}: {', '.join(differing)} differ")
                wrong_kills += len(happened)
            found += happened
            shutil.rmtree(folder / output, ignore_errors=True)
    title = f"Kills by call of the disk and process; an uncut run makes {calls} calls that change the disk"
    show(Table(title, ("call", *_PHASES), _rows(found)), markdown=markdown)
    for line in wrong:
        click.echo(line)
    click.echo(f"{wrong_kills} wrong of {len(found)}")
    if wrong:
        raise click.ClickException("killed runs do not equal the uninterrupted run")


if __name__ == "__main__":
    main()
