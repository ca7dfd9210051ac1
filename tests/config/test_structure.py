from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from noether.config import ConfigError
from noether.config.source import parse
from noether.config.structure.construction import arguments
from noether.config.structure.converter import make_converter, structure
from noether.config.structure.signatures import parameters
from noether.core.errors import check_whole, raise_problems


@dataclass(frozen=True, kw_only=True)
class Inner:
    size: int
    mode: Literal["higher", "lower"] = "higher"

    def __post_init__(self):
        raise_problems([check_whole("size", self.size)])


@dataclass(frozen=True, kw_only=True)
class Outer:
    inner: Inner
    count: int = 1
    rate: float | None = None
    names: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self):
        raise_problems([check_whole("count", self.count)])


def problems(text, kind):
    found = []
    structure(parse(text, "a.yaml"), (), kind, found)
    return str(ConfigError(found)).splitlines()


PLAIN = [0, 1, -3, 2.0, 2.7, True, False, "3", "", "true", None, [], [1], {}, {"a": 1}]


@pytest.mark.parametrize("value", PLAIN)
@pytest.mark.parametrize("kind", [int, float, str, bool, list[int], dict[str, int]])
def test_no_value_is_converted(value, kind):
    origin = getattr(kind, "__origin__", kind)
    fits = type(value) is origin or (kind is float and type(value) is int)
    try:
        made = make_converter().structure(value, kind)
    except ValueError:
        assert not fits
    else:
        assert fits
        assert made == value
        assert type(made) is origin


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(), st.lists))
def test_any_takes_plain_values_as_they_are(value):
    assert make_converter().structure(value, Any) is value


@given(st.one_of(st.booleans(), st.integers(-3, 3), st.floats(-3, 3), st.text("123", max_size=2), st.none()))
def test_a_union_takes_its_members_and_keeps_their_type(value):
    made = make_converter().structure(value, float | int | str | bool | None)
    assert (made, type(made)) == (value, type(value))


@pytest.mark.parametrize(
    ("value", "kind", "made"),
    [
        ([1, 2], tuple[int, ...], (1, 2)),
        ([1, "a"], tuple[int, str], (1, "a")),
        ([1], Sequence[int], (1,)),
        ([1, 1], set[int], {1}),
        ("a/b", Path, Path("a/b")),
        ({"a": [1]}, Mapping[str, tuple[int, ...]], {"a": (1,)}),
        (None, int | None, None),
    ],
)
def test_containers(value, kind, made):
    assert make_converter().structure(value, kind) == made


def test_messages_of_values_that_do_not_fit():
    @dataclass(frozen=True)
    class All:
        a: int | None
        b: bool
        c: str
        d: Literal["high", "low"]
        e: tuple[int, str]
        f: int | str
        g: bytes
        h: Mapping[str, float]
        i: Literal[1]
        j: float

    text = "a: 2.7\nb: 1\nc: 3\nd: hig\ne: [1]\nf: 1.5\ng: x\nh:\n  k: x\ni: true\nj: 1" + "0" * 400
    assert problems(text, All) == [
        "a.yaml:1: a: 2.7 is not a whole number",
        "a.yaml:2: b: 1 is not true or false",
        "a.yaml:3: c: 3 is not text",
        "a.yaml:4: d: 'hig' is not one of 'high', 'low'; did you mean 'high'?",
        "a.yaml:5: e: [1] has 1 elements, not 2",
        "a.yaml:6: f: 1.5 is not a whole number or text",
        "a.yaml:7: g: 'x' is not something that YAML can hold",
        "a.yaml:9: h.k: 'x' is not a number",
        "a.yaml:10: i: True is not one of 1",
        f"a.yaml:11: j: 1{'0' * 400} is not a number",
    ]


def test_every_problem_is_reported_at_once_with_its_line():
    text = "inner:\n  size: 0\n  mod: lower\ncount: two\nrate: fast\nnames:\n  a: 1\n  b: x\nname: x\n"
    assert problems(text, Outer) == [
        "a.yaml:2: inner.size: 0 is not a whole number of at least 1",
        "a.yaml:3: inner.mod: unknown setting; did you mean 'mode'?",
        "a.yaml:4: count: 'two' is not a whole number of at least 1",
        "a.yaml:5: rate: 'fast' is not a number",
        "a.yaml:8: names.b: 'x' is not a whole number",
        "a.yaml:9: name: unknown setting; did you mean 'names'?",
    ]


def test_missing_and_out_of_range_settings_are_reported_together():
    assert problems("count: 0\ninner: {}", Outer) == [
        "a.yaml:1: count: 0 is not a whole number of at least 1",
        "a.yaml:2: inner.size: is missing",
    ]
    assert problems("count: 0", Outer) == [
        "a.yaml:1: inner: is missing",
        "a.yaml:1: count: 0 is not a whole number of at least 1",
    ]


def test_an_error_of_a_constructor_is_a_problem_of_the_object():
    @dataclass(frozen=True)
    class Picky:
        a: int

        def __post_init__(self):
            raise KeyError("inside")

    assert problems("a: 1", Picky) == ["a.yaml:1: KeyError: 'inside'"]


def test_settings_are_checked_by_signature_alone():
    def make(
        width: int,
        loose,
        rate: float = 1,
        pair: tuple[int, int] = (1, 2),
        odd=object,
        hidden: "Nowhere" = None,  # noqa: F821 - as if it were imported for type checkers only
    ):
        return width, loose, rate, pair, odd, hidden

    settings, errors = arguments(make_converter(), make, {"width": 3, "loose": {"a": [1]}})
    assert settings == {"width": 3, "loose": {"a": [1]}, "rate": 1.0, "pair": (1, 2)}
    assert errors == []
    assert arguments(make_converter(), make, {"width": 3, "loose": 1, "hidden": [1]})[0]["hidden"] == [1]
    assert [str(each) for each in arguments(make_converter(), make, {"widht": True})[1]] == [
        "is missing",
        "is missing",
        "unknown setting; did you mean 'width'?",
    ]


def test_a_function_with_keyword_arguments_accepts_any_setting():
    def make(width: int = 1, **others):
        return width, others

    assert arguments(make_converter(), make, {"height": [2]}) == ({"width": 1, "height": [2]}, [])
    assert list(parameters(make)) == ["width"]
