"""A plain loop with everything that draws random numbers or has a position, for tests of resuming."""

import io
import random
import secrets
from dataclasses import dataclass, field

import numpy as np
import torch
from rich.console import Console as RichConsole
from torch import nn
from torch.utils.data import DataLoader, Dataset

from noether import Session, open_run
from noether.effects import Console
from noether.session.randomness import seed_all
from noether.session.timing import Clock

STILL = Clock(wall_s=lambda: 0.0, elapsed_s=lambda: 0.0)


class CutError(Exception):
    """The process is gone."""


class Points(Dataset):
    """Points with an augmentation by all three generators."""

    def __init__(self, count, seed):
        self.inputs = torch.randn(count, 3, generator=torch.Generator().manual_seed(seed))

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, index):
        x = self.inputs[index]
        noise = torch.rand(3) + torch.from_numpy(np.random.rand(3)).float() + random.random()  # noqa: NPY002, S311  # the global generators are tested
        return x + 0.01 * noise, (x.sum() > 0).long()


def make_model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Tanh(), nn.Linear(8, 2))


def loss(outputs, batch):
    return {
        "ce": nn.functional.cross_entropy(outputs.float(), batch[1]),
        "size": 1e-3 * outputs.float().square().mean(),
    }


SCHEDULERS = {
    "none": lambda adam: None,
    "lambda": lambda adam: torch.optim.lr_scheduler.LambdaLR(adam, lambda update: 1 / (1 + update)),
    "one-cycle": lambda adam: torch.optim.lr_scheduler.OneCycleLR(adam, max_lr=0.05, total_steps=100),
    "sequential": lambda adam: torch.optim.lr_scheduler.SequentialLR(
        adam,
        [
            torch.optim.lr_scheduler.LinearLR(adam, 0.1, 1.0, 4),
            torch.optim.lr_scheduler.CosineAnnealingLR(adam, 20),
        ],
        milestones=[4],
    ),
    "plateau": lambda adam: torch.optim.lr_scheduler.ReduceLROnPlateau(adam, patience=1, factor=0.5),
}


@dataclass
class Loop:
    """One process after another trains a run in a directory."""

    path: object
    callbacks: list
    scheduler: str = "none"
    accumulation: int = 1
    precision: object = None
    workers: int = 0
    loader: object = None
    val: object = None
    head: object = None
    settings: dict = field(default_factory=lambda: {"max_epochs": 3})
    before_step: object = lambda model, update: None
    reach: object = lambda place, update: None  # called at places of the loop; it may raise
    handlers: tuple = ()
    batches_settings: dict = field(default_factory=dict)

    def train(self, *, cut=None, leave="raise"):
        """Train until the end, or until `cut` updates are counted; return the session."""
        seed_all(secrets.randbits(60))  # no process begins with the same global generators
        model = make_model()
        if self.head is not None:
            model.append(self.head())
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
        scheduler = SCHEDULERS[self.scheduler](optimizer)
        loader = (
            self.loader()
            if self.loader
            else DataLoader(Points(22, 1), batch_size=4, shuffle=True, num_workers=self.workers)
        )
        val = self.val or DataLoader(Points(10, 2), batch_size=4, shuffle=True)
        with open_run(self.path, Console(RichConsole(file=io.StringIO()))) as directory:
            session = Session(
                self.callbacks,
                directory=directory,
                interpreter=directory.interpreter.with_handlers(*self.handlers) if self.handlers else None,
                model=model,
                optimizer=optimizer,
                scheduler=scheduler,
                data={"val": val},
                loss=loss,
                precision=self.precision,
                accumulation=self.accumulation,
                clock=STILL,
                **self.settings,
            )
            self.batches = session.batches(loader, **self.batches_settings)
            done = session.state.iteration.update  # a loop that reads the state at each update defers none
            try:
                for batch in self.batches:
                    if leave == "raise" and cut is not None and done >= cut:
                        raise CutError  # noqa: TRY301  # as the process would go
                    with torch.autocast("cpu", torch.bfloat16, enabled=self.precision is not None):
                        losses = loss(model(batch[0]), batch)
                    self.reach("forward", done + 1)
                    (sum(losses.values()) / session.accumulation_steps).backward()
                    self.reach("backward", done + 1)
                    session.micro_batch(losses)
                    if not session.completes_update:
                        continue
                    self.before_step(model, done + 1)
                    optimizer.step()
                    optimizer.zero_grad()
                    self.reach("stepped", done + 1)
                    if scheduler is not None:
                        scheduler.step(*([losses["ce"].detach()] if self.scheduler == "plateau" else []))
                    session.update()
                    done += 1
                    if leave != "raise" and cut is not None and done >= cut:
                        if leave == "break":
                            self.batches.close()
                        break
            except CutError:
                pass
            except BaseException:
                self.batches.close()  # as Python does where nothing else holds the iterator
                raise
        self.session, self.model, self.optimizer, self.torch_scheduler = session, model, optimizer, scheduler
        return session

    def result(self):
        """Return all that a resumed run has to share with the uncut one."""
        return {
            "weights": {name: tensor.clone() for name, tensor in self.model.state_dict().items()},
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.torch_scheduler and self.torch_scheduler.state_dict(),
            "memories": dict(self.session.state.callback_states),
            "metrics": dict(self.session.state.metrics),
            "iteration": str(self.session.state.iteration),
            "hyperparams": dict(self.session.state.hyperparams),
            "stop": self.session.stop,
        }

    @property
    def log(self):
        return (self.path / "metrics.jsonl").read_text().replace(f'"{self.path.name}"', '"run"')
