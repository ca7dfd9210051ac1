"""The lock of a run directory: one process at a time, free after a crash, not inherited by a fork."""

import errno
import fcntl
import json
import multiprocessing
import os
import subprocess
import sys

import pytest
from faults import call_without_fsync

from noether.effects import LockedError, open_run
from noether.effects.disk.calls import Disk
from noether.effects.disk.lock import RunLock

TAKE = """\
import sys
from pathlib import Path
from noether.effects import LockedError
from noether.effects.disk.lock import RunLock
try:
    lock = RunLock(Path(sys.argv[1]))
except LockedError as error:
    sys.exit(str(error))
"""


def lock_elsewhere(directory):
    """Take the lock in another process; return the message of its error, empty if it gets the lock."""
    process = subprocess.run(
        [sys.executable, "-c", TAKE, directory], capture_output=True, text=True, check=False, timeout=240
    )
    assert process.returncode == bool(process.stderr)
    return process.stderr.strip()


def test_error_in_another_process_names_the_holder(tmp_path):
    lock = RunLock(tmp_path)
    message = lock_elsewhere(tmp_path)
    assert message.startswith(f"{tmp_path} is in use by process {os.getpid()} on ")
    assert message.endswith("; wait for it to end, or stop it")
    lock.release()
    assert lock_elsewhere(tmp_path) == ""
    assert list(tmp_path.iterdir()) == []


def test_objects_in_one_process_share_the_lock(tmp_path):
    one, other = RunLock(tmp_path), RunLock(tmp_path / "." / "")
    one.release()
    assert lock_elsewhere(tmp_path)
    other.release()
    assert not lock_elsewhere(tmp_path)


def test_garbage_collected_run_is_free(tmp_path):
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


def test_full_disk_can_be_locked(tmp_path, caplog):
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


def test_lock_is_taken_again_if_its_file_was_removed_meanwhile(tmp_path):
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
def test_forked_worker_that_outlives_the_run_holds_no_lock(tmp_path):
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
