"""A loader that shuffles and a model with dropout: a cut and resumed run equals the uncut run, in every framework."""

import logging
import os
import random
from contextlib import nullcontext
from functools import cache, partial

import numpy as np
import pytest
import torch
from reference import STILL, open_silent
from torch import nn
from torch.utils.data import DataLoader

from noether import Session, TrainState
from noether.core.callbacks import CheckpointCallback
from noether.effects.checkpoints.state_codec import decode_state, encode_state
from noether.session.errors import ResumeWarning
from noether.session.generators import GeneratorStates
from noether.session.randomness import seed_all
from noether.testing import assert_same

EPOCHS, UPDATES, SIZE = 3, 4, 4
QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*' does not have many workers"),  # as few as there are cores
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),  # who resumes saves no more here
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning"),  # of Keras
]


class CutError(Exception):
    """Stands for the end of the process."""


def network():
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(2, 4), nn.Dropout(0.3), nn.Linear(4, 1))


def samples():
    inputs = torch.randn(SIZE * UPDATES, 2, generator=torch.Generator().manual_seed(2))
    return [(x, x.sum(-1, keepdim=True)) for x in inputs]


def loader():
    return DataLoader(samples(), batch_size=SIZE, shuffle=True)


def weights(model):
    if hasattr(model, "trainable_variables"):  # of Keras
        return [variable.value.detach().clone() for variable in model.trainable_variables]
    return [parameter.detach().clone() for parameter in model.parameters()]


def saving(every="update"):
    return CheckpointCallback(**{f"every_n_{every}s": 1}, save_weights=True, save_optim=True)


def raise_at(count, cut):
    if count == cut:
        raise CutError


def train_lightning(directory, folder, cut, resume, **settings):
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint

    from noether.integrations.lightning import NoetherCallback

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    class Module(LightningModule):
        def __init__(self):
            super().__init__()
            self.network = network()

        def training_step(self, batch, index):
            return nn.functional.mse_loss(self.network(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.05)

        def train_dataloader(self):
            return loader()

    class Cut(Callback):
        def on_train_batch_start(self, trainer, *_):
            raise_at(trainer.global_step, cut)

    saver = ModelCheckpoint(folder / "own", "{step}", save_top_k=-1, every_n_epochs=1, save_on_train_epoch_end=True)
    noether = NoetherCallback(saving("epoch"), directory=directory, interpreter=ignore_without(directory), clock=STILL)
    module = Module()
    trainer = Trainer(
        callbacks=[noether, Cut(), *([] if resume else [saver])], max_epochs=EPOCHS, **QUIET, **settings,
        enable_checkpointing=not resume, default_root_dir=folder,
    )  # fmt: skip
    newest = max(folder.glob("own/*.ckpt"), key=lambda path: path.stat().st_mtime_ns) if resume == "own" else None
    trainer.fit(module, ckpt_path=newest, weights_only=True)
    return module


def ignore_without(directory):
    return None if directory is not None else lambda *_: None


def train_reloading_lightning(*parts):
    return train_lightning(*parts, reload_dataloaders_every_n_epochs=1)


def train_ignite(directory, folder, cut, resume, kind="Engine"):
    import ignite.engine as ignite

    from noether.integrations.ignite import attach

    model = network()
    sgd = torch.optim.SGD(model.parameters(), lr=0.05)
    engine = getattr(ignite, kind)(ignite.supervised_training_step(model, sgd, nn.functional.mse_loss))
    live = {"model": model, "optimizer": sgd, "directory": directory, "interpreter": ignore_without(directory)}
    session = attach(engine, saving("update" if kind != "Engine" else "epoch"), clock=STILL, **live)
    if resume == "own":
        saved = torch.load(folder / "own.pt", weights_only=False)
        engine.load_state_dict(saved["engine"])
        session.load_state_dict(saved["noether"])
        model.load_state_dict(saved["model"])

    @engine.on(ignite.Events.ITERATION_COMPLETED)
    def cut_engine(engine):
        if engine.state.iteration == cut:
            parts = {"engine": engine, "noether": session, "model": model}
            torch.save({name: part.state_dict() for name, part in parts.items()}, folder / "own.pt")
            raise CutError

    engine.run(loader(), max_epochs=EPOCHS)
    return model


def train_deterministic_ignite(*parts):
    return train_ignite(*parts, kind="DeterministicEngine")


def train_huggingface(directory, folder, cut, resume):
    from transformers import TrainerCallback, TrainingArguments

    from noether.integrations.huggingface import NoetherCallback, NoetherTrainer, to_checkpoint

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = network()

        def forward(self, x, labels):
            return {"loss": nn.functional.mse_loss(self.network(x), labels)}

    class Cut(TrainerCallback):
        def on_save(self, args, state, control, **_):
            raise_at(state.global_step, cut)

    callback = NoetherCallback(saving(), directory=directory, interpreter=ignore_without(directory), clock=STILL)
    settings = {"num_train_epochs": EPOCHS, "report_to": [], "disable_tqdm": True, "use_cpu": True, "save_steps": 1}
    quiet = {"save_strategy": "steps", "logging_strategy": "no", "per_device_train_batch_size": SIZE}
    trainer = NoetherTrainer(
        Model(),
        TrainingArguments(str(folder), **settings, **quiet),
        train_dataset=[{"x": x, "labels": y} for x, y in samples()],
        callbacks=[callback, Cut()],
    )
    resumed = {"own": True, "noether": lambda: to_checkpoint(directory.load(), trainer)}.get(resume)
    trainer.train(resume_from_checkpoint=resumed() if callable(resumed) else resumed)
    return trainer.model


def train_accelerate(directory, folder, cut, resume):
    from accelerate import Accelerator

    from noether.integrations.accelerate import AcceleratedSession

    accelerator, model = Accelerator(cpu=True), network()
    sgd = torch.optim.SGD(model.parameters(), lr=0.05)
    model, sgd, data = accelerator.prepare(model, sgd, loader())
    session = AcceleratedSession(
        saving(), accelerator=accelerator, model=model, optimizer=sgd, directory=directory, max_epochs=EPOCHS,
        interpreter=ignore_without(directory), clock=STILL,
    )  # fmt: skip
    accelerator.register_for_checkpointing(session)
    if resume == "own":
        accelerator.load_state(folder / "own")
    for x, y in session.batches(data):
        session.backward(nn.functional.mse_loss(model(x), y))
        sgd.step()
        sgd.zero_grad()
        session.update()
        if session.session.state.iteration.update == cut:
            accelerator.save_state(folder / "own")
            raise CutError
    return model


def train_keras(directory, folder, cut, resume):
    os.environ.setdefault("KERAS_BACKEND", "torch")
    import keras

    from noether.integrations.keras import NoetherCallback

    class Cut(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            raise_at(noether.session.state.iteration.update, cut)

    class Save(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            self.model.save(folder / "own.keras")
            torch.save(noether.session.state_dict(), folder / "own.pt")

    if resume == "own":
        model = keras.saving.load_model(folder / "own.keras")
    else:
        layers = [keras.Input((2,)), keras.layers.Dense(4), keras.layers.Dropout(0.3, seed=3), keras.layers.Dense(1)]
        model = keras.Sequential(layers)
        model.compile(optimizer=keras.optimizers.SGD(0.05), loss="mse")
    noether = NoetherCallback(
        saving("epoch"), directory=directory, interpreter=ignore_without(directory), clock=STILL,
        **({"remembered": torch.load(folder / "own.pt")} if resume == "own" else {}),
    )  # fmt: skip
    x, y = (torch.stack(part) for part in zip(*samples(), strict=True))
    model.fit(x, y, batch_size=SIZE, epochs=EPOCHS, shuffle=True, verbose=0, callbacks=[noether, Save(), Cut()])
    return model


TRAINERS = {
    "lightning": train_lightning,
    "reloading lightning": train_reloading_lightning,
    "ignite": train_ignite,
    "deterministic ignite": train_deterministic_ignite,
    "huggingface": train_huggingface,
    "accelerate": train_accelerate,
    "keras": train_keras,
}
WARNED = ("ignite", "own", 6)


@cache
def uncut_weights(name, folder):
    seed_all(7)
    with open_silent(folder / "noether") as directory:
        return weights(TRAINERS[name](directory, folder, None, None))


BOTH = ("noether", "own")
CASES = [
    *((name, by, 8) for name in TRAINERS for by in BOTH if (name, by) != ("huggingface", "own")),
    *((name, by, 6) for name in ("deterministic ignite", "accelerate") for by in BOTH),
    ("huggingface", "noether", 6),
    WARNED,
]


@pytest.mark.parametrize(("name", "resume", "cut"), CASES)
def test_shuffling_and_dropout_resume_exactly_or_with_a_warning(name, resume, cut, tmp_path, uncut_folder):
    seed_all(7)
    open_directory = partial(open_silent, tmp_path / "noether") if resume == "noether" else nullcontext
    with open_directory() as directory, pytest.raises(CutError):
        TRAINERS[name](directory, tmp_path, cut, None)
    seed_all(8)
    is_warned = (name, resume, cut) == WARNED
    warned = pytest.warns(ResumeWarning, match="use DeterministicEngine") if is_warned else nullcontext()
    with open_directory() as directory, warned:
        model = TRAINERS[name](directory, tmp_path, None, resume)
    if not is_warned:
        assert_same(weights(model), uncut_weights(name, uncut_folder(name)))


@pytest.mark.parametrize("kind", ["Engine", "DeterministicEngine"])
def test_ignite_says_where_a_generator_of_the_loader_gives_another_order(kind, tmp_path, monkeypatch):
    plain = loader

    def loader_with_generator():
        made = plain()
        made.sampler.generator = torch.Generator().manual_seed(3)
        return made

    monkeypatch.setitem(globals(), "loader", loader_with_generator)
    seed_all(7)
    with open_silent(tmp_path) as directory, pytest.raises(CutError):
        train_ignite(directory, tmp_path, 8, None, kind=kind)
    seed_all(8)
    is_warned = kind == "Engine"
    warned = pytest.warns(ResumeWarning, match="RandomSampler once more") if is_warned else nullcontext()
    with open_silent(tmp_path) as directory, warned:
        resumed = train_ignite(directory, tmp_path, None, "noether", kind=kind)
    if not is_warned:
        with open_silent(tmp_path / "uncut") as directory:
            seed_all(7)
            assert_same(weights(train_ignite(directory, tmp_path, None, None, kind=kind)), weights(resumed))


@pytest.fixture(scope="module")
def uncut_folder(tmp_path_factory):
    return cache(lambda name: tmp_path_factory.mktemp("uncut"))


def draw(*held):
    own = [each.random() if hasattr(each, "random") else torch.rand(1, generator=each).item() for each in held]
    return [torch.rand(1).item(), np.random.rand(), random.random(), *own]  # noqa: NPY002, S311  # the global and the older generators are tested


def test_states_of_generators_are_restored_through_a_checkpoint():
    model, data = network(), loader()
    held = [torch.Generator(), np.random.default_rng(3), np.random.RandomState(4), random.Random(5)]  # noqa: S311  # the global and the older generators are tested
    model.held, data.held = held[:2], held[2:]
    states = GeneratorStates(model, data)
    draw(*held)
    saved = decode_state(encode_state(TrainState().remember("generators", states.read()))).memory("generators")
    expected = [draw(*held) for _ in range(3)]
    states.restore(saved)
    assert [draw(*held) for _ in range(3)] == expected
    model.held = []
    with pytest.warns(ResumeWarning, match="has 4 random generators .* and now they hold 2"):
        GeneratorStates(model, data).restore(saved)


def test_a_checkpoint_without_states_of_generators_is_named():
    session = Session([], interpreter=lambda *_: None, model=network())
    session.load_state_dict(encode_state(TrainState()))
    session.remember_generators()
    with pytest.warns(ResumeWarning, match="has no states of random generators: an earlier version"):
        session.restore_generators()
