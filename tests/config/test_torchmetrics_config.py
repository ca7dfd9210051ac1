"""Metrics of torchmetrics in a configuration: settings, `prepare`, names, and which paths may be imported."""

import sys

import pytest
import torch
from torchmetrics import classification

from noether.config import ConfigError, load
from noether.config.serialization import dump
from noether.core.callbacks.metric_functions import NamedMetric

MODULE = """
import torch
import torchmetrics

def to_labels(outputs, batch, *, shift: int = 0): return outputs.argmax(1) + shift, batch[1]
def error(outputs, batch): return outputs.mean()

class Own(torchmetrics.Metric):
    def __init__(self, power: int = 2):
        super().__init__()
        self.power = power
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
    def update(self, preds, target): self.total += (preds**self.power).sum()
    def compute(self): return self.total
"""
CONFIG = """\
run: {name: r, output: out}
model: {kind: torch.nn.Linear, in_features: 1, out_features: 1}
data: {train: {kind: noether.examples.digits.Digits, split: train}}
optimizer: {kind: torch.optim.SGD, lr: 0.01}
trainer: {max_epochs: 1, effective_batch_size: 4, loss: noether.examples.digits.cross_entropy}
callbacks:
  - {kind: noether.core.callbacks.MetricCallback, every_n_epochs: 1, dataset_key: train,
     metric: METRIC}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("user")
    (path / "metrics_of_user.py").write_text(MODULE)
    return path


@pytest.fixture
def metric_of(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)

    def read(metric, **settings):
        (tmp_path / "c.yaml").write_text(CONFIG.replace("METRIC", metric))
        config = load(tmp_path / "c.yaml", **settings)
        (tmp_path / "again.yaml").write_text(dump(config))
        assert load(tmp_path / "again.yaml", **settings).callbacks == config.callbacks
        return config.callbacks[0].build().metric

    return read


def test_a_metric_has_its_settings_and_its_name(metric_of):
    metric = metric_of("{kind: torchmetrics.classification.MulticlassF1Score, num_classes: 3, average: null, name: f1}")
    assert isinstance(metric, NamedMetric)
    assert (metric.name, metric.prepare) == ("f1", None)
    assert type(metric.function) is classification.MulticlassF1Score
    assert (metric.function.num_classes, metric.function.average) == (3, None)
    short = metric_of("{kind: torchmetrics.Accuracy, task: multiclass, num_classes: 5, sync_on_compute: false}")
    assert (short.name, type(short.function)) == ("Accuracy", classification.MulticlassAccuracy)
    own = metric_of("{kind: metrics_of_user.Own, power: 3}")
    assert (own.name, own.function.power) == ("Own", 3)


def test_prepare_is_a_function_with_settings(metric_of):
    kind = "kind: torchmetrics.classification.MulticlassRecall, num_classes: 3"
    prepared = metric_of(f"{{{kind}, prepare: metrics_of_user.to_labels}}").prepare
    shifted = metric_of(f"{{{kind}, prepare: {{kind: metrics_of_user.to_labels, shift: 2}}}}").prepare
    outputs, batch = torch.eye(3), (None, torch.tensor([0, 1, 2]))
    assert prepared(outputs, batch)[0].tolist() == [0, 1, 2]
    assert shifted(outputs, batch)[0].tolist() == [2, 3, 4]


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("torchmetrics.classification.BinaryF1Score", r"write {kind: torchmetrics.classification.BinaryF1Score}"),
        ("{kind: torchmetrics.classification.MulticlassRecall}", r"c.yaml:7: .*Argument `num_classes` can only be"),
        ("{kind: torchmetrics.classification.BinaryRecall, threshold: a}", r"metric.threshold: 'a' is not a number"),
        ("{kind: torchmetrics.classification.BinaryRecall, treshold: 1}", r"Unexpected keyword arguments: `treshold`"),
        ("{kind: torchmetrics.MeanMetric}", r"metric: MeanMetric.update takes \(value, weight\), not outputs"),
        ("{kind: torchmetrics.MeanMetric, prepare: metrics_of_user.no}", r"metric.prepare: 'metrics_of_user.no'"),
        ("{kind: metrics_of_user.error, prepare: metrics_of_user.error}", r"metric.prepare: unknown setting"),
        ("{kind: torchmetrics.BLEUScore}", r"not an allowed prefix \(noether, torch, torchmetrics.agg.*--allow torchm"),
        ("{kind: torchmetrics.image.FrechetInceptionDistance}", r"'torchmetrics' is not an allowed prefix"),
        ("{kind: torchmetrics.functional.text.bleu.bleu_score}", r"'torchmetrics' is not an allowed prefix"),
        ("{kind: torchmetrics.metric.Path}", r"'torchmetrics' is not an allowed prefix"),
        ("{kind: torchmetrics.warnings.sys.exit}", r"is not an allowed prefix"),
    ],
)
def test_what_is_refused(metric_of, metric, message):
    with pytest.raises(ConfigError, match=message):
        metric_of(metric)


def test_other_parts_of_torchmetrics_can_be_allowed(metric_of):
    metric = metric_of(
        "{kind: torchmetrics.text.CharErrorRate, prepare: metrics_of_user.to_labels}", allow=("torchmetrics",)
    )
    assert type(metric.function).__name__ == "CharErrorRate"


def test_a_file_of_a_run_with_the_name_of_torchmetrics_is_not_imported(metric_of, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "torchmetrics.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchmetrics"]:
        monkeypatch.delitem(sys.modules, name)
    for path in ("torchmetrics.F1Score", "torchmetrics.classification.BinaryF1Score"):
        with pytest.raises(ConfigError, match="the directory of the run itself"):
            metric_of(f"{{kind: {path}}}", run_dir=tmp_path)


def test_a_missing_torchmetrics_says_what_to_install(metric_of, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    with pytest.raises(ConfigError, match=r"torchmetrics is not installed; run: pip install 'noether\[metrics\]'"):
        metric_of("{kind: torchmetrics.classification.BinaryF1Score}")
