# ruff: noqa: E501 - a whole message stays in one piece
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from noether.config import ConfigError
from noether.config.source import apply_overrides, parse, read
from noether.config.yaml_values import MAX_NODES


def refusal(text):
    with pytest.raises(ConfigError) as caught:
        parse(text, "a.yaml")
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("1.e5", 1e5),
        (".5", 0.5),
        ("-2", -2),
        ("0123", 123),
        ("0o17", 15),
        ("0xff", 255),
        ("1_000", "1_000"),
        ("12:30", "12:30"),
        ("2024-01-01", "2024-01-01"),
        ("on", "on"),
        ("off", "off"),
        ("yes", "yes"),
        ("No", "No"),
        ("true", True),
        ("False", False),
        ("null", None),
        ("", None),
        ("~", None),
        ('"1"', "1"),
        ("!!str 5", "5"),
        (r'"\ud83d\ude80"', "\U0001f680"),
        ("-.inf", -math.inf),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text, value):
    read_value = parse(f"a: {text}", "a.yaml").data["a"]
    assert (read_value, type(read_value)) == (value, type(value))


# YAML 1.2 limits a key on the line of its value to 1024 characters, and JSON writes one character as up to 12.
@given(st.dictionaries(st.text(max_size=80), st.text(), max_size=3))
def test_any_text_that_json_escapes_is_read_as_it_is(values):
    assert parse(json.dumps({"data": values}), "a.json").data == {"data": values}


@given(st.floats(allow_nan=False))
def test_a_float_as_python_writes_it_is_a_float(value):
    assert parse(f"a: {value!r}" if math.isfinite(value) else "a: 0.0", "a").data["a"] == (
        value if math.isfinite(value) else 0
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a.yaml:1: is empty; expected sections such as `trainer:`"),
        ("- 1", "a.yaml:1: is not a mapping; expected sections such as `trainer:`"),
        ("a: 1\nb: [1", "a.yaml:2: column 6: does not parse: while parsing a flow sequence, expected ',' or ']', but got '<stream end>'"),
        ("a: 1\n  b: 2", "a.yaml:2: column 4: does not parse: mapping values are not allowed here"),
        ("a: \x01", "a.yaml:1: does not parse: the character '\\x01' is not allowed"),
        ("a: 1\nb: 2\na: 3", "a.yaml:3: a: is given twice, first in line 1"),
        ("a: !!python/object/apply:os.system [ls]", "a.yaml:1: a: the tag !!python/object/apply:os.system is refused; a configuration is plain values"),
        ("a: !!binary aGk=", "a.yaml:1: a: the tag !!binary is refused; a configuration is plain values"),
        ("a: !!int x", "a.yaml:1: a: 'x' does not fit its tag !!int"),
        ("a:\n  1: 2", "a.yaml:2: a: the key '1' is not text; put it in quotes"),
        ("a: &x {b: 1}\nc:\n  <<: *x", "a.yaml:3: c: `<<` is not part of YAML 1.2; write these settings out"),
        ("a: &x [*x]", "a.yaml:1: a[0]: recursive alias: it is part of the value it refers to"),
        ("a: *x", "a.yaml:1: column 4: does not parse: found undefined alias 'x'"),
        ("a: " + "[" * 5000, "a.yaml: is nested too deeply"),
    ],
)  # fmt: skip
def test_invalid_text_is_refused(text, message):
    assert refusal(text) == message


def test_all_problems_of_a_text_are_reported_at_once():
    assert len(refusal("a: 1\na: 2\nb: !x 1\n3: 4").splitlines()) == 3


def test_nested_aliases_cannot_exhaust_memory():
    levels = "\n".join(f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 10)}]" for n in range(1, 9))
    assert f"more than {MAX_NODES} values" in refusal(f"l0: &l0 [x, x]\n{levels}")


def test_an_alias_is_the_value_at_its_own_path():
    source = parse("a: &x {b: 1}\nc: *x", "a.yaml")
    assert source.data == {"a": {"b": 1}, "c": {"b": 1}}
    assert source.place(("c",)).line == 2


def test_unreadable_files_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits.yaml").write_bytes(b"a: \xff")
    messages = []
    for name in ("digit.yaml", ".", "digits.yaml"):
        with pytest.raises(ConfigError) as caught:
            read(name)
        messages.append(str(caught.value))
    assert messages == [
        "digit.yaml: no such file; did you mean 'digits.yaml'?",
        ".: is a directory",
        "digits.yaml: is not UTF-8 text (byte 3)",
    ]


def test_a_byte_order_mark_is_skipped(tmp_path):
    (tmp_path / "a.yaml").write_bytes(b"\xef\xbb\xbfa: 1")
    assert read(tmp_path / "a.yaml").data == {"a": 1}


def test_an_override_replaces_one_value_and_its_place():
    source = parse("a: {b: 1, c: 2}\nl:\n  - x: 1\n  - x: 2", "a.yaml")
    changed = apply_overrides(source, ["a.b=1e-3", "l.1.x={y: [1]}", "new.deep=true"])
    assert changed.data == {"a": {"b": 1e-3, "c": 2}, "l": [{"x": 1}, {"x": {"y": [1]}}], "new": {"deep": True}}
    assert str(changed.place(("l", 1, "x", "y", 0))) == "--set l.1.x={y: [1]}"
    assert str(changed.place(("l", 0, "x"))) == "a.yaml:3"
    assert source.data["a"]["b"] == 1


def test_invalid_overrides_are_refused_at_once():
    with pytest.raises(ConfigError) as caught:
        apply_overrides(parse("a: {b: 1}\nl: [1]", "a.yaml"), ["a.b", "a..b=1", "a.b.c=1", "l.3=1", "l.x=1", "a.b=[1"])
    assert str(caught.value).splitlines() == [
        "--set a.b: is not of the form key=value, such as trainer.max_epochs=20",
        "--set a..b=1: is not of the form key=value, such as trainer.max_epochs=20",
        "--set a.b.c=1: a.b: is 1, which has no settings inside",
        "--set l.3=1: l[3]: there is no such element; the list has 1, numbered from 0",
        "--set l.x=1: l.x: there is no such element; the list has 1, numbered from 0",
        "--set a.b=[1: does not parse: while parsing a flow sequence, expected ',' or ']', but got '<stream end>'",
    ]
