"""Every callback and every kind of schedule that is shipped obeys every law."""

import pytest

from noether import (
    AfterUpdate,
    At,
    EveryNEpochs,
    EveryNSamples,
    EveryNUpdates,
    TrainingIteration,
    compose,
    log,
    on,
)
from noether.config.descriptions import known_kinds
from noether.core import callbacks
from noether.core.callbacks import (
    BestCheckpointCallback,
    BestMetricCallback,
    CheckpointCallback,
    DatasetStatsCallback,
    EMACallback,
    EtaCallback,
    EvaluateCallback,
    FixedUpdateEarlyStopping,
    GradNormCallback,
    HyperparamsCallback,
    LrCallback,
    MetricCallback,
    MetricEarlyStopping,
    NanGuardCallback,
    OfflineLossCallback,
    OnlineLossCallback,
    ParamCountCallback,
    PeakMemoryCallback,
    ProgressCallback,
    ReduceLROnPlateauCallback,
    TrackOutputsCallback,
    TrainTimeCallback,
)
from noether.testing import (
    check_composition,
    check_independent,
    check_pure,
    check_rank_agreement,
    check_resumable,
    check_schedule,
)

UPDATES, EPOCHS, SAMPLES = ({f"every_n_{name}": n, "at_end": True} for name, n in
                            (("updates", 2), ("epochs", 1), ("samples", 3)))  # fmt: skip


def error(outputs, batch):
    return (outputs.argmax(dim=1) != batch[1]).float()


AVERAGES = EMACallback(target_factors=(0.5,), save_latest_weights=True, **UPDATES)
SHIPPED = (
    AVERAGES,
    BestCheckpointCallback(metric_key="val/accuracy", tolerances=(1, 2), **EPOCHS),
    BestMetricCallback(metric_key="val/accuracy", target_metric_keys=("loss/val/total",), **SAMPLES),
    CheckpointCallback(keep=2, **SAMPLES),
    DatasetStatsCallback(),
    EtaCallback(**UPDATES),
    EvaluateCallback(dataset_key="val", measures=("loss", "accuracy", error), **EPOCHS),
    FixedUpdateEarlyStopping(stop_at_update=4),
    GradNormCallback(**UPDATES),
    HyperparamsCallback(),
    LrCallback(**EPOCHS),
    compose(AVERAGES, MetricCallback(dataset_key="val", metric=error, weights="ema=0.5", **SAMPLES)),
    MetricEarlyStopping(metric_key="loss/val/total", tolerance=2, **UPDATES),
    NanGuardCallback(tolerance=1, action="rollback", **UPDATES),
    OfflineLossCallback(dataset_key="val", **EPOCHS),
    OnlineLossCallback(nan="log", **SAMPLES),
    ParamCountCallback(),
    PeakMemoryCallback(**UPDATES),
    ProgressCallback(**EPOCHS),
    ReduceLROnPlateauCallback(metric_key="loss/val/total", tolerance=1, factor=0.5, **EPOCHS),
    compose(
        TrackOutputsCallback(keys=("drift",), **UPDATES),
        TrackOutputsCallback(patterns=("scal",), reduce="last", save_output=True, **SAMPLES),
    ),
    TrainTimeCallback(**UPDATES),
)


@on(AfterUpdate)
def notes(state, event):
    return log(state, event, {"noted": state.iteration.sample})


STOPS = FixedUpdateEarlyStopping(stop_at_update=3, id="stops")
LAWS = {
    "pure": check_pure,
    "resumable": check_resumable,
    "rank agreement": check_rank_agreement,
    "composition": lambda callback, examples: check_composition(callback, notes, STOPS, examples=examples),
    "independence": lambda callback, examples: check_independent(callback, notes, examples=examples),
}


def members(callback):
    return getattr(callback, "members", (callback,))


def test_no_callback_is_left_out():
    kinds = {type(member) for callback in SHIPPED for member in members(callback)}
    assert kinds == {getattr(callbacks, name) for name in known_kinds()}


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("callback", SHIPPED, ids=lambda callback: members(callback)[-1].name)
def test_every_callback_obeys_every_law(callback, law):
    LAWS[law](callback, examples=6)


@pytest.mark.parametrize(
    "schedule",
    [
        EveryNEpochs(2),
        EveryNUpdates(3),
        EveryNSamples(7),
        At(TrainingIteration(update=1), TrainingIteration(update=5)),
        At(TrainingIteration(sample=4)),
        At(TrainingIteration(epoch=2)),
        EveryNUpdates(2) | EveryNUpdates(3) | EveryNEpochs(1),
        EveryNSamples(5).starting(TrainingIteration(sample=8)).until(TrainingIteration(sample=31)),
        EveryNSamples(4).starting(TrainingIteration(epoch=1)) | At(TrainingIteration(epoch=1)),
        EveryNEpochs(1).until(TrainingIteration(update=9)) | EveryNSamples(3).until(TrainingIteration(update=5)),
    ],
    ids=str,
)
def test_every_kind_of_schedule_obeys_every_law(schedule):
    check_schedule(schedule, examples=60)
