"""Numbers that ranks reduce equal their definition, whatever their names, kinds and values are."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from noether.distributed.reductions import Numbers

KINDS = ("sums", "means", "largest", "smallest", "of_rank_0")
NUMBERS = st.floats(width=32)
WEIGHTS = st.sampled_from([0.0, 0.0, 1.0, 3.0, 0.5])


@st.composite
def tables(draw):
    """Return the numbers of each rank, which have the same names and kinds."""
    kinds = draw(st.dictionaries(st.text("abc ,;", max_size=3), st.sampled_from(KINDS), max_size=6))
    ranks = []
    for _ in range(draw(st.integers(1, 4))):
        own = {kind: {} for kind in KINDS}
        for name in draw(st.permutations(list(kinds))):
            number = draw(NUMBERS)
            own[kinds[name]][name] = (number, draw(WEIGHTS)) if kinds[name] == "means" else number
        ranks.append(own)
    return ranks


def define(kind, values):
    """Return what the values of all ranks have to give."""
    if kind == "of_rank_0":
        return values[0]
    if kind in {"largest", "smallest"}:
        return math.nan if any(map(math.isnan, values)) else (max if kind == "largest" else min)(values)
    if kind == "means":
        present = [(value, weight) for value, weight in values if weight > 0]
        total = define("sums", [weight for _, weight in present])
        return define("sums", [value * weight for value, weight in present]) / total if present else math.nan
    total = 0.0
    for value in values:
        total += value
    return total


@given(ranks=tables())
def test_reductions_equal_their_definition(ranks):
    own = [Numbers(**each) for each in ranks]
    assert len({numbers.describe() for numbers in own}) == 1
    table = np.stack([numbers.pack() for numbers in own])
    results = [numbers.reduce(table) for numbers in own]
    expected = {name: define(kind, [each[kind][name] for each in ranks]) for kind in KINDS for name in ranks[0][kind]}
    for result in results:
        assert result.keys() == expected.keys()
        for name, value in expected.items():
            assert np.array_equal(result[name], value, equal_nan=True), name


def test_numbers_of_other_names_or_kinds_differ_in_their_description():
    given_numbers = [{kind: {"a": (1.0, 1.0) if kind == "means" else 1.0}} for kind in KINDS]
    given_numbers += [{"sums": {"b": 1.0}}, {}]
    assert len({Numbers(**numbers).describe() for numbers in given_numbers}) == len(given_numbers)


@pytest.mark.parametrize("weight", [-1.0, math.nan])
def test_a_weight_without_meaning_is_refused(weight):
    with pytest.raises(ValueError, match="the weight of mse is"):
        Numbers(means={"mse": (1.0, weight)})


def test_two_numbers_of_one_name_are_refused():
    with pytest.raises(ValueError, match="twice: a"):
        Numbers(sums={"a": 1.0, "b": 1.0}, largest={"a": 1.0})
