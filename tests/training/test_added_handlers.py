"""A handler of `LogScalars` from YAML is called at each update, also in a run that logs several updates at once."""

import json
import sys
import types

import pytest
import torch
from torch import nn

import noether
from noether.effects.logs.jsonl import LinesFile

CALLBACKS = "noether.core.callbacks"


class Points(torch.utils.data.Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, index):
        return torch.full((2,), float(index)), index % 2


def loss(outputs, batch):
    return nn.functional.cross_entropy(outputs, batch[1])


@pytest.fixture
def train(tmp_path, monkeypatch):
    """A function that trains with handlers; it returns the metrics lines without times, and the number of stretches."""
    module = types.ModuleType("added")
    module.Points, module.loss, module.calls = Points, loss, []
    module.record = lambda effect, state, event: module.calls.append((state.iteration, dict(effect.values)))
    monkeypatch.setitem(sys.modules, "added", module)
    stretches, write_updates = [], LinesFile.write_updates

    def count_stretches(self, effect, state, event):
        stretches.append(effect)
        write_updates(self, effect, state, event)

    monkeypatch.setattr(LinesFile, "write_updates", count_stretches)

    def train_with(handlers):
        stretches.clear()
        run = noether.train(
            {
                "run": {"name": "handlers", "output": str(tmp_path), "handlers": handlers},
                "model": {"kind": "torch.nn.Linear", "in_features": 2, "out_features": 2},
                "data": {"train": {"kind": "added.Points"}},
                "optimizer": {"kind": "torch.optim.AdamW", "lr": 0.05},
                "trainer": {"effective_batch_size": 2, "loss": "added.loss", "max_epochs": 2},
                "callbacks": [{"kind": f"{CALLBACKS}.LrCallback", "every_n_updates": 1}],
            },
            allow=("added",),
        )
        lines = map(json.loads, (run.directory / "metrics.jsonl").read_text().splitlines())
        return [{**line, "run": "", "time_s": 0.0} for line in lines], len(stretches), module.calls

    return train_with


def test_it_gets_the_scalars_of_each_update_with_the_state_of_that_update(train):
    expected, stretches, calls = train({})
    assert stretches
    assert not calls
    lines, stretches, calls = train({"noether.LogScalars": "added.record"})
    assert not stretches
    assert lines == expected
    assert [(at.update, values) for at, values in calls] == [(line["update"], line["metrics"]) for line in lines]
    assert len(calls) == 12
