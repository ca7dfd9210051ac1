import importlib
import sys
from pathlib import Path

import pytest

SHOP = """
from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Callable, Literal

import torch

from noether.core.errors import Problem, check_whole, raise_problems

if TYPE_CHECKING:
    from nowhere import Unknown


class Net(torch.nn.Module):
    def __init__(self, width: int = 32, act: str = "relu", dropout: float = 0.5, extra: Unknown = None, loose=(1, 2)):
        super().__init__()


def make_net(width: int) -> Net:
    return Net(width)


class Digits(torch.utils.data.Dataset):
    def __init__(self, split: str, size: int | None = None, fractions: tuple[float, ...] = (0.8, 0.2)):
        self.split = split


def loss(outputs, batch):
    return {"loss": outputs}


def count(batch):
    return len(batch)


@dataclass(frozen=True, kw_only=True)
class Watch:
    every_n_epochs: int | None = None
    every_n_updates: int | None = None
    at_end: bool = False
    id: str | None = None
    dataset_key: str | None = None
    metric: str | Callable = "accuracy"
    mode: Literal["higher", "lower"] = "higher"
    tolerance: int

    def __post_init__(self):
        names = [name for name in ("every_n_epochs", "every_n_updates") if getattr(self, name) is not None]
        wrong = Problem(names[-1] if names else "", "expected exactly one interval") if len(names) != 1 else None
        checks = [check_whole(name, getattr(self, name)) for name in names]
        raise_problems([*checks, check_whole("tolerance", self.tolerance), wrong])

    def __call__(self, state, event):
        return state, ()


def say(state, event):
    return state, ()


number = 3
"""


@pytest.fixture
def shop(tmp_path, monkeypatch):
    """A working directory that contains a module of the user, `shop`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("shop.py").write_text(SHOP)
    importlib.invalidate_caches()
    yield tmp_path
    for name in ("shop", "broken", "ends"):
        sys.modules.pop(name, None)


DIGITS = """\
run: {name: digits}
model:
  kind: shop.Net
data:
  train: {kind: shop.Digits, split: train}
  val: {kind: shop.Digits, split: val}
optimizer:
  kind: torch.optim.AdamW
  lr: 1e-3
  betas: [0.9, 0.99]
trainer:
  max_epochs: 10
  effective_batch_size: 32
  loss: shop.loss
  evaluate: {val: [loss, accuracy], every_n_epochs: 1}
callbacks:
  - kind: shop.Watch
    every_n_epochs: 1
    tolerance: 3
  - kind: shop.say
    name: only a label
"""


@pytest.fixture
def digits(shop):
    """A function that replaces text in a valid configuration and returns the lines of the error, if any."""
    from noether.config import ConfigError, load

    def problems(*changes, overrides=()):
        text = DIGITS
        for old, new in changes:
            assert old in text
            text = text.replace(old, new, 1)
        (shop / "digits.yaml").write_text(text)
        try:
            load("digits.yaml", overrides)
        except ConfigError as error:
            return str(error).splitlines()
        return []

    return problems
