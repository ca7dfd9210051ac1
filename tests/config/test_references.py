"""References such as `${trainer.max_epochs}` and `${env:NAME}` in a configuration."""

import copy
import json
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import noether
from noether.config import ConfigError, load, load_callbacks
from noether.config.references import escape_references, resolve_references
from noether.config.serialization import dump, resolve_config
from noether.config.source import Source, parse
from noether.config.values import source_from_values

ENVIRONMENT = {"NAME": "seven", "COUNT": "7", "EMPTY": "", "OFF": "false", "WORD": "null", "HOME": "/home/me"}


def resolve(text, **environment):
    return resolve_references(parse(text, "a.yaml"), environment=ENVIRONMENT | environment).data


def refusal(text):
    with pytest.raises(ConfigError) as refused:
        resolve(text)
    return str(refused.value)


TEXTS = st.text(alphabet="${}ab.:,\\ '", max_size=12)
SCALARS = st.none() | st.booleans() | st.integers(-9, 9) | st.floats(allow_nan=False) | TEXTS
TREES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3)
)


@given(TREES)
def test_escaped_values_resolve_to_themselves(tree):
    data = {"value": tree}
    assert resolve_references(Source("", escape_references(data), {})).data == data


@given(TREES, st.lists(st.sampled_from(["a", "b", "c"]), max_size=3))
def test_a_reference_stands_for_the_value_that_is_written(tree, path):
    inner = escape_references(tree)
    for key in reversed(path):
        inner = {key: inner}
    data = {"to": inner, "direct": f"${{{'.'.join(['to', *path])}}}", "chain": "${direct}", "list": ["${chain}"]}
    before = copy.deepcopy(data)
    resolved = resolve_references(Source("", data, {})).data
    assert (resolved["direct"], resolved["chain"], resolved["list"]) == (tree, tree, [tree])
    assert data == before
    assert type(resolved["direct"]) is type(tree)


@pytest.mark.parametrize(("written", "value"), [
    ("${a}", 3),
    ("${ a }", 3),
    ("x${a}y${a}", "x3y3"),
    ("${s.on} ${s.none}", "true null"),
    ("${s.list.1}", 5),
    ("${s.list[1]}", 5),
    ("${s.list}", [4, 5]),
    ("${.beside}", "b"),
    ("${..a}", 3),
    ("${s.inner.${s.key}}", 6),
    ("${s.again.deep}", 6),
    ("${env:NAME}", "seven"),
    ("${oc.env:NAME}", "seven"),
    ("${env:NOT,else}", "else"),
    ("${oc.env:NOT, else }", "else"),
    ("${env:NOT,'a, b '}", "a, b "),
    ("${env:NOT,}", ""),
    ("${env:EMPTY,else}", ""),
    ("${env:NOT,null}", None),
    ("${env:NOT,${a}}", 3),
    ("${env:NOT,${env:NAME}}", "seven"),
    ("${env:NOT,${a}x}", "3x"),
    ("${env:${s.variable}}", "seven"),
    ("${env:HOME}/runs", "/home/me/runs"),
    ("${env:NOT,http://host:80}", "http://host:80"),
    ("$${a}", "${a}"),
    ("$$${a}", "$${a}"),
    ("$a {a} $ {a} }", "$a {a} $ {a} }"),
    ("${s.literal}", "${a}"),
])  # fmt: skip
def test_a_reference_resolves_to_the_value_that_it_names(written, value):
    section = {"on": True, "none": None, "list": [4, 5], "inner": {"deep": 6}, "key": "deep", "again": "${s.inner}",
               "variable": "NAME", "literal": "$${a}", "beside": "b", "value": written}  # fmt: skip
    found = resolve(json.dumps({"a": 3, "s": section}))["s"]["value"]
    assert found == value


@pytest.mark.parametrize(("written", "message"), [
    ("${output_path}", "a.yaml:2: s.value: ${output_path}: nothing is written at output_path; known are epochs, s"),
    ("${epoch}", "${epoch}: nothing is written at epoch; did you mean 'epochs'?"),
    ("runs/${s.lst}", "${s.lst}: nothing is written at s.lst; did you mean 'list'?"),
    ("${s.list.2}", "${s.list.2}: nothing is written at s.list[2]; the list has 2, numbered from 0"),
    ("${epochs.more}", "${epochs.more}: nothing is written at epochs.more"),
    ("${s.value}", "${s.value}: refers to itself: s.value -> s.value"),
    ("${s.other}", "${s.other}: refers to itself: s.other -> s.value -> s.other"),
    ("${s}", "${s}: refers to itself"),
    ("${env:NAMES}", "has no variable 'NAMES'; did you mean 'NAME'?; set it, or write a default: ${env:NAMES,default}"),
    ("${now:%Y}", "${now:%Y}: 'now' is not known; write ${section.setting} or ${env:NAME}, and compute other values"),
    ("${oc.decode:x}", "'oc.decode' is not known"),
    ("${}", "${}: is no reference"),
    ("${a..b}", "${a..b}: is no reference"),
    ("${....a}", "${....a}: is no reference"),
    ("${epochs", "${epochs: the brace is not closed; write }, or $${ for the text ${"),
    ("x ${s.list}", "${s.list}: is a list, which cannot be a part of a text"),
    ("${a.${b", "the brace is not closed"),
])  # fmt: skip
def test_a_reference_that_stands_for_nothing_is_refused_with_file_line_and_fix(written, message):
    text = f"epochs: 3\ns: {{list: [1, 2], other: '${{s.value}}', value: {json.dumps(written)}}}"
    assert message in refusal(text)
    assert refusal(text).startswith("a.yaml:2: s.")


def test_every_wrong_reference_is_reported_at_once():
    assert refusal("a: ${x}\nb: ${env:NO}\nc: ${b}\n").splitlines() == [
        "a.yaml:1: a: ${x}: nothing is written at x; known are a, b, c",
        "a.yaml:2: b: ${env:NO}: the environment has no variable 'NO'; set it, or write a default: ${env:NO,default}",
    ]


MANY = [
    "\n".join(["a0: [x, x]", *(f"a{n + 1}: ['${{a{n}}}', '${{a{n}}}']" for n in range(40))]),
    "\n".join(["a0: xxxxxxxx", *(f"a{n + 1}: ${{a{n}}}${{a{n}}}" for n in range(60))]),
    "\n".join(["a0: x", *(f"a{n + 1}: {{b: '${{a{n}}}'}}" for n in range(300))]),
    "\n".join([*(f"a{n}: ${{a{n + 1}}}" for n in range(300)), "a300: 1"]),
    f"a: {'${' * 2000}b{'}' * 2000}",
    f"a: {'${' * 2000}",
]  # fmt: skip


def test_a_key_is_no_reference():
    assert refusal("a: {'${b}': 1}\nb: c") == (
        "a.yaml:1: a.${b}: is a key, which cannot be a reference; write the name itself"
    )


@pytest.mark.parametrize("text", MANY, ids=["values", "text", "levels", "chain", "closed", "open"])
def test_references_do_not_take_all_memory(text):
    assert "too many" in refusal(text) or "too deeply" in refusal(text)


def test_a_long_text_of_dollars_is_read_in_one_pass():
    text = f"{'{' * 99}{'$' * 300_000} }} {'$' * 300_000}"
    assert resolve(f"a: '{text}'") == {"a": text}


CONFIG = """\
vars: {width: 8, act: gelu}
run: {name: '${env:NAME}', output: 'out/${run.name}', seed: '${env:COUNT}'}
model: {kind: shop.Net, width: '${vars.width}', act: '${vars.act}', dropout: '${env:DROPOUT,0.5}'}
data:
  train: {kind: shop.Digits, split: train, size: '${env:SIZE,null}'}
  val: {kind: '${data.train.kind}', split: val}
optimizer: {kind: torch.optim.SGD, lr: 0.1}
trainer:
  max_epochs: 5
  effective_batch_size: 4
  loss: shop.loss
  compile: ${env:OFF}
callbacks:
  - kind: shop.Watch
    every_n_epochs: ${trainer.max_epochs}
    tolerance: ${.every_n_epochs}
"""


@pytest.fixture
def environment(shop, monkeypatch):
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    Path("a.yaml").write_text(CONFIG)
    return monkeypatch


def test_references_are_resolved_after_overrides_and_written_as_values(environment):
    config = load("a.yaml", ["trainer.max_epochs=9", "model.act=${run.name}"])
    assert (config.run.name, config.run.output, config.run.seed) == ("seven", "out/seven", 7)
    assert config.model.settings == {"width": 8, "act": "seven", "dropout": 0.5}
    assert (config.trainer.compile, config.data["train"].settings) == (
        False,
        {"split": "train", "fractions": (0.8, 0.2)},
    )
    assert config.callbacks[0].settings["tolerance"] == 9
    for name in ENVIRONMENT:
        environment.delenv(name)
    Path("again.yaml").write_text(dump(config))
    assert "$" not in dump(config)
    assert load("again.yaml") == config


def test_a_variable_is_a_text_where_the_setting_is_a_text(environment):
    environment.setenv("NAME", "123")
    config = load("a.yaml")
    assert (config.run.name, type(config.run.name)) == ("123", str)


@pytest.mark.parametrize(("old", "new", "message"), [
    ("'${env:COUNT}'", "'${env:NAME}'",
     "a.yaml:2: run.seed: 'seven' is not a whole number of at least 0 (written as ${env:NAME})"),
    ("${trainer.max_epochs}", "${data.train.split}",
     "a.yaml:15: callbacks[0].every_n_epochs: 'train' is not a whole number of at least 1 (written as ${data.train.s"),
    ("'${data.train.kind}'", "'${trainer.loss}'", "a.yaml:6: data.val.kind: 'shop.loss' is a function, expected a "),
    ("act: gelu", "act: gelu, depth: 2", "a.yaml:1: vars.depth: no reference reads it; write ${vars.depth} where"),
    ("'${vars.width}'", "${vars.width}", "put a reference in quotes: '${...}'"),
    ("seed: '${env:COUNT}'}", "seed: '${count}'}\ncount: 7",
     "a.yaml:3: count: is no section; values that only references read belong in vars: write ${vars.count} for them"),
    ("${.every_n_epochs}", "${.every_n_epoch}",
     "a.yaml:16: callbacks[0].tolerance: ${.every_n_epoch}: nothing is written at callbacks[0].every_n_epoch; did you"),
])  # fmt: skip
def test_a_value_of_another_type_is_reported_at_the_reference(environment, old, new, message):
    assert old in CONFIG
    Path("a.yaml").write_text(CONFIG.replace(old, new))
    with pytest.raises(ConfigError) as refused:
        load("a.yaml")
    assert message in str(refused.value)


def test_a_reference_may_choose_the_value_that_it_reads():
    text = "vars: {size: small, small: 8, large: 64}\nwidth: ${vars.${vars.size}}"
    assert resolve_references(parse(text, "a.yaml")).data == {"width": 8}


def test_the_error_of_an_override_names_the_override(environment):
    with pytest.raises(ConfigError, match=r"^--set run\.seed=\$\{run\.sed\}: run\.seed: \$\{run\.sed\}: nothing is"):
        load("a.yaml", ["run.seed=${run.sed}"])


def test_only_the_callbacks_of_a_file_for_another_loop_are_resolved(environment):
    Path("callbacks.yaml").write_text(
        "other: ${env:NOT}\nevery: 2\ncallbacks:\n"
        "  - {kind: noether.core.callbacks.LrCallback, every_n_updates: '${every}'}\n"
    )
    assert load_callbacks("callbacks.yaml").members[0].every_n_updates == 2


MODULE = """
import torch
class Points(torch.utils.data.Dataset):
    def __len__(self): return 4
    def __getitem__(self, i): return torch.full((1,), float(i)), torch.full((1,), 0.4)
class Net(torch.nn.Linear):
    def __init__(self, note: str): super().__init__(1, 1)
def mse(outputs, batch): return (outputs - batch[1]).square().mean()
"""


def test_a_run_from_python_resumes_without_the_environment(environment):
    Path("mine.py").write_text(MODULE)
    config = {
        "vars": {"end": 2},
        "run": {"name": "r", "output": "runs"},
        "model": {"kind": "mine.Net", "note": "$${plain} ${env:NAME}"},
        "data": {"train": {"kind": "mine.Points"}},
        "optimizer": {"kind": "torch.optim.SGD", "lr": 0.1},
        "trainer": {"max_epochs": "${vars.end}", "effective_batch_size": 4, "loss": "mine.mse"},
    }
    try:
        run = noether.train(config, output="${odd}")
        assert run.directory.parent == Path("${odd}/r")
        environment.delenv("NAME")
        assert noether.train(resume=run.directory, overrides=["trainer.max_epochs=3"]).state.iteration.epoch == 3
        assert resolve_config(load(run.directory / "config.yaml"))["model"]["note"] == "${plain} seven"
    finally:
        sys.modules.pop("mine", None)
    with pytest.raises(ConfigError, match=r"^run\.seed: \$\{run\.sede\}: nothing is written at run\.sede; did you"):
        resolve_references(source_from_values({"run": {"seed": "${run.sede}", "name": "r"}}))
