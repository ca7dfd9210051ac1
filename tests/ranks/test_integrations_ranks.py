"""The loops of frameworks on two ranks: the metrics of one process, one set of files, and the same decisions."""

import io
import json
import os
import warnings

import pytest
import torch
from processes import run_on_ranks
from rich.console import Console as RichConsole
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from noether import AfterEpoch, Run, forward, open_run
from noether.core.callbacks import (
    BestCheckpointCallback,
    CheckpointCallback,
    EvaluateCallback,
    MetricEarlyStopping,
    OnlineLossCallback,
)
from noether.effects import Console

SAMPLES, EPOCHS, STOP = 24, 6, 3
SLOW = pytest.mark.slow


def dataset(count, seed):
    x = torch.randn(count, 3, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, (x.sum(1) > 0).long())


def loss(outputs, batch):
    return {"total": nn.functional.cross_entropy(outputs, batch[1])}


def callbacks(more=()):
    return [
        OnlineLossCallback(every_n_updates=1),
        OnlineLossCallback(every_n_epochs=1),
        EvaluateCallback(every_n_epochs=1, dataset_key="val", measures=("loss", "accuracy")),
        BestCheckpointCallback(every_n_epochs=1, metric_key="loss/val/total"),
        CheckpointCallback(every_n_epochs=1, save_weights=True, save_optim=True),
        # No loss improves by 100, so it stops after as many epochs as it tolerates, and the first one.
        MetricEarlyStopping(every_n_epochs=1, metric_key="loss/val/total", tolerance=STOP - 1, min_delta=100.0),
        *more,
    ]


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))


def world_size():
    return int(os.environ.get("WORLD_SIZE", "1"))


def loaders():
    """Return the loaders of training, whose batches make an update of 12 samples on all ranks, and of evaluation."""
    training = DataLoader(dataset(SAMPLES, 1), batch_size=12 // world_size())
    return training, DataLoader(dataset(11, 2), batch_size=2)


def train_accelerate(directory, more):
    from accelerate import Accelerator

    from noether.integrations.accelerate import AcceleratedSession

    accelerator, model = Accelerator(cpu=True), make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model, optimizer, training, val = accelerator.prepare(model, optimizer, *loaders())
    session = AcceleratedSession(
        callbacks(more), accelerator=accelerator, model=model, optimizer=optimizer, directory=directory,
        data={"val": val}, loss=loss, max_epochs=EPOCHS,
    )  # fmt: skip
    for batch in session.batches(training):
        with accelerator.accumulate(model):
            session.backward(loss(model(batch[0]), batch))
            optimizer.step()
            optimizer.zero_grad()
        session.update()
    return session.session


def train_ignite(directory, more):
    import ignite.distributed as idist
    from ignite.engine import Engine

    from noether.integrations.ignite import attach

    idist.get_world_size()
    model = idist.auto_model(make_model()) if world_size() > 1 else make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    training, val = loaders()
    if world_size() > 1:
        training = idist.auto_dataloader(training.dataset, batch_size=12, shuffle=False)

    def step(engine, batch):
        optimizer.zero_grad()
        value = loss(model(batch[0]), batch)["total"]
        value.backward()
        optimizer.step()
        return value

    engine = Engine(step)
    session = attach(
        engine, callbacks(more), model=model, optimizer=optimizer, directory=directory, data={"val": val}, loss=loss
    )
    engine.run(training, max_epochs=EPOCHS)
    return session


def train_lightning(directory, more):
    from lightning.pytorch import LightningModule, Trainer

    from noether.integrations.lightning import NoetherCallback

    class Module(LightningModule):
        def __init__(self):
            super().__init__()
            self.body = make_model()

        def forward(self, x):
            return self.body(x)

        def training_step(self, batch, index):
            return loss(self(batch[0]), batch)["total"]

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.5)

    training, val = loaders()
    callback = NoetherCallback(callbacks(more), directory=directory, data={"val": val}, loss=loss)
    several = {"devices": 1}
    if world_size() > 1:  # Lightning's own sampler would shuffle
        sampler = DistributedSampler(training.dataset, world_size(), int(os.environ["RANK"]), shuffle=False)
        training = DataLoader(training.dataset, batch_size=training.batch_size, sampler=sampler)
        several = {"strategy": "ddp", "devices": 2, "use_distributed_sampler": False}
    off = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(accelerator="cpu", max_epochs=EPOCHS, callbacks=[callback], **several, **off)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's, of workers
        trainer.fit(Module(), training)
    return callback.session


class Labelled(nn.Module):
    """Returns its loss, as models of transformers do."""

    def __init__(self):
        super().__init__()
        self.body = make_model()

    def forward(self, x, labels):
        outputs = self.body(x)
        return {"loss": nn.functional.cross_entropy(outputs, labels), "logits": outputs}


def train_huggingface(directory, more):
    from transformers import TrainingArguments

    from noether.integrations.huggingface import NoetherCallback, NoetherTrainer

    model = Labelled()
    samples = [{"x": x, "labels": y} for x, y in dataset(SAMPLES, 1)]
    val = DataLoader([{"x": x, "labels": y} for x, y in dataset(11, 2)], batch_size=2)

    def read(outputs, batch):
        return {"total": outputs["loss"]}

    run = Run(forward=forward(model, read))
    measures = [each for each in callbacks(more) if not isinstance(each, EvaluateCallback)]
    evaluate = EvaluateCallback(every_n_epochs=1, dataset_key="val", measures=("loss",))
    callback = NoetherCallback(
        [*measures[:2], evaluate, *measures[2:]], directory=directory, data={"val": val}, run=run
    )
    arguments = TrainingArguments(
        str(directory.path / "hf"), num_train_epochs=EPOCHS, per_device_train_batch_size=12 // world_size(),
        learning_rate=0.5, optim="sgd", lr_scheduler_type="constant", max_grad_norm=0, report_to=[],
        disable_tqdm=True, use_cpu=True, ddp_backend="gloo" if world_size() > 1 else None, save_strategy="no",
        logging_strategy="no", train_sampling_strategy="sequential",
    )  # fmt: skip
    NoetherTrainer(model, arguments, train_dataset=samples, callbacks=[callback]).train()
    return callback.session


FRAMEWORKS = {
    "accelerate": train_accelerate,
    "ignite": train_ignite,
    "lightning": train_lightning,
    "huggingface": train_huggingface,
}


def train(name, path, *more):
    """Train until a callback stops the run; return what all ranks have to share."""
    with open_run(path, Console(RichConsole(file=io.StringIO()))) as directory:
        session = FRAMEWORKS[name](directory, more)
    state = session.state
    metrics = {key: (float(each.value), str(each.iteration)) for key, each in state.metrics.items()}
    params = {key: tensor.tolist() for key, tensor in state.params.items()}
    return str(state.iteration), session.stop, metrics, params


def fail_in_epoch_2(state, event):
    if isinstance(event, AfterEpoch) and state.iteration.epoch == 2:
        raise ValueError("cut")
    return state, ()


def on_ranks(name, folder):
    """Return how an uncut run ends, and one that is cut and resumed."""
    os.environ["ACCELERATE_USE_CPU"] = "1"
    environment = dict(os.environ)
    if name not in {"lightning", "huggingface"}:  # these make a group
        torch.distributed.init_process_group("gloo")
    uncut = train(name, folder / "two")
    os.environ.update(environment)  # Lightning removes WORLD_SIZE
    if name == "huggingface":  # resumes from checkpoints of its own
        return uncut, uncut
    try:
        train(name, folder / "cut", fail_in_epoch_2)
    except ValueError:
        os.environ.update(environment)
        return uncut, train(name, folder / "cut")


def logged(path):
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [({key: line[key] for key in ("event", "epoch", "update", "sample")}, line["metrics"]) for line in lines]


# The others take seconds to import.
@pytest.mark.parametrize("name", [each if each == "ignite" else pytest.param(each, marks=SLOW) for each in FRAMEWORKS])
def test_two_ranks_make_the_run_of_one_process(name, tmp_path):
    (uncut, resumed), of_rank_1 = run_on_ranks(on_ranks, 2, name, tmp_path, detail=False)
    assert of_rank_1 == (uncut, resumed)
    assert resumed == uncut
    iteration, stop, _, params = uncut
    expected = train(name, tmp_path / "one")
    assert iteration == expected[0] == "E3_U6_S72"
    assert stop is not None
    assert expected[1] is not None
    for key, values in expected[3].items():
        torch.testing.assert_close(torch.tensor(params[key]), torch.tensor(values))
    two, one = logged(tmp_path / "two"), logged(tmp_path / "one")
    assert [place for place, _ in two] == [place for place, _ in one]
    for (_, metrics), (_, metrics_of_one) in zip(two, one, strict=True):
        assert metrics == pytest.approx(metrics_of_one, rel=1e-4, abs=1e-5)
    names = [sorted(each.name for each in (tmp_path / run / "checkpoints").iterdir()) for run in ("one", "two")]
    assert names[0] == names[1]
