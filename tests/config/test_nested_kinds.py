"""Datasets and parts in the settings of another dataset, and objects that are no callback, loss or handler."""

from pathlib import Path

import pytest
import torch
from torch.utils.data import ConcatDataset, StackDataset, Subset

from noether.config import ConfigError, load
from noether.config.serialization import dump
from noether.training.data.batches import collate_of

MODULE = """
from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from noether.core.callbacks.base import CallbackBase
from noether.core.callbacks.periodic import PeriodicCallback


class Points(torch.utils.data.Dataset):
    def __init__(self, n: int = 8):
        self.x = torch.arange(float(n))[:, None]
    def __len__(self): return len(self.x)
    def __getitem__(self, i): return self.x[i], self.x[i]
    def collate(self, samples): return tuple(map(torch.stack, zip(*samples)))


class Flip:
    def __init__(self, share: float): self.share = share


class Augmented(torch.utils.data.Dataset):
    def __init__(self, base: Points, transforms=(), parts: dict[str, Points] | None = None, style=None):
        self.base, self.transforms, self.parts, self.style = base, transforms, parts, style
    def __len__(self): return len(self.base)
    def __getitem__(self, i): return self.base[i]


class Tower(torch.nn.Module):
    def __init__(self, body: torch.nn.Module):
        super().__init__()
        self.body = body
    def forward(self, x): return self.body(x)


def loss(outputs, batch): return {"mse": (outputs - batch[1]).square().mean()}
def make() -> torch.utils.data.TensorDataset: return torch.utils.data.TensorDataset(torch.ones(8, 1), torch.ones(8, 1))


def fine(state, event): return state, ()
def factor(state, event, *, factor: int = 2): return state, ()
def three(state, event, other): return state, ()
def one(state): return state, ()
def nothing(state, event) -> None: ...
async def late(state, event): return state, ()
def steps(state, event): yield state, ()
async def stream(state, event): yield state, ()
short = lambda state, event: (state, ())
bound = functools.partial(fine)
bound_late = functools.partial(late)
act = torch.nn.ReLU()
tower = Tower(act)
show = print


@dataclass(frozen=True)
class Silent:
    every: int = 1


@dataclass(frozen=True)
class Odd:
    def __call__(self, event): return event


@dataclass(frozen=True)
class Late:
    async def __call__(self, state, event): return state, ()


class LateHook(CallbackBase):
    async def after_update(self, state, event): return state, ()


class Yields(PeriodicCallback):
    def periodic_callback(self, state, event, interval): yield state, ()


class Plain:
    def __call__(self, state, event): return state, ()


plain = Plain()
"""

CONFIG = """\
run: {name: nested}
model: MODEL
data:
  train: DATA
optimizer: {kind: torch.optim.SGD, lr: 0.1}
trainer: {max_epochs: 1, effective_batch_size: 2, loss: LOSS}
callbacks:
  - CALLBACK
"""


@pytest.fixture
def mine(shop):
    Path("mine.py").write_text(MODULE)
    import sys

    yield shop
    sys.modules.pop("mine", None)


def configure(data="{kind: mine.Points}", model="{kind: torch.nn.Linear, in_features: 1, out_features: 1}",
              loss="mine.loss", callback="{kind: mine.fine}"):  # fmt: skip
    text = CONFIG.replace("MODEL", model).replace("DATA", data).replace("LOSS", loss).replace("CALLBACK", callback)
    Path("nested.yaml").write_text(text)
    return load("nested.yaml")


def problems(**changes):
    with pytest.raises(ConfigError) as refused:
        configure(**changes)
    return str(refused.value).splitlines()


def test_datasets_in_settings_are_built(mine):
    points = "{kind: mine.Points, n: 5}"
    config = configure(f"{{kind: torch.utils.data.ConcatDataset, datasets: [{points}, {{kind: mine.Points}}]}}")
    both = config.data["train"].build()
    assert (type(both), [len(each) for each in both.datasets]) == (ConcatDataset, [5, 8])
    assert len(collate_of(both)([both[0], both[6]])) == 2
    subset = configure(f"{{kind: torch.utils.data.Subset, dataset: {points}, indices: [4, 0]}}").data["train"].build()
    assert (type(subset), [float(x) for x, _ in subset]) == (Subset, [4.0, 0.0])
    stack = configure(f"{{kind: torch.utils.data.StackDataset, a: {points}, b: {points}}}").data["train"].build()
    assert (type(stack), sorted(stack[0])) == (StackDataset, ["a", "b"])
    inner = f"{{kind: torch.utils.data.Subset, dataset: {points}, indices: [1]}}"
    nested = configure(f"{{kind: torch.utils.data.ConcatDataset, datasets: [{inner}, {inner}]}}").data["train"].build()
    assert [float(x) for x, _ in nested] == [1.0, 1.0]
    assert len(configure("{kind: mine.make}").data["train"].build()) == 8


def test_parts_in_lists_and_mappings_are_built(mine):
    config = configure(
        "{kind: mine.Augmented, base: {kind: mine.Points}, parts: {a: {kind: mine.Points, n: 3}}, "
        "style: {kind: plain}, transforms: [{kind: mine.Flip, share: 0.5}, {more: {kind: mine.Flip, share: 1}}]}"
    )
    dataset = config.data["train"].build()
    assert len(dataset.base) == 8
    assert len(dataset.parts["a"]) == 3
    assert dataset.style == {"kind": "plain"}
    assert (dataset.transforms[0].share, dataset.transforms[1]["more"].share) == (0.5, 1)
    Path("again.yaml").write_text(dump(config))
    assert load("again.yaml") == config


def test_models_in_settings_of_a_model_are_built(mine):
    config = configure(model="{kind: mine.Tower, body: {kind: torch.nn.Linear, in_features: 1, out_features: 1}}")
    assert config.model.build()(torch.ones(2, 1)).shape == (2, 1)


CONCAT, SUBSET = "{kind: torch.utils.data.ConcatDataset, datasets: %s}", "{kind: torch.utils.data.Subset, %s}"
DATA = {
    CONCAT % "[3]": "datasets[0]: 3 is not a mapping with a `kind`",
    CONCAT % "{kind: mine.Points}": "datasets: {'kind': 'mine.Points'} is not a list",
    CONCAT % "[{kind: mine.Points, m: 3}]": "datasets[0].m: unknown setting; known are n",
    CONCAT % "[{kind: mine.Points, n: many}]": "datasets[0].n: 'many' is not a whole number",
    CONCAT % "[{kind: mine.Tower}]": "datasets[0].kind: 'mine.Tower' is a model class, expected a dataset: a subclass "
    "of torch.utils.data.Dataset, or a function annotated to return one",
    SUBSET % "dataset: {kind: mine.Points}, indices: [a]": "indices[0]: 'a' is not a whole number",
    SUBSET % "dataset: {kind: mine.Points}": "indices: is missing",
    "{kind: torch.utils.data.StackDataset, a: 3}": "a: 3 is not a mapping with a `kind`",
    "{kind: torch.utils.data.TensorDataset}": "kind: 'torch.utils.data.TensorDataset' takes its arguments by position, "
    "which YAML cannot give: name a function of yours that returns it, def make() -> TensorDataset",
    "{kind: mine.Augmented, base: {kind: mine.make}, transforms: [{kind: torch.hub.load}]}": "transforms[0].kind: "
    "'torch.hub.load' is a function, expected a part of another object: a class of yours, a dataset or a model",
    "{kind: mine.Augmented, base: {kind: mine.Augmented, base: {kind: mine.Points}}}": "base: 'mine.Augmented' is not "
    "a subclass of Points",
}  # fmt: skip


@pytest.mark.parametrize(("data", "message"), DATA.items())
def test_wrong_types_in_settings_of_a_dataset_are_refused_with_file_and_line(mine, data, message):
    assert problems(data=data) == [f"nested.yaml:4: data.train.{message}"]


LATE = "but its result is needed at once"
NO_CALLBACKS = {
    "mine.three": "a function, which takes (state, event, other), not (state, event)",
    "mine.one": "a function, which takes (state), not (state, event)",
    "mine.nothing": "a function",
    "mine.late": f"an async function, {LATE}",
    "mine.stream": f"an async function, {LATE}",
    "mine.steps": f"a generator function, {LATE}",
    "mine.short": "a lambda, which has no name",
    "mine.bound_late": f"an async function, {LATE}",
    "mine.act": "of type ReLU",
    "mine.tower": "of type Tower",
    "mine.show": "a function",
    "mine.Silent": "a class",
    "mine.Odd": "a class",
    "mine.Late": "a class",
    "mine.Plain": "a class",
    "mine.Points": "a dataset class",
    "torch.nn.ReLU": "a model class",
    "torch.nn.functional.relu": "a function",
    "noether.core.errors.suggest": "a function",
    "noether.core.metrics.is_current": "a function",
    "noether.training.step.step.Step": "a class",
}


@pytest.mark.parametrize(("kind", "what"), NO_CALLBACKS.items())
def test_what_is_no_callback_is_refused_with_file_and_line(mine, kind, what):
    expected = "expected a callback: a subclass of CallbackBase, or a function (state, event) -> (state, effects)"
    assert problems(callback=f"{{kind: {kind}}}") == [
        f"nested.yaml:8: callbacks[0].kind: {kind!r} is {what}, {expected}"
    ]


@pytest.mark.parametrize(
    ("callback", "problem"),
    [
        ("{kind: mine.LateHook}", f"LateHook.after_update is an async function, {LATE}: write def after_update(self, "),
        ("{kind: mine.Yields, every_n_epochs: 1}", f"Yields.periodic_callback is a generator function, {LATE}: write "),
    ],
)
def test_a_hook_that_does_not_return_at_once_is_refused_by_name(mine, callback, problem):
    (found,) = problems(callback=callback)
    assert found.startswith(f"nested.yaml:8: callbacks[0]: {problem}")


@pytest.mark.parametrize(
    "kind", ["mine.fine", "mine.factor", "mine.bound", "mine.plain", "noether.core.reducer.identity"]
)
def test_callbacks_of_every_form_are_accepted(mine, kind):
    assert len(configure(callback=f"{{kind: {kind}}}").callbacks) == 1


@pytest.mark.parametrize(
    ("loss", "what"),
    [
        ("mine.one", "a function, which takes (state), not (outputs, batch)"),
        ("mine.three", "a function, which takes (state, event, other), not (outputs, batch)"),
        ("mine.late", f"an async function, {LATE}"),
        ("mine.steps", f"a generator function, {LATE}"),
    ],
)
def test_what_is_no_loss_is_refused_with_file_and_line(mine, loss, what):
    expected = "expected a function: a callable that is not a class, called with (outputs, batch)"
    assert problems(loss=loss) == [f"nested.yaml:6: trainer.loss: {loss!r} is {what}, {expected}"]
