"""Encoding of trees: strict JSON beside tensors, read back bit for bit."""

import json
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from noether.core.tensors.tree import FrozenDict, freeze
from noether.effects.disk.encoding import decode_tree, encode_tree
from noether.effects.disk.json_numbers import json_number
from noether.testing import same

UNTIMED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

TENSORS = st.sampled_from(
    [
        torch.tensor(1.5),
        torch.tensor([math.nan, -math.inf, -0.0]),
        torch.tensor([[1, 2], [3, 4]], dtype=torch.int8),
        torch.tensor(True),
        torch.zeros(2, 0, dtype=torch.bfloat16),
        torch.tensor([2**62], dtype=torch.int64),
    ]
)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=4)
KEYS = st.one_of(TEXT, st.sampled_from(["$tensor", "$tuple", "$dict", "$number", "$", "a.b", "a", "b", "", ".", "0"]))
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), TEXT, st.sampled_from(["NaN", "Infinity", "$number"])
)
TREES = st.recursive(
    st.one_of(SCALARS, TENSORS),
    lambda inner: st.one_of(st.lists(inner, max_size=3).map(tuple), st.dictionaries(KEYS, inner, max_size=3)),
    max_leaves=12,
)


def fail_on_constant(constant):
    raise AssertionError(f"{constant} is not JSON")


def round_trip(tree):
    """Return the tree after it was written as strict JSON beside a safetensors file, and read back."""
    tensors = {}
    text = json.dumps(encode_tree(tree, tensors))
    return decode_tree(
        json.loads(text, parse_constant=fail_on_constant),
        load(save({name: tensor.clone() for name, tensor in tensors.items()})),
    )


@UNTIMED
@given(TREES)
def test_round_trip_keeps_a_tree(tree):
    assert same(round_trip(tree), freeze(tree))


@UNTIMED
@given(TREES)
def test_decoded_trees_are_immutable(tree):
    def is_immutable(value):
        if isinstance(value, dict):
            return isinstance(value, FrozenDict) and all(map(is_immutable, value.values()))
        return not isinstance(value, list) and (not isinstance(value, tuple) or all(map(is_immutable, value)))

    assert is_immutable(round_trip(tree))


def test_paths_with_equal_text_keep_separate_tensors():
    tree = {"a.b": torch.tensor(1), "a": {"b": torch.tensor(2)}, "a.b_": torch.tensor(3)}
    assert same(round_trip(tree), freeze(tree))


def test_round_trip_keeps_the_order_of_keys():
    assert list(round_trip({"b": 1, "a": 2, "$c": 3})) == ["b", "a", "$c"]


def test_tensors_are_named_by_their_paths():
    tensors = {}
    encode_tree({"ema": {"weight": torch.ones(1), "steps": (torch.zeros(1), 3)}}, tensors, "callback_states")
    assert list(tensors) == ["callback_states.ema.weight", "callback_states.ema.steps.0"]


def test_error_names_the_value_that_cannot_be_saved():
    with pytest.raises(TypeError, match=r"^ema\.decay is a set, which cannot be saved$"):
        encode_tree({"ema": {"decay": {1}}}, {})


@pytest.mark.parametrize("value", [{"$list": [1]}, {"$tuple": [], "$dict": {}}])
def test_values_that_the_encoder_never_makes_are_refused(value):
    with pytest.raises(ValueError, match="unknown entry"):
        decode_tree(value, {})


@UNTIMED
@given(st.floats())
def test_json_number_is_strict_json(value):
    shown = json.loads(json.dumps(json_number(value)), parse_constant=fail_on_constant)
    assert same(float(shown), value)
    assert isinstance(shown, str) == (not math.isfinite(value))
