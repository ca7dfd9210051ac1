"""Runs in real processes survive signals, kills and full disks: their checkpoints resume to the same bits."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from command import (
    ENVIRONMENT,
    EXACT,
    PAPER,
    PATIENCE_S,
    ROOT,
    check_equal,
    contents,
    invoke,
    last_files,
    noether,
    only_run,
    pointer,
    start,
    timeless,
    wait_until,
)
from law_examples import slow_except

from noether.effects import CheckpointStore

PHASES = '''\
"""Callbacks that wait in one phase of training until a signal is caught or a file lets them continue."""

import os
import signal
import time
from pathlib import Path

import paper
from noether.core.callbacks.base import CallbackBase


def hold(phase):
    folder = Path(os.environ.get("HOLD_IN", "."))
    go = folder / f"go {phase}"
    if phase not in os.environ.get("HOLD_AT", "").split(",") or go.exists():
        return
    (folder / f"holding {phase}").touch()
    while signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL and not go.exists():
        time.sleep(0.005)
    go.touch()


class Phases(CallbackBase):
    def before_training(self, state, event):
        hold("begin")
        return state, ()

    def after_update(self, state, event):
        hold(f"update {state.iteration.update}")
        return state, ()

    def after_epoch(self, state, event):
        hold(f"epoch {state.iteration.epoch}")
        return state, ()

    def after_training(self, state, event):
        hold("end")
        return state, ()


def agreement(outputs, batch):
    hold("evaluation")
    return paper.agreement(outputs, batch)
'''


@pytest.fixture(scope="module")
def phases(paper, tmp_path_factory):
    """A working directory with the module `PHASES` and a finished run of it."""
    folder = tmp_path_factory.mktemp("phases")
    shutil.copy(paper / "paper.py", folder)
    (folder / "phases.py").write_text(PHASES)
    text = PAPER.replace("paper.agreement", "phases.agreement").replace(
        "{kind: paper.Hold, every_n_updates: 1}", "{kind: phases.Phases}"
    )
    (folder / "phases.yaml").write_text(text)
    noether("train", "phases.yaml", cwd=folder)
    return folder


@pytest.fixture
def holding(phases, tmp_path):
    """Start a run that waits in a phase; return its process once it waits."""
    started = []

    def start_holding(at, *arguments):
        words = ("train", "phases.yaml", "--set", f"run.output={tmp_path}", *arguments)
        process = start(*words, cwd=phases, HOLD_AT=at, HOLD_IN=tmp_path)
        started.append(process)
        wait_until((tmp_path / f"holding {at}").exists, process)
        return process

    yield start_holding
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_a_run_killed_at_calls_of_the_disk_equals_the_uncut_run():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.kill", "--kills", "20"],
        cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=PATIENCE_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "0 wrong of 20"


@pytest.mark.parametrize("phase", slow_except(("begin", "evaluation"), ["begin", "update 20", "evaluation", "epoch 2"]))
def test_a_run_interrupted_in_any_phase_can_be_resumed(phases, tmp_path, holding, phase):
    process = holding(phase)
    process.terminate()
    output, errors = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, errors) == (143, ""), output
    run = only_run(tmp_path / "paper")
    assert output.splitlines()[-2].startswith("interrupted at ")
    assert not (run / ".lock").exists()
    invoke("train", "--resume", run, cwd=phases)
    check_equal(run, only_run(phases / "out/paper"))


def test_a_signal_at_the_end_of_training_lets_it_end(phases, tmp_path, holding):
    process = holding("end")
    process.terminate()
    output, errors = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, errors) == (0, "")
    assert output.splitlines()[-1].startswith("ended at E3_U45_S180")
    check_equal(only_run(tmp_path / "paper"), only_run(phases / "out/paper"))


def test_a_signal_during_a_save_waits_for_the_save(phases, tmp_path):
    """A network of 64 MB is written long enough for the signal to come during the save."""
    wide = ("--set", "model.width=1000000", "--set", "trainer.max_updates=6")
    every = (
        (phases / "phases.yaml")
        .read_text()
        .replace("Callback, every_n_epochs: 1, save", "Callback, every_n_updates: 5, save")
    )
    (phases / "wide.yaml").write_text(every)
    process = start("train", "wide.yaml", "--set", f"run.output={tmp_path}", *wide, cwd=phases)
    wait_until(lambda: list(tmp_path.glob("paper/*/checkpoints/.tmp-*")), process)
    process.terminate()
    output, errors = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode in (0, 143), errors) == (True, ""), output
    run = only_run(tmp_path / "paper")
    assert not list(run.glob("checkpoints/.tmp-*"))
    store = CheckpointStore(run / "checkpoints", "run")
    state, newest = store.recover()
    assert newest.tag == pointer(run, "latest")
    assert state.iteration.update >= 5


def test_a_second_writer_is_refused_but_a_reader_is_not(phases, tmp_path, holding):
    # The training thread saves: another thread might still write while the run waits.
    process = holding("update 40", "--set", "trainer.checkpoints.async=false")
    run = only_run(tmp_path / "paper")
    before = contents(run)
    done = noether("train", "--resume", run, cwd=phases, code=1)
    assert done.stderr.startswith(f"Error: {run} is in use by process {process.pid} on ")
    assert (done.stdout, contents(run)) == ("", before)
    invoke("eval", run, cwd=phases)
    (tmp_path / "go update 40").touch()
    output, errors = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, errors) == (0, ""), output
    check_equal(run, only_run(phases / "out/paper"))


def test_the_lock_of_a_killed_process_is_free_while_its_workers_live(phases, tmp_path, holding):
    process = holding("update 20", "--set", "trainer.num_workers=2")
    process.kill()
    process.wait(PATIENCE_S)
    run = only_run(tmp_path / "paper")
    assert (run / ".lock").exists()
    invoke("train", "--resume", run, cwd=phases)
    check_equal(run, only_run(phases / "out/paper"))


@pytest.mark.slow
def test_checkpoints_are_not_ordered_by_time(phases, tmp_path, holding):
    """After the clock was set back, the newest checkpoint has the oldest files and the run an older name."""
    process = holding("update 40", "--set", "trainer.checkpoints.async=false")  # so that all checkpoints are complete
    process.kill()
    process.communicate()
    run = only_run(tmp_path / "paper")
    for age, path in enumerate(sorted((run / "checkpoints").glob("E*"), key=lambda path: path.name)):
        for each in (path, *path.iterdir()):
            os.utime(each, (1e9 - 1e6 * age,) * 2)
    old = run.rename(run.with_name("19700101-000000"))
    code = "import time; time.time = iter(range(10**9, 0, -1)).__next__; from noether.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "train", "--resume", str(old)],
        cwd=phases, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=PATIENCE_S,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[0] == "resuming at E2_U30_S120"
    check_equal(old, only_run(phases / "out/paper"))


FULL = '''\
"""Trains on a file system of four megabytes that is full from update 20 to update 35."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

disk, on_error = Path(sys.argv[1]), sys.argv[2]
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)], check=True)
filler = disk / "filler"


def fill():
    with filler.open("wb", buffering=0) as file:
        for size in (65536, 4096, 1):
            try:
                while True:
                    file.write(b"x" * size)
            except OSError:
                pass


def train(*arguments, at=""):
    environment = {**os.environ, "HOLD_AT": at, "HOLD_IN": str(disk.parent)}
    words = [sys.executable, "-m", "noether", "train", *arguments]
    return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(process, phase):
    while not (disk.parent / f"holding {phase}").exists() and process.poll() is None:
        time.sleep(0.01)


def release(phase):
    (disk.parent / f"go {phase}").touch()


# The training thread saves: another thread might still write while the run waits, and find room.
checkpoints = [f"trainer.checkpoints.on_error={on_error}", "trainer.checkpoints.async=false"]
settings = [f"run.output={disk}", *checkpoints]
words = [word for each in settings for word in ("--set", each)]
process = train("phases.yaml", *words, at="update 20,update 35")
wait_for(process, "update 20")
fill()
release("update 20")
wait_for(process, "update 35")
filler.unlink()
release("update 35")
stdout, stderr = process.communicate()
run = next((disk / "paper").iterdir())
found = {"code": process.returncode, "stderr": stderr, "saved": sorted(os.listdir(run / "checkpoints"))}
process = train("--resume", str(run))
found["resumed"] = process.communicate()
subprocess.run(["cp", "-r", str(run), str(disk.parent / "kept")], check=True)
print(json.dumps(found))
'''

_OWN_MOUNTS = ("unshare", "--user", "--map-root-user", "--mount")


def run_on_full_disk(phases, tmp_path, on_error):
    """Run on a disk that is full for a while; return the results and a copy of the run directory."""
    if subprocess.run([*_OWN_MOUNTS, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this system does not let users mount file systems; tests/effects injects the same faults")
    (tmp_path / "disk").mkdir()
    (tmp_path / "full.py").write_text(FULL)
    done = subprocess.run(
        [*_OWN_MOUNTS, sys.executable, tmp_path / "full.py", tmp_path / "disk", on_error],
        cwd=phases, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=PATIENCE_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), tmp_path / "kept"


@pytest.mark.slow  # tests/effects injects the same faults into every call of a save
def test_on_a_full_disk_the_run_stops_and_can_be_resumed_later(phases, tmp_path):
    found, run = run_on_full_disk(phases, tmp_path, "stop")
    assert found["code"] == 1
    (message,) = [line for line in found["stderr"].splitlines() if line.startswith("Error: ")]
    assert "could not be written: [Errno 28] No space left on device: " in message
    assert "; earlier checkpoints are intact" in message
    assert [name for name in found["saved"] if name.startswith(("E", "."))] == ["E1_U15_S60"]
    assert found["resumed"][0].splitlines()[0] == "resuming at E1_U15_S60"
    check_equal(run, only_run(phases / "out/paper"))


@pytest.mark.slow
def test_on_a_full_disk_with_warn_training_continues_and_counts_losses(phases, tmp_path):
    found, run = run_on_full_disk(phases, tmp_path, "warn")
    assert found["code"] == 0, found["stderr"]
    messages = found["stderr"].splitlines()
    assert sum("metrics.jsonl failed and may have lost log entries" in line for line in messages) == 1
    assert sum("; training continues without it" in line for line in messages) == 1
    assert [name for name in found["saved"] if name.startswith(("E", "."))] == [
        ".ended",
        "E1_U15_S60",
        "E3_U45_S180",
    ]
    uncut = only_run(phases / "out/paper")
    assert last_files(run, *EXACT) == last_files(uncut, *EXACT)
    manifest = json.loads((run / "checkpoints/E3_U45_S180/MANIFEST.json").read_text())
    assert manifest["log_lines_lost"] > 0
    assert manifest["log_lines"] + manifest["log_lines_lost"] == len(timeless(uncut))
    assert all(line in timeless(uncut) for line in timeless(run))
