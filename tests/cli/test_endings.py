"""Every way in which `noether train` can end: its exit code, what it prints, what is saved, and that it resumes."""

import os
import shlex
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
from command import ENVIRONMENT, check_equal, command, contents, finish, invoke, noether, only_run
from law_examples import slow_except
from process_server import ForkedProcess

from noether.effects import CheckpointStore

MODULE = '''\
"""A run of 12 updates that ends at update 7 as the variable END says."""

import os
import resource
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from noether import AfterUpdate, BeforeTraining, Effect, SaveCheckpoint, every_n_epochs, every_n_updates, on

END = os.environ.get("END", "")
COUNTS = {"reads": 0, "losses": 0}


def reached(name, count):
    """Count a call, and return whether it is the one at which the run ends."""
    COUNTS[name] += 1
    return COUNTS[name] == count


class Points(torch.utils.data.Dataset):
    def __init__(self, length: int, train: bool = False):
        self._inputs = torch.randn(length, 3, generator=torch.Generator().manual_seed(length))
        self._train = train

    def __len__(self):
        return len(self._inputs)

    def __getitem__(self, index):
        if self._train and reached("reads", 26):
            if END == "data":
                raise FileNotFoundError(2, "no such file", "points.npy")
            if END == "worker":
                os.kill(os.getpid(), signal.SIGKILL)
            if END == "hang":
                os.kill(os.getppid(), signal.SIGINT)
                time.sleep(1000)
        return self._inputs[index] + 0.1 * torch.randn(3), (self._inputs[index].sum() > 0).long()


def make_net() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(0.2), nn.Linear(4, 2))


def loss(outputs, batch):
    if torch.is_grad_enabled() and END in ("step", "nan") and reached("losses", 7):
        if END == "step":
            raise MemoryError("no room for the loss")
        return {"entropy": outputs.sum() * float("nan")}
    return {"entropy": nn.functional.cross_entropy(outputs, batch[1])}


def hits(outputs, batch):
    if END.startswith("evaluation "):
        os.kill(os.getpid(), getattr(signal, END.split()[1]))
    return (outputs.argmax(dim=1) == batch[1]).float()


@dataclass(frozen=True)
class Ring(Effect):
    pass


def ring(effect, state, event):
    if END == "handler" and state.iteration.update == 7:
        raise RuntimeError("the bell is broken")


def start(state, event):
    if END == "start" and isinstance(event, BeforeTraining):
        raise IndexError("a bug")
    return state, ()


@on(AfterUpdate)
def end(state, event):
    if state.iteration.update == 7:
        if END == "callback":
            raise IndexError("a bug")
        if END == "gone":
            shutil.rmtree(next(Path(event.run.config["run"]["output"]).glob("ends/*")))
        if END == "exit":
            raise SystemExit(3)
        if END == "keyboard":
            raise KeyboardInterrupt
        if END == "save":
            return state, (SaveCheckpoint(tag="not/a/name"),)
        if END == "disk":
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
            return state, (SaveCheckpoint(tag="full"),)
        if END == "stop":
            return state.request_stop("enough"), ()
        if END.startswith("signal "):
            for name in END.split()[1:]:
                os.kill(os.getpid(), getattr(signal, name))
    return state, (Ring(),)


@every_n_epochs(1)
def end_epoch(state, event):
    if END == "epoch" and state.iteration.epoch == 2:
        raise IndexError("a bug")
    return state, ()
'''

CONFIG = """\
run: {name: ends, output: out, handlers: {ends.Ring: ends.ring}}
model: {kind: ends.make_net}
data:
  train: {kind: ends.Points, length: 16, train: true}
  val: {kind: ends.Points, length: 8}
optimizer: {kind: torch.optim.AdamW, lr: 0.05}
trainer:
  max_epochs: 3
  effective_batch_size: 4
  loss: ends.loss
  nonfinite: raise
  evaluate: {val: [loss, ends.hits], every_n_epochs: 1}
callbacks:
  - {kind: noether.core.callbacks.OnlineLossCallback, every_n_updates: 1}
  - {kind: ends.end}
  - {kind: ends.end_epoch}
  - {kind: noether.core.callbacks.CheckpointCallback, every_n_epochs: 1, save_weights: true, save_optim: true}
  - {kind: ends.start}
"""

E1, U6, U7, END = "E1_U4_S16", "E1_U6_S24", "E1_U7_S28", "E3_U12_S48"


@dataclass(frozen=True)
class Row:
    """One ending.

    Args:
        end: The value of the variable END, which ends the run.
        code: Its exit code.
        newest: The newest checkpoint from which it can be resumed; None if the speed of a worker decides.
        says: Parts of the first line on the standard error or, without an error, of the last lines of the output.
        logged: The last update that is logged.
        settings: Settings of the run.
    """

    end: str
    code: int
    newest: str | None
    says: tuple[str, ...]
    settings: tuple[str, ...] = ()


IN_UPDATE = "in update 7"
SAVES_AT_ONCE = ("trainer.checkpoints.async=false",)
NO_SAVES = "callbacks.3={kind: noether.core.callbacks.OnlineLossCallback, every_n_epochs: 1}"
ROWS = [
    Row("", 0, END, (f"ended at {END}; the run is in ",)),
    Row("stop", 0, U7 + ".end", ("ended at E1_U7_S28: enough",), (NO_SAVES,)),
    Row("signal SIGINT", 130, U7, (f"saved {U7}", f"interrupted at {U7}")),
    Row("signal SIGTERM", 143, U7, (f"saved {U7}", f"interrupted at {U7}")),
    Row("signal SIGHUP", 129, U7, (f"saved {U7}", f"interrupted at {U7}")),
    Row("evaluation SIGINT", 130, "E0_U4_S16", ("saved E0_U4_S16", "interrupted at E0_U4_S16")),
    Row("signal SIGTERM SIGTERM", -signal.SIGTERM, E1, (), SAVES_AT_ONCE),
    Row("data", 1, U6, ("Error: [Errno 2] no such file: 'points.npy'", "while loading sample ", IN_UPDATE)),
    Row("data", 1, U6, ("Error: [Errno 2] no such file", "of data.train", IN_UPDATE), ("trainer.num_workers=1",)),
    Row("worker", 1, None, ("Error: a process that loads samples of data.train ended", "in update "),
        ("trainer.num_workers=1",)),
    Row("step", 1, U6, ("Error: MemoryError: no room for the loss", IN_UPDATE)),
    Row("nan", 1, U6, ("Error: update 7: ", IN_UPDATE)),
    Row("callback", 1, U7, ("Error: IndexError: a bug", "callback 'end' at E1_U7_S28, AfterUpdate")),
    Row("epoch", 1, "E1_U8_S32", ("Error: IndexError: a bug", "callback 'end_epoch' at E2_U8_S32, AfterEpoch")),
    Row("handler", 1, U7, ("Error: RuntimeError: the bell is broken", "a handler of Ring at E1_U7_S28")),
    Row("save", 1, U7, ("Error: tag 'not/a/name' is not a valid name", "SaveCheckpoint at E1_U7_S28"), SAVES_AT_ONCE),
    Row("hang", 130, None, ("saved E", "interrupted at E"), ("trainer.num_workers=1",)),
    Row("keyboard", 130, U7, ("Error: KeyboardInterrupt", "callback 'end' at E1_U7_S28, AfterUpdate")),
    Row("exit", 3, U7, ("Error: SystemExit: 3",)),
    Row("disk", 1, E1, ("could not be written: ", "SaveCheckpoint at E1_U7_S28"), SAVES_AT_ONCE),
]  # fmt: skip


LIKE_OTHERS = ("signal SIGHUP", "signal SIGTERM", "handler", "exit", "hang", "epoch")
"""Rows that end a run as another row does, by another signal or at another place."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working directory with the module, and a finished run in `out`."""
    path = tmp_path_factory.mktemp("ends")
    (path / "ends.py").write_text(MODULE)
    (path / "ends.yaml").write_text(CONFIG)
    noether("train", "ends.yaml", cwd=path)
    return path


@pytest.fixture(scope="module")
def uncut(folder):
    return only_run(folder / "out/ends")


def words(output, settings=()):
    return ["train", "ends.yaml", *(word for each in (f"run.output={output}", *settings) for word in ("--set", each))]


def run_process(folder, end, arguments, stdout=subprocess.PIPE):
    environment = {**ENVIRONMENT, "END": end}
    if any("num_workers" in str(word) for word in arguments):  # processes that it starts find the state of a new one
        process = subprocess.Popen(
            command(*arguments), cwd=folder, env=environment, stdout=stdout, stderr=subprocess.PIPE, text=True
        )
    else:
        process = ForkedProcess(arguments, cwd=folder, environment=environment, stdout=stdout)
    return finish(process)


@pytest.mark.parametrize(
    "row",
    slow_except([row for row in ROWS if row.end not in LIKE_OTHERS], ROWS),
    ids=lambda row: "-".join([row.end or "end", *row.settings]),
)
def test_ending(folder, uncut, tmp_path, row):
    done = run_process(folder, row.end, words(tmp_path, row.settings))
    assert done.returncode == row.code, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    run = only_run(tmp_path / "ends")
    is_error = row.code not in (0, 129, 130, 143) or row.end == "keyboard"
    shown = done.stderr.splitlines() if is_error else done.stdout.splitlines()
    message = "\n".join(shown if is_error else shown[-3:])
    for part in row.says:
        assert part in message
    store = CheckpointStore(run / "checkpoints", "run")
    newest = store.newest().tag if row.newest is None else row.newest
    assert store.newest().tag == newest
    assert not list(run.glob("checkpoints/.tmp-*"))
    if (row.code == 1 or row.end == "keyboard") and row.end != "disk":
        assert shown[1:] == [
            f"the state at {newest} is saved in {run}",
            f"the traceback is in {run / 'traceback.txt'}",
            f"resume with: noether train --resume {run}",
        ]
        assert "Traceback (most recent call last)" in (run / "traceback.txt").read_text()
    if row.code == 0:
        return
    arguments = shlex.split(shown[-1].removeprefix("resume with: noether ")) if shown else ["train", "--resume", run]
    resumed = invoke(*arguments, "--set", "trainer.num_workers=0", cwd=folder)
    assert f"resuming at {newest.removesuffix('.end')}" in resumed.splitlines()
    check_equal(run, uncut)


def full():
    return Path("/dev/full").open("w")


def closed():
    """Return a pipe that nothing reads."""
    reading, writing = os.pipe()
    os.close(reading)
    return os.fdopen(writing, "w")


@pytest.mark.parametrize("make_stdout", [full, closed])
@pytest.mark.parametrize(("end", "code"), [("", 0), ("signal SIGTERM", 143)])
def test_a_run_whose_output_is_gone_loses_nothing(folder, uncut, tmp_path, make_stdout, end, code):
    with make_stdout() as stdout:
        done = run_process(folder, end, words(tmp_path), stdout=stdout)
        os.dup2(os.open(os.devnull, os.O_WRONLY), stdout.fileno())  # closing it flushes
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    run = only_run(tmp_path / "ends")
    if code:
        assert done.stderr.splitlines()[-1] == f"resume with: noether train --resume {run}"
        invoke("train", "--resume", run, cwd=folder)
    check_equal(run, uncut)


def test_a_run_whose_directory_is_gone_ends_with_a_message(folder, tmp_path):
    done = run_process(folder, "gone", words(tmp_path, SAVES_AT_ONCE))  # nothing else removes files meanwhile
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("Error: ")
    assert done.stderr.count("is no longer what this run opened") == 2  # the error, and why nothing is saved
    assert "resume with" not in done.stderr
    assert not list((tmp_path / "ends").iterdir())


def test_a_callback_that_fails_where_a_run_resumes_changes_nothing(folder, uncut, tmp_path):
    done = run_process(folder, "signal SIGINT", words(tmp_path))
    assert done.returncode == 130
    run = only_run(tmp_path / "ends")
    before = contents(run)
    resume = ["train", "--resume", run, "--set", "trainer.max_epochs=4"]
    done = run_process(folder, "start", resume)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines() == [
        "Error: IndexError: a bug, raised by the callback 'start' at E1_U7_S28, BeforeTraining",
        f"the run is as it was; the traceback is in {run / 'traceback.txt'}",
        f"resume with: noether train --resume {run}",
    ]
    (run / "traceback.txt").unlink()
    assert contents(run) == before
    invoke("train", "--resume", run, cwd=folder)
    check_equal(run, uncut)
