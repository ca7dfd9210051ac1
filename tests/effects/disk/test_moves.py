"""Moves of a directory: a fault at any call leaves it whole in a place where the next process finds it."""

import os
import random
import shutil
import socket
from pathlib import Path

import pytest
from faults import KINDS, Faults, Killed, PowerLoss, call_without_fsync, can_meet, write_tree

from noether.effects.disk import moves
from noether.effects.disk.calls import Disk
from noether.effects.disk.lock import LOCK, LockedError, RunLock
from noether.effects.disk.moves import JOURNAL, finish_move, move_directory

FILES = {
    "config.yaml": b"output: here\n",
    "metrics.jsonl": b"1\n2\n",
    "checkpoints/E1/weights": bytes(range(200)),
    "checkpoints/latest": b"E1\n",
    "eval/E1.json": b"",
}
MOVED = {**FILES, "config.yaml": b"output: there\n"}


@pytest.fixture(autouse=True)
def locks_on_the_real_disk(monkeypatch):
    """A simulated kill does not end the process, so it must not keep a lock open."""
    monkeypatch.setattr(moves, "RunLock", lambda directory, disk: RunLock(directory))


def make_run(root):
    for name, content in FILES.items():
        path = root / "here/run" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root / "here/run"


def files(folder):
    """Return the content of the files below a folder, by relative path, without those of the move itself."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: content for name, content in found.items() if name not in (JOURNAL, LOCK, f".tmp-{JOURNAL}")}


def is_whole(folder):
    return files(folder) in (FILES, MOVED)


def move(root, disk, unchanging=("checkpoints",)):
    """Do what a resumed run with another output does, in a process of its own."""
    source, target = root / "here/run", root / "there/run"
    run = finish_move(source if source.exists() else target, disk)
    if run == source:
        move_directory(source, target, {"config.yaml": "output: there\n"}, unchanging=unchanging, disk=disk)


def check_repeated(root):
    """Check that the run is whole at its place, and that the repeated move leaves it at its target only."""
    assert any(is_whole(root / place) for place in ("here/run", "there/run"))
    move(root, Disk(call_without_fsync))
    assert files(root) == {f"there/run/{name}": content for name, content in MOVED.items()}
    assert not (root / "there/run" / JOURNAL).exists()
    assert sorted(path.name for path in root.glob("*/*")) == ["run"]


@pytest.mark.parametrize(
    ("kind", "may_link"),
    [
        *((kind, False) for kind in KINDS if not kind.startswith(("EDQUOT", "EACCES"))),
        ("kill", True),
        ("EIO once", True),
    ],
)
def test_no_fault_in_a_call_of_a_move_loses_a_file(tmp_path, kind, may_link):
    def call(function, *arguments):
        if function is os.link and not may_link:  # as between two file systems
            raise OSError(18, "Invalid cross-device link")
        return call_without_fsync(function, *arguments)

    faults = Faults(call)
    make_run(tmp_path / "faultless")
    faults.arm()
    move(tmp_path / "faultless", Disk(faults))
    check_repeated(tmp_path / "faultless")
    calls = list(faults.names)
    faulty = [number for number, name in enumerate(calls) if can_meet(name, kind)]
    assert len(faulty) >= (3 if kind in ("torn", "short") else 60)
    stopped = 0
    for number in faulty:
        root = tmp_path / str(number)
        make_run(root)
        faults.arm(number, kind)
        try:
            move(root, Disk(faults))
        except (OSError, Killed):
            stopped += 1
        finally:
            faults.armed = False
        check_repeated(root)
    assert stopped >= (0 if kind == "short" else len(faulty) // 2)


@pytest.mark.parametrize("error", ["ENOSPC", "EDQUOT"])
def test_a_full_target_leaves_nothing_behind(tmp_path, error):
    faults = Faults()
    source = make_run(tmp_path)
    faults.arm()
    move(tmp_path, Disk(faults))
    writes = [number for number, name in enumerate(faults.names) if name == "write"]
    shutil.rmtree(tmp_path)
    for number in writes[1:]:  # the first one writes the journal
        make_run(tmp_path)
        faults.arm(number, f"{error} once")
        with pytest.raises(OSError, match=r"No space left|quota exceeded"):
            move(tmp_path, Disk(faults))
        faults.armed = False
        assert files(source) == FILES
        assert not (source / JOURNAL).exists()
        assert list((tmp_path / "there").iterdir()) == []
        shutil.rmtree(tmp_path)


def outcomes_of_power_losses(root, samples, skips_fsync=None, unchanging=("checkpoints",)):
    chance, outcomes = random.Random(0), []  # noqa: S311  # no secrets
    make_run(root)
    power = PowerLoss(root, lambda: outcomes.append([power.survivors(chance) for _ in range(samples)]), skips_fsync)
    move(root, Disk(power), unchanging)
    return [survivors for each in outcomes for survivors in each]


def restore(root, survivors):
    shutil.rmtree(root)
    root.mkdir()
    write_tree(survivors, root)


@pytest.mark.parametrize("unchanging", [["checkpoints"], []])
def test_no_loss_of_power_loses_a_file(tmp_path, unchanging):
    root = tmp_path / "root"
    outcomes = outcomes_of_power_losses(root, 30, unchanging=unchanging)
    outcomes = {tuple(survivors.items()) for survivors in outcomes}
    assert len(outcomes) >= 80
    for survivors in outcomes:
        restore(root, dict(survivors))
        check_repeated(root)


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_a_move_without_fsync_is_detected(tmp_path, kind):
    root = tmp_path / "root"
    outcomes = outcomes_of_power_losses(root, 20, lambda path, what: what == kind)

    def is_lost(survivors):
        restore(root, survivors)
        return not any(is_whole(root / place) for place in ("here/run", "there/run"))

    assert any(map(is_lost, reversed(outcomes)))


def test_links_lead_to_the_same_files(tmp_path):
    source = make_run(tmp_path)
    (tmp_path / "elsewhere").write_text("outside")
    links = {"inside": "metrics.jsonl", "absolute": str(source / "metrics.jsonl"), "eval/up": "../metrics.jsonl"}
    links |= {"outside": "../../elsewhere", "gone": "nothing"}
    for name, text in links.items():
        (source / name).symlink_to(text)
    target = tmp_path / "deeper/down/run"
    move_directory(source, target)
    assert not source.exists()
    assert [(target / name).read_text() for name in ("inside", "absolute", "eval/up")] == ["1\n2\n"] * 3
    assert (target / "outside").read_text() == "outside"
    assert (target / "gone").readlink() == Path("nothing")


def test_permissions_and_times_are_kept(tmp_path):
    source = make_run(tmp_path)
    (source / "metrics.jsonl").chmod(0o600)
    os.utime(source / "metrics.jsonl", (1, 2))
    source.chmod(0o700)
    move_directory(source, tmp_path / "run")
    status = (tmp_path / "run/metrics.jsonl").stat()
    assert (status.st_mode & 0o777, status.st_mtime) == (0o600, 2)
    assert (tmp_path / "run").stat().st_mode & 0o777 == 0o700


def test_what_cannot_be_copied_is_named(tmp_path):
    source = make_run(tmp_path)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(source / "socket"))
    with pytest.raises(OSError, match=r"is neither a file nor a directory nor a link: '.*/socket'"):
        move_directory(source, tmp_path / "run")
    assert is_whole(source)
    assert not (tmp_path / "run").exists()


def test_a_run_that_another_process_moves_is_not_touched(tmp_path):
    """A forked child holds the lock of the source, as a process in the middle of a move does."""
    source = make_run(tmp_path)
    ready, done = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        lock = RunLock(source)
        os.write(ready[1], b"x")
        os.read(done[0], 1)
        lock.release()
        os._exit(0)
    os.read(ready[0], 1)
    (source / JOURNAL).write_text("{}")
    try:
        with pytest.raises(LockedError, match=f"is in use by process {child}"):
            finish_move(source)
    finally:
        os.write(done[1], b"x")
        os.waitpid(child, 0)
    assert finish_move(source) == source
    assert files(source) == FILES


def test_a_copy_made_by_hand_is_independent(tmp_path):
    """The journal in a copied directory names other places, which are left alone."""
    faults = Faults()
    source = make_run(tmp_path)
    faults.arm()
    move(tmp_path, Disk(faults))
    number = len(faults.names)
    shutil.rmtree(tmp_path)
    while not ((tmp_path / "there/run").exists() and source.exists()):  # killed when both are in place
        number -= 1
        shutil.rmtree(tmp_path, ignore_errors=True)
        make_run(tmp_path)
        faults.arm(number)
        with pytest.raises(Killed):
            move(tmp_path, Disk(faults))
        faults.armed = False
    copied = Path(shutil.copytree(source, tmp_path / "copied"))
    assert finish_move(copied) == copied
    assert files(copied) == FILES
    assert source.exists()
    assert (tmp_path / "there/run").exists()
    assert finish_move(tmp_path / "there/run") == tmp_path / "there/run"
    assert not source.exists()
    assert files(tmp_path / "there/run") == MOVED
