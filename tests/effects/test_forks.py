"""A process that is forked while a run is open, or saves: it neither writes to the run nor releases its lock."""

import subprocess
import sys
from pathlib import Path

import pytest
from log_files import read
from small_run import open_small_run, state_after

from noether.testing import same

FORK = '''
import fcntl, gc, os, sys, threading
from pathlib import Path
import torch
from noether import AfterUpdate, LogScalars, SaveCheckpoint, SetSummary, TrainState
from noether.effects import LockedError, RunClosedError, open_run
from noether.effects.disk.calls import Disk, fsync
sys.path.insert(0, sys.argv[2])
from small_run import state_after

root, actions = Path(sys.argv[1]), sys.argv[3:]

def block_saves(folder, has_started, may_finish):
    """Return calls of the disk that block the fsync of the log in the thread that saves; it holds the log's lock."""

    def call(function, *arguments):
        if function is fsync and threading.current_thread() is not threading.main_thread():
            if os.path.samestat(os.fstat(arguments[0]), os.stat(folder / "metrics.jsonl")):
                has_started.set()
                may_finish.wait()
        return function(*arguments)

    return call


def log(directory, update, *effects):
    event = AfterUpdate(samples=4, time_s=1000 + update / 100)
    directory.interpreter([LogScalars({"x": update}), SetSummary({"x": update}), *effects], state_after(update), event)


def refuse(error_type, function, *arguments):
    try:
        function(*arguments)
    except error_type as error:
        assert str(os.getppid()) in str(error), error
    else:
        raise AssertionError("not refused")


def write_in_a_worker(directory):
    class Data(torch.utils.data.Dataset):
        def __len__(self):
            return 2

        def __getitem__(self, index):
            refuse(RunClosedError, log, directory, 9)
            return index

    assert list(torch.utils.data.DataLoader(Data(), num_workers=2, multiprocessing_context="fork"))


def act(directory, folder, action):
    if action == "use":
        refuse(RunClosedError, log, directory, 9)
        refuse(RunClosedError, log, directory, 9, SaveCheckpoint())
        refuse(RunClosedError, directory.resume)
        refuse(RunClosedError, directory.truncate_logs, None)
        directory.wait()
        directory.close()
    elif action == "open":
        refuse(LockedError, open_run, folder)
    elif action == "raise":
        raise SystemExit("an error of the child")


def fork_during_a_save(folder, action):
    has_started, may_finish = threading.Event(), threading.Event()
    disk = Disk(block_saves(folder, has_started, may_finish))
    with open_run(folder, asynchronous=True, borrowed=False, disk=disk) as directory:
        log(directory, 1)
        log(directory, 2)
        log(directory, 2, SaveCheckpoint(pointers=("latest",)))
        has_started.wait()
        if action == "worker":
            write_in_a_worker(directory)
            code = 0
        else:
            child = os.fork()
            if child == 0:
                if action == "collect":
                    del directory
                    gc.collect()
                    os._exit(0)
                act(directory, folder, action)
                sys.exit()
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code == (action == "raise"), code
        try:
            fcntl.flock(os.open(folder / ".lock", os.O_RDWR), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pass
        else:
            raise AssertionError("the lock is free")
        may_finish.set()
        log(directory, 3)


for action in actions:
    fork_during_a_save(root / action, action)
'''


ACTIONS = ("exit", "raise", "use", "open", "collect", "worker")


@pytest.fixture(scope="module")
def forked(tmp_path_factory):
    """A folder with a run for each action of a child; one process makes them all, because it imports torch first."""
    folder = tmp_path_factory.mktemp("forked")
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORK, folder, Path(__file__).parent, *ACTIONS],
        capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip
    errors = [line for line in process.stderr.splitlines() if line != "an error of the child"]
    assert (process.returncode, errors) == (0, [])
    return folder


@pytest.mark.parametrize("action", ACTIONS)
def test_a_child_that_is_forked_during_a_save_changes_nothing(forked, action):
    folder = forked / action
    with open_small_run(folder) as directory:
        assert same(directory.load(), state_after(2))
        assert directory.checkpoints.find("latest").log_lines == 3
    assert [line["update"] for line in read(folder / "metrics.jsonl")] == [1, 2, 2, 3]
    assert not (folder / ".lock").exists()
