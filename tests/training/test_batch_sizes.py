"""The trainer's data knows the samples of its batches, whatever their shapes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import Dataset, IterableDataset

from noether import AfterEpoch, AfterUpdate, Run, TrainingIteration, TrainState, compose, forward, on
from noether.core.callbacks import MetricCallback, OfflineLossCallback, OnlineLossCallback
from noether.training.data.batches import SampleCounter
from noether.training.data.indexed import EvaluationData, TrainingData
from noether.training.data.interruptible import interruptible
from noether.training.data.streamed import StreamedData
from noether.training.data.streamed_evaluation import StreamedEvaluationData
from noether.training.step.compiled import CompiledStep
from noether.training.step.optimizer import FunctionalOptimizer
from noether.training.step.step import Step
from noether.training.trainer import Trainer


def pack(samples):
    """Return clouds packed along the first dimension, with weights of classes in front."""
    clouds = torch.cat([torch.full((len(p),), index) for index, (p, _) in enumerate(samples)])
    targets = torch.stack([target for _, target in samples])
    return {"class_weights": torch.ones(5), "points": torch.cat([p for p, _ in samples]), "cloud": clouds, "y": targets}


class Clouds(Dataset):
    """Sample i has i + 1 points, and i as its target."""

    def __init__(self, length=10):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return torch.full((index + 1, 3), float(index)), torch.tensor(float(index))

    collate = staticmethod(pack)


class Stream(IterableDataset):
    collate = staticmethod(pack)

    def __init__(self):
        self.at = 0

    def __len__(self):
        return 10

    def __iter__(self):
        for index in range(self.at % 10, 10):
            self.at = index + 1
            yield Clouds()[index]

    def state_dict(self):
        return {"at": self.at % 10}

    def load_state_dict(self, state):
        self.at = state["at"]


class MeanTarget(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(()))

    def forward(self, points, cloud):
        return self.w + torch.zeros(int(cloud.max()) + 1)


def error(outputs, batch):
    return {"error": (outputs - batch["y"]).abs().mean()}


def first_error(outputs, batch):
    return (outputs - batch["y"]).abs()


def count_clouds(batch):
    return len(batch["y"])


def make_data(kind, batch, micro, function=None):
    options = {"seed": 1, "effective_batch_size": batch, "max_batch_size": micro}
    if kind == "stream":
        dataset = Stream()
        return StreamedData(dataset, **options, count_samples=SampleCounter(dataset, function))
    dataset = Clouds()
    return TrainingData(dataset, **options, count_samples=SampleCounter(dataset, function))


@pytest.mark.parametrize("kind", ["indexed", "stream"])
@settings(max_examples=15, deadline=None)
@given(st.integers(1, 10), st.sampled_from([None, 1, 3]), st.sampled_from([None, count_clouds]), st.integers(1, 10))
def test_packed_samples_are_counted_and_weighted_as_samples(kind, batch, micro, function, evaluated):
    data, model = make_data(kind, batch, micro, function), MeanTarget()
    dataset = Stream() if kind == "stream" else Clouds()
    loader = StreamedEvaluationData if kind == "stream" else EvaluationData
    run = Run(
        end=TrainingIteration(epoch=2),
        updates_per_epoch=data.batching.updates_per_epoch,
        samples_per_epoch=data.batching.samples_per_epoch,
        effective_batch_size=batch,
        data={"val": loader(dataset, seed=0, batch_size=evaluated)},
        forward=forward(model, error),
    )
    run = interruptible(run, lambda: False)
    optimizer = FunctionalOptimizer(torch.optim.SGD, {"lr": 0.0})
    state = TrainState.from_module(model)
    state = state.replace(opt_state=optimizer.init(state.params))
    step = Step(model=model, loss=error, optimizer=optimizer, lr={"default": lambda _: 0.0})
    accumulated, logged = [], {}

    def interpret(effects, state, event):
        for effect in effects:
            for key, value in effect.values.items():
                logged.setdefault(key, []).append((str(state.iteration), float(value)))

    watch = on(AfterUpdate)(lambda state, event: (accumulated.append(event.accumulated), (state, ()))[1])
    callbacks = [
        watch,
        OnlineLossCallback(every_n_epochs=1),
        OfflineLossCallback(every_n_epochs=1, dataset_key="val"),
        MetricCallback(every_n_epochs=1, dataset_key="val", metric=first_error),
    ]
    reducer = compose(*([data] if kind == "stream" else []), *callbacks)
    end = Trainer(run=run, step=step, data=data, reducer=reducer, interpreter=interpret)(state)
    assert end.iteration == run.final
    assert [list(each) for each in accumulated[: run.updates_per_epoch]] == [
        [part.stop - part.start for part in data.batching.parts(update)] for update in range(run.updates_per_epoch)
    ]
    for key in ("loss/online/error/E1", "loss/val/error", "val/first_error"):
        assert [value for _, value in logged[key]] == pytest.approx([4.5, 4.5])


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_function_gets_the_batch_before_it_is_moved(device):
    def largest(batch):
        return int(batch["cloud"].max()) + 1

    data = TrainingData(
        Clouds(), seed=0, effective_batch_size=4, device=device, count_samples=SampleCounter(Clouds(), largest)
    )
    assert data.batch(TrainingIteration()).sizes == (4,)
    evaluated = EvaluationData(
        Clouds(), seed=0, batch_size=4, device=device, count_samples=SampleCounter(Clouds(), largest)
    )
    for each in (evaluated, interruptible(Run(data={"val": evaluated}), lambda: False).data["val"]):
        assert [size for _, size in each.with_sizes()] == [4, 4, 2]
        assert [size for _, size in each.batched(3).with_sizes()] == [3, 3, 3, 1]


class Filtered(Clouds):
    """Leaves out every third sample."""

    @staticmethod
    def collate(samples):
        usable = [(p[:1], y) for p, y in samples if y % 3]
        return (torch.cat([p for p, _ in usable]), torch.stack([y for _, y in usable])) if usable else None


def test_samples_that_collate_leaves_out_do_not_count():
    sizes = [size for _, size in EvaluationData(Filtered(10), seed=0, batch_size=2).with_sizes()]
    assert sizes == [1, 1, 2, 1, 1]
    assert [size for _, size in EvaluationData(Filtered(1), seed=0, batch_size=2).with_sizes()] == [0]


def weigh_halves(outputs, batch):
    return {"mse": outputs.square().mean()}


@pytest.mark.parametrize("kind", [Step, CompiledStep])
def test_a_step_weighs_micro_batches_by_its_function(kind):
    """Without the trainer's data: each row of a batch is half a sample in the second micro-batch."""
    model = nn.Linear(2, 1)
    optimizer = FunctionalOptimizer(torch.optim.SGD, {"lr": 0.1})
    step = Step(
        model=model, loss=weigh_halves, optimizer=optimizer, lr={"default": lambda _: 0.1},
        batch_size=lambda batch: int(batch[1].sum()),
    )  # fmt: skip
    state = TrainState.from_module(model)
    state = state.replace(opt_state=optimizer.init(state.params))
    batches = [(torch.ones(2, 2), torch.ones(2)), (2 * torch.ones(4, 2), torch.tensor([1, 0, 1, 0]))]
    made = step if kind is Step else CompiledStep(step)
    _, event = made(state, batches)
    assert event.accumulated == (2, 2)
    losses = [model(x).square().mean().item() for x, _ in batches]
    assert float(event.losses["mse"]) == pytest.approx(sum(losses) / 2, rel=1e-6)


def test_the_event_of_an_epoch_after_packed_samples():
    data = make_data("indexed", 4, None)
    state = TrainState()
    for _ in range(3):
        state, batches = data.next_batches(state)
        state = state.advance(samples=sum(batches.sizes))
    assert state.next_epoch().iteration == TrainingIteration(1, 3, 10)
    assert AfterEpoch().run.count_samples(batches[0]["y"]) == 2
