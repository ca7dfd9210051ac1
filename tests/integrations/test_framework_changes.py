"""What updates change of a model, and what no checkpoint has, is named in the loops of other frameworks, too."""

import pytest
import torch
from ignite.engine import Engine, Events
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader

from noether.integrations.ignite import attach
from noether.integrations.lightning import NoetherCallback
from noether.session.errors import ResumeWarning

SAMPLES = torch.randn(12, 2, generator=torch.Generator().manual_seed(0))
pytestmark = pytest.mark.filterwarnings("ignore:The '.*' does not have many workers")


class Counting(LightningModule):
    def __init__(self):
        super().__init__()
        self.norm, self.lin, self.calls = nn.BatchNorm1d(2), nn.Linear(2, 1), 0

    def forward(self, x):
        self.calls += 1
        return self.lin(self.norm(x)) * self.calls

    def training_step(self, x, index):
        return self(x).square().mean()

    def on_train_epoch_start(self):
        if self.current_epoch == 1:
            self.norm.eval()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def train_ignite(model):
    optimizer = model.configure_optimizers()

    def step(engine, x):
        optimizer.zero_grad()
        loss = model.training_step(x, 0)
        loss.backward()
        optimizer.step()
        return loss.item()

    engine = Engine(step)
    engine.add_event_handler(Events.EPOCH_COMPLETED(once=1), model.norm.eval)
    attach(engine, [], model=model, optimizer=optimizer, interpreter=lambda *_: None)
    engine.run(SAMPLES.split(4), max_epochs=3)


def train_lightning(model):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    callback = NoetherCallback([], interpreter=lambda *_: None)
    Trainer(callbacks=[callback], max_epochs=3, enable_checkpointing=False, **quiet).fit(
        model, DataLoader(SAMPLES, batch_size=4)
    )


@pytest.mark.parametrize("train", [train_ignite, train_lightning], ids=["ignite", "lightning"])
def test_counts_and_modes_that_no_checkpoint_has_are_named_once(train, recwarn):
    train(Counting())
    named = [str(each.message) for each in recwarn if issubclass(each.category, ResumeWarning)]
    assert [text.partition(",")[0] for text in named] == [
        "an update changed calls of the model",
        "the mode of norm changed since epoch 0",
    ]
