"""Data that ranks share: a stream is that of one process, and a sampler has one order on all ranks."""

import json
import os
import sys
from pathlib import Path

import torch
from processes import outcomes_on_ranks, run_on_ranks

import noether

MODULE = """
import os
import torch

class Points(torch.utils.data.Dataset):
    def __len__(self):
        return 11

    def __getitem__(self, index):
        return torch.ones(2)

def rotate(dataset):
    return torch.arange(len(dataset)).roll(int(os.environ.get("RANK", 0))).tolist()

class Stream(torch.utils.data.IterableDataset):
    def __init__(self, length, wrong=False, rank=0, world_size=1):
        self.length, self.wrong, self.rank, self.world_size, self.at = length, wrong, rank, world_size, 0

    def __len__(self):
        return self.length

    def shard(self, rank, world_size):
        return Stream(self.length, self.wrong, rank, world_size)

    def __iter__(self):
        for start in range(self.at, self.length, self.world_size):
            self.at = start + (self.rank + 1 if self.wrong else self.world_size)
            if start + self.rank < self.length:
                yield torch.tensor([float(start + self.rank), 1.0]) + torch.rand(2)
        self.at = 0

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, saved):
        self.at = saved["at"]

def loss(outputs, batch):
    return {"square": (outputs - batch.square().sum(1, keepdim=True)).square().mean()}
"""


def config(updates, **options):
    return {
        "run": {"name": "streamed", "output": "out"},
        "model": {"kind": "torch.nn.Linear", "in_features": 2, "out_features": 1},
        "data": {"train": {"kind": "streams.Stream", "length": 11, **options},
                 "val": {"kind": "streams.Stream", "length": 7}},
        "optimizer": {"kind": "torch.optim.SGD", "lr": 1e-4},
        "trainer": {"effective_batch_size": 6, "max_batch_size": 2, "loss": "streams.loss", "max_updates": updates,
                    "evaluate": {"val": ["loss"], "every_n_epochs": 1}},
        "callbacks": [{"kind": "noether.core.callbacks.OnlineLossCallback", "every_n_updates": 1}],
    }  # fmt: skip


def train(folder, *arguments, **settings):
    os.chdir(folder)
    run = noether.train(*arguments, **settings)
    return run.state.params, run.state.callback_states["data/train"], str(run.directory)


def resume(folder, directory, updates):
    return train(folder, resume=directory, overrides=[f"trainer.max_updates={updates}"])


def metrics(directory):
    return [json.loads(line)["metrics"] for line in (Path(directory) / "metrics.jsonl").read_text().splitlines()]


def test_a_stream_on_several_ranks_is_that_of_one_process(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    Path("streams.py").write_text(MODULE)
    params, position, alone = train(tmp_path, config(7))
    first, *_ = run_on_ranks(train, 2, tmp_path, config(3))
    results = run_on_ranks(resume, 3, tmp_path, first[2], 7)
    for each in results:
        assert each[1] == position == {"at": 6}
        torch.testing.assert_close(dict(each[0]), dict(params))
    together = metrics(first[2])
    assert len(together) == len(metrics(alone)) == 7 + 3
    for ours, expected in zip(together, metrics(alone), strict=True):
        assert ours.keys() == expected.keys()
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=0)
    sys.modules.pop("streams")


def test_other_positions_or_orders_on_another_rank_are_refused(tmp_path):
    (tmp_path / "streams.py").write_text(MODULE)
    outcomes = outcomes_on_ranks(train, 2, tmp_path, config(3, wrong=True))
    assert all("state_dict of data.train on rank 1 is not that of rank 0" in text for _, text in outcomes)
    rotated = config(3) | {"data": {"train": {"kind": "streams.Points"}}}
    rotated["trainer"] |= {"sampler": "streams.rotate", "evaluate": None}
    outcomes = outcomes_on_ranks(train, 2, tmp_path, rotated)
    message = "trainer.sampler: yields another order on rank 1 than on rank 0; draw it from seed and epoch alone"
    assert all(message in text for _, text in outcomes)
