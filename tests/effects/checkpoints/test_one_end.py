"""The end of training is saved once, whatever combination of callbacks saves."""

import collections
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_run import open_small_run

from noether import AfterEpoch, AfterTraining, AfterUpdate, BeforeTraining, Run, TrainingIteration, TrainState, compose
from noether.core.callbacks import CheckpointCallback, EMACallback
from noether.core.loop import Move, dispatch, next_move
from noether.effects.run_ending import save_end

KINDS = ("save_weights", "save_optim", "save_latest_weights", "save_latest_optim")
INTERVALS = st.builds(
    lambda name, n: {name: n}, st.sampled_from(("every_n_epochs", "every_n_updates")), st.integers(1, 4)
)
CHECKPOINTS = st.builds(
    lambda kinds, models, interval: {**dict(zip(KINDS, kinds, strict=True)), "model_names": models, **interval},
    st.tuples(*[st.booleans()] * 4).filter(any),
    st.sampled_from(((), ("a",), ("a", "b"), ("b", "a"))),
    INTERVALS,
)


def train(folder, callbacks, epochs, updates_per_epoch):
    """Train a run with a real store; return its checkpoints at the end."""
    reducer = compose(*callbacks)
    run = Run(end=TrainingIteration(epoch=epochs), updates_per_epoch=updates_per_epoch,
              samples_per_epoch=4 * updates_per_epoch, effective_batch_size=4)  # fmt: skip
    params = {"a.w": torch.zeros(2), "b.w": torch.zeros(2)}
    state = TrainState(params=params, opt_state={"state": {"m": torch.zeros(3)}})
    with open_small_run(folder) as directory:
        state = dispatch(state, BeforeTraining(run=run), reducer, directory.interpreter)
        while (move := next_move(state, run)) is not Move.NOTHING:
            if move is Move.UPDATE:
                params = {name: tensor + 1 for name, tensor in state.params.items()}
                state, event = state.replace(params=params).advance(samples=4), AfterUpdate(run=run, samples=4)
            elif move is Move.END_EPOCH:
                state, event = state.next_epoch(), AfterEpoch(run=run)
            else:
                state, event = state.replace(ended=True), AfterTraining(run=run)
            state = dispatch(state, event, reducer, directory.interpreter)
        save_end(directory, directory.interpreter, state, AfterTraining(run=run))
        return directory.checkpoints.manifests()


@settings(max_examples=25)
@given(st.lists(CHECKPOINTS, min_size=1, max_size=3), st.booleans(), st.integers(1, 3), st.integers(1, 3))
def test_no_copy_of_a_checkpoint_holds_what_the_checkpoint_holds(savers, averages, epochs, updates_per_epoch):
    callbacks = [CheckpointCallback(id=f"saver{index}", **each) for index, each in enumerate(savers)]
    callbacks += [EMACallback(every_n_updates=2, target_factors=(0.5,), save_latest_weights=True)] if averages else []
    with tempfile.TemporaryDirectory() as folder:
        manifests = train(Path(folder), callbacks, epochs, updates_per_epoch)
    groups = collections.defaultdict(list)
    for manifest in manifests:
        groups[manifest.slot].append(manifest)
    for copies in groups.values():
        files = [{name: part.sha256 for name, part in each.parts.items()} for each in copies]
        assert len({tuple(sorted(each.items())) for each in files}) == len(files)
        # A later one was saved only because no earlier one had all of it.
        assert not any(later.items() <= earlier.items() for i, earlier in enumerate(files) for later in files[i + 1 :])


@pytest.mark.parametrize(
    ("more", "parts"),
    [
        pytest.param({"save_optim": True}, [], id="the whole state"),
        pytest.param({"save_latest_optim": False}, [], id="weights"),
        pytest.param({"save_latest_optim": False, "model_names": ("a",)}, ["E2_U4_S16.a"], id="weights of a part"),
    ],
)
def test_two_intervals_meet_at_the_end(tmp_path, more, parts):
    callbacks = [CheckpointCallback(every_n_epochs=1), CheckpointCallback(id="other", every_n_updates=3, **more)]
    manifests = train(tmp_path, callbacks, 2, 2)
    at_end = [each.tag for each in manifests if each.iteration.epoch == 2]
    assert sorted(at_end) == sorted(["E2_U4_S16", "E2_U4_S16.latest", *parts])
