"""The resume law: a run cut anywhere, any number of times, equals the uncut run, bit for bit."""

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from law_examples import examples
from torch import nn
from torch.utils.data import Dataset, IterableDataset

from noether import (
    Run,
    SaveCheckpoint,
    TrainingIteration,
    TrainState,
    callback,
    compose,
    every_n_samples,
    forward,
    log,
)
from noether.core.callbacks import (
    BestCheckpointCallback,
    BestMetricCallback,
    CheckpointCallback,
    EvaluateCallback,
    LrCallback,
    MetricEarlyStopping,
    OnlineLossCallback,
    ProgressCallback,
)
from noether.effects import CheckpointStore
from noether.session.timing import Clock
from noether.testing import same
from noether.training.data.indexed import EvaluationData, TrainingData
from noether.training.data.streamed import StreamedData
from noether.training.step.optimizer import FunctionalOptimizer
from noether.training.step.step import Step
from noether.training.trainer import Trainer

STILL = Clock(wall_s=lambda: 0.0, elapsed_s=lambda: 0.0)


class Noisy(Dataset):
    """Points of two classes, with random noise on each reading."""

    def __init__(self, length):
        generator = torch.Generator().manual_seed(1)
        self._inputs = torch.randn(length, 3, generator=generator)

    def __len__(self):
        return len(self._inputs)

    def __getitem__(self, index):
        noisy = self._inputs[index] + 0.1 * torch.randn(3)
        return noisy, (self._inputs[index].sum() > 0).long()


class Stream(IterableDataset):
    """The same points; each epoch has another order, and the position is part of `state_dict`."""

    def __init__(self, length):
        self._points, self._read = Noisy(length), 0

    def __len__(self):
        return len(self._points)

    def __iter__(self):
        while True:
            index = (7 * self._read + self._read // len(self)) % len(self)
            self._read += 1
            yield self._points[index]
            if self._read % len(self) == 0:
                return

    def state_dict(self):
        return {"read": [self._read]}

    def load_state_dict(self, state):
        (self._read,) = state["read"]


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(0.3), nn.Linear(4, 2))


def loss(outputs, batch):
    return {"entropy": nn.functional.cross_entropy(outputs, batch[1]), "size": 1e-3 * outputs.square().mean()}


@callback("halving", init=lambda _: 0, track=lambda seen, event: seen + event.samples)
@every_n_samples(20)
def halve_lr(state, event):
    """Halve the learning rate every 20 samples."""
    scaled = state.replace(hyperparams={**state.hyperparams, "lr_scale": state.hyperparams["lr_scale"] / 2})
    return log(scaled, event, {"seen": state.memory("halving")})


def make_callbacks(interval, tolerance):
    watch = {**interval, "metric_key": "loss/val/total"}
    stopping = [MetricEarlyStopping(**watch, tolerance=tolerance)] if tolerance else []
    return compose(
        ProgressCallback(every_n_updates=2),
        LrCallback(every_n_epochs=1),
        OnlineLossCallback(every_n_updates=3),
        OnlineLossCallback(every_n_epochs=1, at_end=True),
        EvaluateCallback(**interval, dataset_key="val", measures=("loss", "accuracy")),
        BestMetricCallback(**watch),
        BestCheckpointCallback(**watch, tolerances=(1, 2)),
        halve_lr,
        CheckpointCallback(every_n_epochs=1, save_weights=True, save_optim=True),
        *stopping,
    )


class Cut(Exception):  # noqa: N818  # it is no error
    """The process dies."""


class DyingInterpreter:
    """The interpreter of one process: records effects, saves at one event, dies at another."""

    def __init__(self, store=None, *, saves_at=None, dies_at=None):
        self.stream, self.saved = [], 0
        self._store, self._saves_at, self._dies_at = store, saves_at, dies_at
        self._events = 0

    def __call__(self, effects, state, event):
        self._events += 1
        self.stream += [(str(state.iteration), type(event).__name__, effect) for effect in effects]
        if self._events == self._saves_at:
            self._store.save(SaveCheckpoint(), state, event)
            self.saved = len(self.stream)
        if self._events == self._dies_at:
            raise Cut


def trainer(case, interpreter):
    settings = {
        "seed": case["seed"],
        "effective_batch_size": case["batch"],
        "max_batch_size": case["micro"],
        "drop_last": case["drop_last"],
    }
    if case["streamed"]:
        data = StreamedData(Stream(case["length"]), **settings)
    else:
        data = TrainingData(Noisy(case["length"]), **settings, num_workers=case["workers"])
    model = make_model()
    run = Run(
        end=case["end"],
        updates_per_epoch=data.batching.updates_per_epoch,
        samples_per_epoch=data.batching.samples_per_epoch,
        effective_batch_size=data.batching.effective_batch_size,
        run_id="law",
        data={"val": EvaluationData(Noisy(5), seed=case["seed"], batch_size=2)},
        forward=forward(make_model(), loss),
    )
    optimizer = FunctionalOptimizer(torch.optim.AdamW, {"lr": 0.05})
    step = Step(
        model=model,
        loss=loss,
        optimizer=optimizer,
        lr={"default": lambda position: 0.05 / (1 + position)},
        clip_grad_norm=1.0,
        donate=case["donate"],
    )
    callbacks = make_callbacks(case["interval"], case["tolerance"])
    reducer = compose(data, callbacks) if case["streamed"] else callbacks
    state = TrainState.from_module(make_model(), seed=case["seed"])
    state = state.replace(opt_state=optimizer.init(state.params))
    return Trainer(run=run, step=step, data=data, reducer=reducer, interpreter=interpreter, clock=STILL), state


def uncut(case):
    session = DyingInterpreter()
    train, state = trainer({**case, "donate": False}, session)  # an update without donation writes to no tensor
    return train(state), session.stream


def with_cuts(case, cuts, directory):
    """Run in sessions that die; each resumes from the newest save in the real store, or starts from the beginning."""
    stream = []
    for dies_at, saves_at in [*cuts, (None, None)]:
        store = CheckpointStore(directory, "law")
        session = DyingInterpreter(store, saves_at=saves_at, dies_at=dies_at)
        train, state = trainer(case, session)
        newest = store.newest()
        if newest is not None:
            state = store.resume(newest)
        try:
            state = train(state, resumed=newest is not None)
        except Cut:
            # The next session requests the effects after the save again.
            stream += session.stream[: session.saved]
        else:
            return state, stream + session.stream
    raise AssertionError("the last session does not die")


def without_resumes(stream):
    """Drop the effects of `BeforeTraining`: a resumed run may request them again."""
    return [entry for entry in stream if entry[1] != "BeforeTraining"]


@st.composite
def cases(draw, workers=0):
    length, batch = draw(st.integers(4, 14)), draw(st.integers(2, 4))
    ends = [TrainingIteration(epoch=draw(st.integers(1, 4))), TrainingIteration(update=draw(st.integers(1, 14)))]
    return {
        "seed": draw(st.integers(0, 3)),
        "length": length,
        "batch": batch,
        "micro": draw(st.sampled_from([None, 2, 3])),
        "drop_last": draw(st.booleans()) or length % batch == 1,  # batch norm needs two samples
        "workers": workers,
        "donate": draw(st.booleans()),
        "streamed": draw(st.booleans()),
        "end": draw(st.sampled_from([*ends, TrainingIteration(sample=draw(st.integers(1, 40)))])),
        "interval": draw(st.sampled_from([{"every_n_epochs": 1}, {"every_n_updates": 2}, {"every_n_samples": 7}])),
        "tolerance": draw(st.sampled_from([None, 1, 2])),
    }


def without_single_samples(case):
    """Change a case so that no micro-batch has one sample: batch norm cannot train on it."""
    micro = case["micro"]
    sizes = [case["batch"]] + ([] if case["drop_last"] else [case["length"] % case["batch"] or case["batch"]])
    alone = micro is not None and any(size % micro == 1 for size in sizes)
    return {**case, "micro": None if alone else micro}


cut_points = st.lists(st.tuples(st.integers(2, 12), st.integers(1, 12)), max_size=3)


def check(case, cuts, directory):
    case = without_single_samples(case)
    expected_state, expected_stream = uncut(case)
    state, stream = with_cuts(case, cuts, directory)
    for name in ("iteration", "previous", "params", "buffers", "opt_state", "hyperparams", "metrics"):
        assert same(getattr(state, name), getattr(expected_state, name)), name
    assert same(state.callback_states, expected_state.callback_states)
    assert (state.stop, state.ended, state.seed) == (expected_state.stop, expected_state.ended, expected_state.seed)
    assert same(without_resumes(stream), without_resumes(expected_stream))


@examples(60, quick=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=cases(), cuts=cut_points)
def test_a_run_cut_anywhere_equals_the_uncut_run(case, cuts, tmp_path_factory):
    check(case, cuts, tmp_path_factory.mktemp("law"))


@pytest.mark.parametrize("cuts", [[(4, 3), (3, 2)], [(7, 7)]])
def test_workers_change_nothing(cuts, tmp_path):
    case = {
        "seed": 0, "length": 10, "batch": 4, "micro": 2, "drop_last": False, "workers": 2, "streamed": False,
        "donate": True,
        "end": TrainingIteration(epoch=2), "interval": {"every_n_updates": 2}, "tolerance": None,
    }  # fmt: skip
    check(case, cuts, tmp_path)
    state, stream = uncut(case)
    alone, alone_stream = uncut({**case, "workers": 0})
    assert same(state.params, alone.params)
    assert same(stream, alone_stream)
