"""A branch of a run is whole or not there, whatever fails, and its source stays as it is."""

import json
import random
import shutil

import pytest
from faults import Faults, Killed, PowerLoss, call_without_fsync, can_meet, write_tree
from small_run import NO_FSYNC, open_small_run, state_after, train

from noether.effects import branches
from noether.effects.branches import branch_run
from noether.effects.checkpoints.listing import CheckpointError
from noether.effects.checkpoints.store import CheckpointStore
from noether.effects.disk.calls import Disk
from noether.effects.disk.lock import LOCK, LockedError, RunLock


@pytest.fixture(autouse=True)
def locks_on_the_real_disk(monkeypatch):
    """A simulated kill does not end the process, so it must not keep a lock open."""
    monkeypatch.setattr(branches, "RunLock", lambda directory, disk: RunLock(directory))


def make_source(root):
    """Train three updates, of which the pointer `best` names the first and `latest` the third; return the run."""
    source = root / "here/run"
    source.mkdir(parents=True)
    (source / "config.yaml").write_text("run: {}\n")
    with open_small_run(source) as directory:
        list(train(directory, (1, 2, 3), keep=3))
    return source


def branch(root, disk=NO_FSYNC, update=2):
    source = root / "here/run"
    manifest = CheckpointStore(source / "checkpoints", "run").find(f"U{update}")
    return branch_run(source, root / "there/new", manifest, state_after(update), disk)


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def check_whole(root, update=2, lacks=()):
    """Check that the branch resumes at the update, with its log, and has the pointers except those that it lacks."""
    folder = root / "there/new"
    with open_small_run(folder) as directory:
        assert str(directory.resume().iteration) == str(state_after(update).iteration)
        pointers = {"best": "E0_U1_S4", "latest": f"E0_U{update}_S{4 * update}"}
        assert directory.checkpoints.pointers() == {name: pointers[name] for name in pointers.keys() - lacks}
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["update"] for line in lines] == list(range(1, update + 1))
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["branched_from"] == str(root / "here/run/checkpoints" / f"E0_U{update}_S{4 * update}")


def test_a_branch_starts_at_a_checkpoint_with_what_was_logged_and_named_up_to_it(tmp_path):
    source = make_source(tmp_path)
    before = files(source)
    assert branch(tmp_path) == []
    check_whole(tmp_path)
    shutil.rmtree(tmp_path / "there")
    assert branch(tmp_path, update=3) == []
    check_whole(tmp_path, update=3)
    shutil.rmtree(tmp_path / "there")
    (source / "checkpoints/best").write_bytes((source / "checkpoints/latest").read_bytes())
    assert branch(tmp_path) == ["best"]
    assert CheckpointStore(tmp_path / "there/new/checkpoints", "new").pointers() == {"latest": "E0_U2_S8"}
    assert files(source) == before | {"checkpoints/best": before["checkpoints/latest"]}


@pytest.mark.parametrize(
    ("kind", "stride"), [("kill", 3), ("torn", 1), ("short", 2), ("ENOSPC once", 5), ("EIO from then on", 7)]
)
def test_no_fault_leaves_part_of_a_branch(tmp_path, kind, stride):
    faults, source = Faults(), make_source(tmp_path)
    before, target = files(source), tmp_path / "there/new"
    faults.arm()
    branch(tmp_path, Disk(faults))
    calls = list(faults.names)
    assert len(calls) >= 60
    stopped = 0
    for number in [number for number, name in enumerate(calls) if can_meet(name, kind)][::stride]:
        shutil.rmtree(tmp_path / "there")
        faults.arm(number, kind)
        lacks = []
        try:
            lacks = branch(tmp_path, Disk(faults))  # a pointer that cannot be read
        except (OSError, CheckpointError, Killed):
            stopped += 1
        finally:
            faults.armed = False
        assert files(source) == before
        if not target.exists():
            branch(tmp_path)
        check_whole(tmp_path, lacks=lacks)
        assert not list(target.parent.glob(".tmp-*")) or kind == "EIO from then on"
    assert stopped or kind == "short"  # of which the rest is written next


def test_no_loss_of_power_leaves_part_of_a_branch(tmp_path):
    root, chance, outcomes = tmp_path / "root", random.Random(0), set()  # noqa: S311  # no secrets
    before = files(make_source(root))
    power = PowerLoss(root, lambda: outcomes.update([tuple(power.survivors(chance).items()) for _ in range(4)]))
    branch(root, Disk(power))
    assert len(outcomes) >= 20
    for survivors in outcomes:
        shutil.rmtree(root)
        root.mkdir()
        write_tree(dict(survivors), root)
        assert files(root / "here/run") == before
        if not (root / "there/new").exists():
            branch(root)
        check_whole(root)


def test_a_branch_that_another_process_makes_is_not_touched(tmp_path):
    make_source(tmp_path)
    other = tmp_path / "there/.tmp-new"
    other.mkdir(parents=True)
    lock = RunLock(other)
    with pytest.raises(LockedError):
        branch(tmp_path)
    lock.release()
    (other / "part").write_text("of a process that was killed")
    branch(tmp_path, Disk(call_without_fsync))
    assert not other.exists()
    assert not {LOCK, "part"} & set(files(tmp_path / "there/new"))
