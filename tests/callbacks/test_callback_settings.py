"""Invalid settings, each with its whole message."""

import math

import pytest

from noether.core.callbacks import (
    BestCheckpointCallback,
    BestMetricCallback,
    CheckpointCallback,
    EvaluateCallback,
    MetricCallback,
    MetricEarlyStopping,
    OfflineLossCallback,
    OnlineLossCallback,
    ProgressCallback,
)
from noether.core.callbacks.periodic import PeriodicCallback
from noether.core.callbacks.registry import SHIPPED
from noether.core.errors import SettingsError
from noether.core.schedules.schedule import INTERVALS
from noether.testing.shipped import SETTINGS

REQUIRED = {
    kind: settings[0]
    for name, settings in SETTINGS.items()
    if issubclass(kind := SHIPPED[name].load(), PeriodicCallback)
}
KINDS = pytest.mark.parametrize("kind", REQUIRED)
NAMES = "every_n_epochs, every_n_updates, every_n_samples"
WHOLE = "is not a whole number of at least 1"


def problems(kind, **settings):
    with pytest.raises(SettingsError) as refused:
        kind(**{**REQUIRED[kind], **settings})
    assert str(refused.value) == "\n".join(map(str, refused.value.problems))
    return [str(problem) for problem in refused.value.problems]


@KINDS
def test_no_interval(kind):
    assert problems(kind) == [f"no interval is set; give exactly one of {NAMES}"]


@KINDS
def test_two_intervals(kind):
    both = "every_n_epochs: 1 and every_n_samples: 2 are both set"
    assert problems(kind, every_n_epochs=1, every_n_samples=2) == [
        f"every_n_samples: {both}; give exactly one of {NAMES}"
    ]


@KINDS
@pytest.mark.parametrize("interval", INTERVALS)
@pytest.mark.parametrize("n", [0, -1, 2.7, 2.0, True, False, "3"])
def test_an_interval_that_is_not_a_whole_number(kind, interval, n):
    assert problems(kind, **{interval: n}) == [f"{interval}: {n!r} {WHOLE}"]


@KINDS
def test_an_unknown_setting(kind):
    with pytest.raises(TypeError, match="unexpected keyword argument 'every_n_epoch'; did you mean 'every_n_epochs'"):
        kind(**REQUIRED[kind], every_n_epoch=1)


@KINDS
def test_settings_are_frozen_and_name_the_memory(kind):
    callback = kind(**REQUIRED[kind], every_n_updates=100)
    with pytest.raises(AttributeError, match="cannot assign to field 'every_n_updates'"):
        callback.every_n_updates = 3
    assert callback.name.split("/")[:2] == [kind.__name__, "U100"]
    named = kind(**REQUIRED[kind], every_n_updates=100, id="mine")
    assert named.name == "mine"
    assert named != callback
    assert callback == kind(**REQUIRED[kind], every_n_updates=100)
    assert callback.interval_name == "U100"
    assert kind(**REQUIRED[kind], every_n_epochs=1).interval_name == "E1"
    assert kind(**REQUIRED[kind], every_n_samples=512).interval_name == "S512"


@pytest.mark.parametrize("kind", [BestMetricCallback, BestCheckpointCallback, MetricEarlyStopping])
def test_a_key_without_a_direction_requires_mode(kind):
    assert problems(kind, every_n_epochs=1, metric_key="val/dice") == [
        "mode: the key 'val/dice' does not say whether higher or lower is better; give mode"
    ]
    assert problems(kind, every_n_epochs=1, mode="hihger") == [
        "mode: 'hihger' is not one of 'higher', 'lower'; did you mean 'higher'?"
    ]
    assert problems(kind, every_n_epochs=1, mode="min") == ["mode: 'min' is not one of 'higher', 'lower'"]
    assert kind(**{**REQUIRED[kind], "metric_key": "val/dice"}, every_n_epochs=1, mode="higher").direction == "higher"


@pytest.mark.parametrize("kind", [BestCheckpointCallback, MetricEarlyStopping])
@pytest.mark.parametrize("min_delta", [-0.1, math.nan, math.inf, True, "0.1", None])
def test_min_delta(kind, min_delta):
    assert problems(kind, every_n_epochs=1, min_delta=min_delta) == [
        f"min_delta: {min_delta!r} is not a number of at least 0"
    ]


@pytest.mark.parametrize("tolerance", [0, -1, 2.7, True, None])
def test_tolerance(tolerance):
    assert problems(MetricEarlyStopping, every_n_epochs=1, tolerance=tolerance) == [f"tolerance: {tolerance!r} {WHOLE}"]
    assert problems(BestCheckpointCallback, every_n_epochs=1, tolerances=(3, tolerance)) == [
        f"tolerances: {tolerance!r} {WHOLE}"
    ]


def test_a_duplicate_tolerance():
    assert problems(BestCheckpointCallback, every_n_epochs=1, tolerances=(3, 5, 3)) == [
        "tolerances: [3, 5, 3] has duplicates; give each tolerance once"
    ]


def test_nan():
    assert problems(MetricEarlyStopping, every_n_epochs=1, nan="cout") == [
        "nan: 'cout' is not one of 'count', 'stop', 'raise'; did you mean 'count'?"
    ]
    assert problems(OnlineLossCallback, every_n_epochs=1, nan="ignore") == [
        "nan: 'ignore' is not one of 'raise', 'log'"
    ]


def test_metric():
    known = "'accuracy', 'binary_accuracy', a function of outputs and batch, or a metric of torchmetrics"
    assert problems(MetricCallback, every_n_epochs=1, metric="acuracy") == [
        f"metric: 'acuracy' is not {known}; did you mean 'accuracy'?"
    ]
    assert problems(EvaluateCallback, every_n_epochs=1, measures=("loss", 3)) == [
        "measures: 3 is not 'accuracy', 'binary_accuracy', a function of outputs and batch, or a metric of torchmetrics"
    ]


@pytest.mark.parametrize("measures", [(), ("loss", "loss"), ("accuracy", "loss", "accuracy")])
def test_measures(measures):
    assert problems(EvaluateCallback, every_n_epochs=1, measures=measures) == [
        f"measures: {list(measures)} is not a list of different measures, like [loss, accuracy]"
    ]


@pytest.mark.parametrize("batch_size", [0, -1, 2.7, True])
@pytest.mark.parametrize("kind", [OfflineLossCallback, MetricCallback, EvaluateCallback])
def test_batch_size(kind, batch_size):
    assert problems(kind, every_n_epochs=1, batch_size=batch_size) == [f"batch_size: {batch_size!r} {WHOLE}"]


def test_nothing_to_save():
    assert problems(
        CheckpointCallback,
        every_n_epochs=1,
        save_weights=False,
        save_optim=False,
        save_latest_weights=False,
        save_latest_optim=False,
    ) == [
        (
            "nothing would be saved; set at least one of "
            "save_weights, save_optim, save_latest_weights, save_latest_optim to true"
        )
    ]


@pytest.mark.parametrize("keep", [0, -1, 2.7, True])
def test_keep(keep):
    assert problems(CheckpointCallback, every_n_epochs=1, keep=keep) == [f"keep: {keep!r} {WHOLE}"]


def test_all_problems_are_reported_at_once():
    assert problems(MetricEarlyStopping, metric_key="x", tolerance=0, min_delta=-1, nan="?") == [
        f"no interval is set; give exactly one of {NAMES}",
        "mode: the key 'x' does not say whether higher or lower is better; give mode",
        f"tolerance: 0 {WHOLE}",
        "min_delta: -1 is not a number of at least 0",
        "nan: '?' is not one of 'count', 'stop', 'raise'",
    ]
    assert problems(ProgressCallback, every_n_epochs=0, every_n_updates=2.7) == [
        f"every_n_updates: every_n_epochs: 0 and every_n_updates: 2.7 are both set; give exactly one of {NAMES}",
        f"every_n_epochs: 0 {WHOLE}",
        f"every_n_updates: 2.7 {WHOLE}",
    ]
