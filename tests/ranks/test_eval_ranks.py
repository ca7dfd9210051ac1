"""`noether eval` under a launcher: the metrics have the bits of one process, and rank 0 alone prints and writes."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from processes import run_on_ranks

import noether

MODULE = """
import os
import signal
import torch
from torch import nn
from noether.core.callbacks import PeriodicDataIteratorCallback

class Points(torch.utils.data.Dataset):
    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return torch.tensor([index / 7.0, 1.0]) + torch.rand(2)

def make_model() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 1))

def loss(outputs, batch):
    return {"square": outputs.square().mean(), "first": noether_mean(outputs)}

def noether_mean(outputs):
    from noether import Mean
    return Mean(outputs.mean(), weight=(outputs.abs() > 0.4).sum())

def size(outputs, batch):
    return outputs.abs().flatten()

def interrupt(outputs, batch):
    if os.environ.get("RANK") == "1":
        os.kill(os.getpid(), signal.SIGTERM)
    return outputs.flatten()
"""
CONFIG = {
    "run": {"name": "tiny", "output": "out"},
    "model": {"kind": "points.make_model"},
    "data": {
        "train": {"kind": "points.Points", "length": 8},
        "val": {"kind": "points.Points", "length": 13},
        "one": {"kind": "points.Points", "length": 1},
    },
    "optimizer": {"kind": "torch.optim.SGD", "lr": 0.1},
    "trainer": {"effective_batch_size": 4, "eval_batch_size": 3, "loss": "points.loss", "max_epochs": 2,
                "evaluate": {"val": ["loss", "points.size"], "every_n_epochs": 1}},
    "callbacks": [
        {"kind": "noether.core.callbacks.CheckpointCallback", "every_n_epochs": 1, "save_weights": True},
        {"kind": "noether.core.callbacks.OfflineLossCallback", "every_n_epochs": 1, "dataset_key": "one"},
    ],
}  # fmt: skip


def evaluate(folder, *arguments):
    """Call the command line; return its exit code and what it printed."""
    from noether.cli.main import main

    os.chdir(folder)
    result = CliRunner().invoke(main, ["eval", *map(str, arguments)])
    return result.exit_code, result.output


@pytest.fixture
def run(tmp_path, monkeypatch):
    path = list(sys.path)
    monkeypatch.chdir(tmp_path)
    Path("points.py").write_text(MODULE)
    yield noether.train(CONFIG).directory
    sys.path[:] = path
    sys.modules.pop("points", None)


def test_metrics_have_the_bits_of_one_process(run, tmp_path):
    arguments = (tmp_path, run, "--checkpoint", "latest", "--data", "val", "--data", "one")
    outputs = [evaluate(*arguments)]
    for world_size in (2, 3):
        first, *others = run_on_ranks(evaluate, world_size, *arguments)
        outputs.append(first)
        assert others == [(0, "")] * (world_size - 1)
    for data in ("val", "one"):
        written = [run / f"eval/E2_U4_S16.latest.{data}{again}.json" for again in ("", ".2", ".3")]
        texts = [path.read_text() for path in written]
        assert texts == texts[:1] * 3
        assert json.loads(texts[0]).keys() == {f"loss/{data}/{name}" for name in ("square", "first", "total")} | {
            f"{data}/size"
        }
    printed = [(code, text.replace(".2", "").replace(".3", "")) for code, text in outputs]
    assert printed == printed[:1] * 3
    assert outputs[0][1].count("written to") == 2


def train(folder, config):
    os.chdir(folder)
    run = noether.train(config)
    return run.finished, str(run.state.iteration), str(run.directory)


def test_a_signal_to_one_rank_in_an_evaluation_of_training_saves_the_run(run, tmp_path):
    evaluate_and_interrupt = CONFIG["trainer"] | {"evaluate": {"val": ["points.interrupt"], "every_n_updates": 1}}
    results = run_on_ranks(train, 2, tmp_path, CONFIG | {"trainer": evaluate_and_interrupt})
    assert results == [(False, "E0_U1_S4", results[0][2])] * 2
    resumed = noether.train(resume=results[0][2])
    assert (resumed.finished, str(resumed.state.iteration)) == (True, "E2_U4_S16")
    lines = [json.loads(line) for line in (tmp_path / results[0][2] / "metrics.jsonl").read_text().splitlines()]
    assert [line["update"] for line in lines if "val/interrupt" in line["metrics"]] == [1, 2, 3, 4]


def test_a_signal_to_one_rank_ends_all(run, tmp_path):
    changes = ("--set", "trainer.evaluate.val=[points.interrupt]")
    first, second = run_on_ranks(evaluate, 2, tmp_path, run, *changes)
    assert first[0] == second[0] == 128 + signal.SIGTERM
    assert (
        first[1].splitlines()[-1] == "interrupted in the evaluation of E2_U4_S16.latest; its metrics were not written"
    )
    assert not (run / "eval").exists()
