"""Two checkpoints of one iteration never have the same content, whatever combination of callbacks saves."""

import collections
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_run import open_small_run

from noether import AfterEpoch, AfterTraining, AfterUpdate, BeforeTraining, Run, TrainingIteration, TrainState, compose
from noether.core.callbacks import BestCheckpointCallback, CheckpointCallback, EMACallback
from noether.core.combinators import on
from noether.core.loop import Move, dispatch, next_move
from noether.core.metrics import log
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


@on(AfterUpdate, AfterEpoch, AfterTraining)
def measure(state, event):
    return log(state, event, {"val/accuracy": (0.1, 0.4, 0.3, 0.5, 0.2)[state.iteration.update % 5]})


AVERAGES = st.builds(lambda latest, interval: {"save_latest_weights": latest, **interval}, st.booleans(), INTERVALS)
BEST = st.builds(
    lambda at_end, keep, interval: {"at_end": at_end, "keep": keep, **interval},
    st.booleans(), st.integers(1, 2), INTERVALS,
)  # fmt: skip


@settings(max_examples=25)
@given(
    st.lists(CHECKPOINTS, max_size=3), st.lists(BEST, max_size=1), st.lists(AVERAGES, max_size=1),
    st.integers(1, 3), st.integers(1, 3),
)  # fmt: skip
def test_checkpoints_of_one_iteration_differ_in_content(savers, best, averages, epochs, updates_per_epoch):
    callbacks = [CheckpointCallback(id=f"saver{index}", **each) for index, each in enumerate(savers)]
    callbacks += [measure, *(BestCheckpointCallback(metric_key="val/accuracy", **each) for each in best)]
    callbacks += [EMACallback(target_factors=(0.5,), **each) for each in averages]
    with tempfile.TemporaryDirectory() as folder:
        manifests = train(Path(folder), callbacks, epochs, updates_per_epoch)
    moments, slots = collections.defaultdict(list), collections.defaultdict(list)
    for manifest in manifests:
        files = {name: part.sha256 for name, part in manifest.parts.items()}
        slots[manifest.slot].append(files)
        moments[manifest.iteration, manifest.weights_of, tuple(sorted(manifest.models))].append(files)
    for checkpoints in moments.values():
        assert all(checkpoints.count(files) == 1 for files in checkpoints)
    for files in slots.values():
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


def test_the_best_checkpoint_is_the_newest_one_too(tmp_path):
    best = BestCheckpointCallback(every_n_epochs=1, metric_key="val/accuracy")
    manifests = train(tmp_path, [CheckpointCallback(every_n_epochs=1), measure, best], 3, 1)
    assert [(each.tag, each.resumable) for each in manifests] == [
        ("E1_U1_S4", True),
        ("E2_U2_S8", False),
        ("E3_U3_S12", True),
    ]


def test_a_checkpoint_that_the_end_adds_is_named_end(tmp_path):
    weights = {"save_latest_optim": False, "every_n_epochs": 1}
    whole = CheckpointCallback(id="whole", every_n_updates=3, save_optim=True)
    manifests = train(tmp_path, [CheckpointCallback(id="weights", **weights), whole], 2, 1)
    assert [(each.tag, each.resumable) for each in manifests] == [
        ("E1_U1_S4", False),
        ("E2_U2_S8", False),
        ("E2_U2_S8.end", True),
    ]


def test_the_order_of_sub_modules_makes_no_second_checkpoint(tmp_path):
    settings = {"save_latest_optim": False, "every_n_epochs": 1}
    callbacks = [CheckpointCallback(id=f"of {a}", model_names=(a, b), **settings) for a, b in ("ab", "ba")]
    manifests = train(tmp_path, callbacks, 1, 1)
    assert [each.tag for each in manifests] == ["E1_U1_S4.a-b", "E1_U1_S4.end"]
