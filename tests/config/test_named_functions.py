"""Functions and classes that a configuration names are written as they were read, with their settings."""

import dataclasses
import functools
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from noether.config import ConfigError, load
from noether.config.errors import InvalidValueError
from noether.config.loading import from_source
from noether.config.objects.functions import build_function, describe_function
from noether.config.serialization import dump, resolve_config
from noether.config.values import source_from_values
from noether.core.callbacks.evaluation import metric_name
from noether.core.callbacks.metric_functions import NamedMetric
from noether.core.tensors.losses import name_of

MODULE = """
from __future__ import annotations

import enum
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from noether import Effect, LogText
from noether.core.callbacks.base import CallbackBase
from noether.core.callbacks.metric_functions import MetricFunction
from torch import nn


def double(metric):
    @functools.wraps(metric)
    def wrapped(outputs, batch): return 2 * metric(outputs, batch)
    return wrapped

def through(function):
    @functools.wraps(function)
    def wrapped(*args, **kwargs): return function(*args, **kwargs)
    return wrapped

def mse(outputs, batch): return (outputs - batch[1]).square().mean()
def within(outputs, batch, tol: float = 0.1): return ((outputs - batch[1]).abs() < tol).float().flatten()
def huber(outputs, batch, *, delta: float): return nn.functional.huber_loss(outputs, batch[1], delta=delta)
def named(outputs, batch, *, name: str = "x"): return outputs.flatten()
def three(outputs, batch, third): return outputs.mean() * third
strict = double(within)
passed = through(within)
close = lambda outputs, batch: within(outputs, batch, 1.0)
loose = functools.partial(within, tol=0.5)

class Losses:
    @staticmethod
    def static(outputs, batch): return mse(outputs, batch)
    @classmethod
    def of_class(cls, outputs, batch): return mse(outputs, batch)

class Huber:
    def __init__(self, delta: float = 1.0): self.delta = delta
    def __call__(self, outputs, batch): return huber(outputs, batch, delta=self.delta)

class Module(nn.Module):
    def forward(self, outputs, batch): return mse(outputs, batch)

class Uncalled: ...

instance = Huber(2.0)
criterion = nn.CrossEntropyLoss()

def count(batch, per: int = 1): return len(batch[0]) * per

@dataclass(frozen=True)
class Act:
    function: Callable = nn.functional.relu
    size: int = 3

class Net(nn.Module):
    def __init__(self, layer: type = nn.Linear, act: Callable = nn.functional.relu, acts: tuple[Callable, ...] = (),
                 style: Act | None = None):
        super().__init__()
        self.used = (layer, act, acts, style)
        self.lin = nn.Linear(1, 1)
    def forward(self, x): return self.lin(x)

class Points(torch.utils.data.Dataset):
    def __init__(self, n: int = 4, transform: Callable | None = None, parts=()):
        self.n, self.used = n, (transform, parts)
    def __len__(self): return self.n
    def __getitem__(self, i): return torch.full((1,), float(i)), torch.full((1,), 0.4)

net = functools.partial(Net, layer=nn.Identity)
points = functools.partial(Points, n=8)
positional = functools.partial(Points, 8)

class Color(enum.Enum):
    RED = "red"
    BLUE = 2
    PLAIN = None

class Painted(Net):
    def __init__(self, color: Color, others: tuple[Color, ...] = ()):
        super().__init__()
        self.colors = (color, *others)

class Part:
    def __init__(self, function: Callable = len): self.function = function

class Watch(CallbackBase):
    metric: MetricFunction
    others: tuple[str | MetricFunction, ...] = ()
    def after_epoch(self, state, event): return state, ()

@dataclass(frozen=True)
class Ring(Effect): ...

def ring(effect, state, event, *, times: int = 1): ...

@functools.lru_cache(None)
def cached(outputs, batch): return outputs.mean()

def repeat(text, times: int): return text * times
def shout(state, event, *, words: Callable, ending: Callable | None = None): return state, (LogText(words("hey")),)
def say(state, event, *, text: str = "hello"): return state, (LogText(text),)

def quiet(callback):
    @functools.wraps(callback)
    def wrapped(state, event): return callback(state, event)
    return wrapped

quiet_say = quiet(say)
"""

CONFIG = """\
run: {name: named, handlers: {mine.Ring: HANDLER}}
model: MODEL
data:
  train: DATA
  val: {kind: mine.Points}
  batch_size: COUNT
optimizer: {kind: torch.optim.SGD, lr: 0.1}
trainer:
  max_epochs: 1
  effective_batch_size: 2
  loss: LOSS
  evaluate: {val: [loss, METRIC], every_n_epochs: 1}
callbacks:
  - CALLBACK
"""
PLACES = {"HANDLER": "mine.ring", "MODEL": "{kind: mine.Net}", "DATA": "{kind: mine.Points}", "COUNT": "mine.count",
          "LOSS": "mine.mse", "METRIC": "accuracy", "CALLBACK": "{kind: mine.say}"}  # fmt: skip


@pytest.fixture
def mine(shop):
    Path("mine.py").write_text(MODULE)
    yield shop
    sys.modules.pop("mine", None)


def configure(**changes):
    text = CONFIG
    for place, entry in {
        **changes,
        **{place: entry for place, entry in PLACES.items() if place not in changes},
    }.items():
        text = text.replace(place, entry)
    Path("named.yaml").write_text(text)
    return load("named.yaml")


def refusal(**changes):
    with pytest.raises(ConfigError) as refused:
        configure(**changes)
    return str(refused.value)


def check_round_trip(config):
    """Check that the text of a configuration reads as the same configuration, and is written again as the same text."""
    Path("again.yaml").write_text(dump(config))
    again = load("again.yaml")
    assert (again, dump(again)) == (config, dump(config))
    return again


FUNCTIONS = ["mine.strict", "mine.passed", "mine.close", "mine.loose", "mine.Losses.static", "mine.Losses.of_class",
             "mine.instance", "mine.cached"]  # fmt: skip
WITH_SETTINGS = ["{kind: mine.within, tol: 0.3}", "{kind: mine.loose, tol: 0.3}", "{kind: mine.passed, tol: 0.3}",
                 "{kind: mine.Huber, delta: 0.3}", "{kind: mine.Module}", "{kind: mine.three, third: 2}"]  # fmt: skip
FORMS = {
    "LOSS": ("{}", lambda config: build_function(config.trainer.loss)),
    "METRIC": ("{}", lambda config: build_function(config.trainer.evaluate.datasets["val"][1])),
    "DATA": ("{{kind: mine.Points, transform: {}}}", lambda config: config.data["train"].build().used[0]),
    "MODEL": ("{{kind: mine.Net, acts: [{}]}}", lambda config: config.model.build().used[2][0]),
    "CALLBACK": ("{{kind: mine.Watch, metric: {0}, others: [{0}]}}", lambda config: config.callbacks[0].build().metric),
}


def configure_everywhere(entry):
    """Return a configuration that has an entry in each place of `FORMS` that takes a function of outputs and batch."""
    return configure(**{place: form.format(entry) for place, (form, _) in FORMS.items()})


@pytest.mark.parametrize("path", FUNCTIONS)
def test_a_path_is_written_as_it_was_read_and_means_the_same_object(mine, path):
    config = configure_everywhere(path)
    again = check_round_trip(config)
    assert dump(config).count(path) == len(FORMS) + 1
    expected = functools.reduce(getattr, path.split(".")[1:], sys.modules["mine"])
    for _, read in FORMS.values():
        found, written = (getattr(used, "function", used) for used in (read(config), read(again)))
        assert found == written == expected


@pytest.mark.parametrize("entry", WITH_SETTINGS)
def test_settings_of_a_function_or_class_are_written_as_they_were_read(mine, entry):
    config = configure_everywhere(entry)
    again = check_round_trip(config)
    outputs, batch = torch.full((2, 1), 0.7), (None, torch.full((2, 1), 0.45))
    results = [read(each)(outputs, batch) for _, read in FORMS.values() for each in (config, again)]
    assert all(result.equal(results[0]) for result in results)


@pytest.mark.parametrize(("place", "entry", "text"), [
    ("COUNT", "{kind: mine.count, per: 2}", "{'kind': 'mine.count', 'per': 2}"),
    ("HANDLER", "{kind: mine.ring}", "{'kind': 'mine.ring', 'times': 1}"),
    ("MODEL", "{kind: mine.Net, layer: torch.nn.Linear}", "'layer': 'torch.nn.Linear'"),
    ("MODEL", "{kind: mine.Net, style: {function: torch.nn.functional.gelu}}",
     "'style': {'function': 'torch.nn.functional.gelu', 'size': 3}"),
    ("DATA", "{kind: mine.Points, parts: [{kind: mine.Part, function: mine.strict}]}",
     "[{'kind': 'mine.Part', 'function': 'mine.strict'}]"),
    ("MODEL", "{kind: mine.net}", "{'kind': 'mine.net', 'layer': 'torch.nn.modules.linear.Identity', "),
    ("DATA", "{kind: mine.points}", "'train': {'kind': 'mine.points', 'n': 8}"),
    ("DATA", "{kind: mine.points, n: 2}", "'train': {'kind': 'mine.points', 'n': 2}"),
    ("MODEL", "{kind: mine.Painted, color: red}", "'color': 'red'"),
    ("MODEL", "{kind: mine.Painted, color: RED, others: [PLAIN, BLUE]}", "'color': 'red', 'others': ['PLAIN', "),
])  # fmt: skip
def test_every_other_place_keeps_what_was_written(mine, place, entry, text):
    config = configure(**{place: entry})
    check_round_trip(config)
    assert text in str(resolve_config(config))


def test_objects_of_a_partial_are_made_with_what_it_binds_and_members_of_enumerations_are_these(mine):
    config = configure(MODEL="{kind: mine.net}", DATA="{kind: mine.points}")
    assert (config.model.build().used[0], config.data["train"].build().n) == (torch.nn.Identity, 8)
    painted = configure(MODEL="{kind: mine.Painted, color: red, others: [PLAIN]}").model.build()
    color = sys.modules["mine"].Color
    assert painted.colors == (color.RED, color.PLAIN)


def test_a_dataclass_in_settings_gets_the_functions_that_it_names(mine):
    config = configure(MODEL="{kind: mine.Net, style: {function: mine.strict}}")
    style = config.model.build().used[3]
    assert (type(style).__name__, style.function, style.size) == ("Act", sys.modules["mine"].strict, 3)


@pytest.mark.parametrize("entry", [
    "{kind: torch.hub.load, repo_or_dir: a, model: b}",
    "{kind: torch.jit.load, f: a}",
    "{kind: torch.package.PackageImporter, file_or_buffer: a}",
    "{kind: noether.effects.disk.files.replace_text, text: a}",
    "{kind: noether.effects.CheckpointStore, path: a}",
    "{kind: mine.functools.partial, func: mine.mse}",
])  # fmt: skip
@pytest.mark.parametrize("place", ["LOSS", "MODEL"])
def test_a_configuration_gives_no_settings_to_functions_that_run_code(mine, place, entry):
    message = refusal(**{place: FORMS[place][0].format(entry)})
    assert "named.yaml:" in message
    assert any(words in message for words in ("gets no settings", "expected a function", "is not an allowed prefix"))


def test_functions_of_torch_and_parts_of_models_take_settings(mine):
    entry = (
        "{kind: torch.nn.functional.leaky_relu, negative_slope: 0.5}, {kind: torch.nn.LeakyReLU, negative_slope: 0.5}"
    )
    acts = configure(MODEL=f"{{kind: mine.Net, acts: [{entry}]}}").model.build().used[2]
    assert [float(act(torch.tensor(-1.0))) for act in acts] == [-0.5, -0.5]


@pytest.mark.parametrize(("metric", "key"), [
    ("mine.strict", "val/strict"),
    ("mine.close", "val/close"),
    ("mine.loose", "val/loose"),
    ("mine.Losses.static", "val/static"),
    ("{kind: mine.within, tol: 0.03}", "val/within"),
    ("{kind: mine.within, tol: 0.03, name: within_3}", "val/within_3"),
    ("{kind: mine.Huber, name: huber}", "val/huber"),
    ("{kind: accuracy, name: top_1}", "val/top_1"),
    ("{kind: accuracy}", "val/accuracy"),
])  # fmt: skip
def test_a_metric_has_the_name_that_is_written(mine, metric, key):
    callback = "{kind: noether.core.callbacks.MetricCallback, every_n_epochs: 1, dataset_key: val, metric: METRIC}"
    config = configure(CALLBACK=callback, METRIC=metric)
    from noether.training.configured_callbacks import _build_evaluations

    check_round_trip(config)
    assert config.callbacks[0].build().produces == (key,)
    assert key in _build_evaluations(config)[0].produces


REFUSED = {
    "LOSS": {
        "{kind: mine.huber, delta: half}": "named.yaml:11: trainer.loss.delta: 'half' is not a number",
        "{kind: mine.huber}": "named.yaml:11: trainer.loss.delta: is missing",
        "{kind: mine.huber, dleta: 0.5}": "trainer.loss.dleta: unknown setting; did you mean 'delta'?",
        "{kind: mine.huber, delta: 1, outputs: 2}": "trainer.loss.outputs: unknown setting; known are delta",
        "{kind: mine.strict, tol: 0.3}": "trainer.loss.tol: unknown setting; known are no settings",
        "{kind: mine.Huber, dleta: 0.5}": "trainer.loss.dleta: unknown setting; did you mean 'delta'?",
        "{kind: mine.Uncalled}": "trainer.loss.kind: 'mine.Uncalled' is a class, expected a function",
        "{delta: 0.5}": "named.yaml:11: trainer.loss.kind: is missing; expected a callable",
        "mine.huber": "trainer.loss: 'mine.huber' needs the setting delta: write {kind: mine.huber, delta: ...}",
        "mine.Huber": "for an instance of the class, write {kind: mine.Huber}",
        "{kind: torch.nn.CrossEntropyLoss}": "call it in a function of yours, such as def loss(outputs, batch): return "
        "{'loss': CrossEntropyLoss()(outputs, batch[1])}",
        "[mine.mse, mine.mse]": "named.yaml:11: trainer.loss: ['mine.mse', 'mine.mse'] is a list; a single function",
        "mine.criterion": "return {'loss': CrossEntropyLoss()(outputs, batch[1])}",
    },
    "METRIC": {
        "{kind: mine.within, tol: yes}": "named.yaml:12: trainer.evaluate.val[1].tol: 'yes' is not a number",
        "{kind: mine.within, name: ''}": "trainer.evaluate.val[1].name: '' is no name for a metric",
        "{kind: mine.within, name: 3}": "trainer.evaluate.val[1].name: 3 is not text",
        "{kind: acuracy, name: a}": "val[1].kind: 'acuracy' is not 'accuracy', 'binary_accuracy', or the dotted path "
        "of a function; did you mean 'accuracy'?",
        "{kind: accuracy, k: 5}": "val[1].k: unknown setting; known are no settings",
        "{kind: mine.named, name: a}": "mine.named cannot have a parameter of that name; rename it",
        "mine.within, {kind: mine.within, tol: 0.03}": "trainer.evaluate.val: ['loss', 'within', 'within'] names a "
        "metric twice; remove one or give it another name",
    },
    "COUNT": {"{kind: mine.count, per: 1.5}": "named.yaml:6: data.batch_size.per: 1.5 is not a whole number"},
    "MODEL": {"{kind: mine.Painted, color: rad}": "named.yaml:2: model.color: 'rad' is not one of 'red', 2, PLAIN"},
    "DATA": {"{kind: mine.positional}": "data.train.kind: 'mine.positional' is of type partial, expected a dataset",
             "{kind: mine.Points, parts: [{kind: mine.mse}]}": "data.train.parts[0].kind: 'mine.mse' is a function, "
             "expected a part of another object: a class of yours, a dataset or a model; for the function itself, "
             "annotate the parameter as Callable"},
    "HANDLER": {"{kind: mine.ring, volume: 3}": "run.handlers.mine.Ring.volume: unknown setting; known are times"},
    "CALLBACK": {"{kind: noether.core.callbacks.MetricCallback, every_n_epochs: 1, dataset_key: val, metric: mine.los}":
                 "callbacks[0].metric: 'mine.los': 'mine' has no 'los'; did you mean",
                 "{kind: mine.Watch, metric: accuracy, others: [[accuracy]]}": "others[0]: ['accuracy'] is "
                 "not text or a function, given as its dotted path or as {kind: ...}",
                 "{kind: mine.Watch, metric: {kind: mine.within, tol: much}}": "named.yaml:14: callbacks[0].metric."
                 "tol: 'much' is not a number"},
}  # fmt: skip


@pytest.mark.parametrize(
    ("place", "entry", "message"),
    [(place, entry, message) for place, entries in REFUSED.items() for entry, message in entries.items()],
)
def test_wrong_settings_of_a_function_are_refused_with_file_line_and_fix(mine, place, entry, message):
    assert message in refusal(**{place: entry})


def test_a_setting_of_a_function_callback_is_the_function_that_it_names(mine):
    from noether import AfterEpoch, TrainState

    entry = "{kind: mine.shout, words: {kind: mine.repeat, times: 2}, ending: mine.close}"
    config = configure(CALLBACK=entry)
    check_round_trip(config)
    assert config.callbacks[0].build()(TrainState(), AfterEpoch())[1][0].text == "heyhey"
    assert "ending: mine.close" in dump(config)


def test_a_decorator_that_passes_no_settings_on_gets_none(mine):
    assert "callbacks[0].text: unknown setting" in refusal(CALLBACK="{kind: mine.quiet_say, text: hi}")
    from noether import AfterEpoch, TrainState

    callback = configure(CALLBACK="{kind: mine.quiet_say}").callbacks[0].build()
    assert callback(TrainState(), AfterEpoch())[1][0].text == "hello"


def values(loss="mine.mse", **trainer):
    return {
        "run": {"name": "named"},
        "model": {"kind": "mine.Net"},
        "data": {"train": {"kind": "mine.Points"}, "val": {"kind": "mine.Points"}},
        "optimizer": {"kind": torch.optim.SGD, "lr": 0.1},
        "trainer": {"max_epochs": 1, "effective_batch_size": 2, "loss": loss, **trainer},
    }


@pytest.mark.parametrize("path", [path for path in FUNCTIONS if path != "mine.Losses.of_class"])
def test_a_function_given_from_python_gets_the_path_that_imports_it(mine, path):
    configure()
    function = functools.reduce(getattr, path.split(".")[1:], sys.modules["mine"])
    if path == "mine.loose":
        assert describe_function(function) == {"kind": "mine.within", "tol": 0.5}
        return
    config = from_source(source_from_values(values(function)))
    assert config.trainer.loss == path
    assert build_function(config.trainer.loss) is function
    check_round_trip(config)


def test_a_partial_given_from_python_is_stored_as_settings(mine):
    configure()
    metric = functools.partial(sys.modules["mine"].within, tol=0.3)
    named = {"kind": metric, "name": "close"}
    config = from_source(source_from_values(values(evaluate={"val": [metric, named], "every_n_epochs": 1})))
    assert "- kind: mine.within\n      tol: 0.3\n    - kind: mine.within\n      tol: 0.3\n      name: close" in dump(
        config
    )
    check_round_trip(config)


def test_a_type_of_effect_given_from_python_is_the_key_of_its_handler(mine):
    configure()
    module = sys.modules["mine"]
    plain = source_from_values({"run": {"handlers": {module.Ring: functools.partial(module.ring, times=3)}}}).data
    assert plain == {"run": {"handlers": {"mine.Ring": {"kind": "mine.ring", "times": 3}}}}


def test_functions_that_no_path_imports_are_refused_in_one_line(mine, monkeypatch):
    configure()
    within = sys.modules["mine"].within

    def local(outputs, batch): ...

    def of_script(outputs, batch): ...

    of_script.__module__, of_script.__qualname__ = "__main__", "of_script"
    for function, reason in {
        local: "is made inside of another function or object, so config.yaml cannot name it",
        (lambda outputs, batch: outputs): "<lambda> is made inside of another function",
        of_script: "is defined in the script that runs, which a resumed run or `noether eval` cannot import: move it",
        sys.modules["mine"].Huber(3.0): "is an object that config.yaml cannot name: give its class and settings, "
        "{'kind': Huber, ...}, or define it in a module",
        functools.partial(within, 1): "binds 1 by position: bind settings by name",
    }.items():
        with pytest.raises(ConfigError, match=r"^trainer\.loss: [^\n]*$") as refused:
            source_from_values(values(function))
        assert reason in str(refused.value)


@given(st.recursive(st.sampled_from([len, torch.nn.Linear, torch.nn.functional.relu, torch.optim.SGD]),
                    lambda inner: st.builds(functools.partial, inner, bias=st.booleans())))  # fmt: skip
def test_a_described_function_is_the_one_that_its_path_imports(function):
    described = describe_function(function)
    path = described["kind"] if isinstance(described, dict) else described
    module, _, name = path.rpartition(".")
    target = function.func if isinstance(function, functools.partial) else function
    assert getattr(sys.modules[module], name) is target


def test_a_function_in_a_section_made_in_python_is_written_as_its_path(mine):
    config = configure()
    mse = sys.modules["mine"].mse
    trainer = dataclasses.replace(config.trainer, loss=mse)
    assert build_function(trainer.loss) is mse
    assert dump(dataclasses.replace(config, trainer=trainer)) == dump(config)


def test_a_partial_has_the_name_of_its_function():
    assert metric_name(functools.partial(describe_function, tol=0.3)) == "describe_function"
    assert metric_name(NamedMetric("half", describe_function)) == "half"
    assert name_of(functools.partial(describe_function)) == "noether.config.objects.functions.describe_function"


def test_a_class_given_from_python_without_a_module_is_refused():
    with pytest.raises(InvalidValueError, match=r"config\.yaml cannot name it"):
        describe_function(type("Made", (), {}))
