"""A run directory that is moved, removed or replaced while it is written: an error, and nothing is lost."""

import errno
import os
import re
import shutil
from contextlib import suppress

import pytest
from faults import call_without_fsync
from log_files import at, read, update_at
from small_run import NO_FSYNC, open_small_run, state_after, train

from noether import AfterEpoch, AfterUpdate, LogScalars, SaveCheckpoint, SaveTensors, SetSummary
from noether.effects import CheckpointError, RunMovedError, open_run
from noether.effects.disk.calls import Disk
from noether.testing import same


def content(folder):
    """Return the content of all files below a folder, by relative path; None for a directory."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")
    }


def move(run):
    run.rename(run.with_name("moved"))


def move_parent(run):
    run.parent.rename(run.parent.with_name("moved"))


def remove(run):
    shutil.rmtree(run)


def replace(run):
    run.rename(run.with_name("moved"))
    shutil.copytree(run.with_name("moved"), run)


def replace_by_file(run):
    move(run)
    run.write_text("precious")


def move_checkpoints(run):
    (run / "checkpoints").rename(run / "old")


def remove_checkpoints(run):
    shutil.rmtree(run / "checkpoints")


def remove_lock(run):
    (run / ".lock").unlink()


def replace_lock(run):
    remove_lock(run)
    (run / ".lock").write_text("{}")


WHOLE = [move, move_parent, remove, replace, replace_by_file]
PARTS = [move_checkpoints, remove_checkpoints, remove_lock, replace_lock]


@pytest.mark.parametrize("on_error", ["stop", "warn"])
@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("damage", [*WHOLE, *PARTS])
def test_a_save_is_refused_and_creates_nothing(tmp_path, damage, asynchronous, on_error):
    run = tmp_path / "runs/run"
    directory = open_small_run(run, asynchronous=asynchronous, borrowed=False, on_error=on_error)
    list(train(directory, (1, 2)))
    directory.wait()
    damage(run)
    before = content(tmp_path)
    for _ in range(2):  # also the save after an error
        with pytest.raises(RunMovedError, match="is no longer what this run opened"):
            directory.interpreter([SaveCheckpoint()], state_after(3), AfterUpdate(samples=4))
    directory.close()
    after = content(tmp_path)
    after.update({name: before[name] for name in before if name.endswith(".lock") and damage in PARTS})
    assert after == before


@pytest.mark.parametrize("damage", WHOLE)
@pytest.mark.parametrize(
    "effect", [LogScalars({"x": 1}), SetSummary({"x": 1}), SaveTensors(name="a", tensors=state_after(1).params)]
)
@pytest.mark.parametrize("first", [True, False])
def test_a_log_is_refused_and_creates_nothing(tmp_path, damage, effect, first):
    run = tmp_path / "runs/run"
    directory = open_small_run(run)
    if not first:
        directory.interpreter([LogScalars({"x": 0}), SetSummary({"x": 0})], at(1), AfterEpoch())
    damage(run)
    before = content(tmp_path)
    with pytest.raises(RunMovedError):
        directory.interpreter([effect], at(2), AfterEpoch())
    after = content(tmp_path)
    assert after.keys() == before.keys()
    changed = [name for name in after if after[name] != before[name]]
    assert changed in ([], ["moved/metrics.jsonl"], ["moved/run/metrics.jsonl"], ["runs/moved/metrics.jsonl"])


def test_the_error_says_where_the_directory_is_and_what_to_do(tmp_path):
    run = tmp_path / "run"
    directory = open_small_run(run)
    move(run)
    with pytest.raises(RunMovedError) as error:
        directory.check_location()
    assert str(error.value) == (
        f"{run} is no longer what this run opened: it was moved to {tmp_path / 'moved'}. The run stops, and creates "
        "nothing at the old path. Move it back and resume the run, or resume the run at its new path."
    )
    run.mkdir()
    with pytest.raises(RunMovedError, match=r"moved, and something else is in its place\. The run stops"):
        directory.check_location()
    shutil.rmtree(tmp_path / "moved")
    with pytest.raises(RunMovedError, match="it was removed, or moved to another file system, and something else"):
        directory.check_location()


def test_no_line_of_a_moved_directory_is_lost(tmp_path):
    run = tmp_path / "run"
    directory = open_small_run(run)
    for update in range(1, 5):
        directory.interpreter([LogScalars({"x": update})], at(update), update_at(update / 100))
    move(run)
    with pytest.raises(RunMovedError), directory:
        pass
    assert [line["update"] for line in read(tmp_path / "moved/metrics.jsonl")] == [1, 2, 3, 4]
    assert not run.exists()


def test_an_error_in_the_run_is_not_hidden_by_the_moved_directory(tmp_path, caplog):
    directory = open_small_run(tmp_path / "run")
    for update in (1, 2):
        directory.interpreter([LogScalars({"x": 1})], at(update), update_at(update / 100))
    move(tmp_path / "run")
    with pytest.raises(ZeroDivisionError), directory:
        raise ZeroDivisionError
    assert caplog.text.count("is no longer what this run opened") == 1


@pytest.mark.parametrize("how", ["resume there", "move back", "go on"])
def test_a_moved_run_continues(tmp_path, how):
    run, moved = tmp_path / "run", tmp_path / "moved"
    directory = open_small_run(run)
    list(train(directory, (1, 2)))
    move(run)
    with pytest.raises(RunMovedError):
        list(train(directory, (3,)))
    if how != "resume there":
        moved.rename(run)
        moved = run
    if how != "go on":
        directory.close()
        directory = open_small_run(moved)
        assert same(directory.resume(), state_after(2))
    assert list(train(directory, (3, 4))) == [3, 4]
    directory.close()
    lines = [line["update"] for line in read(moved / "metrics.jsonl")]
    assert lines == ([1, 2, 3, 3, 4] if how == "go on" else [1, 2, 3, 4])
    assert os.listdir(tmp_path) == [moved.name]  # noqa: PTH208  # names


def test_a_directory_moved_on_purpose_is_closed_without_an_error(tmp_path):
    with open_small_run(tmp_path / "run") as directory:
        list(train(directory, (1,)))
        move(tmp_path / "run")
    with open_small_run(tmp_path / "moved") as directory:
        assert same(directory.resume(), state_after(1))


@pytest.mark.parametrize("on_error", ["stop", "warn"])
def test_a_move_during_a_save_is_an_error(tmp_path, on_error):
    run = tmp_path / "run"

    def call(function, *arguments):
        if function is os.open and str(arguments[0]).endswith("weights.safetensors") and "U3" in str(arguments[0]):
            move(run)
        return call_without_fsync(function, *arguments)

    with open_small_run(run, Disk(call), on_error=on_error) as directory:
        list(train(directory, (1, 2)))
        with pytest.raises(RunMovedError):
            list(train(directory, (3,)))
    assert not run.exists()
    with open_small_run(tmp_path / "moved") as directory:
        assert same(directory.resume(), state_after(2))


@pytest.mark.parametrize("name", ["metrics.jsonl", "events.jsonl"])
@pytest.mark.parametrize("damage", ["move", "remove", "replace"])
@pytest.mark.parametrize("resumed", [True, False])
def test_a_log_file_that_is_gone_stops_the_run_once(tmp_path, name, damage, resumed):
    run = tmp_path / "run"

    def write(directory, update, *effects):
        interpret = directory.recording_interpreter(directory.interpreter, line)
        interpret([LogScalars({"x": update}), *effects], state_after(update), AfterUpdate(samples=4))

    def line(_effects, state, event):
        return {"event": "after_update", "epoch": 0, "update": state.iteration.update, "sample": 0, "time_s": 0.0}

    directory = open_small_run(run)
    write(directory, 1, SaveCheckpoint())
    if resumed:
        directory.close()
        directory = open_small_run(run)
        directory.resume()
    (run / name).unlink() if damage == "remove" else (run / name).rename(run / "old")
    if damage == "replace":
        shutil.copy(run / "old", run / name)
    before = content(run)
    with pytest.raises(RunMovedError, match=f"{re.escape(name)} is no longer what .* Put it back and resume the run"):
        write(directory, 2)
    assert content(run).keys() == before.keys()
    assert content(run).get(name) == before.get(name)
    write(directory, 3, SaveCheckpoint())  # as after an error: the state is saved, and the lines count as lost
    directory.close()
    assert content(run).get(name) == before.get(name)
    if damage != "remove":
        assert [each["update"] for each in read(run / "old")] == [1, 2, 3]  # written to the open file
        (run / "old").rename(run / name)
    with open_small_run(run) as directory:
        newest = directory.checkpoints.newest()
        assert (newest.log_lines, newest.log_lines_lost) == ((0, 3) if name == "metrics.jsonl" else (2, 0))
        assert same(directory.resume(), state_after(3))


def test_a_check_that_fails_is_no_evidence(tmp_path):
    """The write itself reports the error of the disk."""
    failing = []

    def call(function, *arguments):
        if failing and function in (os.stat, os.fstat):
            raise OSError(errno.EACCES, "Permission denied")
        return call_without_fsync(function, *arguments)

    with open_small_run(tmp_path / "run", Disk(call)) as directory:
        list(train(directory, (1,)))
        failing.append(True)
        directory.check_location()
        failing.clear()


@pytest.mark.parametrize("stale", [os.stat, os.fstat])
def test_a_stale_file_handle_is_a_removed_directory(tmp_path, stale):
    """As on NFS, after another machine removed the directory."""
    failing = []

    def call(function, *arguments):
        if failing and function is stale:
            raise OSError(errno.ESTALE, "Stale file handle")
        return call_without_fsync(function, *arguments)

    with open_small_run(tmp_path / "run", Disk(call)) as directory:
        failing.append(True)
        with pytest.raises(RunMovedError, match="it was removed, or moved to another file system"):
            directory.check_location()
        failing.clear()


def test_linked_checkpoints_are_followed_and_checked(tmp_path):
    """A link to another disk in the place of `checkpoints`."""
    (tmp_path / "scratch").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run/checkpoints").symlink_to(tmp_path / "scratch")
    with open_small_run(tmp_path / "run") as directory:
        list(train(directory, (1,)))
        (tmp_path / "run/checkpoints").unlink()
        (tmp_path / "other").mkdir()
        (tmp_path / "run/checkpoints").symlink_to(tmp_path / "other")
        with pytest.raises(RunMovedError, match=r"checkpoints is no longer .*: it is now a link that leads elsewhere"):
            directory.interpreter([SaveCheckpoint()], state_after(2), AfterUpdate(samples=4))
    assert list((tmp_path / "other").iterdir()) == []


def test_an_update_does_not_check_the_place(tmp_path):
    """Only a flush or a save does; it compares files once."""
    calls = []

    def call(function, *arguments):
        calls.append(function.__name__)
        return call_without_fsync(function, *arguments)

    with open_small_run(tmp_path / "run", Disk(call)) as directory:
        directory.interpreter([LogScalars({"x": 0})], at(0), update_at(0.0))
        calls.clear()
        for update in range(1, 9):
            directory.interpreter([LogScalars({"x": update})], at(update), update_at(update / 10))
        assert calls == []
        directory.interpreter([LogScalars({"x": 9})], at(9), update_at(1.0))
        assert calls == 2 * ["write", "fstat", "stat"]


def test_a_checkpoint_error_is_not_hidden(tmp_path):
    with open_run(tmp_path / "run", disk=NO_FSYNC) as directory, pytest.raises(CheckpointError, match="tag 'a/b'"):
        directory.interpreter([SaveCheckpoint(tag="a/b")], at(1), AfterEpoch())


@pytest.mark.parametrize("effect", [SaveCheckpoint(), SaveTensors(name="a", tensors=state_after(1).params)])
def test_a_move_before_any_call_of_the_first_write_leaves_nothing_at_the_old_path(tmp_path, effect):
    calls, moves_at = 0, -1

    def call(function, *arguments):
        nonlocal calls
        calls += 1
        if calls == moves_at:
            move(run)
        return call_without_fsync(function, *arguments)

    def write():
        nonlocal calls
        with suppress(RunMovedError), open_small_run(run, Disk(call)) as directory:
            calls = 0
            directory.interpreter([effect], state_after(1), AfterUpdate(samples=4))
            return calls
        return None

    run = tmp_path / "whole/run"
    total = write()
    assert total > 5
    for moves_at in range(1, total + 1):
        run = tmp_path / f"{moves_at}/run"
        write()
        assert not run.exists()
        assert run.with_name("moved").is_dir()
