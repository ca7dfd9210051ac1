"""Several optimizers, added groups and gradient scalers in other frameworks: a resume from a directory is exact."""

import pytest
import torch
from accelerate import Accelerator
from ignite.engine import Engine
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BackboneFinetuning, BaseFinetuning
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader

from noether import AfterUpdate, GradNormCallback, LrCallback, on, open_run
from noether.core.callbacks import CheckpointCallback
from noether.core.errors import StateWarning
from noether.integrations.accelerate import AcceleratedSession
from noether.integrations.ignite import attach
from noether.integrations.lightning import NoetherCallback
from noether.testing import assert_same

BATCHES = [torch.randn(4, 2, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
UPDATES = len(BATCHES)
pytestmark = pytest.mark.filterwarnings("ignore:The '.*' does not have many workers")


def make_gan():
    torch.manual_seed(0)
    return nn.ModuleDict({"g": nn.Linear(2, 2), "d": nn.Linear(2, 1)})


def make_optimizers(gan):
    return {
        "g": torch.optim.Adam(gan["g"].parameters(), lr=0.05),
        "d": torch.optim.SGD(gan["d"].parameters(), lr=0.1, momentum=0.9),
    }


def make_schedulers(optimizers):
    return {name: torch.optim.lr_scheduler.StepLR(each, 3, 0.5) for name, each in optimizers.items()}


def game(gan, x, name):
    return (1 if name == "d" else -1) * gan["d"](gan["g"](x)).tanh().mean()


def turns(update):
    """Return whose steps an update has: two of the discriminator, and one of the generator in every second update."""
    return ["d", "d"] + (["g"] if update % 2 == 0 else [])


def watch(seen):
    @on(AfterUpdate)
    def note(state, event):
        lr = {name.replace("0", "g").replace("1", "d"): rate for name, rate in event.lr.items()}
        seen.append((state.iteration, lr, None if event.skipped else float(event.grad_norm)))
        return state, ()

    return [
        note,
        GradNormCallback(every_n_updates=1),
        LrCallback(every_n_updates=1),
        CheckpointCallback(every_n_epochs=1, keep=1),
    ]


def train_ignite(path, epochs, seen):
    gan = make_gan()
    optimizers = make_optimizers(gan)
    schedulers = make_schedulers(optimizers)

    def step(engine, x):
        for name in turns(engine.state.iteration - 1):
            loss = game(gan, x, name)
            gan.zero_grad()
            loss.backward()
            optimizers[name].step()
        for each in schedulers.values():
            each.step()
        return {"game": loss.detach()}

    engine = Engine(step)
    with open_run(path) as directory:
        parts = {"model": gan, "optimizer": optimizers, "scheduler": schedulers}
        attach(engine, watch(seen), directory=directory, losses=lambda output: output, **parts)
        engine.run(BATCHES, max_epochs=epochs)
    return gan, optimizers, schedulers


def train_accelerate(path, epochs, seen):
    accelerator, gan = Accelerator(cpu=True), make_gan()
    optimizers = make_optimizers(gan)
    schedulers = make_schedulers(optimizers)
    loader = DataLoader(torch.cat(BATCHES), batch_size=4)
    gan, d, g, loader = accelerator.prepare(gan, optimizers["d"], optimizers["g"], loader)
    prepared = {"g": g, "d": d}
    with open_run(path) as directory:
        parts = {"accelerator": accelerator, "model": gan, "optimizer": prepared, "scheduler": schedulers}
        session = AcceleratedSession(watch(seen), directory=directory, max_epochs=epochs, **parts)
        for x in session.batches(loader):
            *before, last = turns(session.session.state.iteration.update)
            for name in before:
                gan.zero_grad()
                accelerator.backward(game(gan, x, name))
                prepared[name].step()
            gan.zero_grad()
            session.backward({"game": game(gan, x, last)})
            prepared[last].step()
            for each in schedulers.values():
                each.step()
            session.update()
    return gan, optimizers, schedulers


class Gan(LightningModule):
    def __init__(self):
        super().__init__()
        self.gan = make_gan()
        self.automatic_optimization = False

    def configure_optimizers(self):
        self.made = make_optimizers(self.gan)
        self.schedulers = make_schedulers(self.made)
        return list(self.made.values()), list(self.schedulers.values())

    def training_step(self, x, index):
        optimizers = dict(zip("gd", self.optimizers(), strict=True))
        for name in turns(self.trainer.current_epoch * UPDATES + index):
            loss = game(self.gan, x, name)
            self.gan.zero_grad()
            self.manual_backward(loss)
            optimizers[name].step()
        for each in self.lr_schedulers():
            each.step()
        return loss.detach()


def fit(module, path, epochs, callbacks, *others, **settings):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    with open_run(path) as directory:
        noether = NoetherCallback(callbacks, directory=directory)
        trainer = Trainer(
            callbacks=[*others, noether], max_epochs=epochs, enable_checkpointing=False, default_root_dir=path, **quiet,
            **settings,
        )  # fmt: skip
        trainer.fit(module, DataLoader(torch.cat(BATCHES), batch_size=4))
    return trainer


def train_lightning(path, epochs, seen):
    module = Gan()
    trainer = fit(module, path, epochs, watch(seen))
    assert trainer.global_step == sum(len(turns(update)) for update in range(epochs * UPDATES))
    return module.gan, module.made, module.schedulers


FRAMEWORKS = {"ignite": train_ignite, "accelerate": train_accelerate, "lightning": train_lightning}


@pytest.mark.parametrize("train", FRAMEWORKS.values(), ids=FRAMEWORKS)
def test_a_gan_resumes_exactly_with_both_optimizers_and_schedulers(train, tmp_path):
    # keras-team/keras#10806, dansuh17/segan-pytorch#14
    def describe(gan, optimizers, schedulers):
        return gan.state_dict(), [each.state_dict() for parts in (optimizers, schedulers) for each in parts.values()]

    whole, parts = [], []
    uncut = describe(*train(tmp_path / "uncut", 3, whole))
    train(tmp_path / "cut", 2, parts)
    assert_same(describe(*train(tmp_path / "cut", 3, parts)), uncut)
    assert_same(parts, whole)
    assert [set(lr) for _, lr, _ in whole] == [{"g", "d"}] * 3 * UPDATES
    assert train is train_ignite or whole == reference(train_ignite, tmp_path)


def reference(train, path):
    seen = []
    train(path / "reference", 3, seen)
    return seen


@pytest.mark.parametrize("kind", ["ignite", "accelerate", "lightning"])
def test_parameters_that_no_optimizer_holds_are_named(kind, tmp_path, monkeypatch):
    def only_g(gan):
        return {"g": torch.optim.Adam(gan["g"].parameters(), lr=0.05), "d": torch.optim.SGD([gan["d"].bias], lr=0.1)}

    monkeypatch.setitem(globals(), "make_optimizers", only_g)
    with pytest.warns(StateWarning, match=r"no optimizer holds 1 of the parameters .* \(.*d.weight\)"):
        FRAMEWORKS[kind](tmp_path, 1, [])


# Groups that are added while a run trains


class Net(LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(2, 2), nn.Linear(2, 1)

    def training_step(self, x, index):
        return self.head(self.body(x)).square().mean()

    def configure_optimizers(self):
        self.adam = torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=0.1)
        return self.adam


class Unfreeze(BaseFinetuning):
    def freeze_before_training(self, module):
        self.freeze(module.body)

    def finetune_function(self, module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(module.body, optimizer, lr=0.01)


@pytest.mark.parametrize("cut", [1, 2])
def test_a_group_that_lightning_unfreezes_is_there_after_a_resume(cut, tmp_path):
    # Lightning-AI/pytorch-lightning#6891, #8502
    def train(path, epochs):
        module = Net()
        callbacks = [CheckpointCallback(every_n_epochs=1), LrCallback(every_n_updates=1)]
        trainer = fit(module, path, epochs, callbacks, Unfreeze())
        noether = next(each for each in trainer.callbacks if isinstance(each, NoetherCallback))
        return module.state_dict(), module.adam.state_dict(), noether.session.state.metrics

    uncut = train(tmp_path / "uncut", 4)
    train(tmp_path / "cut", cut)
    assert_same(train(tmp_path / "cut", 4), uncut)
    assert {"optim/lr", "optim/lr/1"} <= uncut[2].keys()


class Backbone(Net):
    @property
    def backbone(self):
        return self.body


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_backbone_that_lightning_finetunes_keeps_its_learning_rates_after_a_resume(cut, tmp_path):
    def train(path, epochs):
        module, finetuning = Backbone(), BackboneFinetuning(unfreeze_backbone_at_epoch=1, lambda_func=lambda _: 1.5)
        fit(module, path, epochs, [CheckpointCallback(every_n_epochs=1)], finetuning)
        return module.state_dict(), module.adam.state_dict(), finetuning.previous_backbone_lr

    uncut = train(tmp_path / "uncut", 4)
    train(tmp_path / "cut", cut)
    assert_same(train(tmp_path / "cut", 4), uncut)


# Gradient scalers


def make_scaler():
    return torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=2)


def train_scaled_lightning(path, epochs, seen):
    scaler, module = make_scaler(), Net()
    fit(module, path, epochs, watch(seen), plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    return module.state_dict(), scaler.state_dict()


def train_scaled_ignite(path, epochs, seen):
    scaler, module = make_scaler(), Net()
    adam = module.configure_optimizers()

    def step(engine, x):
        adam.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = module.training_step(x, 0)
        scaler.scale(loss).backward()
        scaler.step(adam)
        scaler.update()
        return loss.item()

    engine = Engine(step)
    with open_run(path) as directory:
        attach(engine, watch(seen), model=module, optimizer=adam, scaler=scaler, directory=directory)
        engine.run(BATCHES, max_epochs=epochs)
    return module.state_dict(), scaler.state_dict()


def train_scaled_accelerate(path, epochs, seen):
    accelerator, module = Accelerator(cpu=True), Net()
    accelerator.scaler = scaler = make_scaler()  # as on a GPU with mixed_precision="fp16"
    adam = accelerator.prepare(module.configure_optimizers())
    loader = accelerator.prepare(DataLoader(torch.cat(BATCHES), batch_size=4))
    with open_run(path) as directory:
        parts = {"accelerator": accelerator, "model": module, "optimizer": adam}
        session = AcceleratedSession(watch(seen), directory=directory, max_epochs=epochs, **parts)
        for x in session.batches(loader):
            with torch.autocast("cpu", dtype=torch.float16):
                loss = module.training_step(x, 0)
            session.backward(loss)
            adam.step()
            adam.zero_grad()
            session.update()
    return module.state_dict(), scaler.state_dict()


SCALED = {"ignite": train_scaled_ignite, "accelerate": train_scaled_accelerate, "lightning": train_scaled_lightning}


@pytest.mark.parametrize("train", SCALED.values(), ids=SCALED)
def test_the_scale_of_a_frameworks_scaler_resumes_exactly(train, tmp_path):
    whole, parts = [], []
    uncut = train(tmp_path / "uncut", 3, whole)
    train(tmp_path / "cut", 2, parts)
    assert_same(train(tmp_path / "cut", 3, parts), uncut)
    assert_same(parts, whole)
    assert uncut[1]["scale"] < 2.0**20
    assert max(norm for _, _, norm in whole if norm is not None) < 10  # unscaled
