"""Losses and metrics with other names or settings, from the command line."""

import json

import pytest
from command import invoke, lines, only_run

MODULE = """
import functools
import torch

class Points(torch.utils.data.Dataset):
    def __len__(self): return 4
    def __getitem__(self, i): return torch.full((1,), float(i)), torch.full((1,), 0.4)

def within(outputs, batch, *, tol: float = 100.0): return ((outputs - batch[1]).abs() < tol).float().flatten()
def none_of(metric):
    @functools.wraps(metric)
    def wrapped(outputs, batch): return 0.0 * metric(outputs, batch)
    return wrapped
strict = none_of(within)
def scaled(outputs, batch, *, factor: float): return factor * (outputs - batch[1]).square().mean()
"""
CONFIG = """\
run: {name: r, output: out}
model: {kind: torch.nn.Linear, in_features: 1, out_features: 1}
data: {train: {kind: named.Points}, val: {kind: named.Points}}
optimizer: {kind: torch.optim.SGD, lr: 0.01}
trainer:
  max_epochs: 1
  effective_batch_size: 4
  loss: {kind: named.scaled, factor: 0.5}
  evaluate: {val: [named.strict, {kind: named.within, tol: 1e-6, name: close}], every_n_epochs: 1}
callbacks:
  - {kind: noether.core.callbacks.MetricCallback, every_n_epochs: 1, dataset_key: train, metric: named.strict}
  - {kind: noether.core.callbacks.CheckpointCallback, every_n_epochs: 1, save_weights: true, save_optim: true}
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "named.py").write_text(MODULE)
    (tmp_path / "named.yaml").write_text(CONFIG)
    return tmp_path


def test_eval_and_a_resume_use_the_function_that_was_named(folder):
    invoke("train", "named.yaml", cwd=folder)
    run = only_run(folder / "out" / "r")
    expected = {"val/strict": 0.0, "val/close": 0.0, "train/strict": 0.0}
    invoke("eval", run, cwd=folder)
    (file,) = (run / "eval").glob("*.json")
    assert json.loads(file.read_text()) == expected
    invoke("train", "--resume", run, "--set", "trainer.max_epochs=2", cwd=folder)
    logged = [line["metrics"] for line in lines(run) if "metrics" in line]
    assert [{key: metrics[key] for key in expected if key in metrics} for metrics in logged] == [expected] * len(logged)


def test_validate_reports_every_wrong_setting_with_its_line(folder):
    changes = {"factor: 0.5": "facter: 0.5", "tol: 1e-6": "tol: small", "max_epochs: 1": "max_epochs: ${env:NO_SUCH}"}
    text = CONFIG
    for old, new in changes.items():
        text = text.replace(old, new)
    (folder / "named.yaml").write_text(text)
    assert "named.yaml:6: trainer.max_epochs: ${env:NO_SUCH}: the environment has no variable 'NO_SUCH'" in invoke(
        "validate", "named.yaml", cwd=folder, code=2
    )
    output = invoke("validate", "named.yaml", "--set", "trainer.max_epochs=1", cwd=folder, code=2)
    assert "named.yaml:8: trainer.loss.factor: is missing" in output
    assert "named.yaml:8: trainer.loss.facter: unknown setting; did you mean 'factor'?" in output
    assert "named.yaml:9: trainer.evaluate.val[1].tol: 'small' is not a number" in output
