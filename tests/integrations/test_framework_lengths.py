"""Loops of other libraries whose epochs differ in length train as without callbacks, and resume exactly."""

from contextlib import suppress

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import GradientAccumulationPlugin
from reference import STILL, Recorder, loss, model, open_silent, points, weights
from torch.utils.data import DataLoader, IterableDataset
from transformers import TrainingArguments

from noether.core.callbacks import CheckpointCallback, EtaCallback, OnlineLossCallback, ProgressCallback
from noether.core.event import AfterEpoch
from noether.integrations.accelerate import AcceleratedSession
from noether.integrations.huggingface import NoetherCallback, NoetherTrainer
from noether.testing import assert_same


class CutError(Exception):
    """Stands for the end of the process."""


@pytest.fixture
def new_accelerator():
    """Return a function that makes the accelerator of a new process."""

    def make(**settings):
        AcceleratorState._reset_state(True)  # noqa: SLF001  # as accelerate's own tests do
        GradientState._reset_state()  # noqa: SLF001  # Accelerate has no public reset
        return Accelerator(cpu=True, **settings)

    yield make
    AcceleratorState._reset_state(True)  # noqa: SLF001  # Accelerate has no public reset
    GradientState._reset_state()  # noqa: SLF001  # Accelerate has no public reset


@pytest.mark.parametrize("cut", [None, 1, 2, 3, 4, 5])
def test_accelerate_may_carry_gradients_over_epochs(cut, tmp_path, caplog, new_accelerator):
    def train(path, cut=None):
        plugin = GradientAccumulationPlugin(num_steps=2, sync_with_dataloader=False)
        accelerator = new_accelerator(gradient_accumulation_plugin=plugin)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            network = model()
        optimizer = torch.optim.Adam(network.parameters(), lr=0.1)
        network, optimizer, loader = accelerator.prepare(network, optimizer, DataLoader(points(20), batch_size=4))
        save = CheckpointCallback(every_n_updates=1, save_weights=True, save_optim=True)
        with open_silent(path) as directory, suppress(CutError):
            parts = {"model": network, "optimizer": optimizer, "directory": directory, "clock": STILL}
            session = AcceleratedSession(
                [OnlineLossCallback(every_n_epochs=1), EtaCallback(every_n_epochs=1), save],
                accelerator=accelerator,
                max_epochs=2,
                **parts,
            )
            for batch in session.batches(loader):
                with accelerator.accumulate(network):
                    session.backward(loss(network(batch[0]), batch))
                    optimizer.step()
                    optimizer.zero_grad()
                session.update()
                if session.session.state.iteration.update == cut:
                    raise CutError
        return weights(network), session.session.state

    whole, state = train(tmp_path / "whole")
    assert str(state.iteration) == "E2_U5_S40"
    assert "epoch 0 ended inside of an update" in caplog.text
    if cut is not None:
        train(tmp_path / "cut", cut)
        resumed, state = train(tmp_path / "cut")
        assert str(state.iteration) == "E2_U5_S40"
        assert_same(resumed, whole)


class Stream(IterableDataset):
    """Four batches of four samples; it does not announce them."""

    def __iter__(self):
        for index in range(16):
            yield {"x": torch.full((2,), float(index)), "labels": torch.ones(1)}


class Net(torch.nn.Linear):
    def __init__(self):
        super().__init__(2, 1)

    def forward(self, x, labels=None):
        predicted = super().forward(x)
        return {"loss": (predicted - labels).square().mean(), "predicted": predicted}


def test_transformers_reads_a_short_stream_again(tmp_path, caplog):
    recorder = Recorder()
    settings = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "save_strategy": "no"}
    arguments = TrainingArguments(
        str(tmp_path), max_steps=10, per_device_train_batch_size=4, logging_strategy="no", **settings
    )
    ends = []

    def interpret(effects, state, event):
        recorder(effects, state, event)
        ends.extend([str(state.iteration)] if isinstance(event, AfterEpoch) else [])

    shown = [ProgressCallback(every_n_epochs=1), EtaCallback(every_n_updates=1)]
    callback = NoetherCallback(shown, interpreter=interpret)
    trainer = NoetherTrainer(Net(), arguments, train_dataset=Stream(), callbacks=[callback])
    trainer.train()
    assert trainer.state.global_step == callback.session.state.iteration.update == 10
    assert ends == ["E1_U4_S16", "E2_U8_S32"]
    named = [record.getMessage() for record in caplog.records if "the session ignores" in record.getMessage()]
    assert ["epoch 0 had 4 updates, not updates_per_epoch=10" in line for line in named] == [True]
