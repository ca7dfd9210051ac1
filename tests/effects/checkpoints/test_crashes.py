"""Faults, kills and losses of power during a save never lose a checkpoint that was reported as saved."""

import json
import random
import shutil

import pytest
from faults import KINDS, Faults, Killed, PowerLoss, can_meet, write_tree
from law_examples import slow_except
from small_run import BEST, NO_FSYNC, open_small_run, state_after, train

from noether import AfterUpdate, LogScalars, SaveCheckpoint
from noether.effects import CheckpointError, CheckpointStore, LogError
from noether.effects.checkpoints import writer
from noether.effects.checkpoints.listing import list_checkpoints
from noether.effects.checkpoints.manifest import Manifest
from noether.effects.disk.calls import Disk
from noether.effects.disk.files import TEMPORARY_PREFIX, remove_tree, write_new_file
from noether.effects.logs.buffers import discard_all_buffers
from noether.effects.logs.jsonl import LinesFile
from noether.effects.run_logs import RunLogs
from noether.testing import same


def check_recovery(folder, acknowledged):
    """Check the directory of a run after a crash, and that the run can resume and save there.

    Args:
        folder: The directory of the run.
        acknowledged: The newest update that was reported as saved; 0 for none.
    """
    listing = list_checkpoints(folder / "checkpoints", NO_FSYNC)
    assert (listing.damaged, listing.broken) == ({}, {})
    with open_small_run(folder) as directory:
        state = directory.resume()
        newest = 0 if state is None else state.iteration.update
        assert newest >= acknowledged
        assert newest == 0 or same(state, state_after(newest))
        store = directory.checkpoints
        for name, since in (("latest", 1), ("best", BEST)):
            if acknowledged >= since:
                target = store.load(store.find(name))
                assert target.iteration.update >= (acknowledged if name == "latest" else BEST)
                assert same(target, state_after(target.iteration.update))
        lines = (folder / "metrics.jsonl").read_text().splitlines() if newest else []
        lost = max((each.log_lines_lost for each in store.manifests() if each.iteration.update == newest), default=0)
        assert newest - lost <= len(lines) <= newest
        assert list(train(directory, [newest + 1])) == [newest + 1]
        assert store.pointers()["latest"] == str(state_after(newest + 1).iteration)
    assert not [name for name in (folder / "checkpoints").iterdir() if name.name.startswith(TEMPORARY_PREFIX)]


@pytest.fixture(scope="module")
def three_saves(tmp_path_factory):
    """A run with three checkpoints, one of which a save at update 4 removes."""
    folder = tmp_path_factory.mktemp("three") / "run"
    with open_small_run(folder) as directory:
        assert list(train(directory, (1, 2, 3))) == [1, 2, 3]
    return folder


def save_with_fault(folder, *fault):
    """Save twice on a disk with a fault; return the newest update reported as saved, and the calls of one save."""
    faults, newest, calls = Faults(), 3, []
    with open_small_run(folder, Disk(faults)) as directory:
        directory.resume()
        faults.arm(*fault)
        try:
            for update in train(directory, (4, 5)):
                newest, calls = update, calls or list(faults.names)
        except (CheckpointError, Killed):
            pass
        finally:
            faults.armed = False
    return newest, calls


FAULTS = [  # no code tells EDQUOT from ENOSPC
    *(pytest.param(kind, 5, id=kind) for kind in KINDS if not kind.startswith("EDQUOT")),
    *(pytest.param(kind, 1, id=f"{kind}, each call", marks=pytest.mark.slow) for kind in KINDS),
]


@pytest.mark.parametrize(("kind", "step"), FAULTS)
def test_no_fault_in_a_call_of_a_save_loses_a_checkpoint(three_saves, tmp_path, kind, step):
    faultless = shutil.copytree(three_saves, tmp_path / "faultless" / "run")
    newest, calls = save_with_fault(faultless)
    assert (newest, (faultless / "checkpoints" / str(state_after(2).iteration)).exists()) == (5, False)
    # Eleven kinds of faults, each in every `step`-th call in which it can occur, and in the last one.
    assert len(calls) >= 100
    faulty = [number for number, name in enumerate(calls) if can_meet(name, kind)]
    assert len(faulty) >= 10
    for number in {*faulty[::step], faulty[-1]}:
        folder = shutil.copytree(three_saves, tmp_path / str(number) / "run")
        newest, _ = save_with_fault(folder, number, kind)
        check_recovery(folder, newest)
        shutil.rmtree(folder)


def lose_power(root, samples, skips_fsync=None):
    """Train in two processes; return what a loss of power after each of their calls may leave.

    Args:
        root: Where to train.
        samples: How many possible outcomes to draw after each call.
        skips_fsync: Which fsyncs a mutant omits.

    Returns:
        Pairs of the surviving files, by path below `root`, and the newest update that had been reported as saved.
    """
    root.mkdir()
    chance, outcomes, saved = random.Random(0), [], 0  # noqa: S311  # no secrets

    def lose():
        outcomes.extend((power.survivors(chance), saved) for _ in range(samples))

    power = PowerLoss(root, lose, skips_fsync)
    for updates in ((1, 2, 3), (4, 5)):
        with open_small_run(root / "run", Disk(power)) as directory:
            directory.resume()
            for update in train(directory, updates, keep=1):
                saved = update
            # Beyond the last checkpoint: the next process removes this line.
            directory.interpreter([LogScalars({"loss": 0.0})], state_after(updates[-1] + 1), AfterUpdate(samples=4))
    return outcomes


def check_outcomes(outcomes, folder):
    for number, (survivors, saved) in enumerate(outcomes):
        root = folder / str(number)
        root.mkdir(parents=True)
        write_tree(survivors, root)
        check_recovery(root / "run", saved)
        shutil.rmtree(root)


EACH_OUTCOME = pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.slow, id="each outcome"), 5])


@EACH_OUTCOME
def test_no_loss_of_power_loses_a_saved_checkpoint(tmp_path, step):
    outcomes = lose_power(tmp_path / "root", 6)
    different = list(dict.fromkeys((tuple(survivors.items()), saved) for survivors, saved in outcomes))
    assert len(different) >= 1000
    check_outcomes([(dict(survivors), saved) for survivors, saved in different[::step]], tmp_path)


def log_and_save(directory, updates):
    """Log at each of `updates` within one second, and save at every third; yield each update reported as saved."""
    for update in updates:
        save = [SaveCheckpoint(pointers=("latest",), retention={"c": 1})] if update % 3 == 0 else []
        event = AfterUpdate(samples=4, time_s=1000 + update / 100)
        directory.interpreter([LogScalars({"loss": 1 / update}), *save], state_after(update), event)
        if save:
            yield update


def lose_power_with_buffered_lines(root, samples):
    """Do as `lose_power` while the log buffers lines, four of which are beyond the last save."""
    root.mkdir()
    chance, outcomes, saved = random.Random(0), [], 0  # noqa: S311  # no secrets

    def lose():
        outcomes.extend((power.survivors(chance), saved) for _ in range(samples))

    power = PowerLoss(root, lose)
    for updates in (range(1, 8), range(7, 14)):
        with open_small_run(root / "run", Disk(power)) as directory:
            directory.resume()
            for update in log_and_save(directory, updates):
                saved = update
    return outcomes


def check_lines(outcomes, folder):
    """Check that a resumed run has each line up to its state exactly once."""
    for number, (survivors, saved) in enumerate(outcomes):
        root = folder / str(number)
        root.mkdir(parents=True)
        write_tree(survivors, root)
        log = root / "run/metrics.jsonl"
        with open_small_run(root / "run") as directory:
            state = directory.resume()
            newest = 0 if state is None else state.iteration.update
            assert newest >= saved
            assert updates_in(log) == [*range(1, newest + 1)]
            list(log_and_save(directory, range(newest + 1, newest + 6)))
        assert updates_in(log) == [*range(1, newest + 6)]
        shutil.rmtree(root)


def updates_in(log):
    return [json.loads(line)["update"] for line in log.read_text().splitlines()] if log.exists() else []


@EACH_OUTCOME
def test_no_loss_of_power_loses_a_buffered_line_of_a_checkpoint(tmp_path, step):
    outcomes = lose_power_with_buffered_lines(tmp_path / "root", 3)
    different = list(dict.fromkeys((tuple(survivors.items()), saved) for survivors, saved in outcomes))
    assert len(different) >= 200
    check_lines([(dict(survivors), saved) for survivors, saved in different[::step]], tmp_path)


def test_a_save_without_a_flush_of_the_logs_is_caught(tmp_path, monkeypatch):
    with monkeypatch.context() as mutated:
        mutated.setattr(RunLogs, "flush_files", lambda self: None)
        outcomes = lose_power_with_buffered_lines(tmp_path / "root", 3)
    with pytest.raises(AssertionError):
        check_lines(outcomes, tmp_path)


@pytest.mark.parametrize(("kind", "step"), FAULTS)
def test_no_fault_loses_a_buffered_line_without_counting_it(tmp_path, kind, step):
    """Faults in every `step`-th call of a run in which each save flushes three lines."""
    for number in range(0, 1000, step):
        folder, faults, saved = tmp_path / str(number) / "run", Faults(), 0
        directory = open_small_run(folder, Disk(faults))
        faults.arm(number, kind)
        try:
            for update in log_and_save(directory, range(1, 8)):
                saved = update
        except CheckpointError:
            pass
        except Killed:
            discard_all_buffers()  # a process that ended has no memory
        faults.armed = False
        directory.close()
        reached = number < len(faults.names)
        with open_small_run(folder) as directory:
            state = directory.resume()
            newest = 0 if state is None else state.iteration.update
            assert newest >= saved
            lost = max((each.log_lines_lost for each in directory.checkpoints.manifests()), default=0)
            found = updates_in(folder / "metrics.jsonl")
            assert found == sorted(set(found))
            assert len(found) + lost >= newest
        shutil.rmtree(folder.parent)
        if not reached:
            break
    assert number >= 50


STEPS = ("_write", "_commit", "move", "prune")


def settle(value, written):
    """Return `value` with the draft of a checkpoint replaced by what was written, also in a dict of manifests."""
    if isinstance(value, dict):
        return {key: settle(each, written) for key, each in value.items()}
    is_draft = written is not None and isinstance(value, Manifest) and value.tag == written.tag
    return written if is_draft else value


def save_in_order(*order):
    """Return a `CheckpointStore.save` that takes its steps in another order."""
    save = CheckpointStore.save

    def save_out_of_order(store, *arguments):
        pointers, pruner = store._pointers, store._pruner  # noqa: SLF001  # their steps are deferred, too
        owners = dict(zip(STEPS, (store, store, pointers, pruner), strict=True))
        steps = {name: getattr(owner, name) for name, owner in owners.items()}
        calls = {}

        def defer(name):
            def step(first, *others, **named):
                calls[name] = ([first, *others], named)
                return first

            return step

        for name, owner in owners.items():
            setattr(owner, name, defer(name))
        save(store, *arguments)
        for name, owner in owners.items():
            delattr(owner, name)
        written = None
        for name in order:
            positional, named = calls[name]
            named = {key: settle(each, written) for key, each in named.items()}
            result = steps[name](*(settle(each, written) for each in positional), **named)
            written = result if name == "_write" else written

    return save_out_of_order


def prune_in_place(self, tags):
    for tag in tags:
        remove_tree(self._directory / tag, self._disk)


def replace_in_place(path, text, disk):
    if disk.kind(path) is not None:
        disk.remove(path)
    write_new_file(path, [text.encode()], disk)
    disk.fsync_directory(path.parent)


# By name: arguments of `monkeypatch.setattr`, and which fsyncs are omitted.
MUTANTS = {
    "no fsync of files": ((), lambda path, kind: kind == "file"),
    "no fsync of the directory": (
        (),
        lambda path, kind: path.name.startswith(TEMPORARY_PREFIX) and kind == "directory",
    ),
    "no fsync of the parent": ((), lambda path, kind: path.name == "checkpoints"),
    "pointers before the commit": (
        (CheckpointStore, "save", save_in_order("_write", "move", "_commit", "prune")),
        None,
    ),
    "prune first": ((CheckpointStore, "save", save_in_order("prune", "_write", "_commit", "move")), None),
    "prune before the pointers": (
        (CheckpointStore, "save", save_in_order("_write", "_commit", "prune", "move")),
        None,
    ),
    "written in place": ((writer.Writer, "_temporary", lambda self, tag: self._directory / tag), None),
    "pruned in place": ((writer.Writer, "prune", prune_in_place), None),
    "pointers replaced in place": ((writer, "replace_text", replace_in_place), None),
    "no fsync of the log": ((LinesFile, "fsync", lambda self, counts: counts), None),
}


@pytest.mark.parametrize(
    "mutant",
    slow_except(("no fsync of files", "no fsync of the parent", "prune first", "no fsync of the log"), MUTANTS),
)
def test_a_mutant_of_the_protocol_is_caught(tmp_path, monkeypatch, mutant):
    change, skips_fsync = MUTANTS[mutant]
    with monkeypatch.context() as mutated:
        if change:
            mutated.setattr(*change)
        outcomes = lose_power(tmp_path / "root", 2, skips_fsync)
    check_recovery(tmp_path / "root" / "run", 5)  # without a loss of power, the mutant works
    with pytest.raises((AssertionError, CheckpointError, LogError)):
        check_outcomes(outcomes, tmp_path)


@EACH_OUTCOME
def test_deferred_steps_in_the_right_order_are_safe(tmp_path, monkeypatch, step):
    """The mutants of the order are caught for their order, not because their steps are deferred."""
    with monkeypatch.context() as mutated:
        mutated.setattr(CheckpointStore, "save", save_in_order(*STEPS))
        outcomes = lose_power(tmp_path / "root", 2)
    check_outcomes(outcomes[::step], tmp_path)
