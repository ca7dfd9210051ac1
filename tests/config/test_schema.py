# ruff: noqa: E501 - a whole message stays in one piece
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from noether.config import ConfigError, load, load_callbacks
from noether.config.changes import changed_settings, refuse_changes
from noether.config.schema import RunSettings
from noether.config.serialization import dump, resolve_config

ENDS = "expected exactly one of max_epochs, max_updates, max_samples"
INTERVALS = "expected exactly one of every_n_epochs, every_n_updates, every_n_samples"


def test_a_valid_configuration_loads(digits):
    assert digits() == []
    config = load("digits.yaml")
    assert config.optimizer.lr == 1e-3
    assert config.optimizer.kind.settings["betas"] == (0.9, 0.99)
    assert config.model.settings == {"width": 32, "act": "relu", "dropout": 0.5}
    assert config.data["train"].build().split == "train"
    assert config.trainer.evaluate.datasets == {"val": ("loss", "accuracy")}
    watch, say = (kind.build() for kind in config.callbacks)
    assert watch.tolerance == 3
    assert say.__name__ == "say"


EVALUATE = "evaluate: {val: [loss, accuracy], every_n_epochs: 1}"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("name: digits", "nam: digits", ["1: run.name: is missing", "1: run.nam: unknown setting; did you mean 'name'?"]),
        ("name: digits", f"name: {'ä' * 128}", ["1: run.name: has 256 bytes, and the name of a folder has at most 255"]),
        ("name: digits", "name: a/b", ["1: run.name: 'a/b' is not the name of a folder; use letters, digits, '.', '_', '-'"]),
        ("name: digits", "name: digits, seed: -1", ["1: run.seed: -1 is not a whole number of at least 0"]),
        ("name: digits", "name: digits, handlers: {shop.Net: os.system}",
         ["1: run.handlers.shop.Net: 'os.system': 'os' is not an allowed prefix (noether, torch, modules under the working directory); to allow it, pass allow=('os',), or --allow os on the command line"]),
        ("model:\n  kind: shop.Net", "model:\n  width: 3",
         ["2: model.kind: is missing; expected a subclass of torch.nn.Module, or a function annotated to return one"]),
        ("shop.Net", "shop.Net\n  width: 2.7\n  dropuot: 1",
         ["4: model.width: 2.7 is not a whole number", "5: model.dropuot: unknown setting; did you mean 'dropout'?"]),
        ("  train:", "  trian:", ["4: data.train: is missing; training uses that dataset; did you mean 'trian'?"]),
        ("  train:", "  batch_size: shop.los\n  train:", ["5: data.batch_size: 'shop.los': 'shop' has no 'los'; did you mean 'loss'?"]),
        ("  train:", "  batch_size: shop.loss\n  train:",
         ["5: data.batch_size: 'shop.loss' is a function, which takes (outputs, batch), not (batch), expected a function of one batch: a callable that is not a class, called with (batch)"]),
        ("  train:", "  batch_size: 4\n  train:", ["5: data.batch_size: 4 is not text"]),
        ("  train:", "  batch_size: {kind: shop.Digits}\n  train:",
         ["5: data.batch_size: is no dataset, but the dotted path of a function (batch) -> number of samples; rename the dataset"]),
        ("data:\n", "batch_size: shop.count\ndata:\n", ["4: batch_size: unknown setting"]),
        ("split: val", "splt: val", ["6: data.val.split: is missing", "6: data.val.splt: unknown setting; did you mean 'split'?"]),
        ("lr: 1e-3", "lr: true", ["9: optimizer.lr: True is not a number of at least 0"]),
        ("lr: 1e-3", "lr: .nan", ["9: optimizer.lr: nan is not a number of at least 0"]),
        ("betas: [0.9, 0.99]", "beta: [0.9, 0.99]", ["10: optimizer.beta: unknown setting; did you mean 'betas'?"]),
        ("betas: [0.9, 0.99]", "schedul: {}", ["10: optimizer.schedul: unknown setting; did you mean 'schedule'?"]),
        ("betas: [0.9, 0.99]", "params: []", ["10: optimizer.params: unknown setting"]),
        ("torch.optim.AdamW\n  lr: 1e-3\n  betas: [0.9, 0.99]", "torch.optim.Rprop\n  lr: 1\n  weight_decay: 0.1",
         ["10: optimizer.weight_decay: is not a setting of Rprop"]),
        ("betas: [0.9, 0.99]", "schedule: {kind: cosin}\n  groups: [{name: a, match: [x], settings: {epss: 1}}]",
         ["10: optimizer.schedule.kind: 'cosin' is not one of 'constant', 'linear', 'cosine', 'step', 'polynomial'; did you mean 'cosine'?",
          "11: optimizer.groups[0].settings.epss: is not a setting of AdamW; did you mean 'eps'?"]),
        ("max_epochs: 10", "max_epochs: ten", ["12: trainer.max_epochs: 'ten' is not a whole number of at least 1"]),
        ("max_epochs: 10", "max_epochs: 10\n  max_updates: 5", [f"13: trainer.max_updates: max_epochs and max_updates are given; {ENDS}"]),
        ("  max_epochs: 10\n", "", [f"11: trainer: no end is given; {ENDS}"]),
        ("effective_batch_size: 32", "effective_batch_size: 0", ["13: trainer.effective_batch_size: 0 is not a whole number of at least 1"]),
        ("effective_batch_size: 32", "batch_size: 32",
         ["11: trainer.effective_batch_size: is missing", "13: trainer.batch_size: unknown setting; did you mean 'max_batch_size'?"]),
        ("shop.loss", "shop.los", ["14: trainer.loss: 'shop.los': 'shop' has no 'los'; did you mean 'loss'?"]),
        (EVALUATE, "evaluate: {valid: [loss], every_n_epochs: 1}",
         ["15: trainer.evaluate.valid: data has no 'valid', it has 'train', 'val'; did you mean 'val'?"]),
        (EVALUATE, "evaluate: {val: [], every_n_epochs: 1}",
         ["15: trainer.evaluate.val: names no metric; expected for example [loss, accuracy]"]),
        (EVALUATE, "evaluate: {val: [loss, loss], every_n_epochs: 1}", ["15: trainer.evaluate.val: ['loss', 'loss'] names a metric twice; remove one"]),
        (EVALUATE, "evaluate: {val: [shop.los], every_n_epochs: 1}",
         ["15: trainer.evaluate.val[0]: 'shop.los': 'shop' has no 'los'; did you mean 'loss'?"]),
        (EVALUATE, "evaluate: {val: [loss], every_n_epoch: 1}",
         ["15: trainer.evaluate.every_n_epoch: 1 is not a list such as [loss, accuracy]; did you mean 'every_n_epochs'?",
          f"15: trainer.evaluate: no interval is given; {INTERVALS}"]),
        (EVALUATE, "evaluate: {val: [loss], every_n_epochs: 2.7}", ["15: trainer.evaluate.every_n_epochs: 2.7 is not a whole number of at least 1"]),
        (EVALUATE, "evaluate: {every_n_epochs: 1}", ["15: trainer.evaluate: names no dataset; expected for example `val: [loss, accuracy]`"]),
        (EVALUATE, "evaluate: 3", ["15: trainer.evaluate: 3 is not a mapping such as {val: [loss, accuracy], every_n_epochs: 1}"]),
        (EVALUATE, "evaluate_first: true", ["15: trainer.evaluate_first: needs the setting `evaluate`, which is missing"]),
        (EVALUATE, "device: GPU", ["15: trainer.device: 'GPU' is not a device such as 'auto', 'cpu', 'cuda' or 'cuda:1'"]),
        (EVALUATE, "nonfinite: skp", ["15: trainer.nonfinite: 'skp' is not one of 'apply', 'skip', 'raise'; did you mean 'skip'?"]),
        (EVALUATE, "clip_grad_norm: 0", ["15: trainer.clip_grad_norm: 0.0 is not a number above 0"]),
        ("- kind: shop.Watch", "- kin: shop.Watch",
         ["17: callbacks[0].kind: is missing; expected a subclass of CallbackBase, or a function (state, event) -> (state, effects)"]),
        ("every_n_epochs: 1\n    tol", "tol", ["17: callbacks[0]: expected exactly one interval"]),
        ("every_n_epochs: 1\n    tol", "every_n_epochs: 1\n    every_n_updates: 2\n    tol", ["19: callbacks[0].every_n_updates: expected exactly one interval"]),
        *((("every_n_epochs: 1\n    tol", f"every_n_epochs: {bad}\n    tol",
            [f"18: callbacks[0].every_n_epochs: {shown} is not a whole number of at least 1"]))
          for bad, shown in [("0", 0), ("-1", -1), ("2.7", 2.7), ("true", True), ("'3'", "'3'")]),
        ("tolerance: 3", "tolerence: 3", ["17: callbacks[0].tolerance: is missing", "19: callbacks[0].tolerence: unknown setting; did you mean 'tolerance'?"]),
        ("tolerance: 3", "tolerance: 3\n    dataset_key: vla", ["20: callbacks[0].dataset_key: data has no 'vla', it has 'train', 'val'; did you mean 'val'?"]),
        ("tolerance: 3", "tolerance: 3\n    metric: shop.los", ["20: callbacks[0].metric: 'shop.los': 'shop' has no 'los'; did you mean 'loss'?"]),
        ("callbacks:", "callback:", ["16: callback: unknown setting; did you mean 'callbacks'?"]),
        ("name: only a label", "nam: x", ["21: callbacks[1].nam: unknown setting; known are every_n_epochs, every_n_updates, every_n_samples, at_end"]),
        ("run: {name: digits}", "source: x", ["1: run: is missing", "1: source: unknown setting"]),
    ],
)  # fmt: skip
def test_a_problem_is_reported_with_line_setting_and_fix(digits, old, new, message):
    found = digits((old, new))
    # The list of all known settings is shown in full once.
    assert [line.split("; known are")[0] if "known are" not in "".join(message) else line for line in found] == [
        f"digits.yaml:{each}" for each in message
    ]


def test_problems_of_all_sections_are_reported_at_once_in_line_order(digits):
    found = digits(
        ("name: digits", "sed: 1, name: digits"),
        ("train: {kind: shop.Digits", "train: {kind: shop.Digit"),
        ("max_epochs: 10", "max_epochs: ten"),
        ("val: [loss, accuracy]", "vla: [loss]"),
        ("every_n_epochs: 1\n    tol", "every_n_epochs: 0\n    dataset_key: tset\n    tol"),
        overrides=["optimizer.lr=fast"],
    )
    assert [line.split(": ")[:2] for line in found] == [
        ["digits.yaml:1", "run.sed"],
        ["digits.yaml:5", "data.train.kind"],
        ["digits.yaml:12", "trainer.max_epochs"],
        ["digits.yaml:15", "trainer.evaluate.vla"],
        ["digits.yaml:18", "callbacks[0].every_n_epochs"],
        ["digits.yaml:19", "callbacks[0].dataset_key"],
        ["--set optimizer.lr=fast", "optimizer.lr"],
    ]


def test_an_overriding_end_replaces_the_end_of_the_file(digits):
    assert digits(overrides=["trainer.max_updates=7"]) == []
    config = load("digits.yaml", ["trainer.max_updates=7"])
    assert (config.trainer.max_epochs, config.trainer.max_updates) == (None, 7)
    both = digits(overrides=["trainer.max_updates=7", "trainer.max_samples=7"])
    assert both == [f"--set trainer.max_samples=7: trainer.max_samples: max_updates and max_samples are given; {ENDS}"]


def test_a_resolved_configuration_has_ordered_sections_and_defaults(digits):
    digits()
    plain = resolve_config(load("digits.yaml"))
    assert list(plain) == ["run", "model", "data", "optimizer", "trainer", "callbacks"]
    assert plain["run"] == {"name": "digits", "output": "runs", "seed": 0, "handlers": {}, "tensorboard": False}
    assert plain["optimizer"]["eps"] == 1e-8
    assert plain["callbacks"][1] == {"kind": "shop.say", "at_end": False}


AWKWARD = st.text(min_size=1) | st.sampled_from(
    ["1e-3", "on", "yes", "null", "~", "0o7", "<<", "=", "1_0", " x ", "a: b"]
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=50)
@given(
    output=AWKWARD.filter(lambda text: text.strip() and "\0" not in text),
    lr=st.floats(0, 1e300),
    act=AWKWARD,
    dropout=st.floats(allow_nan=False),
    loose=st.recursive(st.none() | st.booleans() | st.integers() | AWKWARD, lambda x: st.lists(x) | st.dictionaries(AWKWARD, x)),
    end=st.sampled_from(["max_epochs", "max_updates", "max_samples"]),
    n=st.integers(1, 10**12),
    size=st.none() | st.integers(),
    function=st.booleans(),
)  # fmt: skip
def test_a_dumped_configuration_loads_as_an_equal_one(digits, **drawn):
    from noether.config.loading import from_source
    from noether.config.source import parse

    digits()
    plain = resolve_config(load("digits.yaml"))
    source = parse(Path("digits.yaml").read_text(), "digits.yaml")
    plain["run"]["output"] = drawn["output"]
    plain["optimizer"]["lr"] = drawn["lr"]
    plain["model"] |= {"act": drawn["act"], "dropout": drawn["dropout"], "loose": drawn["loose"]}
    plain["data"]["val"]["size"] = drawn["size"]
    plain["trainer"] = {name: each for name, each in plain["trainer"].items() if name != "max_epochs"}
    plain["trainer"][drawn["end"]] = drawn["n"]
    plain["callbacks"][0]["metric"] = "shop.loss" if drawn["function"] else "accuracy"
    config = from_source(type(source)("drawn", plain, {}))
    again = from_source(parse(dump(config), "again.yaml"))
    assert again == config
    assert dump(again) == dump(config)
    assert changed_settings(config, again) == ()


def test_settings_that_a_resumed_run_may_change(digits):
    digits()
    old = load("digits.yaml")
    new = load(
        "digits.yaml",
        ["trainer.max_samples=9", "run.output=there", "trainer.device=auto", "trainer.num_workers=2",
         "trainer.evaluate.every_n_epochs=2", "callbacks.0.tolerance=5"],
    )  # fmt: skip
    refuse_changes(old, new)
    assert changed_settings(old, new) == (
        "run.output",
        "trainer.max_epochs",
        "trainer.evaluate.every_n_epochs",
        "trainer.device",
        "trainer.num_workers",
        "trainer.max_samples",
        "callbacks",
    )


def test_forbidden_changes_are_reported_at_once(digits):
    digits()
    old = load("digits.yaml")
    new = load("digits.yaml", ["trainer.max_epochs=9", "run.seed=3", "optimizer.lr=0.1", "trainer.clip_grad_norm=1"])
    with pytest.raises(ConfigError) as caught:
        refuse_changes(old, new)
    assert str(caught.value).splitlines() == [
        "--set run.seed=3: run.seed: 0 cannot become 3 in a resumed run",
        "--set optimizer.lr=0.1: optimizer.lr: 0.001 cannot become 0.1 in a resumed run",
        "--set trainer.clip_grad_norm=1: trainer.clip_grad_norm: nothing cannot become 1.0 in a resumed run",
    ]


@pytest.mark.usefixtures("shop")
def test_load_callbacks_reads_only_the_callbacks():
    Path("callbacks.yaml").write_text("callbacks:\n  - {kind: shop.say, every_n_updates: 2}\n  - {kind: shop.say}\n")
    reducer = load_callbacks("callbacks.yaml")
    assert callable(reducer)
    Path("callbacks.yaml").write_text("callbacks:\n  - {kind: shop.say, every_n_updates: 0}\n  - {kind: shop.sy}\n")
    with pytest.raises(ConfigError) as caught:
        load_callbacks("callbacks.yaml")
    assert [line.split(": ")[:2] for line in str(caught.value).splitlines()] == [
        ["callbacks.yaml:2", "callbacks[0].every_n_updates"],
        ["callbacks.yaml:3", "callbacks[1].kind"],
    ]
    Path("callbacks.yaml").write_text("callback: []\n")
    with pytest.raises(ConfigError) as caught:
        load_callbacks("callbacks.yaml")
    assert str(caught.value) == "callbacks.yaml:1: has no list of `callbacks`; did you mean 'callback'?"


def test_error_has_the_place_of_a_setting(digits):
    digits()
    config = load("digits.yaml")
    assert str(config.error(("callbacks", 0), "does not fit")) == "digits.yaml:17: callbacks[0]: does not fit"


def test_sections_can_be_constructed_in_python():
    assert RunSettings(name="digits") == RunSettings(name="digits", output="runs", seed=0)


COUNTED = """
from dataclasses import dataclass

constructed = []


@dataclass(frozen=True)
class Counted:
    step: int

    def __post_init__(self):
        constructed.append(self.step)

    def __call__(self, state, event):
        return state, ()
"""


def test_a_callback_is_constructed_once(digits, monkeypatch):
    Path("counted.py").write_text(COUNTED)
    monkeypatch.delitem(sys.modules, "counted", raising=False)
    assert digits(("  - kind: shop.say\n    name: only a label\n", "  - {kind: counted.Counted, step: 3}\n")) == []
    constructed = sys.modules["counted"].constructed
    assert constructed == [3]

    constructed.clear()
    kind = load("digits.yaml").callbacks[1]
    assert kind.build() is kind.build()
    assert constructed == [3]

    constructed.clear()
    load_callbacks("digits.yaml")
    assert constructed == [3]


READINGS = """
from dataclasses import dataclass

from noether.core.callbacks import PeriodicCallback


class OfProperty(PeriodicCallback):
    reading: str = "grad_nrom"

    @property
    def readings(self):
        return (self.reading,)

    def periodic_callback(self, state, event, interval):
        return state, ()


@dataclass(frozen=True)
class OfPlainClass:
    readings: tuple[str, ...] = ("grad_nrom",)

    def __call__(self, state, event):
        return state, ()


def of_function(state, event):
    return state, ()


of_function.readings = ("grad_nrom",)
"""

READINGS_OF_CLASS = """
from noether.core.callbacks import PeriodicCallback


class OfClass(PeriodicCallback):
    readings = ("grad_nrom",)

    def periodic_callback(self, state, event, interval):
        return state, ()
"""


@pytest.mark.parametrize(
    ("entry", "place"),
    [
        ("kind: unknown_readings.OfProperty, every_n_updates: 1", "callbacks[1]"),
        ("kind: unknown_readings.OfPlainClass", "callbacks[1]"),
        ("kind: unknown_readings.of_function", "callbacks[1]"),
        ("kind: unknown_reading_of_class.OfClass, every_n_updates: 1", "callbacks[1].kind"),
    ],
)
def test_an_unknown_reading_is_refused_with_file_and_line(digits, monkeypatch, entry, place):
    Path("unknown_readings.py").write_text(READINGS)
    Path("unknown_reading_of_class.py").write_text(READINGS_OF_CLASS)
    for module in ("unknown_readings", "unknown_reading_of_class"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    (message,) = digits(("  - kind: shop.say\n    name: only a label\n", f"  - {{{entry}}}\n"))
    assert message.startswith(f"digits.yaml:20: {place}: ")
    assert "declares the unknown reading 'grad_nrom'" in message
    assert message.endswith("; did you mean 'grad_norm'?")


@pytest.mark.parametrize(
    "several", ["{g: {kind: torch.optim.SGD}, d: {kind: torch.optim.SGD}}", "[{kind: torch.optim.SGD}]"]
)
def test_several_optimizers_are_refused_with_the_way_out(digits, several):
    digits()
    with pytest.raises(ConfigError, match=r"optimizer: lists several optimizers.*, with noether.Session\(optimizer="):
        load("digits.yaml", [f"optimizer={several}"])
