"""State of a model that no checkpoint has is named once, in a trainer and in a session."""

import functools
import logging
from pathlib import Path

import pytest
import torch
from tiny_runs import make_config
from torch import nn

from noether import Session
from noether.session.errors import ResumeWarning
from noether.session.hidden_state import ModelWatch
from noether.training.runs.train import train


class Memory:
    def __init__(self):
        self.seen = []


class Net(nn.Module):
    """Runs a function on itself at each forward pass."""

    def __init__(self, change):
        super().__init__()
        self.lin, self.change = nn.Linear(2, 1), change
        self.register_buffer("count", torch.zeros(()))
        self.memory, self.cache, self.calls, self.mean = Memory(), {}, 0, torch.zeros(2)

    def forward(self, x):
        outputs = self.lin(x)
        self.change(self, outputs)
        return outputs


class Saved(Net):
    def get_extra_state(self):
        return {"calls": self.calls}

    def set_extra_state(self, state):
        self.calls = state["calls"]


def count(net, outputs):
    net.calls += 1


def append(net, outputs):
    net.memory.seen.append(outputs.sum().item())


def write(net, outputs):
    net.mean = 0.9 * net.mean + 0.1


def write_in_place(net, outputs):
    net.mean += 1


def keep_activation(net, outputs):
    net.last = outputs


def fill_cache(net, outputs):
    net.cache.setdefault("shape", tuple(outputs.shape))
    net.table = torch.arange(3)


def count_in_buffer(net, outputs):
    net.count += 1


def do_nothing(net, outputs):
    pass


def find_changes(model, updates=3):
    watch, messages = ModelWatch(model), []
    for update in range(updates):
        model.eval() if update % 2 else model.train()
        model(torch.full((4, 2), float(update)))
        messages.append(watch.describe_changes())
    return messages


@pytest.mark.parametrize(
    ("change", "attribute"), [(count, "calls"), (append, "memory"), (write, "mean"), (write_in_place, "mean")]
)
@pytest.mark.parametrize("prefix", ["", "0."])
def test_what_each_forward_pass_changes_is_named_once(change, attribute, prefix):
    model = nn.Sequential(Net(change)) if prefix else Net(change)
    first, second, third = find_changes(model)
    assert (first, third) == (None, None)
    assert second.startswith(f"an update changed {prefix}{attribute} of the model, which no checkpoint has: if forward")


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(lambda: Net(keep_activation), id="an activation"),
        pytest.param(lambda: Net(fill_cache), id="a cache"),
        pytest.param(lambda: Net(count_in_buffer), id="a buffer"),
        pytest.param(lambda: Net(do_nothing), id="nothing"),
        pytest.param(lambda: Saved(count), id="extra state"),
        pytest.param(lambda: nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout()), id="modules of torch"),
        pytest.param(functools.partial(nn.utils.parametrizations.spectral_norm, nn.Linear(2, 2)), id="parametrized"),
    ],
)
def test_what_is_saved_or_written_before_it_is_read_is_not_named(model):
    assert find_changes(model()) == [None] * 3


COUNTING = """
class Counting(nn.Linear):
    calls = 0
    def forward(self, x):
        self.calls += 1
        return super().forward(x) * self.calls
"""


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_trainer_names_it_once(tiny_module, caplog, accumulation):
    caplog.set_level(logging.WARNING, logger="noether.training")
    Path("tiny.py").write_text(Path("tiny.py").read_text() + COUNTING)
    config = make_config(max_batch_size=4 // accumulation)
    train(config | {"model": {"kind": "tiny.Counting", "in_features": 2, "out_features": 1}})
    named = [record.getMessage() for record in caplog.records if "which no checkpoint has" in record.getMessage()]
    assert len(named) == 1
    assert named[0].startswith("an update changed calls of the model")


def test_a_session_names_it_once():
    model = Net(count)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    session = Session([], interpreter=lambda *_: None, model=model, optimizer=optimizer, max_epochs=2)

    def run():
        for batch in session.batches([torch.ones(4, 2)] * 3):
            loss = model(batch).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            session.update({"square": loss})

    with pytest.warns(ResumeWarning, match=r"an update changed calls of the model") as caught:
        run()
    assert len(caught) == 1
