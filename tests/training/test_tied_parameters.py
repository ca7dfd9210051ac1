"""Callbacks for a part of a model do not leave out parameters that are tied to others."""

from pathlib import Path

import pytest
from tiny_runs import CALLBACKS, make_config

from noether.config import ConfigError
from noether.training.runs.train import train

TIED = """
class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.head = nn.Linear(2, 2), nn.Linear(2, 2)
        self.head.weight = self.emb.weight
    def forward(self, x): return self.head(self.emb(x))
"""
PARTS = [
    {"kind": f"{CALLBACKS}.EMACallback", "target_factors": [0.9], "model_paths": ["head"]},
    {"kind": f"{CALLBACKS}.CheckpointCallback", "save_latest_optim": False, "model_names": ["head"]},
    {"kind": f"{CALLBACKS}.BestCheckpointCallback", "metric_key": "loss/online/square/U1", "model_names": ["head"]},
]


@pytest.mark.parametrize("part", PARTS, ids=[part["kind"].rpartition(".")[2] for part in PARTS])
def test_sub_modules_that_leave_out_a_tied_parameter_are_refused(tiny_module, part):
    Path("tiny.py").write_text(Path("tiny.py").read_text() + TIED)
    (setting,) = {"model_names", "model_paths"} & part.keys()

    def train_with(names):
        config = make_config({**part, "every_n_epochs": 1, setting: names}, max_epochs=1)
        return train(config | {"model": {"kind": "tiny.Tied"}})

    with pytest.raises(ConfigError, match=rf"{setting}: 'head.weight' is tied to 'emb.weight', .*: add 'emb'"):
        train_with(["head"])
    for names in (["head", "emb"], ["emb"]):
        assert train_with(names).finished
