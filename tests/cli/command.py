"""Runs the command line for tests, and reads the files of a run."""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from click.testing import CliRunner
from process_server import ForkedProcess, can_fork
from safetensors.torch import load_file

from noether.cli.main import main

ROOT = Path(__file__).parents[2]
PATIENCE_S = 240
ENVIRONMENT = dict(os.environ)  # without the variables that a single test sets in this process

SMALL = """\
run:
  name: small
  output: out
model:
  kind: noether.examples.digits.ConvNet
  width: 4
  dropout: 0.2
data:
  train:
    kind: noether.examples.digits.Digits
    split: train
    shift: 1
  val:
    kind: noether.examples.digits.Digits
    split: val
optimizer:
  kind: torch.optim.AdamW
  lr: 2e-3
trainer:
  max_epochs: 2
  effective_batch_size: 32
  loss: noether.examples.digits.cross_entropy
  evaluate:
    val: [loss, accuracy]
    every_n_epochs: 1
callbacks:
  - kind: noether.core.callbacks.ProgressCallback
    every_n_updates: 10
  - kind: noether.core.callbacks.OnlineLossCallback
    every_n_updates: 5
  - kind: noether.core.callbacks.BestMetricCallback
    every_n_epochs: 1
    metric_key: val/accuracy
  - kind: noether.core.callbacks.CheckpointCallback
    every_n_epochs: 1
    save_weights: true
    save_optim: true
  - kind: noether.core.callbacks.BestCheckpointCallback
    every_n_epochs: 1
    metric_key: val/accuracy
"""

PAPER = """\
run:
  name: paper
  output: out
  handlers: {paper.Ring: paper.ring}
model: {kind: paper.make_net, width: 4}
data:
  train: {kind: paper.Points, length: 60}
  val: {kind: paper.Points, length: 10}
optimizer: {kind: torch.optim.SGD, lr: 0.05, momentum: 0.9}
trainer:
  max_epochs: 3
  effective_batch_size: 4
  loss: paper.loss
  evaluate: {val: [loss, paper.agreement], every_n_epochs: 1}
callbacks:
  - {kind: paper.WeightNorm, every_n_updates: 5, power: 2}
  - {kind: paper.say, every_n_epochs: 2}
  - {kind: paper.Bell, every_n_epochs: 1, times: 2}
  - {kind: noether.core.callbacks.OnlineLossCallback, every_n_updates: 1}
  - {kind: noether.core.callbacks.CheckpointCallback, every_n_epochs: 1, save_weights: true, save_optim: true}
  - {kind: paper.Hold, every_n_updates: 1}
"""

MODULE = '''\
"""A user's module with one object of each kind that a configuration can name."""

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from noether import Effect, LogText, log
from noether.core.callbacks.periodic import PeriodicCallback


class Points(torch.utils.data.Dataset):
    def __init__(self, length: int, noise: float = 0.1):
        self._inputs = torch.randn(length, 3, generator=torch.Generator().manual_seed(length))
        self._noise = noise

    def __len__(self):
        return len(self._inputs)

    def __getitem__(self, index):
        point = self._inputs[index]
        return point + self._noise * torch.randn(3), (point.sum() > 0).long()


def make_net(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.2), nn.Linear(width, 2))


def loss(outputs, batch):
    return {"entropy": nn.functional.cross_entropy(outputs, batch[1]), "size": 1e-3 * outputs.square().mean()}


def broken_loss(outputs, batch):
    return {"entropy": nn.functional.cross_entropy(outputs, batch[1]) * float("nan")}


def agreement(outputs, batch):
    return (outputs.argmax(dim=1) == batch[1]).float()


class WeightNorm(PeriodicCallback):
    power: int

    def periodic_callback(self, state, event, interval):
        return log(state, event, {"weight_norm": state.params["0.weight"].norm(self.power)})


def say(state, event):
    return state, (LogText("two epochs more"),)


@dataclass(frozen=True)
class Ring(Effect):
    times: int


def ring(effect, state, event):
    with Path("rings.txt").open("a") as file:
        file.write(f"{type(event).__name__} {state.iteration.epoch}: " + "ding " * effect.times + "\\n")


class Bell(PeriodicCallback):
    times: int

    def periodic_callback(self, state, event, interval):
        return state, (Ring(self.times),)

    def at_eval(self, state, event):
        return state, (Ring(1),)


class Hold(PeriodicCallback):
    """Waits at an update until a signal is caught; with HOLD_ON it then waits for a second one."""

    def periodic_callback(self, state, event, interval):
        if os.environ.get("HOLD_AT") == str(state.iteration.update):
            folder = Path(os.environ["HOLD_IN"])
            (folder / "holding").touch()
            while signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
                time.sleep(0.005)
            (folder / "caught").touch()
            while os.environ.get("HOLD_ON"):
                time.sleep(0.005)
        return state, ()
'''


EVALUATE = "  evaluate:\n    val: [loss, accuracy]\n    every_n_epochs: 1\n"
METRIC = """\
  - kind: noether.core.callbacks.MetricCallback
    every_n_epochs: 1
    dataset_key: val
    metric: accuracy
"""
BEST_METRIC = "  - kind: noether.core.callbacks.BestMetricCallback\n"
# `SMALL` with a MetricCallback in place of `trainer.evaluate`.
WITH_METRIC = SMALL.replace(EVALUATE, "").replace(BEST_METRIC, METRIC + BEST_METRIC)
EXACT = ("weights.safetensors", "optimizer.safetensors")


def set_options(changes):
    """Return the arguments that override settings such as `trainer.max_epochs=2`."""
    return [word for change in changes for word in ("--set", change)]


def command(*argv):
    return [sys.executable, "-m", "noether", *map(str, argv)]


def noether(*argv, cwd, code=0):
    """Run the real command line in a separate process; return the finished process."""
    done = finish(ForkedProcess(argv, cwd=cwd, environment=ENVIRONMENT))
    assert done.returncode == code, done.stdout + done.stderr
    return done


def finish(process):
    """Wait for a process; return it as `subprocess.run` does."""
    try:
        stdout, stderr = process.communicate(timeout=PATIENCE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def invoke(*argv, cwd, code=0):
    """Run the command line in this process and return its output; raise exceptions that it does not handle."""
    modules, path, threads = set(sys.modules), list(sys.path), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with contextlib.chdir(cwd):
            result = CliRunner().invoke(main, list(map(str, argv)))
    finally:
        torch.set_num_threads(threads)
        sys.path[:] = path
        for name in set(sys.modules) - modules:  # another working directory may have a module of the same name
            if (getattr(sys.modules[name], "__file__", None) or "").startswith(str(cwd)):
                del sys.modules[name]
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.output


def start(*argv, cwd, **environment):
    """Start the real command line in a separate process group; return the process."""
    environment = {name: str(value) for name, value in environment.items()}
    if can_fork(environment):
        return ForkedProcess(argv, cwd=cwd, environment={**ENVIRONMENT, **environment}, new_session=True)
    return subprocess.Popen(
        command(*argv),
        cwd=cwd,
        env={**ENVIRONMENT, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_until(condition, process):
    """Wait until `condition()` is true; fail if the process ends before."""
    end = time.monotonic() + PATIENCE_S
    while not condition():
        if process.poll() is not None or time.monotonic() > end:
            process.kill()
            raise AssertionError(process.communicate())
        time.sleep(0.01)


def only_run(folder):
    """Return the directory of the only run below `folder`."""
    (path,) = Path(folder).iterdir()
    return path


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def timeless(run):
    """Return the lines of metrics.jsonl without run id and time."""
    return [{key: value for key, value in line.items() if key not in ("run", "time_s")} for line in lines(run)]


def pointer(run, name):
    return (run / "checkpoints" / name).read_text().split()[0]


def weights(run, name="latest"):
    return load_file(run / "checkpoints" / pointer(run, name) / "weights.safetensors")


def last_files(run, *files):
    """Return the bytes of files in the last checkpoint."""
    return [(run / "checkpoints" / pointer(run, "last") / file).read_bytes() for file in files]


def check_equal(run, uncut):
    """Check that two runs have the same last weights, optimizer and log."""
    assert last_files(run, *EXACT) == last_files(uncut, *EXACT)
    assert timeless(run) == timeless(uncut)


def contents(folder):
    """Return the bytes of every file below a folder, by path."""
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
