"""A small run with every feature in noether's own trainer, the reference for the loops of frameworks."""

import io

import torch
from rich.console import Console as RichConsole
from torch import nn

from noether import Run, TrainingIteration, TrainState, compose, forward
from noether.core.callbacks import (
    BestCheckpointCallback,
    CheckpointCallback,
    EMACallback,
    EvaluateCallback,
    LrCallback,
    MetricEarlyStopping,
    OfflineLossCallback,
    OnlineLossCallback,
    ProgressCallback,
    ReduceLROnPlateauCallback,
)
from noether.effects import Console, open_run
from noether.session.timing import Clock
from noether.training.step.optimizer import FunctionalOptimizer
from noether.training.step.step import Step
from noether.training.trainer import Trainer

STILL = Clock(wall_s=lambda: 0.0, elapsed_s=lambda: 0.0)
LR = 0.05


class Model(nn.Module):
    """With buffers, and without dropout: random numbers do not matter."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))

    def forward(self, x):
        return self.layers(x)


def model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Model()


def optimizer(model):
    return torch.optim.Adam(model.parameters(), lr=LR)


def loss(outputs, batch):
    return {"ce": nn.functional.cross_entropy(outputs, batch[1])}


def points(count, seed=1):
    inputs = torch.randn(count, 3, generator=torch.Generator().manual_seed(seed))
    return [(x, (x.sum() > 0).long()) for x in inputs]


def batches(samples, size):
    parts = [samples[at : at + size] for at in range(0, len(samples), size)]
    return [(torch.stack([x for x, _ in part]), torch.stack([y for _, y in part])) for part in parts]


VAL = batches(points(20, seed=2), 8)


def callbacks(*more, tolerance=3):
    return compose(
        OnlineLossCallback(every_n_updates=2),
        OnlineLossCallback(every_n_epochs=1),
        LrCallback(every_n_updates=1),
        ProgressCallback(every_n_epochs=1),
        EMACallback(every_n_epochs=1, target_factors=(0.9,)),
        EvaluateCallback(every_n_epochs=1, dataset_key="val", measures=("loss", "accuracy")),
        OfflineLossCallback(every_n_epochs=1, dataset_key="val", weights="ema=0.9"),
        # No loss improves by 100, so the learning rate is halved from the second epoch on, whatever the CPU computes.
        ReduceLROnPlateauCallback(
            every_n_epochs=1, metric_key="loss/val/total", tolerance=1, factor=0.5, min_delta=100.0
        ),
        BestCheckpointCallback(every_n_epochs=1, metric_key="val/accuracy"),
        CheckpointCallback(every_n_updates=1, save_weights=True, save_optim=True),
        MetricEarlyStopping(every_n_epochs=1, metric_key="val/accuracy", tolerance=tolerance),
        *more,
    )


def run(model, criterion=loss, **fields):
    return Run(data={"val": VAL}, forward=forward(model, criterion), **fields)


def open_silent(path, **settings):
    return open_run(path, Console(RichConsole(file=io.StringIO())), **settings)


class Recorder:
    """An interpreter that records every call, and then calls another."""

    def __init__(self, then=lambda *_: None):
        self.lines, self._then = [], then

    def __call__(self, effects, state, event):
        self.lines.append((type(event).__name__, str(state.iteration), tuple(effects)))
        self._then(effects, state, event)

    def after(self, iteration):
        """Return the calls after an iteration, without `BeforeTraining`."""
        names = [line[1] for line in self.lines]
        start = len(names) - names[::-1].index(iteration) if iteration in names else 0
        return [line for line in self.lines[start:] if line[0] != "BeforeTraining"]

    @property
    def history(self):
        return [line for line in self.lines if line[0] != "BeforeTraining"]


class EventCollector:
    """A callback that collects every event; not pure, and so only for a test."""

    readings = ("finite",)

    def __init__(self):
        self.events = []

    def __call__(self, state, event):
        self.events.append(event)
        return state, ()

    def of(self, kind):
        return [event for event in self.events if type(event) is kind]


class Listed:
    """The same micro-batches in every epoch, as the trainer asks for them."""

    def __init__(self, updates):
        self._updates = updates

    def next_batches(self, state, last):
        return state, self._updates[state.iteration.update % len(self._updates)]

    def close(self):
        pass


def group_batches(micro, steps):
    return [micro[at : at + steps] for at in range(0, len(micro), steps)]


def zero_decay(update):
    return 0.0


def reference_run(  # all that differs between frameworks
    micro,
    *,
    steps=1,
    reducer=None,
    lr=lambda update: LR,
    network=None,
    criterion=loss,
    kind=torch.optim.Adam,
    decay=zero_decay,
    **end,
):
    """Return the recorder of a run in noether's own trainer, and its final state; `decay=None` sets no weight decay."""
    network, recorder, updates = (network or model()).train(), Recorder(), group_batches(micro, steps)
    functional = FunctionalOptimizer(kind, {"lr": LR})
    samples = [sum(len(x) for x, _ in update) for update in updates]
    fixed = run(
        network,
        criterion,
        end=TrainingIteration(**end),
        updates_per_epoch=len(updates),
        samples_per_epoch=sum(samples),
        effective_batch_size=samples[0],
    )
    state = TrainState.from_module(network)
    trainer = Trainer(
        run=fixed,
        step=Step(
            model=network,
            loss=criterion,
            optimizer=functional,
            lr={"default": lr},
            weight_decay={} if decay is None else {"default": decay},
        ),
        data=Listed(updates),
        reducer=reducer or callbacks(),
        interpreter=recorder,
        clock=Clock(wall_s=lambda: 0.0, elapsed_s=lambda: 0.0),
    )
    return recorder, trainer(state.replace(opt_state=functional.init(state.params)))


def weights(state_or_model):
    """Return params and buffers of a state or a model by name."""
    if isinstance(state_or_model, nn.Module):
        state_or_model = TrainState.from_module(state_or_model)
    return {name: t.clone() for name, t in {**state_or_model.params, **state_or_model.buffers}.items()}
