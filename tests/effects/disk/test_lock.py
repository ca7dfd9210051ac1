"""One process at a time writes into the directory of a run."""

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


def refused(directory):
    """Return what another process is told that wants the lock of a directory; nothing where it gets it."""
    done = subprocess.run(
        [sys.executable, "-c", TAKE, directory], capture_output=True, text=True, check=False, timeout=240
    )
    assert done.returncode == bool(done.stderr)
    return done.stderr.strip()


def test_another_process_is_refused_and_told_who_has_it(tmp_path):
    lock = RunLock(tmp_path)
    said = refused(tmp_path)
    assert said.startswith(f"{tmp_path} is in use by process {os.getpid()} on ")
    assert said.endswith("; wait for it to end, or stop it")
    lock.release()
    assert refused(tmp_path) == ""
    assert list(tmp_path.iterdir()) == []


def test_objects_of_one_process_share_it_and_the_last_lets_go(tmp_path):
    one, other = RunLock(tmp_path), RunLock(tmp_path / "." / "")
    one.release()
    assert refused(tmp_path)
    other.release()
    assert not refused(tmp_path)


def test_what_nobody_holds_any_more_is_free(tmp_path):
    open_run(tmp_path / "run")
    assert not refused(tmp_path / "run")


def test_a_lock_file_that_a_dead_process_left_locks_nothing(tmp_path):
    (tmp_path / ".lock").write_text('{"pid": 1, "host": "elsewhere", "command": "noether train"}')
    lock = RunLock(tmp_path)
    assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    lock.release()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": 3}', "\x00" * 5000])
def test_a_holder_that_does_not_say_who_it_is_still_has_it(tmp_path, content):
    with (tmp_path / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(content)
        file.flush()
        with pytest.raises(LockedError, match="is in use by another process; wait for it to end"):
            RunLock(tmp_path)


def test_a_link_in_its_place_is_not_followed(tmp_path):
    (tmp_path / "precious").write_text("x")
    (tmp_path / ".lock").symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match=os.strerror(errno.ELOOP)):
        RunLock(tmp_path)
    assert (tmp_path / "precious").read_text() == "x"


def test_a_full_disk_locks_all_the_same(tmp_path, caplog):
    def call(function, *arguments):
        if function is os.write:
            raise OSError(errno.ENOSPC, "No space left on device")
        return call_without_fsync(function, *arguments)

    lock = RunLock(tmp_path, Disk(call))
    assert "it does not name the process that holds it" in caplog.text
    assert "is in use by another process" in refused(tmp_path)
    lock.release()


def test_a_file_system_without_locks_is_told_of(tmp_path, caplog):
    def call(function, *arguments):
        if function is fcntl.flock:
            raise OSError(errno.ENOLCK, "No locks available")
        return call_without_fsync(function, *arguments)

    RunLock(tmp_path, Disk(call)).release()
    assert "cannot be locked (No locks available): make sure that no other process writes there" in caplog.text


def test_a_lock_whose_file_was_removed_in_between_is_taken_again(tmp_path):
    """The holder removes the file and lets go; who opened it before would hold a lock of nothing."""
    removed = []

    def call(function, *arguments):
        if function is fcntl.flock and not removed:
            removed.append((tmp_path / ".lock").unlink())
        return call_without_fsync(function, *arguments)

    lock = RunLock(tmp_path, Disk(call))
    assert removed
    assert refused(tmp_path)
    lock.release()


# Python 3.12 says so of every fork; the workers that load data are forked, too.
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_worker_that_lives_on_holds_nothing(tmp_path):
    lock = RunLock(tmp_path)
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    worker = context.Process(target=theirs.recv)
    worker.start()
    lock.release()
    assert not refused(tmp_path)
    ours.send("end")
    worker.join()
    assert worker.exitcode == 0
