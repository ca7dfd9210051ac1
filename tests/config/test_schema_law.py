"""Laws of the JSON schema: the loader accepts only what is valid, and no number out of a range of `noether help`."""

import copy
import json
import warnings

import jsonschema
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from noether.config import ConfigError
from noether.config.compatibility import SECTIONS, TRAINER, TRANSLATIONS
from noether.config.descriptions import PREFIX, describe, known_kinds
from noether.config.json_schema import make_schema
from noether.config.loading import from_source
from noether.config.reference import walk
from noether.config.source import parse
from noether.config.trainer_settings import ENDS
from noether.core.schedules.schedule import INTERVALS

VALIDATOR = jsonschema.Draft202012Validator(make_schema())
CALLBACKS = {name: describe(f"{PREFIX}.{name}") for name in sorted(known_kinds())}
DIGITS = {"kind": "noether.examples.digits.Digits", "split": "val"}
LOSS = "noether.examples.digits.cross_entropy"
BASE = {
    "run": {"name": "law", "handlers": {}},
    "model": {"kind": "torch.nn.Linear", "in_features": 2, "out_features": 1},
    "data": {"train": DIGITS, "val": DIGITS},
    "optimizer": {
        "kind": "torch.optim.AdamW",
        "lr": 0.1,
        "schedule": {"kind": "cosine", "warmup_updates": 2},
        "groups": [{"name": "bias", "match": ["*.bias"]}],
    },
    "trainer": {
        "max_epochs": 3,
        "effective_batch_size": 4,
        "loss": LOSS,
        "evaluate": {"every_n_epochs": 1, "val": ["loss"]},
    },
    "callbacks": [],
}
TEXTS = [
    *("", "x", "a/b", "auto", "cuda:1", "disabled", "default", "loss", "accuracy", "cosine", "linear", "step", "fp16"),
    *("stop", "warn", "skip", "shard", "events", "offline", "torch.utils.data.RandomSampler", "torch.optim.SGD"),
    *("${trainer.effective_batch_size}", "$${x}", "${env:NO_SUCH,3}", LOSS, DIGITS["kind"], f"{PREFIX}.LrCallback"),
]
NUMBERS = st.integers(-2, 3) | st.sampled_from([2**63 - 1, 2**63, 2**1023, 0.5, 1.0, 1e-300]) | st.floats(width=32)
SCALARS = st.none() | st.booleans() | NUMBERS | st.sampled_from(TEXTS)
SECTION_LIKE = [DIGITS, {"val": ["loss"], "every_n_updates": 2}, {"kind": LOSS}, {"kind": "step"}, {"path": "a.pt"}]
KEYS = st.sampled_from(["kind", "path", "name", "val", "every_n_epochs", "x"])
VALUES = (
    SCALARS
    | st.lists(SCALARS, max_size=2)
    | st.dictionaries(KEYS, SCALARS, max_size=2)
    | st.sampled_from([*SECTION_LIKE, [["loss"]], [{"kind": f"{PREFIX}.EtaCallback", "every_n_updates": 1}]])
)
TYPED = {
    "whole number": st.integers(-1, 5),
    "number": st.integers(-1, 5) | st.floats(-1, 5),
    "true or false": st.booleans(),
    "text": st.sampled_from(["x", "runs", "cpu"]),
    "list of text": st.lists(st.sampled_from(["*.bias", "x"]), max_size=2),
    "list of number": st.lists(st.floats(0, 1), max_size=2),
    "list of whole number": st.lists(st.integers(0, 3), max_size=2),
}


def values_of(kind):
    """Return a strategy for values: those of a type in words, and others."""
    choices = st.sampled_from(kind.split(" | ")) if " | " in kind else st.nothing()
    return TYPED.get(kind, st.nothing()) | choices | VALUES


def path_of(name):
    return tuple({"NAME": "val", "N": 0, "0": 0}.get(key, key) for key in name.split("."))


def values_by_path():
    """Return the strategy for the values of each setting by its path, of unknown and of older names too."""
    known = {}
    for entry in walk():
        known[path_of(entry.name)] = values_of(entry.setting.type)
        if entry.settings:
            known[*path_of(entry.name), "unknown"] = VALUES
    for translation, section in ((TRAINER, ("trainer",)), (SECTIONS, ())):
        for name in names_of(translation):
            known.setdefault((*section, name), VALUES)
    return known


def names_of(translation):
    return (*translation.renamed, *translation.values, *translation.ignored, *translation.replaced)


VALUES_BY_PATH = values_by_path()


def set_at(data, path, value):
    """Set a value, with the sections around it, and remove another end or interval, of which there may be one."""
    *sections, key = path
    for each in sections:
        inner = data[each] if isinstance(data, list) or each in data else None
        if not isinstance(inner, (dict, list)) or not inner:
            inner = data[each] = {}
        data = inner
    for names in (ENDS, INTERVALS):
        for name in names if key in names and value is not None else ():
            data.pop(name, None)
    data[key] = value


@st.composite
def configurations(draw):
    data = copy.deepcopy(BASE)
    for path in draw(st.lists(st.sampled_from(sorted(VALUES_BY_PATH, key=str)), min_size=1, max_size=3)):
        try:
            set_at(data, path, copy.deepcopy(draw(VALUES_BY_PATH[path])))
        except (TypeError, IndexError, AttributeError):
            assume(False)  # an earlier value is no section
    return data


@st.composite
def configured_callbacks(draw):
    description = CALLBACKS[draw(st.sampled_from([*CALLBACKS]))]
    known = dict.fromkeys((name for each in TRANSLATIONS.values() for name in names_of(each)), VALUES)
    known |= {"unknown": VALUES, "name": VALUES, "kind": VALUES}
    known |= {each.name: values_of(each.type) for each in description.settings}
    entry = dict(yaml.safe_load(description.yaml)[0])
    for key in draw(st.lists(st.sampled_from(sorted(known)), min_size=1, max_size=2)):
        set_at(entry, (key,), draw(known[key]))
    return BASE | {"callbacks": [entry]}


def loads(data):
    """Return whether the loader accepts a configuration, which it reads as YAML."""
    text = json.dumps(data).replace("Infinity", ".inf").replace("NaN", ".nan")  # as YAML writes them
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            from_source(parse(text, "law.yaml"))
        except ConfigError:
            return False
    return True


def check_law(strategy, examples):
    accepted = []

    @settings(max_examples=examples)
    @given(strategy)
    def check(data):
        if loads(data):
            accepted.append(data)
            assert VALIDATOR.is_valid(data)

    check()
    if len(accepted) <= examples / 10:  # rarely, by chance
        check()
    assert len(accepted) > examples / 10


def test_a_configuration_that_the_loader_accepts_is_valid():
    check_law(configurations(), examples=80)


def test_a_callback_that_the_loader_accepts_is_valid():
    check_law(configured_callbacks(), examples=40)


def described_ranges():
    """Return the path of each number with a range, its callback if it is one of its settings, and the range."""
    numbers = [(entry.name, None, entry.setting.bounds) for entry in walk()]
    for name, description in CALLBACKS.items():
        numbers += [(f"callbacks.0.{each.name}", name, each.bounds) for each in description.settings]
    return [(path_of(path), callback, bounds) for path, callback, bounds in numbers if bounds]


RANGES = described_ranges()
LIMITS = {
    "at least": lambda limit: st.integers(limit - 3, limit - 1),
    "above": lambda limit: st.integers(limit - 3, limit),
    "at most": lambda limit: st.integers(limit + 1, limit + 3),
    "below": lambda limit: st.integers(limit, limit + 3),
}


@settings(max_examples=25)
@given(st.data())
def test_a_number_out_of_the_described_range_is_refused_by_both(data):
    path, callback, words = data.draw(st.sampled_from(RANGES))
    word, _, text = data.draw(st.sampled_from(words.removeprefix("each ").split(" and "))).rpartition(" ")
    number = data.draw(LIMITS[word](2**63 if text == "2**63" else int(text)))
    configuration = copy.deepcopy(BASE)
    if callback is not None:
        configuration["callbacks"] = yaml.safe_load(CALLBACKS[callback].yaml)
    assert VALIDATOR.is_valid(configuration)
    set_at(configuration, path, [number] if words.startswith("each ") else number)
    assert not loads(configuration)
    assert not VALIDATOR.is_valid(configuration)
