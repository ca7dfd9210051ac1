"""Cost of an update in a whole training loop with callbacks, compared with a hand-written loop.

Run as `python -m benchmarks.training`. All rows train what `configs/seed.yaml` describes, with a small network (an MLP)
and a medium one (the ConvNet of the digits), on precomputed batches, and evaluate after each epoch. Two bare loops do
only that. The third also does by hand what the callbacks of that file do: a line of progress every 10 updates, the
learning rate in a file at every update, the best accuracy after each epoch. noether uses its callbacks, trainer and run
directory; for Ignite and Lightning, hooks call a few lines that write as much. One row has the callbacks of
`configs/digits.yaml` instead, which also save checkpoints. In two rows, of noether and Ignite, 100 callbacks are beside
the evaluation: 5 log a number at each update, 95 have intervals that no update reaches.

A run is timed from the first batch of its second epoch to the first of its last. All rows take turns in one process on
one thread; a ratio is taken within each round, and the tables show medians over rounds with quartiles. All rows with
the same kernel have to end at the same parameters, to the bit; if they do not, the command fails.

Goals for the small network: at most 1.00 of the bare loop with the same fused kernel, less than 0.80 of that with
torch's default AdamW; compiled, less than 0.45 of that; for the medium one at most 0.96 of that; less than Ignite's row
everywhere. Measured on 2026-11-29, noether has 1.09, 0.74 to 0.79, 0.46 to 0.56, and 0.97 to 1.05: it misses the first,
the third and the fourth. Ignite has 1.23, 0.87 to 0.95, and 0.97, so that goal is missed for the medium network only.

Of an update of the small network, in parts of the bare fused loop, 0.80 is there without any callback; the bare loop
without its evaluation has 0.89. The evaluation adds 0.20, and progress, learning rate and best accuracy 0.08, as much
as by hand; the evaluation of the bare loop is 0.11. Calls of torch alone are 0.50 of the 0.80, and seeds of torch,
numpy and `random` 0.07. In the loop everything runs with cold caches: after callbacks, the same calls of torch take up
to a tenth longer.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import tempfile
import time
import warnings
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click
import torch
from torch import nn
from torch.nn import functional

from benchmarks.dispatch import NEVER
from benchmarks.measurement import (
    Table,
    available_rows,
    keep_freed_memory,
    markdown_option,
    quartiles,
    ratios,
    show,
    take_turns,
)
from noether import TrainingIteration, compose
from noether.config import load
from noether.core.callbacks import EvaluateCallback
from noether.core.callbacks.periodic import PeriodicCallback
from noether.core.metrics import log
from noether.core.tensors.batch import SizedBatches
from noether.effects import open_run
from noether.examples.digits import ConvNet
from noether.training.experiment import Experiment, build
from noether.training.step.compiled import CompiledStep
from noether.training.trainer import Trainer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from torch import Tensor

    from noether import TrainState
    from noether.core.callback import Callback
    from noether.training.step.step import Step

    Train = Callable[[Path], "Trained"]
    WrapStep = Callable[[Step], Step | CompiledStep]

_CONFIGS = Path(__file__).parents[1] / "configs"
_CONFIG = _CONFIGS / "seed.yaml"
_FIRING, _IDLE = 5, 95  # of 100 callbacks


class Network(NamedTuple):
    """A network and its number of epochs."""

    make: Callable[[], nn.Module]
    epochs: int


_NETWORKS: Mapping[str, Network] = {
    "small": Network(lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)), 20),
    # Without dropout, because the other loops would draw different random numbers.
    "medium": Network(lambda: ConvNet(dropout=0.0), 4),
}
_DEFAULT, _FUSED = "bare loop, default AdamW", "bare loop, fused AdamW"
_BY_HAND = "the same, callbacks by hand"
_STEPS: Mapping[str, WrapStep] = {
    "noether": lambda step: dataclasses.replace(step, donate=False),
    "noether, donated": lambda step: step,
    "noether, compiled": CompiledStep,
}
_OTHER_KERNELS = (_DEFAULT, "noether, compiled")  # these may add in another order
_TOLERANCE = 0.1  # largest difference of params, relative to their change in training


class Batches:
    """The same batches in every epoch, for any loop; records when each epoch starts."""

    def __init__(self, batches: Sequence[Any], clock_s: Callable[[], float]) -> None:
        self._batches = batches
        # As the data of noether gives them, which knows the samples of each batch.
        self._updates = [SizedBatches([batch], [len(batch[0])]) for batch in batches]
        self._clock_s = clock_s
        self._starts_s: list[float] = []

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Any]:
        self._starts_s.append(self._clock_s())
        return iter(self._batches)

    def next_batches(self, state: TrainState, *, last: int | None = None) -> tuple[TrainState, SizedBatches]:  # noqa: ARG002  # called by the trainer
        """Return the state and the batch of its next update: the interface of noether's trainer."""
        index = state.iteration.update % len(self._batches)
        if not index:
            self._starts_s.append(self._clock_s())
        return state, self._updates[index]

    def close(self) -> None:
        """Do nothing: there is no prefetching."""

    def update_s(self) -> float:
        """Return the mean seconds of an update from the start of the second epoch to the start of the last."""
        _, first_s, *_, last_s = self._starts_s
        return (last_s - first_s) / (len(self) * (len(self._starts_s) - 2))


class LogNumber(PeriodicCallback):
    """Logs a number."""

    def periodic_callback(self, state: TrainState, event: Any, interval: Any) -> tuple[TrainState, Any]:  # noqa: ARG002  # a hook
        """Log the number of the update under the name of the callback."""
        return log(state, event, {self.id: state.iteration.update})


class Trained(NamedTuple):
    """Result of a run."""

    update_s: float
    params: Mapping[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Task:
    """The training task of all rows.

    Args:
        experiment: The experiment built from the configuration.
        model: The network with its initial weights.
        batches: Batches of an epoch.
        validation: Batches to evaluate after each epoch.
        epochs: Number of epochs.
        clock_s: Returns the time in seconds.
    """

    experiment: Experiment
    model: nn.Module
    batches: Sequence[Any]
    validation: Sequence[Any]
    epochs: int
    clock_s: Callable[[], float]

    @classmethod
    def of(cls, make_model: Callable[[], nn.Module], epochs: int, clock_s: Callable[[], float]) -> Task:
        """Return the task of the configuration with another network."""
        experiment = build(load(_CONFIG, ["optimizer.fused=true"]), "benchmark", model=make_model)
        positions = map(TrainingIteration, [0] * experiment.run.updates_per_epoch, range(10**9))
        batches = [batch for position in positions for batch in experiment.data.batch(position)]
        validation = list(experiment.run.data["val"])
        run = experiment.run.replace(end=TrainingIteration(epoch=epochs), data={"val": validation})
        model = copy.deepcopy(experiment.model)
        return cls(dataclasses.replace(experiment, run=run), model, batches, validation, epochs, clock_s)

    def new_batches(self) -> Batches:
        """Return the batches for one run."""
        return Batches(self.batches, self.clock_s)

    def optimizer(self, model: nn.Module, *, fused: bool | None = True) -> torch.optim.Optimizer:
        """Return the torch optimizer of the configuration."""
        lr = self.experiment.config.optimizer.lr
        return torch.optim.AdamW(model.parameters(), lr=lr, fused=fused)


def make_update(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Any) -> None:
    """Make one update."""
    optimizer.zero_grad()
    functional.cross_entropy(model(batch[0]), batch[1]).backward()
    optimizer.step()


@torch.no_grad()
def evaluate(model: nn.Module, batches: Sequence[Any]) -> dict[str, float]:
    """Return loss and accuracy of a model."""
    model.eval()
    loss, right, samples = torch.zeros(()), torch.zeros(()), 0
    for images, labels in batches:
        outputs = model(images)
        loss += functional.cross_entropy(outputs, labels) * len(labels)
        right += (outputs.argmax(-1) == labels).sum()
        samples += len(labels)
    model.train()
    return {"loss/val/total": loss.item() / samples, "val/accuracy": right.item() / samples}


class SeedCallbacks:
    """The callbacks of the configuration, written by hand for other loops."""

    def __init__(self, folder: Path, updates: int) -> None:
        self._log = (folder / "metrics.jsonl").open("w")
        self._console = (folder / "console.txt").open("w")
        self._updates, self._starts_s, self._best = updates, time.perf_counter(), 0.0

    def after_update(self, update: int, lr: float) -> None:
        """Log the learning rate and, every 10 updates, the progress."""
        self.write(update, {"optim/lr": lr})
        if update % 10 == 0:
            spent_s = time.perf_counter() - self._starts_s
            left_s = spent_s / update * (self._updates - update)
            share = f"{update / self._updates:.1%}  update {update}/{self._updates}"
            print(f"{share}  {1000 * spent_s / update:.1f} ms/update  left {left_s:.0f} s", file=self._console)

    def after_evaluation(self, update: int, measured: Mapping[str, float]) -> None:
        """Log the measured values and the best accuracy."""
        self._best = max(self._best, measured["val/accuracy"])
        self.write(update, {**measured, "val/accuracy/best": self._best})

    def close(self) -> None:
        """Flush and close the files."""
        self._log.close()
        self._console.close()

    def write(self, update: int, values: Mapping[str, float]) -> None:
        """Write a line of values."""
        self._log.write(json.dumps({"update": update, "time_s": time.time(), "metrics": values}) + "\n")


def bare(task: Task, *, fused: bool | None) -> Train:
    """Train with the usual PyTorch loop."""

    def train(folder: Path) -> Trained:  # noqa: ARG001  # this loop writes no files
        model, batches = copy.deepcopy(task.model).train(), task.new_batches()
        optimizer = task.optimizer(model, fused=fused)
        for _ in range(task.epochs):
            for batch in batches:
                make_update(model, optimizer, batch)
            evaluate(model, task.validation)
        return Trained(batches.update_s(), dict(model.named_parameters()))

    return train


def by_hand(task: Task) -> Train:
    """Train with the usual PyTorch loop and hand-written callbacks."""

    def train(folder: Path) -> Trained:
        model, batches = copy.deepcopy(task.model).train(), task.new_batches()
        optimizer, update = task.optimizer(model), 0
        callbacks = SeedCallbacks(folder, task.epochs * len(batches))
        for _ in range(task.epochs):
            for batch in batches:
                make_update(model, optimizer, batch)
                update += 1
                callbacks.after_update(update, optimizer.param_groups[0]["lr"])
            callbacks.after_evaluation(update, evaluate(model, task.validation))
        callbacks.close()
        return Trained(batches.update_s(), dict(model.named_parameters()))

    return train


def noether(task: Task, callbacks: Iterable[Callback], wrap_step: WrapStep = lambda step: step) -> Train:
    """Train with noether's trainer in a run directory."""
    experiment, reducer = task.experiment, compose(*callbacks)
    step = wrap_step(experiment.step)

    def train(folder: Path) -> Trained:
        batches = task.new_batches()
        # Redirected, as into a pipe or the log of a job.
        with (folder / "console.txt").open("w") as file, redirect_stdout(file), open_run(folder / "run") as directory:
            trainer = Trainer(
                run=experiment.run, step=step, data=batches, reducer=reducer, interpreter=directory.interpreter
            )
            state = trainer(experiment.state)
        return Trained(batches.update_s(), dict(state.params))

    return train


def digits_callbacks(task: Task) -> list[Callback]:
    """Return the callbacks of `configs/digits.yaml`; early stopping watches, but has no time to stop the run."""
    config = load(_CONFIGS / "digits.yaml", ["callbacks.8.tolerance=1000"])
    return [each.callback for each in build(config, "benchmark", model=lambda: copy.deepcopy(task.model)).callbacks]


def many_callbacks() -> list[Callback]:
    """Return 100 callbacks, of which 5 are due at each update."""
    intervals = [1] * _FIRING + [NEVER] * _IDLE
    return [LogNumber(every_n_updates=n, id=f"number/{index}") for index, n in enumerate(intervals)]


def ignite(task: Task, intervals: Sequence[int] | None = None) -> Train:
    """Train with an Ignite engine, with the callbacks by hand, or handlers of these intervals that log a number."""
    from ignite.engine import Engine, Events

    def train(folder: Path) -> Trained:
        model, batches = copy.deepcopy(task.model).train(), task.new_batches()
        optimizer = task.optimizer(model)
        callbacks = SeedCallbacks(folder, task.epochs * len(batches))
        engine = Engine(lambda engine, batch: make_update(model, optimizer, batch))  # noqa: ARG005  # called by the engine

        def log_number(engine: Engine, key: str) -> None:
            callbacks.write(engine.state.iteration, {key: engine.state.iteration})

        def log_all(engine: Engine) -> None:
            callbacks.after_update(engine.state.iteration, optimizer.param_groups[0]["lr"])

        if intervals is None:
            engine.add_event_handler(Events.ITERATION_COMPLETED, log_all)
        for index, n in enumerate(intervals or ()):
            event = Events.ITERATION_COMPLETED(every=n) if n > 1 else Events.ITERATION_COMPLETED
            engine.add_event_handler(event, log_number, f"number/{index}")

        @engine.on(Events.EPOCH_COMPLETED)
        def evaluate_epoch(engine: Engine) -> None:
            callbacks.after_evaluation(engine.state.iteration, evaluate(model, task.validation))

        engine.run(batches, max_epochs=task.epochs)
        callbacks.close()
        return Trained(batches.update_s(), dict(model.named_parameters()))

    return train


def lightning(task: Task) -> Train:
    """Train with a Lightning trainer."""
    from lightning.pytorch import Callback, LightningModule
    from lightning.pytorch import Trainer as LightningTrainer

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = copy.deepcopy(task.model)

        def training_step(self, batch: Any, index: int) -> Tensor:  # noqa: ARG002  # Lightning passes it by name
            return functional.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return task.optimizer(self.model)

    class Watch(Callback):
        def __init__(self, callbacks: SeedCallbacks) -> None:
            self.callbacks = callbacks

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            self.callbacks.after_update(trainer.global_step, trainer.optimizers[0].param_groups[0]["lr"])

        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            self.callbacks.after_evaluation(trainer.global_step, evaluate(module.model, task.validation))

    def train(folder: Path) -> Trained:
        module, batches = Module(), task.new_batches()
        callbacks = SeedCallbacks(folder, task.epochs * len(batches))
        quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
        trainer = LightningTrainer(
            accelerator="cpu", max_epochs=task.epochs, callbacks=[Watch(callbacks)], default_root_dir=folder,
            **dict.fromkeys(quiet, False),
        )  # fmt: skip
        trainer.fit(module, batches)
        callbacks.close()
        return Trained(batches.update_s(), dict(module.model.named_parameters()))

    return train


def rows(task: Task) -> tuple[dict[str, Train], list[str]]:
    """Return the rows that can run here, and notes on those that cannot."""
    guide = [each.callback for each in task.experiment.callbacks]
    evaluation = [each for each in guide if isinstance(each, EvaluateCallback)]
    many = many_callbacks()
    trains = {_DEFAULT: bare(task, fused=None), _FUSED: bare(task, fused=True), _BY_HAND: by_hand(task)}
    trains |= {name: noether(task, guide, wrap_step) for name, wrap_step in _STEPS.items()}
    trains["noether, donated, evaluation alone"] = noether(task, evaluation)
    trains["noether, donated, digits callbacks"] = noether(task, digits_callbacks(task))
    trains["noether, donated, 100 callbacks"] = noether(task, [*evaluation, *many])
    intervals = [each.every_n_updates or NEVER for each in many]
    peers, notes = available_rows(
        {
            "Ignite": partial(ignite, task),
            "Ignite, 100 callbacks": partial(ignite, task, intervals),
            "Lightning": partial(lightning, task),
        }
    )
    return trains | peers, notes


def measure(task: Task, trains: Mapping[str, Train], rounds: int) -> list[dict[str, float]]:
    """Return the seconds of an update of each row in each round; check that all rows did the same work."""
    params: dict[str, Mapping[str, Tensor]] = {}

    def update_s(name: str, train: Train) -> float:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Lightning, about loaders that are not from torch
            trained = train(Path(folder))
        params[name] = trained.params
        return trained.update_s

    measured = take_turns({name: partial(update_s, name, train) for name, train in trains.items()}, rounds)
    for name in params:
        _check_same(name, params, task.model.parameters())
    return measured


def _check_same(name: str, params: Mapping[str, Mapping[str, Tensor]], start: Iterable[Tensor]) -> None:
    begin, end, other = map(_flat, (start, params[_FUSED].values(), params[name].values()))
    tolerance = _TOLERANCE if name in _OTHER_KERNELS else 0.0
    if (other - end).norm() > tolerance * (end - begin).norm():
        raise click.ClickException(f"{name!r} did not do the same work as {_FUSED!r}: their parameters differ")


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


@click.command(help=__doc__)
@click.option(
    "--network", "networks", multiple=True, type=click.Choice([*_NETWORKS]), help="Network to train; by default, all."
)
@click.option(
    "--epochs",
    type=click.IntRange(min=3),
    help="Epochs of a run; by default, 20 of the small network, 4 of the medium.",
)
@click.option("--rounds", default=10, show_default=True, type=click.IntRange(min=2), help="Rounds measured.")
@click.option("--cpu", is_flag=True, help="Measure CPU time: steadier on a shared machine.")
@markdown_option
def main(networks: Sequence[str], epochs: int | None, rounds: int, *, cpu: bool, markdown: bool) -> None:
    """Measure and print the tables."""
    torch.set_num_threads(1)
    notes = keep_freed_memory()
    for size in networks or _NETWORKS:
        task = Task.of(
            _NETWORKS[size].make, epochs or _NETWORKS[size].epochs, time.process_time if cpu else time.perf_counter
        )
        trains, missing = rows(task)
        measured = measure(task, trains, rounds)
        us = {name: quartiles([each[name] * 1e6 for each in measured], 0) for name in trains}
        cells = [
            (name, us[name], *(quartiles(ratios(measured, name, u)) for u in (_DEFAULT, _FUSED))) for name in trains
        ]
        parameters = sum(parameter.numel() for parameter in task.model.parameters())
        title = f"An update of the {size} network ({parameters:,} parameters, batch 64) in its training loop"
        headings = ("", "us", "/ bare, default AdamW", "/ bare, fused AdamW")
        show(Table(title, headings, cells, [*missing, *notes]), markdown=markdown)


if __name__ == "__main__":
    main()
