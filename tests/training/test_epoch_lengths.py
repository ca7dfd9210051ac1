"""The trainer refuses another length of the training set: on resume with the way out, and during a run."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import Dataset, IterableDataset

from noether import Run, TrainingIteration, TrainState
from noether.config import ConfigError
from noether.core.loop import Move, next_move
from noether.training.data.indexed import TrainingData
from noether.training.data.streamed import MEMORY, StreamedData
from noether.training.runs.train import train

MODULE = """
import pathlib, torch
from torch.utils.data import Dataset, IterableDataset

class Files(Dataset):
    def __init__(self):
        self._length = int(pathlib.Path("length.txt").read_text())
    def __len__(self):
        return self._length
    def __getitem__(self, index):
        return torch.full((2,), float(index)), torch.ones(1)

class Stream(IterableDataset):
    def __init__(self):
        self._length, self._position = int(pathlib.Path("length.txt").read_text()), 0
    def __len__(self):
        return self._length
    def __iter__(self):
        for index in range(self._position, self._length):
            self._position = (index + 1) % self._length
            yield torch.full((2,), float(index)), torch.ones(1)
    def state_dict(self):
        return {"position": self._position}
    def load_state_dict(self, saved):
        self._position = saved["position"]

class Model(torch.nn.Linear):
    def __init__(self):
        super().__init__(2, 1)

def mse(outputs, batch):
    return {"mse": (outputs - batch[1]).square().mean()}
"""


@pytest.fixture(autouse=True)
def in_working_directory(tmp_path, monkeypatch):
    """Change to a directory with a module of the user's, and remove the module from `sys.modules` afterwards."""
    path = list(sys.path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "files.py").write_text(MODULE)
    yield
    sys.path[:] = path
    sys.modules.pop("files", None)


def begin(kind, samples, **trainer):
    Path("length.txt").write_text(str(samples))
    return train(
        {
            "run": {"name": "r", "output": "out"},
            "model": {"kind": "files.Model"},
            "data": {"train": {"kind": f"files.{kind}"}},
            "optimizer": {"kind": "torch.optim.SGD", "lr": 0.001},
            "trainer": {"effective_batch_size": 4, "loss": "files.mse", **trainer},
            "callbacks": [{"kind": "noether.core.callbacks.CheckpointCallback", "every_n_updates": 5}],
        }
    )


def resume(run, samples, later):
    Path("length.txt").write_text(str(samples))
    return train(resume=run.directory, overrides=[later])


def files_of(run):
    return {path: path.read_bytes() for path in run.directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", ["Files", "Stream"])
@pytest.mark.parametrize("samples", [16, 41])
@pytest.mark.parametrize(
    ("end", "later"),
    [({"max_epochs": 3}, "trainer.max_epochs=4"), ({"max_updates": 25}, "trainer.max_updates=30")],
    ids=["end of an epoch", "middle of an epoch"],
)
def test_a_resumed_run_refuses_another_length_before_it_changes_anything(kind, samples, end, later):
    run = begin(kind, 40, **end)
    before = files_of(run)
    with pytest.raises(ConfigError) as error:
        resume(run, samples, later)
    message = str(error.value)
    assert f"data.train: has {samples} samples, but the run began with 40, in epochs of 10 updates" in message
    assert (
        f"noether train {run.directory}/config.yaml --set run.init_from={run.directory}/checkpoints/latest" in message
    )
    assert "\n" not in message
    assert files_of(run) == before
    assert resume(run, 40, later).finished  # once the data is restored


def test_the_way_out_that_the_refusal_names_works():
    run = begin("Files", 40, max_epochs=1)
    Path("length.txt").write_text("16")
    new = train(run.directory / "config.yaml", overrides=[f"run.init_from={run.directory}/checkpoints/latest"])
    assert new.state.iteration == TrainingIteration(epoch=1, update=4, sample=16)


def test_a_length_that_only_drop_last_hides_is_refused():
    run = begin("Files", 40, max_epochs=1, drop_last=True)
    with pytest.raises(ConfigError, match="has 42 samples"):  # 10 updates as before, but in another order
        resume(run, 42, "trainer.max_epochs=2")


def test_a_checkpoint_of_an_earlier_version_resumes_if_its_counts_fit_the_length(monkeypatch):
    run = begin("Files", 40, max_updates=25)
    old = run.state.replace(lengths={}, epoch_start=TrainingIteration())
    store = "noether.effects.run_directory.RunDirectory.load"
    monkeypatch.setattr(store, lambda *_: old)
    with pytest.raises(
        ConfigError, match=r"data\.train: gives epochs of 4 updates, in which no run reaches E2_U25_S100"
    ):
        resume(run, 16, "trainer.max_updates=30")
    assert resume(run, 40, "trainer.max_updates=30").state.iteration == TrainingIteration(3, 30, 120)


def test_the_state_saves_the_lengths_and_the_start_of_the_epoch():
    run = begin("Files", 10, max_epochs=2, drop_last=True)
    assert run.state.epoch_start == run.state.iteration
    saved = json.loads(next(run.directory.glob("checkpoints/*.latest/state.json")).read_text())
    assert saved["epoch_start"] == "E2_U4_S16"
    assert saved["lengths"] == {
        "training_samples": 10,
        "updates_per_epoch": 2,
        "samples_per_epoch": 8,
        "effective_batch_size": 4,
        "drop_last": 1,
    }


class Growing(Dataset):
    """A dataset whose length the test changes."""

    samples = 8

    def __len__(self):
        return self.samples

    def __getitem__(self, index):
        return torch.tensor(index)


class GrowingStream(Growing, IterableDataset):
    position = 0

    def __iter__(self):
        for index in range(self.position, self.samples):
            self.position = (index + 1) % self.samples
            yield torch.tensor(index)

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, saved):
        self.position = saved["position"]


@pytest.mark.parametrize("samples", [4, 7, 9])
@pytest.mark.parametrize(("data_type", "dataset"), [(TrainingData, Growing), (StreamedData, GrowingStream)])
def test_a_length_that_changes_during_the_run_is_refused_at_the_next_epoch(samples, data_type, dataset):
    dataset = dataset()
    data = data_type(dataset, seed=0, effective_batch_size=4)
    state = TrainState(callback_states=data.init(TrainState()) if data_type is StreamedData else {})
    state, _ = data.next_batches(state)
    state, _ = data.next_batches(state.advance(samples=4))
    state = state.advance(samples=4).next_epoch()
    dataset.samples = samples
    with pytest.raises(ValueError, match=f"has {samples} samples at the start of epoch 1, and had 8 when training"):
        data.next_batches(state)


@pytest.mark.parametrize("yields", [6, 10])
def test_a_stream_that_ends_early_or_late_says_so(yields):
    class Wrong(GrowingStream):
        def __len__(self):
            return 8

    dataset = Wrong()
    dataset.samples = yields
    data = StreamedData(dataset, seed=0, effective_batch_size=4)
    state = TrainState(callback_states={MEMORY: dataset.state_dict()})

    def two_epochs(state):
        for _ in range(2):
            for _ in range(2):
                state, _ = data.next_batches(state)
                state = state.advance(samples=4)
            state = state.next_epoch()

    with pytest.raises(
        ValueError, match=r"Wrong ended after \d samples of epoch \d, but its __len__ is 8: return from"
    ):
        two_epochs(state)


def test_next_move_ends_an_epoch_whose_length_is_reached_and_goes_on_with_the_next():
    state = TrainState()
    for _ in range(5):
        state = state.advance(samples=4)
    run = Run(end=TrainingIteration(epoch=2), updates_per_epoch=3)  # epochs had more updates before
    assert next_move(state, run) is Move.END_EPOCH
    state = state.next_epoch()
    for _ in range(3):
        assert next_move(state, run) is Move.UPDATE
        state = state.advance(samples=4)
    assert next_move(state, run) is Move.END_EPOCH
    assert next_move(state.next_epoch(), run) is Move.END_TRAINING
