"""YAML of the class-based framework: module paths, settings of the trainer, layout, and `tolerances`."""

import dataclasses
import warnings

import pytest
import yaml

from noether.config import ConfigError, load_callbacks
from noether.config.compatibility import SECTIONS, TRAINER, ConfigWarning
from noether.config.descriptions import describe
from noether.config.loading import from_source
from noether.config.schema import Config
from noether.config.serialization import dump
from noether.config.source import parse
from noether.config.trainer_settings import TrainerSettings
from noether.core.callbacks import (
    BestCheckpointCallback,
    BestMetricCallback,
    CheckpointCallback,
    DatasetStatsCallback,
    EMACallback,
    EtaCallback,
    FixedUpdateEarlyStopping,
    LrCallback,
    MetricEarlyStopping,
    OfflineLossCallback,
    OnlineLossCallback,
    ParamCountCallback,
    PeakMemoryCallback,
    ProgressCallback,
    TrackOutputsCallback,
    TrainTimeCallback,
)

CORE, TRAINING = "noether.core.callbacks", "noether.training.callbacks"
EACH = {"every_n_epochs": 1}
WATCH = {**EACH, "metric_key": "loss/val/total"}
LISTED = {
    f"{CORE}.checkpoint.checkpoint.CheckpointCallback": (CheckpointCallback, EACH),
    f"{CORE}.checkpoint.ema.EmaCallback": (EMACallback, {**EACH, "target_factors": [0.9]}),
    f"{CORE}.checkpoint.best_checkpoint.BestCheckpointCallback": (BestCheckpointCallback, WATCH),
    f"{CORE}.default.dataset_stats.DatasetStatsCallback": (DatasetStatsCallback, {}),
    f"{CORE}.default.eta.EtaCallback": (EtaCallback, EACH),
    f"{CORE}.default.lr.LrCallback": (LrCallback, EACH),
    f"{CORE}.default.OnlineLossCallback": (OnlineLossCallback, EACH),
    f"{CORE}.default.param_count.ParamCountCallback": (ParamCountCallback, {}),
    f"{CORE}.default.peak_memory.PeakMemoryCallback": (PeakMemoryCallback, EACH),
    f"{CORE}.default.progress.ProgressCallback": (ProgressCallback, EACH),
    f"{CORE}.default.train_time.TrainTimeCallback": (TrainTimeCallback, EACH),
    f"{CORE}.early_stoppers.fixed.FixedEarlyStopper": (FixedUpdateEarlyStopping, {"stop_at_epoch": 2}),
    f"{CORE}.early_stoppers.metric.MetricEarlyStopper": (MetricEarlyStopping, {**WATCH, "tolerance": 3}),
    f"{CORE}.online.best_metric.BestMetricCallback": (BestMetricCallback, WATCH),
    f"{CORE}.online.track_outputs.TrackAdditionalOutputsCallback": (TrackOutputsCallback, {**EACH, "keys": ["a"]}),
    f"{TRAINING}.offline_loss.OfflineLossCallback": (OfflineLossCallback, {**EACH, "dataset_key": "val"}),
    f"{TRAINING}.OfflineLossCallback": (OfflineLossCallback, {**EACH, "dataset_key": "val"}),
}


def make_config(trainer=(), callbacks=(), **sections):
    """Return the configuration of a small run as a mapping."""
    digits = "noether.examples.digits"
    return {
        "run": {"name": "digits"},
        "model": {"kind": f"{digits}.ConvNet"},
        "data": {key: {"kind": f"{digits}.Digits", "split": key} for key in ("train", "val")},
        "optimizer": {"kind": "torch.optim.SGD", "lr": 0.1},
        "trainer": {"max_epochs": 1, "effective_batch_size": 8, "loss": f"{digits}.cross_entropy", **dict(trainer)},
        **({} if callbacks is None else {"callbacks": list(callbacks)}),
        **sections,
    }


def load(config):
    return from_source(parse(yaml.safe_dump(config, sort_keys=False), "a.yaml"))


def refusals(config):
    """Return the messages of the error by path."""
    with pytest.raises(ConfigError) as refused:
        load(config)
    return {".".join(map(str, each.path)): each.message for each in refused.value.problems}


@pytest.mark.parametrize(("path", "kind", "settings"), [(path, *entry) for path, entry in LISTED.items()])
def test_a_callback_is_found_by_its_last_name_in_any_module_of_the_framework(path, kind, settings):
    (callback,) = load(make_config(callbacks=[{"kind": path, **settings}])).callbacks
    assert callback.target is kind


def test_a_callback_is_described_under_its_older_path():
    assert describe(f"{CORE}.default.lr.LrCallback") == describe("LrCallback")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (f"{CORE}.checkpoint.checkpoint.CheckpointCallbak", "has no callback 'CheckpointCallbak'; did you mean 'Ch"),
        (f"{CORE}.online.best_metric.BestMetrik", "has no callback 'BestMetrik'; did you mean 'BestMetricCallback'?"),
        (f"{TRAINING}.offline_los.OflineLossCallback", "'OflineLossCallback'; did you mean 'OfflineLossCallback'?"),
        (f"{CORE}.default.model_norm.Xy", "has no callback 'Xy'; `noether callbacks` lists them"),
        (f"{CORE}.progress.Progres", f"'{CORE}.progress' has no 'Progres'; did you mean 'Progress'?"),
        ("noether.core.callback.ProgressCallback", "has no 'ProgressCallback'"),
    ],
)
def test_a_mistyped_last_name_is_answered_with_the_nearest(path, message):
    assert message in refusals(make_config(callbacks=[{"kind": path, **EACH}]))["callbacks.0.kind"]


@pytest.mark.parametrize("path", [f"{CORE}.early_stopping.FixedEarlyStopper", f"{CORE}.FixedEarlyStopper"])
def test_a_path_that_exists_stays(path):
    (callback,) = load(make_config(callbacks=[{"kind": path, "stop_at_epoch": 1}])).callbacks
    assert callback.path == path


@pytest.mark.parametrize(
    ("older", "newer"),
    [
        ({"use_torch_compile": True}, {"compile": True}),
        ({"skip_nan_loss": True}, {"nonfinite": "skip"}),
        ({"skip_nan_loss": False}, {"nonfinite": "apply"}),
        ({"precision": "fp32"}, {"precision": "float32"}),
        ({"precision": "bf16"}, {"precision": "bfloat16"}),
        ({"precision": "fp16"}, {"precision": "float16"}),
        ({"tracker": "disabled", "initializer": {}}, {}),
        ({"max_updates": None, "tracker": None, "start_at_epoch": None, "skip_nan_loss": None}, {}),
    ],
)
def test_a_setting_of_the_trainer_is_read(older, newer):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load(make_config(older)) == load(make_config(newer))


@pytest.mark.parametrize("name", TRAINER.replaced)
def test_a_setting_of_the_trainer_is_answered_with_what_to_write(name):
    ((path, message),) = refusals(make_config({name: 3})).items()
    assert path == f"trainer.{name}"
    assert message == f"is no setting here: {TRAINER.replaced[name]}"


@pytest.mark.parametrize("name", SECTIONS.replaced)
def test_a_section_is_answered_with_what_to_write(name):
    assert refusals(make_config(**{name: {"a": 1}})) == {name: f"is no setting here: {SECTIONS.replaced[name]}"}


def test_settings_without_effect_are_named_once():
    trainer = dict.fromkeys(TRAINER.ignored, True)
    with pytest.warns(ConfigWarning) as warned:
        config = load(make_config(trainer, debug=True))
    assert config == load(make_config())
    assert [str(each.message).partition(" has no effect here and is left out: ")[0] for each in warned] == [
        *("a.yaml:25: debug:", *(f"a.yaml:{19 + i}: trainer.{name}:" for i, name in enumerate(trainer)))
    ]


def test_all_mistakes_are_reported_at_once_with_those_of_the_other_settings():
    found = refusals(
        make_config({"kind": "my.Trainer", "max_epochs": 0, "clip_grad": 1.0}, tracker={"kind": "my.WandB"})
    )
    assert found.keys() == {"tracker", "trainer.kind", "trainer.max_epochs", "trainer.clip_grad"}


def test_no_name_of_the_class_based_framework_hides_one_of_noether():
    for translation, kind in ((TRAINER, TrainerSettings), (SECTIONS, Config)):
        own = {each.name for each in dataclasses.fields(kind)}
        assert not own & {*translation.renamed, *translation.ignored, *translation.replaced}
        assert own >= set(translation.renamed.values())


def test_callbacks_below_the_trainer_are_read_as_those_at_the_top_level():
    listed = [{"kind": f"{CORE}.LrCallback", **EACH}]
    assert load(make_config({"callbacks": listed}, callbacks=None)) == load(make_config(callbacks=listed))
    found = refusals(make_config({"callbacks": [{"kind": f"{CORE}.LrCallback", "every_n_epochs": 0}]}, callbacks=None))
    assert found == {"callbacks.0.every_n_epochs": "0 is not a whole number of at least 1"}
    assert load(make_config({"callbacks": "${callbacks}"}, callbacks=listed)) == load(make_config(callbacks=listed))
    found = refusals(make_config({"callbacks": []}, callbacks=listed))
    assert found == {"trainer.callbacks": "callbacks are given at the top level too (a.yaml:20); leave them out here"}


@pytest.mark.parametrize("entry", [{"model_name": "body"}, {"name": "BestCheckpointCallback"}])
def test_tolerances_count_one_firing_less_than_in_the_class_based_framework(entry):
    best = {"kind": f"{CORE}.BestCheckpointCallback", **WATCH, "tolerances": [3, 5], **entry}
    loss = {"kind": f"{TRAINING}.OfflineLossCallback", **EACH, "dataset_key": "val"}
    with pytest.warns(
        ConfigWarning, match=r"callbacks\[1\].tolerances: .* if \[3, 5\] was written for that, write \[4, 6\]"
    ):
        config = load(make_config(callbacks=[loss, best]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert from_source(parse(dump(config), "resolved.yaml")) == config
        del best[next(iter(entry))]
        load(make_config(callbacks=[loss, best]))


def test_callbacks_of_an_evaluation_are_answered_with_the_command():
    best = {"kind": f"{CORE}.BestCheckpointCallback", **WATCH, "eval_callbacks": []}
    assert (
        "noether eval RUN_DIR --checkpoint best_model"
        in refusals(make_config(callbacks=[best]))["callbacks.0.eval_callbacks"]
    )


def test_a_loss_that_is_listed_again_at_a_longer_interval_is_measured_once(tmp_path):
    losses = [{"kind": f"{TRAINING}.OfflineLossCallback", "every_n_epochs": n, "dataset_key": "val"} for n in (1, 2)]
    (tmp_path / "callbacks.yaml").write_text(yaml.safe_dump({"callbacks": losses}))
    with pytest.warns(ConfigWarning, match=r"callbacks\[1\]: measures only what OfflineLossCallback/E1/val measures"):
        assert load_callbacks(tmp_path / "callbacks.yaml").members == (OfflineLossCallback(**EACH, dataset_key="val"),)
