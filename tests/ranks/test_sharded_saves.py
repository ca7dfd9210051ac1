"""Checkpoints of states with shards: ranks save them together, and an error or death of one leaves no part of one."""

import errno
import os
import signal

import pytest
from processes import outcomes_on_ranks, run_on_ranks
from sharded_states import full_tensors, sharded_tensors, state_of

from noether import AfterUpdate, Run, SaveCheckpoint, open_run
from noether.distributed.ranks import join
from noether.effects.checkpoints.listing import CheckpointError, list_checkpoints
from noether.effects.checkpoints.reader import CheckpointReader
from noether.effects.disk.calls import DISK, Disk
from noether.testing import same


def save(directory, ranks, update=1):
    """Save the state after an update, and a checkpoint of its averaged weights; each replaces earlier ones."""
    state = state_of(sharded_tensors(ranks.world_size, replicated=("counts",)), update)
    newest = SaveCheckpoint(pointers=("latest",), retention={"c": 1})
    average = SaveCheckpoint(tag=f"ema_{update}", optimizer=False, weights_of="ema=0.9", retention={"e": 1})
    run = Run(rank=ranks.rank, world_size=ranks.world_size)
    directory.interpreter((newest, average), state, AfterUpdate(run=run, samples=4))
    directory.wait()
    return state


def save_twice(folder):
    """Save one state twice, and then a later one; return whether the run holds the first state, and a later one."""
    ranks = join(timeout_s=60)
    with open_run(folder, ranks=ranks, asynchronous=True) as directory:
        state = save(directory, ranks)
        held = directory.checkpoints.holds(state), directory.checkpoints.holds(state.advance(samples=4))
        save(directory, ranks)
        assert [each.tag for each in directory.checkpoints.manifests()] == ["E0_U1_S4", "ema_1"]
        ranks.control.reduce("both have read the directory")
        save(directory, ranks, update=2)
    return held


def test_ranks_save_together_in_the_background(tmp_path):
    assert run_on_ranks(save_twice, 2, tmp_path / "run") == [(True, False)] * 2
    reader = CheckpointReader(tmp_path / "run/checkpoints")
    assert [each.tag for each in reader.manifests()] == ["E0_U2_S8", "ema_2"]
    manifest = reader.find("latest")
    names = [f"{part}-0000{rank}-of-00002.safetensors" for part in ("optimizer", "state", "weights") for rank in (1, 2)]
    assert sorted(manifest.parts) == sorted([*names, "state.json"])
    state, expected = reader.load(manifest), state_of(full_tensors(), 2)
    assert same(state, expected)
    assert [each.stride() for each in state.params.values()] == [each.stride() for each in expected.params.values()]
    assert same(reader.load(reader.find("ema_2")).params, expected.params)


class FailingDisk:
    """Makes calls of a disk; once it is armed, a call of one function fails or ends the process."""

    def __init__(self, function, kind):
        self._function, self._kind = function, kind
        self.armed = False

    def __call__(self, function, *arguments):
        if self.armed and function is self._function:
            if self._kind == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return function(*arguments)


def save_with_faults(folder, faults):
    """Save once, once for each fault, and once more; return the errors of the faults that did not kill this rank."""
    ranks, errors = join(timeout_s=60), []
    for index, (failing, function, kind, on_error) in enumerate(faults):
        disk = FailingDisk(function, kind)
        with open_run(folder, ranks=ranks, on_error=on_error, disk=Disk(disk)) as directory:
            if index == 0:
                save(directory, ranks)
            disk.armed = ranks.rank == failing
            error = None
            try:
                save(directory, ranks, update=2)
            except CheckpointError as caught:
                error = str(caught)
            errors.append(error)
            disk.armed = False
            save(directory, ranks, update=3)
        ranks.control.reduce("run directory is closed")
    return errors


def test_a_full_disk_of_one_rank_fails_the_save_on_all(tmp_path):
    faults = [(0, os.write, "fail", "stop"), (1, os.write, "fail", "stop"), (1, os.write, "fail", "warn")]
    errors, others = run_on_ranks(save_with_faults, 2, tmp_path / "run", faults)
    assert errors == others
    assert errors[2] is None
    assert "E0_U2_S8 could not be written: [Errno 28] No space left on device" in errors[0]
    assert "E0_U2_S8 could not be written: rank 1: [Errno 28] No space left on device" in errors[1]
    reader = CheckpointReader(tmp_path / "run/checkpoints")
    assert {each.iteration.update for each in reader.manifests()} == {3}
    assert same(reader.load(reader.find("latest")), state_of(full_tensors(), 3))
    assert not [*(tmp_path / "run/checkpoints").glob(".tmp*")]


@pytest.mark.parametrize(("killed", "function"), [(1, os.write), (0, os.rename)], ids=["writing", "committing"])
def test_a_killed_rank_leaves_no_part_of_a_checkpoint(tmp_path, killed, function):
    outcomes = outcomes_on_ranks(save_with_faults, 2, tmp_path / "run", [(killed, function, "kill", "warn")])
    assert outcomes[killed] == ("ended", -signal.SIGKILL)
    assert outcomes[1 - killed][0] == "raised"
    assert "CheckpointError" not in outcomes[1 - killed][1].splitlines()[0]
    listing = list_checkpoints(tmp_path / "run/checkpoints", DISK)
    assert [each.tag for each in listing.manifests] == ["E0_U1_S4", "ema_1"]
    assert (listing.damaged, listing.broken) == ({}, {})
    with open_run(tmp_path / "run") as directory:  # one process
        assert same(directory.resume(), state_of(full_tensors()))
    assert not [*(tmp_path / "run/checkpoints").glob(".tmp*")]


class Counter:
    """Makes calls of a disk, and counts them once it is armed; that of one number fails."""

    def __init__(self):
        self.armed, self.count, self.failing = False, 0, None

    def arm(self, failing=None):
        self.armed, self.count, self.failing = True, 0, failing

    def __call__(self, function, *arguments):
        if self.armed:
            self.count += 1
            if self.count - 1 == self.failing:
                if function is os.close:
                    function(*arguments)  # a close that fails still closes the file
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return None if function is os.fsync else function(*arguments)


def fail_in_every_call(folder, step):
    """Save with an error in every `step`-th call of each rank; return how many calls a save has, and saves failed."""
    ranks, disk, failed = join(timeout_s=60), Counter(), 0
    with open_run(folder, ranks=ranks, disk=Disk(disk)) as directory:
        save(directory, ranks)
        disk.arm()
        save(directory, ranks, update=2)
        counts = ranks.control.gather("calls of a save", disk.count)
        acknowledged = update = 2
        for rank, count in enumerate(counts):
            for call in range(0, count, step):
                update += 1
                disk.arm(call if rank == ranks.rank else None)
                error = ""
                try:
                    save(directory, ranks, update=update)
                except CheckpointError as caught:
                    error = str(caught)
                disk.armed = False
                assert len(set(ranks.control.gather("error", error))) == 1
                failed += bool(error)
                acknowledged = acknowledged if error else update
                newest = directory.checkpoints.newest()
                assert newest.iteration.update >= acknowledged
                if ranks.is_first:
                    found = directory.checkpoints.load(newest)
                    assert same(found, state_of(full_tensors(), newest.iteration.update))
    return counts, failed


@pytest.mark.parametrize(
    "step", [pytest.param(1, marks=pytest.mark.slow, id="every call"), pytest.param(13, id="every 13th call")]
)
def test_no_error_of_one_rank_leaves_part_of_a_checkpoint(tmp_path, step):
    (counts, failed), other = run_on_ranks(fail_in_every_call, 2, tmp_path / "run", step)
    assert (counts, failed) == other
    assert min(counts) > 10
    assert failed > sum(counts) // step // 3
    listing = list_checkpoints(tmp_path / "run/checkpoints", DISK)
    assert (listing.damaged, listing.broken) == ({}, {})
    with open_run(tmp_path / "run") as directory:
        assert directory.resume() is not None
    assert not [*(tmp_path / "run/checkpoints").glob(".tmp*")]
