"""Each module keeps the mode that the user gave it: in training, around evaluations, and after a resume."""

import copy
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from tiny_runs import make_config
from torch import nn

import noether
from noether import Session, TrainState
from noether.core.callbacks import EMACallback, OfflineLossCallback
from noether.core.tensors.modes import evaluation_mode, start_training_mode
from noether.session.errors import ResumeWarning
from noether.training.step.optimizer import FunctionalOptimizer
from noether.training.step.step import Step


def mse(outputs, batch):
    return {"mse": outputs.square().mean()}


class Overriding(nn.Sequential):
    """Keeps its first part in evaluation mode by `train`, and its last one in training mode."""

    def train(self, mode=True):  # noqa: FBT002  # as in torch
        super().train(mode)
        self[0].eval()
        self[-1].train()
        return self


class Stubborn(nn.Sequential):
    """Trains in every mode, as dropout that samples at inference."""

    def train(self, mode=True):  # noqa: FBT002  # as in torch
        return super().train(True)


class Setting(nn.Sequential):
    """Sets the mode of a part in forward, as some detectors do."""

    def forward(self, x):
        self[0].eval()
        return super().forward(x)


class Hiding(nn.Sequential):
    """Hides a part from `train`."""

    def children(self):
        return list(super().children())[1:]


class HidingNames(nn.Sequential):
    """Hides a part from `train` and from `children`."""

    def named_children(self):
        return list(super().named_children())[1:]


class Waking(nn.Sequential):
    """Keeps its first part in training mode by `eval`."""

    def eval(self):
        super().eval()
        self[0].train()
        return self


class Following(nn.Sequential):
    """Sets a probability of dropout as its mode changes."""

    def __setattr__(self, name, value):
        super().__setattr__(name, value)
        if name == "training" and len(self) > 1:
            self[1].p = 0.25 if value else 0.75


class Storing(nn.Sequential):
    """Keeps its mode elsewhere."""

    training = property(lambda self: vars(self)["mode"], lambda self, value: vars(self).update(mode=value))


class Patched(nn.Sequential):
    """Has another `train` on the object, as a patched model."""

    def __init__(self, *parts):
        super().__init__(*parts)
        self.train = self.train_head

    def train_head(self, mode=True):  # noqa: FBT002  # as in torch
        nn.Sequential.train(self, mode)
        self[-1].training = True
        return self

    def __deepcopy__(self, memo):
        return type(self)(*(copy.deepcopy(part, memo) for part in self))


KINDS = [nn.Sequential, Overriding, Setting, Stubborn]
OTHER_KINDS = [Hiding, HidingNames, Waking, Following, Storing, Patched]


def make_model(kinds):
    model = nn.Sequential(*(kind(nn.BatchNorm1d(2), nn.Dropout(0.5), nn.Linear(2, 2)) for kind in kinds))
    for norm in (each for each in model.modules() if isinstance(each, nn.BatchNorm1d)):
        norm.running_mean.fill_(5.0)
    return model


def modes_of(model):
    return [module.training for module in model.modules()]


MODELS = st.lists(st.sampled_from(KINDS), min_size=1, max_size=3)


@settings(max_examples=25)
@given(kinds=MODELS, data=st.data())
def test_evaluations_restore_the_mode_of_each_module(kinds, data):
    model = make_model(kinds)
    for module in model.modules():
        module.training = data.draw(st.booleans())
    before = modes_of(model)
    other = TrainState.from_module(make_model(kinds))
    predict = noether.forward(model, mse)
    for state in (TrainState.from_module(model), other):
        predict(state, torch.ones(4, 2))
        assert modes_of(model) == before
    with pytest.raises(RuntimeError), evaluation_mode(model):
        model(torch.ones(4, 3))
    assert modes_of(model) == before


@pytest.mark.parametrize("kind", [*KINDS, *OTHER_KINDS])
@settings(max_examples=25)
@given(others=st.sampled_from([[], [nn.Sequential], KINDS]), data=st.data())
def test_the_modes_of_an_evaluation_are_those_that_eval_sets(kind, others, data):
    model = make_model([kind, *others])
    model = Waking(*model) if kind is Waking else model  # torch calls `eval` of the whole model alone
    for module in model.modules():
        module.training = data.draw(st.booleans())
    reference, before = copy.deepcopy(model), modes_of(model)
    reference.eval()
    with evaluation_mode(model) as modules:
        assert modes_of(model) == modes_of(reference)
        assert [module.p for module in model.modules() if isinstance(module, nn.Dropout)] == [
            module.p for module in reference.modules() if isinstance(module, nn.Dropout)
        ]
        assert [module for _, module in modules] == list(model.modules())
    assert modes_of(model) == before


@settings(max_examples=25)
@given(kinds=MODELS, data=st.data())
def test_a_new_model_trains_what_neither_its_constructor_nor_its_train_keeps(kinds, data):
    model, reference = make_model(kinds), make_model(kinds)
    for module in model.modules():
        module.training = data.draw(st.booleans())
    constructed = modes_of(model)
    start_training_mode(model)
    assert modes_of(model) == [a and b for a, b in zip(constructed, modes_of(reference.train()), strict=True)]


@pytest.mark.parametrize("donate", [False, True])
def test_a_step_runs_frozen_parts_in_evaluation_mode(donate):
    model = make_model([nn.Sequential, nn.Sequential])
    model[0].requires_grad_(False).eval()
    frozen = frozenset(f"0.{name}" for name, _ in model[0].named_parameters())
    batch = torch.randn(8, 2)
    expected = model[0](batch)
    seen = []
    model[0].register_forward_hook(lambda module, inputs, outputs: seen.append(outputs))
    step = Step(
        model=model,
        loss=mse,
        optimizer=FunctionalOptimizer(torch.optim.SGD, {"lr": 0.1}, frozen=frozen),
        lr={"default": lambda position: 0.1},
        donate=donate,
    )
    state = TrainState.from_module(model)
    for _ in range(3):
        state, _ = step(state, [batch])
    assert all(torch.equal(outputs, expected) for outputs in seen)  # no dropout, and the stored statistics
    assert torch.equal(state.buffers["0.0.running_mean"], torch.full((2,), 5.0))
    assert not torch.equal(state.buffers["1.0.running_mean"], torch.full((2,), 5.0))


def test_evaluations_of_averages_and_of_sessions_keep_modes():
    model = make_model([nn.Sequential, Overriding])
    model[0].eval()
    callbacks = [
        EMACallback(every_n_updates=1, target_factors=(0.5,), save_weights=False, save_last_weights=False),
        OfflineLossCallback(every_n_updates=1, dataset_key="val"),
        OfflineLossCallback(every_n_updates=1, dataset_key="val", weights="ema=0.5", id="average"),
    ]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    session = Session(
        callbacks, interpreter=lambda *_: None, model=model, optimizer=optimizer,
        data={"val": [torch.ones(4, 2)]}, loss=mse, max_epochs=3,
    )  # fmt: skip
    changed_modes = []

    def train():
        for batch in session.batches([torch.randn(4, 2)]):
            if session.state.iteration.epoch == 1:
                model[0][1].train()  # as a user unfreezes a part
            before = modes_of(model)
            loss = mse(model(batch), batch)["mse"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            session.update(loss)
            changed_modes.append(modes_of(model) != before)

    with pytest.warns(ResumeWarning, match="the mode of 0.1 changed since epoch 0, and no checkpoint has it") as caught:
        train()
    assert changed_modes == [False] * 3
    assert len(caught) == 1


def test_a_session_names_a_model_in_evaluation_mode_once(caplog):
    model = nn.Linear(2, 1).eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    session = Session([], interpreter=lambda *_: None, model=model, optimizer=optimizer, max_epochs=2)
    for batch in session.batches([torch.randn(4, 2)]):
        loss = model(batch).square().mean()
        loss.backward()
        optimizer.step()
        session.update(loss)
    assert [line.split(",")[0] for line in caplog.messages] == ["Linear is in evaluation mode"]


MODULE = """
class FineTuned(nn.Module):
    def __init__(self, whole: bool = False):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout(0.5))
        self.backbone.requires_grad_(False).eval()
        self.norm = nn.BatchNorm1d(2)
        self.head = nn.Linear(2, 1)
        if whole:
            self.eval()

    def forward(self, x):
        return self.head(self.norm(self.backbone(x)))
"""
EVALUATE = {"kind": "noether.core.callbacks.OfflineLossCallback", "every_n_updates": 1, "dataset_key": "train"}


def configure(**model):
    Path("tiny.py").write_text(Path("tiny.py").read_text() + MODULE)
    return make_config(EVALUATE, max_epochs=2) | {"model": {"kind": "tiny.FineTuned", **model}}


def test_a_run_and_its_resume_keep_the_statistics_of_a_frozen_part(tiny_module):
    run = noether.train(configure())
    run = noether.train(resume=run.directory, overrides=["trainer.max_epochs=3"])
    assert torch.equal(run.state.buffers["backbone.1.running_mean"], torch.zeros(2))
    assert not torch.equal(run.state.buffers["norm.running_mean"], torch.zeros(2))


@pytest.mark.parametrize("whole", [False, True])
def test_a_model_in_evaluation_mode_stays_there_and_is_named(tiny_module, caplog, whole):
    run = noether.train(configure(whole=whole))
    assert torch.equal(run.state.buffers["norm.running_mean"], torch.zeros(2)) == whole
    named = [line for line in caplog.messages if "evaluation mode" in line]
    assert [line.split(",")[0] for line in named] == ["FineTuned is in evaluation mode"] * whole
