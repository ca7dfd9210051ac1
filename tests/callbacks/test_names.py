"""Every callback under every name that it has, in Python and in YAML."""

import importlib
import inspect

import pytest

from noether.config.descriptions import describe, known_kinds
from noether.config.kinds import CALLBACK, resolve
from noether.core import callbacks

# The canonical name, the module it lives in, and its other names.
TABLE = (
    ("ProgressCallback", "progress", ("Progress",)),
    ("EtaCallback", "eta", ("ETA", "ETACallback")),
    ("LrCallback", "lr", ("LR",)),
    ("PeakMemoryCallback", "peak_memory", ("PeakMemory",)),
    ("OnlineLossCallback", "online_loss", ("OnlineLoss",)),
    ("TrainTimeCallback", "train_time", ()),
    ("ParamCountCallback", "summaries", ()),
    ("DatasetStatsCallback", "summaries", ()),
    ("HyperparamsCallback", "summaries", ()),
    ("CheckpointCallback", "checkpoint", ()),
    ("BestCheckpointCallback", "best_checkpoint", ()),
    ("EMACallback", "ema", ("EmaCallback",)),
    ("MetricEarlyStopping", "early_stopping", ("MetricEarlyStopper",)),
    ("FixedUpdateEarlyStopping", "early_stopping", ("FixedEarlyStopper",)),
    ("BestMetricCallback", "best_metric", ()),
    ("TrackOutputsCallback", "track_outputs", ("TrackAdditionalOutputsCallback",)),
    ("OfflineLossCallback", "evaluation", ()),
    ("MetricCallback", "evaluation", ()),
    ("EvaluateCallback", "evaluation", ()),
    ("ReduceLROnPlateauCallback", "lr_on_plateau", ()),
    ("GradNormCallback", "grad_norm", ()),
    ("NanGuardCallback", "nan_guard", ()),
)
BASES = (("CallbackBase", "base"), ("PeriodicCallback", "periodic"), ("PeriodicDataIteratorCallback", "periodic"))
ROOT = "noether.core.callbacks"
PATHS = [
    (f"{place}.{name}", canonical)
    for canonical, module, aliases in TABLE
    for name in (canonical, *aliases)
    for place in (ROOT, f"{ROOT}.{module}")
] + [("noether.training.callbacks.OfflineLossCallback", "OfflineLossCallback")]


@pytest.mark.parametrize(("path", "canonical"), PATHS)
def test_a_name_resolves_in_yaml_and_in_python(path, canonical):
    module, _, name = path.rpartition(".")
    kind = getattr(importlib.import_module(module), name)
    assert resolve(path, CALLBACK) is kind is getattr(callbacks, canonical)
    assert kind.__name__ == canonical


@pytest.mark.parametrize(("name", "module"), BASES)
def test_a_base_is_found_where_the_guide_says(name, module):
    assert getattr(importlib.import_module(f"{ROOT}.{module}"), name) is getattr(callbacks, name)


def test_the_table_is_complete():
    assert known_kinds() == {canonical: aliases for canonical, _, aliases in sorted(TABLE)}


@pytest.mark.parametrize("canonical", [canonical for canonical, _, _ in TABLE])
def test_a_callback_is_documented_with_all_its_settings_and_its_yaml(canonical):
    said = describe(canonical)
    kind = getattr(callbacks, canonical)
    assert [setting.name for setting in said.settings if not setting.text] == []
    assert {setting.name for setting in said.settings} == set(inspect.signature(kind).parameters)
    assert f"- kind: {said.kind}\n" in f"{said.yaml}\n"
    assert ">>>" in inspect.getdoc(kind)
    assert said.summary.endswith((".", ")."))
    assert len(said.summary) < 120
