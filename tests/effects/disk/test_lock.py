"""The lock of a run directory: one process at a time, free after a crash, not inherited by a fork."""

import errno
import fcntl
import json
import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from faults import call_without_fsync

from noether.effects import LockedError, open_run
from noether.effects.disk.calls import Disk
from noether.effects.disk.lock import RunLock

TAKE = """\
import json
import sys
from pathlib import Path
from noether.effects import LockedError
from noether.effects.disk.lock import RunLock
for line in sys.stdin:
    message = ""
    try:
        RunLock(Path(json.loads(line))).release()
    except LockedError as error:
        message = str(error)
    print(json.dumps(message), flush=True)
"""


@pytest.fixture(scope="module")
def lock_elsewhere():
    """Take and release the lock in another process; return the message of its error, empty if it gets the lock."""
    command = [sys.executable, "-c", TAKE]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:

        def take(directory):
            process.stdin.write(f"{json.dumps(str(directory))}\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        yield take
        process.stdin.close()
        assert process.wait() == 0


def test_error_in_another_process_names_the_holder(tmp_path, lock_elsewhere):
    lock = RunLock(tmp_path)
    message = lock_elsewhere(tmp_path)
    assert message.startswith(f"{tmp_path} is in use by process {os.getpid()} on ")
    assert message.endswith("; wait for it to end, or stop it")
    lock.release()
    assert lock_elsewhere(tmp_path) == ""
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def linked(tmp_path):
    """A directory, and a link to it."""
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to("run")
    return tmp_path / "run", tmp_path / "link"


@pytest.mark.parametrize("how", ["same", "link", "relative", "thread"])
def test_second_lock_in_one_process_is_refused(linked, monkeypatch, how, lock_elsewhere):
    directory, link = linked
    lock = RunLock(directory)
    monkeypatch.chdir(directory.parent)
    path = {"same": directory / "." / "", "link": link, "relative": Path("run"), "thread": directory}[how]
    with ThreadPoolExecutor(1) as pool, pytest.raises(LockedError) as error:
        pool.submit(RunLock, path).result() if how == "thread" else RunLock(path)
    assert f"{path} is already open in this process, at {__file__}:" in str(error.value)
    assert str(error.value).endswith("; use that run, or close it first")
    assert lock_elsewhere(directory)
    lock.release()
    RunLock(link).release()


def test_second_lock_is_refused_where_the_system_has_no_locks(tmp_path):
    def call(function, *arguments):
        return None if function is fcntl.flock else call_without_fsync(function, *arguments)

    lock = RunLock(tmp_path, Disk(call))
    with pytest.raises(LockedError, match="is already open in this process"):
        RunLock(tmp_path, Disk(call))
    lock.release()
    lock.release()  # a second time is a no-op
    RunLock(tmp_path, Disk(call)).release()


def test_lock_that_is_refused_can_be_taken_later(tmp_path):
    with (tmp_path / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(LockedError, match="another process"):
            RunLock(tmp_path)
    RunLock(tmp_path).release()


def test_lock_that_is_interrupted_is_free(tmp_path, lock_elsewhere):
    """By Ctrl-C, while it names its holder."""
    interrupts = [True]

    def call(function, *arguments):
        if function is os.write and interrupts.pop():
            raise KeyboardInterrupt
        return call_without_fsync(function, *arguments)

    with pytest.raises(KeyboardInterrupt):
        RunLock(tmp_path, Disk(call))
    assert not lock_elsewhere(tmp_path)
    RunLock(tmp_path).release()


def test_lock_belongs_to_the_directory_and_not_to_its_path(tmp_path, lock_elsewhere):
    path, moved = tmp_path / "run", tmp_path / "moved"
    path.mkdir()
    first = RunLock(path)
    path.rename(moved)
    path.mkdir()
    second = RunLock(path)
    assert lock_elsewhere(moved)
    with pytest.raises(LockedError, match=f"{moved} is already open"):
        RunLock(moved)
    first.release()
    assert lock_elsewhere(path)  # releasing the first does not remove the lock of the second
    assert not lock_elsewhere(moved)
    second.release()
    assert not lock_elsewhere(path)


def test_garbage_collected_run_is_free(tmp_path, lock_elsewhere):
    open_run(tmp_path / "run")
    assert not lock_elsewhere(tmp_path / "run")


def test_lock_file_of_a_dead_process_does_not_lock(tmp_path):
    (tmp_path / ".lock").write_text('{"pid": 1, "host": "elsewhere", "command": "noether train"}')
    lock = RunLock(tmp_path)
    assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    lock.release()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": 3}', "\x00" * 5000])
def test_unnamed_holder_keeps_the_lock(tmp_path, content):
    with (tmp_path / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(content)
        file.flush()
        with pytest.raises(LockedError, match="is in use by another process; wait for it to end"):
            RunLock(tmp_path)


def test_link_in_place_of_the_lock_file_is_not_followed(tmp_path):
    (tmp_path / "precious").write_text("x")
    (tmp_path / ".lock").symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match=os.strerror(errno.ELOOP)):
        RunLock(tmp_path)
    assert (tmp_path / "precious").read_text() == "x"


def test_full_disk_can_be_locked(tmp_path, caplog, lock_elsewhere):
    def call(function, *arguments):
        if function is os.write:
            raise OSError(errno.ENOSPC, "No space left on device")
        return call_without_fsync(function, *arguments)

    lock = RunLock(tmp_path, Disk(call))
    assert "it does not name the process that holds it" in caplog.text
    assert "is in use by another process" in lock_elsewhere(tmp_path)
    lock.release()


def test_file_system_without_locks_gives_a_warning(tmp_path, caplog):
    def call(function, *arguments):
        if function is fcntl.flock:
            raise OSError(errno.ENOLCK, "No locks available")
        return call_without_fsync(function, *arguments)

    RunLock(tmp_path, Disk(call)).release()
    assert "cannot be locked (No locks available): make sure that no other process writes there" in caplog.text


def test_lock_is_taken_again_if_its_file_was_removed_meanwhile(tmp_path, lock_elsewhere):
    """The previous holder removes the file before it closes it, so a process may lock a file without a name."""
    removed = []

    def call(function, *arguments):
        if function is fcntl.flock and not removed:
            removed.append((tmp_path / ".lock").unlink())
        return call_without_fsync(function, *arguments)

    lock = RunLock(tmp_path, Disk(call))
    assert removed
    assert lock_elsewhere(tmp_path)
    lock.release()


# Python 3.12 warns at every fork; data loading workers are forked, too.
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_forked_worker_that_outlives_the_run_holds_no_lock(tmp_path, lock_elsewhere):
    lock = RunLock(tmp_path)
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    worker = context.Process(target=theirs.recv)
    worker.start()
    lock.release()
    assert not lock_elsewhere(tmp_path)
    ours.send("end")
    worker.join()
    assert worker.exitcode == 0
