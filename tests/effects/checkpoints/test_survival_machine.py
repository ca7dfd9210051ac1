"""Random sequences of saves, faults, kills, damage and resumes: the last saved checkpoint can always be read."""

import random
import shutil
import tempfile
from pathlib import Path

import pytest
from faults import KINDS, Faults, Killed, PowerLoss, write_tree
from hypothesis import HealthCheck
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from law_examples import examples
from small_run import NO_FSYNC, open_small_run, state_after, train

from noether import TrainingIteration
from noether.effects import CheckpointError, CheckpointStore
from noether.effects.disk.calls import Disk
from noether.testing import same

SEEDS = st.integers(0, 2**32)
KEEPS = st.sampled_from((1, 1, 2))


@examples(60, quick=15, stateful_step_count=15, suppress_health_check=list(HealthCheck))
class Survival(RuleBasedStateMachine):
    """A run under saves, faults, losses of power, damage and resumes."""

    def __init__(self):
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.losses = 0
        self.last = None  # tag of the checkpoint last reported as saved
        self.damaged = set()
        self.root.mkdir()
        self.open_and_resume()

    def teardown(self):
        self.directory.close()
        self.folder.cleanup()

    @property
    def root(self):
        return Path(self.folder.name) / str(self.losses)

    @property
    def checkpoints(self):
        return self.root / "run/checkpoints"

    def open_and_resume(self):
        self.power = PowerLoss(self.root)
        self.faults = Faults(call=self.power)
        self.directory = open_small_run(self.root / "run", Disk(self.faults))
        state = self.directory.resume()
        self.update = 0 if state is None else state.iteration.update

    def store(self):
        return CheckpointStore(self.checkpoints, "run", NO_FSYNC)

    def tags_on_disk(self):
        return {path.name for path in self.checkpoints.glob("E*")}

    def save(self, keep):
        for update in train(self.directory, [self.update + 1], keep):
            self.update = update
            self.last = self.store().pointers()["latest"]
            self.damaged &= self.tags_on_disk()  # the tag of a pruned checkpoint can be used again

    @rule(keep=KEEPS)
    def save_without_fault(self, keep):
        self.save(keep)
        assert self.last.startswith(str(state_after(self.update).iteration))

    @rule(keep=KEEPS, call=st.integers(0, 140), kind=st.sampled_from(KINDS))
    def save_with_a_fault(self, keep, call, kind):
        self.faults.arm(call, kind)
        try:
            self.save(keep)
        except CheckpointError:
            self.faults.armed = False
        except Killed:
            self.faults.armed = False
            self.resume()
        self.faults.armed = False

    @rule()
    def resume(self):
        self.directory.close()
        if self.tags_on_disk() and self.tags_on_disk() <= self.damaged:
            shutil.rmtree(self.checkpoints.parent)  # as a user would after the error that the run cannot resume
            self.damaged, self.last = set(), None
        self.open_and_resume()

    @rule(seed=SEEDS)
    def lose_power(self, seed):
        self.directory.close()
        survivors = self.power.survivors(random.Random(seed))  # noqa: S311  # no secrets
        self.losses += 1
        self.root.mkdir()
        write_tree(survivors, self.root)
        self.resume()

    @precondition(lambda self: self.tags_on_disk() - self.damaged)
    @rule(seed=SEEDS)
    def corrupt(self, seed):
        choice = random.Random(seed)  # noqa: S311  # no secrets
        tag = choice.choice(sorted(self.tags_on_disk() - self.damaged))
        path = choice.choice(sorted((self.checkpoints / tag).iterdir()))
        content = bytearray(path.read_bytes())
        content[choice.randrange(len(content))] ^= 1 << choice.randrange(8)
        self.power.damage(path, bytes(content))
        self.damaged.add(tag)

    @invariant()
    def last_saved_checkpoint_can_be_read(self):
        if self.last is None or self.last in self.damaged:
            return
        manifests = {manifest.tag: manifest for manifest in self.store().manifests()}
        # A save that was killed while it pruned was not reported as saved, but is on the disk.
        update = TrainingIteration.parse(self.last.split(".")[0]).update
        newer = [each for each in manifests.values() if each.iteration.update > update]
        manifest = manifests.get(self.last) or newer[-1]
        if manifest.tag in self.damaged:
            return
        assert same(self.store().load(manifest), state_after(manifest.iteration.update))

    @invariant()
    def newest_intact_checkpoint_is_found(self):
        store = self.store()
        intact = [manifest for manifest in store.manifests() if manifest.tag not in self.damaged]
        if intact:
            state, manifest = store.recover()
            assert manifest == intact[-1]
            assert same(state, state_after(manifest.iteration.update))
        elif self.tags_on_disk():
            with pytest.raises(CheckpointError) as error:
                store.recover()
            assert all(f"{self.checkpoints / tag}" in str(error.value) for tag in self.tags_on_disk())
        else:
            assert store.recover() is None


TestSurvival = Survival.TestCase
