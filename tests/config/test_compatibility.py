"""Callbacks in YAML written for the class-based framework, and callbacks of the user, load."""

import sys
import warnings
from pathlib import Path

import pytest

from noether import AfterEpoch, AfterUpdate, TrainState
from noether.config import ConfigError, load, load_callbacks
from noether.config.compatibility import ConfigWarning
from noether.config.serialization import dump
from noether.core.callbacks import (
    BestCheckpointCallback,
    BestMetricCallback,
    CheckpointCallback,
    EMACallback,
    FixedUpdateEarlyStopping,
    MetricEarlyStopping,
    OfflineLossCallback,
    OnlineLossCallback,
    TrackOutputsCallback,
)

OLDER = """\
callbacks:
  - kind: noether.core.callbacks.EmaCallback
    name: EmaCallback
    every_n_epochs: 10
    save_weights: false
    save_last_weights: false
    save_latest_weights: true
    model_paths: [null]
    target_factors:
      - 0.9999
  - kind: noether.core.callbacks.OnlineLossCallback
    name: OnlineLossCallback
    every_n_updates: 50
    verbose: false
  - kind: noether.core.callbacks.OnlineLossCallback
    name: OnlineLossCallback
    every_n_epochs: 1
    verbose: true
  - kind: noether.core.callbacks.TrackAdditionalOutputsCallback
    name: TrackAdditionalOutputsCallback
    every_n_samples: 512
    batch_size: 16
    keys: null
    patterns: [loss]
    verbose: true
    reduce: last
    log_output: true
    save_output: true
  - kind: noether.training.callbacks.OfflineLossCallback
    name: OfflineLossCallback
    every_n_epochs: 1
    batch_size: 8
    dataset_key: val
    output_patterns_to_log: [residual]
  - kind: noether.training.callbacks.OfflineLossCallback
    name: OfflineLossCallback
    every_n_epochs: 1
    dataset_key: test
    output_patterns_to_log: null
  - kind: noether.core.callbacks.BestMetricCallback
    name: BestMetricCallback
    every_n_epochs: 1
    source_metric_key: loss/val/total
    target_metric_keys:
      - loss/test/total
    optional_target_metric_keys: null
  - kind: noether.core.callbacks.BestCheckpointCallback
    name: BestCheckpointCallback
    every_n_epochs: 1
    metric_key: loss/val/total
    save_frozen_weights: true
    tolerances: [5]
    model_name: encoder
  - kind: noether.core.callbacks.CheckpointCallback
    name: CheckpointCallback
    every_n_epochs: 1
    save_weights: true
    save_optim: true
    save_latest_weights: true
    save_latest_optim: true
    model_name: null
  - kind: noether.core.callbacks.MetricEarlyStopper
    name: MetricEarlyStopper
    every_n_epochs: 1
    metric_key: loss/val/total
    tolerance: 3
  - kind: noether.core.callbacks.FixedEarlyStopper
    name: FixedEarlyStopper
    stop_at_epoch: 10
"""
NO_MEANING = "has no meaning for {} and is left out: {}"
COUNTS_OTHERWISE = (
    "k ends here at k firings in a row without improvement, as early stopping does, and at k + 1 in the class-based "
    "framework: if [5] was written for that, write [6]"
)
WARNINGS = [
    "older.yaml:52: callbacks[7].tolerances: " + COUNTS_OTHERWISE,
    f"older.yaml:22: callbacks[3].batch_size: {NO_MEANING.format('TrackOutputsCallback', 'it iterates no dataset')}",
    "older.yaml:51: callbacks[7].save_frozen_weights: "
    + NO_MEANING.format("BestCheckpointCallback", "a checkpoint is whole, frozen weights included"),
]


def load_members(text, name="older.yaml"):
    Path(name).write_text(text)
    return load_callbacks(name).members


def test_a_list_of_the_class_based_framework_is_read_with_all_its_settings(shop):
    with pytest.warns(ConfigWarning) as warned:
        members = load_members(OLDER)
    assert [str(each.message) for each in warned] == WARNINGS
    each_epoch = {"every_n_epochs": 1}
    assert members == (
        EMACallback(
            every_n_epochs=10, target_factors=(0.9999,), model_paths=(None,), save_weights=False,
            save_last_weights=False, save_latest_weights=True,
        ),
        OnlineLossCallback(every_n_updates=50, verbose=False),
        OnlineLossCallback(**each_epoch),
        TrackOutputsCallback(every_n_samples=512, patterns=("loss",), verbose=True, reduce="last", save_output=True),
        OfflineLossCallback(**each_epoch, dataset_key="val", batch_size=8, output_patterns_to_log=("residual",)),
        OfflineLossCallback(**each_epoch, dataset_key="test"),
        BestMetricCallback(**each_epoch, metric_key="loss/val/total", target_metric_keys=("loss/test/total",)),
        BestCheckpointCallback(
            **each_epoch, metric_key="loss/val/total", tolerances=(5,), model_names=("encoder",)
        ),
        CheckpointCallback(**each_epoch, save_optim=True, save_latest_optim=True),
        MetricEarlyStopping(**each_epoch, metric_key="loss/val/total", tolerance=3),
        FixedUpdateEarlyStopping(stop_at_epoch=10),
    )  # fmt: skip
    assert len({member.name for member in members}) == len(members)  # no memory needs an `id`


def test_a_replaced_setting_is_refused_with_what_to_write(shop):
    with pytest.raises(ConfigError) as refused:
        load_members(
            "callbacks:\n"
            "  - kind: noether.core.callbacks.EmaCallback\n"
            "    every_n_epochs: 1\n"
            "    target_factors: [0.5]\n"
            "    eval_callbacks: []\n"
        )
    assert str(refused.value) == (
        "older.yaml:5: callbacks[0].eval_callbacks: is no setting here: "
        "list those callbacks after this one, each with weights: ema=FACTOR"
    )


def test_a_setting_under_both_of_its_names_is_refused(shop):
    with pytest.raises(ConfigError) as refused:
        load_members(
            "callbacks:\n"
            "  - kind: noether.core.callbacks.BestMetricCallback\n"
            "    every_n_epochs: 1\n"
            "    metric_key: val/accuracy\n"
            "    source_metric_key: val/loss\n"
        )
    assert str(refused.value) == (
        "older.yaml:5: callbacks[0].source_metric_key: is an older name of metric_key, which is given too; leave it out"
    )


def test_a_resolved_configuration_loads_without_warnings(shop, digits):
    old = "{kind: noether.core.callbacks.LrCallback, every_n_updates: 5, batch_size: 3}"
    with pytest.warns(ConfigWarning, match="digits.yaml:21: callbacks.2..batch_size: has no meaning for LrCallback"):
        assert digits(("    name: only a label\n", f"  - {old}\n")) == []
    with pytest.warns(ConfigWarning):
        config = load("digits.yaml")
    Path("resolved.yaml").write_text(dump(config))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load("resolved.yaml") == config


MINE = '''
from noether import LogText, callback, every_n_epochs, log
from noether.core.callbacks import PeriodicCallback


class Speak(PeriodicCallback):
    """Says something.

    Args:
        words: What it says.
    """

    words: tuple[str, ...]

    def periodic_callback(self, state, event, interval):
        return state, (LogText(" ".join(self.words)),)


def shout(state, event, *, text: str, times: int = 2):
    """Say it louder."""
    return state, (LogText(text.upper() * times),)


@every_n_epochs(2)
def every_second(state, event, *, text: str = "hm"):
    return state, (LogText(text),)


@callback("seen", init=lambda state: 0, track=lambda seen, event: seen + event.samples, produces=("seen",))
@every_n_epochs(1)
def seen(state, event, *, scale: float = 1.0):
    return log(state, event, {"seen": state.memory("seen") * scale})
'''


@pytest.fixture
def mine(shop):
    Path("mine.py").write_text(MINE)
    yield
    sys.modules.pop("mine", None)


def texts(member, state, event):
    return [effect.text for effect in member(state, event)[1]]


def test_callbacks_of_the_user_are_named_by_their_path(mine):
    members = load_members("""\
callbacks:
  - {kind: mine.Speak, every_n_updates: 1, words: [go, on]}
  - {kind: mine.shout, every_n_epochs: 1, text: hey}
  - {kind: mine.shout, every_n_updates: 1, text: a, times: 3, name: a label}
  - {kind: mine.every_second, text: well}
  - {kind: mine.seen, scale: 2}
""")
    state = TrainState().advance(samples=4)
    update, epoch = AfterUpdate(samples=4), AfterEpoch()
    assert texts(members[0], state, update) == ["go on"]
    assert [texts(members[1], state, event) for event in (update, epoch)] == [[], []]
    assert texts(members[1], state.next_epoch(), epoch) == ["HEYHEY"]
    assert texts(members[2], state, update) == ["AAA"]
    assert texts(members[3], state.next_epoch(), epoch) == []
    assert texts(members[3], state.next_epoch().next_epoch(), epoch) == ["well"]
    state, _ = members[4](state, update)
    assert members[4](state.next_epoch(), epoch)[1][0].values == {"seen": 8.0}
    assert members[4].produces == ("seen",)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("{kind: mine.shout}", "text: is missing"),
        ("{kind: mine.shout, text: 3}", "text: 3 is not text"),
        ("{kind: mine.shout, text: a, times: 2.5}", "times: 2.5 is not a whole number"),
        ("{kind: mine.shout, text: a, tims: 2}", "tims: unknown setting; did you mean 'times'?"),
        ("{kind: mine.every_second, text: [a]}", "text: ['a'] is not text"),
        ("{kind: mine.Speak, every_n_updates: 1, words: [1]}", "words[0]: 1 is not text"),
        (
            "{kind: mine.Speak, every_n_updates: 0, words: [a]}",
            "every_n_updates: 0 is not a whole number of at least 1",
        ),
        ("{kind: mine.seen, scale: big}", "scale: 'big' is not a number"),
    ],
)
def test_their_settings_are_checked_against_their_signature(mine, entry, message):
    with pytest.raises(ConfigError) as refused:
        load_members(f"callbacks:\n  - {entry}\n")
    assert str(refused.value) == f"older.yaml:2: callbacks[0].{message}"


def test_a_function_with_a_schedule_refuses_an_interval(mine):
    with pytest.raises(ConfigError, match=r"every_second already has a schedule: unite both with \| or remove one"):
        load_members("callbacks:\n  - {kind: mine.every_second, every_n_updates: 1}\n")


def test_an_interval_of_a_callback_that_acts_once_is_ignored_with_a_warning(shop):
    kinds = ("FixedEarlyStopper", "ParamCountCallback", "DatasetStatsCallback", "HyperparamsCallback")
    entries = [f"  - {{kind: noether.core.callbacks.{kind}, every_n_epochs: 1}}\n" for kind in kinds]
    entries[0] = entries[0].replace("every_n_epochs: 1", "every_n_epochs: 1, stop_at_epoch: 3")
    with pytest.warns(ConfigWarning) as warned:
        members = load_members("callbacks:\n" + "".join(entries))
    assert [str(each.message).partition(": ")[2].partition(" has")[0] for each in warned] == [
        f"callbacks[{index}].every_n_epochs:" for index in range(4)
    ]
    assert len(members) == 4


def test_null_settings_are_left_out_without_warning(shop):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (member,) = load_members("""\
callbacks:
  - kind: noether.core.callbacks.EmaCallback
    every_n_epochs: 1
    target_factors: [0.5]
    eval_callbacks: null
    batch_size: null
    model_paths: null
""")
        (best,) = load_members("""\
callbacks:
  - kind: noether.core.callbacks.BestCheckpointCallback
    every_n_epochs: 1
    metric_key: val/accuracy
    model_name: null
    model_names: [encoder]
    tolerances: null
""")
    assert member == EMACallback(every_n_epochs=1, target_factors=(0.5,))
    assert best.model_names == ("encoder",)


OWN = """
from noether import LogText, callback, every_n_epochs
from noether.core.callbacks import PeriodicCallback


class Sample(PeriodicCallback):
    batch_size: int = 4

    def periodic_callback(self, state, event, interval):
        return state, (LogText(str(self.batch_size)),)


def named(state, event, *, settings: int = 1):
    return state, (LogText(str(settings)),)


def clashing(state, event, *, at_end: str):
    return state, ()
"""


@pytest.fixture
def own(shop):
    Path("own.py").write_text(OWN)
    yield
    sys.modules.pop("own", None)


def test_a_class_of_the_user_may_have_a_setting_ignored_elsewhere(own):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (member,) = load_members("callbacks:\n  - {kind: own.Sample, every_n_updates: 1, batch_size: 8}\n")
    assert member.batch_size == 8


def test_a_setting_without_effect_is_ignored_for_a_class_of_the_users_own_too(mine):
    with pytest.warns(
        ConfigWarning, match="batch_size: has no meaning for Speak and is left out: it iterates no dataset"
    ):
        (member,) = load_members("callbacks:\n  - {kind: mine.Speak, every_n_updates: 1, words: [a], batch_size: 8}\n")
    assert member.words == ("a",)


def test_a_setting_may_have_any_name_but_that_of_an_interval(own):
    with pytest.raises(ConfigError, match="settings: 'a' is not a whole number"):
        load_members("callbacks:\n  - {kind: own.named, settings: a}\n")
    with pytest.raises(
        ConfigError, match="the parameter at_end of the function has the name of an interval setting; rename it"
    ):
        load_members("callbacks:\n  - {kind: own.clashing, at_end: a}\n")
