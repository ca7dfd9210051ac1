"""Whatever happens in the middle of a save, no checkpoint that was reported as saved is ever lost, and all goes on."""

import json
import random
import shutil

import pytest
from faults import KINDS, Faults, Killed, PowerLoss, can_meet, write_tree
from small_run import BEST, NO_FSYNC, open_small_run, state_after, train

from noether import AfterUpdate, LogScalars, SaveCheckpoint
from noether.effects import CheckpointError, CheckpointStore, LogError
from noether.effects.checkpoints import writer as writing
from noether.effects.checkpoints.listing import list_checkpoints
from noether.effects.disk.calls import Disk
from noether.effects.disk.files import TEMPORARY_PREFIX, remove_tree, write_new_file
from noether.effects.logs.buffers import discard_all_buffers
from noether.effects.logs.jsonl import LinesFile
from noether.effects.run_logs import RunLogs
from noether.testing import same


def check(directory, acknowledged):
    """Check what is in a directory after whatever happened, and that a run goes on there.

    Args:
        directory: Of the run.
        acknowledged: The newest update that was reported as saved; 0 for none.
    """
    found = list_checkpoints(directory / "checkpoints", NO_FSYNC)
    assert (found.damaged, found.broken) == ({}, {})
    with open_small_run(directory) as run:
        state = run.resume()
        newest = 0 if state is None else state.iteration.update
        assert newest >= acknowledged
        assert newest == 0 or same(state, state_after(newest))
        store = run.checkpoints
        for name, since in (("latest", 1), ("best", BEST)):
            if acknowledged >= since:
                pointed = store.load(store.find(name))
                assert pointed.iteration.update >= (acknowledged if name == "latest" else BEST)
                assert same(pointed, state_after(pointed.iteration.update))
        lines = (directory / "metrics.jsonl").read_text().splitlines() if newest else []
        lost = max((each.log_lines_lost for each in store.manifests() if each.iteration.update == newest), default=0)
        assert newest - lost <= len(lines) <= newest
        assert list(train(run, [newest + 1])) == [newest + 1]
        assert store.pointers()["latest"] == str(state_after(newest + 1).iteration)
    assert not [name for name in (directory / "checkpoints").iterdir() if name.name.startswith(TEMPORARY_PREFIX)]


@pytest.fixture(scope="module")
def three_saves(tmp_path_factory):
    """A run of three checkpoints, of which a save at update 4 removes one."""
    directory = tmp_path_factory.mktemp("begun") / "run"
    with open_small_run(directory) as run:
        assert list(train(run, (1, 2, 3))) == [1, 2, 3]
    return directory


def saved_with(directory, *fault):
    """Save twice on a disk with a fault; return the newest update that was reported as saved, and the calls of one."""
    faults, newest, calls = Faults(), 3, []
    with open_small_run(directory, Disk(faults)) as run:
        run.resume()
        faults.arm(*fault)
        try:
            for update in train(run, (4, 5)):
                newest, calls = update, calls or list(faults.names)
        except (CheckpointError, Killed):
            pass
        finally:
            faults.armed = False
    return newest, calls


@pytest.mark.parametrize("kind", KINDS)
def test_no_fault_in_any_call_of_a_save_with_a_prune_loses_a_checkpoint(three_saves, tmp_path, kind):
    calm = shutil.copytree(three_saves, tmp_path / "calm" / "run")
    newest, calls = saved_with(calm)
    assert (newest, (calm / "checkpoints" / str(state_after(2).iteration)).exists()) == (5, False)
    # Eleven kinds of faults, each in all of the calls that it can meet.
    assert len(calls) >= 100
    met = [number for number, name in enumerate(calls) if can_meet(name, kind)]
    assert len(met) >= 10
    for number in met:
        directory = shutil.copytree(three_saves, tmp_path / str(number) / "run")
        newest, _ = saved_with(directory, number, kind)
        check(directory, newest)
        shutil.rmtree(directory)


def cut_off(root, samples, skipped=None):
    """Train in two processes; return what a loss of power after each of their calls may leave.

    Returns:
        Pairs of what survived, by path below `root`, and the newest update that had been reported as saved.
    """
    root.mkdir()
    chance, found, saved = random.Random(0), [], 0  # noqa: S311  # no secrets

    def lose():
        found.extend((power.survivors(chance), saved) for _ in range(samples))

    power = PowerLoss(root, lose, skipped)
    for updates in ((1, 2, 3), (4, 5)):
        with open_small_run(root / "run", Disk(power)) as run:
            run.resume()
            for update in train(run, updates, keep=1):
                saved = update
            # Beyond the last checkpoint: the next process cuts it off.
            run.interpreter([LogScalars({"loss": 0.0})], state_after(updates[-1] + 1), AfterUpdate(samples=4))
    return found


def check_survivors(found, folder):
    for number, (survivors, saved) in enumerate(found):
        root = folder / str(number)
        root.mkdir(parents=True)
        write_tree(survivors, root)
        check(root / "run", saved)
        shutil.rmtree(root)


def test_a_loss_of_power_at_any_moment_loses_nothing_that_was_saved(tmp_path):
    found = cut_off(tmp_path / "root", 6)
    different = {(tuple(survivors.items()), saved) for survivors, saved in found}
    assert len(different) >= 1000
    check_survivors([(dict(survivors), saved) for survivors, saved in different], tmp_path)


def log_and_save(run, updates):
    """Log at each of `updates` within one second, save at every third; yield each update that is reported as saved."""
    for update in updates:
        save = [SaveCheckpoint(pointers=("latest",), retention={"c": 1})] if update % 3 == 0 else []
        event = AfterUpdate(samples=4, time_s=1000 + update / 100)
        run.interpreter([LogScalars({"loss": 1 / update}), *save], state_after(update), event)
        if save:
            yield update


def waiting_cut_off(root, samples):
    """Do as `cut_off` while lines wait, four of which are beyond the last save."""
    root.mkdir()
    chance, found, saved = random.Random(0), [], 0  # noqa: S311  # no secrets

    def lose():
        found.extend((power.survivors(chance), saved) for _ in range(samples))

    power = PowerLoss(root, lose)
    for updates in (range(1, 8), range(7, 14)):
        with open_small_run(root / "run", Disk(power)) as run:
            run.resume()
            for update in log_and_save(run, updates):
                saved = update
    return found


def check_waiting(found, folder):
    """Check that a run goes on with the lines up to its state, and none that was saved is missing or there twice."""
    for number, (survivors, saved) in enumerate(found):
        root = folder / str(number)
        root.mkdir(parents=True)
        write_tree(survivors, root)
        log = root / "run/metrics.jsonl"
        with open_small_run(root / "run") as run:
            state = run.resume()
            newest = 0 if state is None else state.iteration.update
            assert newest >= saved
            assert updates_in(log) == [*range(1, newest + 1)]
            list(log_and_save(run, range(newest + 1, newest + 6)))
        assert updates_in(log) == [*range(1, newest + 6)]
        shutil.rmtree(root)


def updates_in(log):
    return [json.loads(line)["update"] for line in log.read_text().splitlines()] if log.exists() else []


def test_a_loss_of_power_while_lines_wait_loses_none_that_was_saved(tmp_path):
    found = waiting_cut_off(tmp_path / "root", 3)
    different = {(tuple(survivors.items()), saved) for survivors, saved in found}
    assert len(different) >= 200
    check_waiting([(dict(survivors), saved) for survivors, saved in different], tmp_path)


def test_a_save_that_leaves_lines_waiting_is_caught(tmp_path, monkeypatch):
    with monkeypatch.context() as mutated:
        mutated.setattr(RunLogs, "flush_files", lambda self: None)
        found = waiting_cut_off(tmp_path / "root", 3)
    with pytest.raises(AssertionError):
        check_waiting(found, tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_no_fault_while_lines_wait_loses_one_that_is_not_counted(tmp_path, kind):
    """Faults in every call of a run in which three lines are handed over by each save."""
    for number in range(1000):
        directory, faults, saved = tmp_path / str(number) / "run", Faults(), 0
        run = open_small_run(directory, Disk(faults))
        faults.arm(number, kind)
        try:
            for update in log_and_save(run, range(1, 8)):
                saved = update
        except CheckpointError:
            pass
        except Killed:
            discard_all_buffers()  # a process that ended has no memory
        faults.armed = False
        run.close()
        met = number < len(faults.names)
        with open_small_run(directory) as run:
            state = run.resume()
            newest = 0 if state is None else state.iteration.update
            assert newest >= saved
            lost = max((each.log_lines_lost for each in run.checkpoints.manifests()), default=0)
            found = updates_in(directory / "metrics.jsonl")
            assert found == sorted(set(found))
            assert len(found) + lost >= newest
        shutil.rmtree(directory.parent)
        if not met:
            break
    assert number >= 50


STEPS = {name: getattr(CheckpointStore, name) for name in ("_write", "_commit", "_move_pointers", "_prune")}


def save_in_order(*order):
    """Return a `CheckpointStore.save` that takes its steps in another order."""
    save = CheckpointStore.save

    def save_out_of_order(store, *arguments):
        calls = {}

        def defer(name):
            def step(manifest, *others):
                calls[name] = (manifest, others)
                return manifest

            return step

        for name in STEPS:
            setattr(store, name, defer(name))
        save(store, *arguments)
        for name in STEPS:
            delattr(store, name)
        written = None
        for name in order:
            manifest, others = calls[name]
            result = STEPS[name](store, written or manifest, *others)
            written = result if name == "_write" else written

    return save_out_of_order


def pruned_in_place(self, tags):
    for tag in tags:
        remove_tree(self._directory / tag, self._disk)


def replaced_in_place(path, text, disk):
    if disk.kind(path) is not None:
        disk.remove(path)
    write_new_file(path, [text.encode()], disk)
    disk.fsync_directory(path.parent)


# By name: what is replaced (where, what, by what), and what is not flushed.
MUTANTS = {
    "no file is flushed": ((), lambda path, kind: kind == "file"),
    "the directory is not flushed": (
        (),
        lambda path, kind: path.name.startswith(TEMPORARY_PREFIX) and kind == "directory",
    ),
    "the parent is not flushed": ((), lambda path, kind: path.name == "checkpoints"),
    "pointers before the commit": (
        (CheckpointStore, "save", save_in_order("_write", "_move_pointers", "_commit", "_prune")),
        None,
    ),
    "prune first": ((CheckpointStore, "save", save_in_order("_prune", "_write", "_commit", "_move_pointers")), None),
    "prune before the pointers": (
        (CheckpointStore, "save", save_in_order("_write", "_commit", "_prune", "_move_pointers")),
        None,
    ),
    "written in place": ((writing.Writer, "_temporary", lambda self, tag: self._directory / tag), None),
    "pruned in place": ((writing.Writer, "prune", pruned_in_place), None),
    "pointers replaced in place": ((writing, "replace_text", replaced_in_place), None),
    "the log is not flushed": ((LinesFile, "fsync", lambda self, counts: counts), None),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mutant_of_the_protocol_is_caught(tmp_path, monkeypatch, mutant):
    change, skipped = MUTANTS[mutant]
    with monkeypatch.context() as mutated:
        if change:
            mutated.setattr(*change)
        found = cut_off(tmp_path / "root", 2, skipped)
    check(tmp_path / "root" / "run", 5)  # while nothing happens, it does as it should
    with pytest.raises((AssertionError, CheckpointError, LogError)):
        check_survivors(found, tmp_path)
