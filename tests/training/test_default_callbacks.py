"""A configuration that lists no callbacks: what is logged, measured and kept, wherever the run ends."""

import json

import pytest
import yaml
from tiny_runs import make_config

import noether
from noether.config import ConfigError, load, load_callbacks
from noether.config.loading import from_source
from noether.config.source import parse
from noether.config.values import source_from_values
from noether.effects import CheckpointStore

VAL = {"train": {"kind": "tiny.Data"}, "val": {"kind": "tiny.Data"}}
LOGS = ["OnlineLossCallback", "LrCallback", "ProgressCallback"]
SAVES = ["BestCheckpointCallback", "CheckpointCallback"]


def without_callbacks(data=None, **trainer):
    """Return the configuration of a tiny run, with one end, that lists no callbacks."""
    config = make_config(**trainer)
    if {"max_updates", "max_samples"} & trainer.keys():
        del config["trainer"]["max_epochs"]
    del config["callbacks"]
    return {**config, "data": data or config["data"]}


def load_values(values):
    return from_source(source_from_values(values))


def names(config):
    return [kind.path.rpartition(".")[2] for kind in config.callbacks]


@pytest.mark.parametrize(
    ("config", "updates", "best"),
    [
        pytest.param(without_callbacks(VAL, max_epochs=2), [2, 4], "loss/val/total", id="epochs"),
        pytest.param(without_callbacks(max_epochs=1), [2], "loss/online/total/E1", id="no val"),
        pytest.param(without_callbacks(VAL, max_updates=1), [1], "loss/val/total", id="a part of an epoch"),
        pytest.param(without_callbacks(max_updates=21), [*range(2, 21, 2), 21], "loss/online/total/U2", id="updates"),
        pytest.param(
            without_callbacks(VAL, max_samples=50), [2, 3, 4, 5, 7, 8, 9, 10, 12, 13], "loss/val/total", id="samples"
        ),
    ],
)
def test_losses_are_logged_and_the_newest_and_the_best_checkpoint_are_kept(tiny_module, config, updates, best):
    run = noether.train(config)
    lines = [json.loads(line) for line in (run.directory / "metrics.jsonl").read_text().splitlines()]
    values = {line["update"]: line["metrics"][best] for line in lines if best in line["metrics"]}
    assert list(values) == updates
    assert "optim/lr" in {key for line in lines for key in line["metrics"]}
    store = CheckpointStore(run.directory / "checkpoints", "tiny")
    saved = {name: store.find(name).iteration.update for name in ("last", "latest", f"best_model.{best}")}
    assert list(saved.values()) == [updates[-1], updates[-1], min(values, key=values.get)]
    assert {each.iteration.update for each in store.manifests()} == set(saved.values())


def test_a_run_lists_default_callbacks_in_its_configuration_and_resumes_with_them(tiny_module):
    run = noether.train(without_callbacks(VAL, max_epochs=1))
    written = yaml.safe_load((run.directory / "config.yaml").read_text())["callbacks"]
    assert [each["kind"].rpartition(".")[2] for each in written] == [*LOGS, "OfflineLossCallback", *SAVES]
    assert (
        load(run.directory / "config.yaml").callbacks
        == from_source(source_from_values(without_callbacks(VAL))).callbacks
    )
    longer = noether.train(resume=run.directory, overrides=["trainer.max_epochs=2"])
    uncut = noether.train(without_callbacks(VAL, max_epochs=2), output="uncut")
    assert longer.state.metrics == uncut.state.metrics


@pytest.mark.parametrize(
    ("evaluate", "best"),
    [
        ({"val": ["loss", "accuracy"], "every_n_updates": 3}, ("every_n_updates", "loss/val/total")),
        ({"val": ["accuracy"], "every_n_epochs": 2}, ("every_n_epochs", "val/accuracy")),
        ({"train": ["loss"], "val": ["tiny.loss"], "every_n_epochs": 1}, ("every_n_epochs", "val/loss")),
        (
            {"train": ["loss"], "val": [{"kind": "tiny.loss", "name": "size"}], "every_n_epochs": 1},
            ("every_n_epochs", "loss/train/total"),
        ),
        ({"val": ["tiny.loss"], "every_n_updates": 1}, ("every_n_updates", "val/loss")),
        (
            {"val": [{"kind": "tiny.loss", "name": "top-1 accuracy"}], "every_n_updates": 1},
            ("every_n_updates", "val/top-1 accuracy"),
        ),
        (
            {"val": [{"kind": "tiny.loss", "name": "size"}], "every_n_updates": 1},
            ("every_n_epochs", "loss/online/total/E1"),
        ),
    ],
)
def test_default_callbacks_do_not_repeat_measures_of_trainer_evaluate(tiny_module, evaluate, best):
    config = load_values(without_callbacks(VAL, evaluate=evaluate))
    assert names(config) == [*LOGS, *SAVES]
    settings = config.callbacks[-2].settings
    assert (best[0] in settings, settings["metric_key"]) == (True, best[1])


def test_trainer_evaluate_and_the_default_callbacks_train_together(tiny_module):
    config = without_callbacks(VAL, max_updates=4, evaluate={"val": ["loss"], "every_n_updates": 3})
    run = noether.train(config)
    assert (run.directory / "checkpoints/best_model.loss.val.total").read_text().startswith("E1_U3_S12 ")


@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        ("", [*LOGS, *SAVES]),
        ("callbacks: default\n", [*LOGS, *SAVES]),
        ("callbacks: []\n", []),
        ("callbacks: [default]\n", [*LOGS, *SAVES]),
        (
            "callbacks:\n- default\n- {kind: noether.core.callbacks.GradNormCallback, every_n_updates: 1}\n",
            [*LOGS, *SAVES, "GradNormCallback"],
        ),
    ],
)
def test_default_stands_for_the_default_callbacks_and_an_empty_list_for_none(tiny_module, listed, expected):
    text = yaml.safe_dump(without_callbacks()) + listed
    assert names(from_source(parse(text, "a.yaml"))) == expected


CALLBACKS = "noether.core.callbacks"
OFFLINE = {"kind": f"{CALLBACKS}.OfflineLossCallback", "every_n_epochs": 2, "dataset_key": "val"}


@pytest.mark.parametrize(
    ("own", "name"),
    [
        ({"kind": f"{CALLBACKS}.LR", "every_n_updates": 1}, "LrCallback"),
        ({"kind": f"{CALLBACKS}.ProgressCallback", "every_n_updates": 1}, "ProgressCallback"),
        (
            {"kind": f"{CALLBACKS}.BestCheckpointCallback", "every_n_epochs": 1, "metric_key": "loss/val/total"},
            "BestCheckpointCallback",
        ),
    ],
)
def test_a_callback_of_the_list_takes_the_place_of_a_default_one(tiny_module, own, name):
    config = {**without_callbacks(VAL), "callbacks": ["default", own]}
    defaults = [each for each in [*LOGS, "OfflineLossCallback", *SAVES] if each != name]
    assert names(load_values(config)) == [*defaults, own["kind"].rpartition(".")[2]]
    noether.train(config)


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        (
            ["default", OFFLINE],
            "callbacks[1]: `default` measures this too: remove this OfflineLossCallback, or list all",
        ),
        (["default", "default"], "callbacks[1]: `default` is listed twice; remove one"),
    ],
)
def test_what_the_default_callbacks_measure_is_refused_beside_them(tiny_module, listed, message):
    with pytest.raises(ConfigError) as refused:
        load_values({**without_callbacks(VAL), "callbacks": listed})
    assert str(refused.value).startswith(message)
    load_values({**without_callbacks(VAL), "callbacks": ["default", {**OFFLINE, "dataset_key": "train"}]})


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        ("callbacks:\n", "a.yaml:1: callbacks: is empty; write `[]` for no callbacks, or `default`"),
        ("callbacks: defaults\n", "a.yaml:1: callbacks: 'defaults' is not a list"),
        (
            "callbacks:\n- default\n- kind: noether.core.callbacks.GradNormCallback\n  every_n_updates: 0\n",
            "a.yaml:4: callbacks[5].every_n_updates: 0 is not a whole number of at least 1",
        ),
    ],
)
def test_a_mistake_is_located_where_it_was_written(tiny_module, listed, message):
    with pytest.raises(ConfigError) as refused:
        from_source(parse(listed + yaml.safe_dump(without_callbacks()), "a.yaml"))
    assert str(refused.value) == message


def test_another_loop_loads_default_callbacks_by_name(tmp_path):
    (tmp_path / "callbacks.yaml").write_text("callbacks: default\n")
    assert [type(each).__name__ for each in load_callbacks(tmp_path / "callbacks.yaml").members] == [*LOGS, *SAVES]
