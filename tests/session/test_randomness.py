"""Seeds are a function of the run's seed and of their use, and each use has its own."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from noether.session.randomness import derive, derive_in_order, seed_all, seed_torch, update_seed

SEEDS = st.integers(-(2**63), 2**63 - 1)
USES = st.tuples(SEEDS, st.sampled_from(["update", "order", "sample", "params"]), st.lists(st.integers(0, 2**40)))


@given(USES)
def test_seed_is_a_function_with_values_that_torch_takes(use):
    seed, purpose, counts = use
    assert derive(seed, purpose, *counts) == derive(seed, purpose, *counts)
    assert 0 <= derive(seed, purpose, *counts) < 2**63


@given(USES, USES)
def test_different_uses_have_different_seeds(one, other):
    (seed, purpose, counts), (seed_2, purpose_2, counts_2) = one, other
    assert (derive(seed, purpose, *counts) == derive(seed_2, purpose_2, *counts_2)) == (one == other)


@given(SEEDS, st.integers(1, 1000))
def test_neighbours_have_different_seeds(seed, count):
    uses = [("update", count), ("update", count, 0), ("update", count + 1), ("order", count), ("update", 0, count)]
    assert len({derive(seed, *use) for use in uses}) == len(uses)


def test_seeds_stay_what_they_are():
    """A run resumed by another version of noether, Python or torch continues with the same numbers."""
    assert derive(0, "update", 0, 0) == 1_191_140_349_930_652_144
    assert derive(-1, "sample", 12, 345) == 6_463_577_174_061_727_580


@given(st.lists(st.tuples(SEEDS, st.integers(0, 200) | st.integers(0, 2**40), st.integers(0, 8)), min_size=1))
def test_seeds_of_updates_are_derived_seeds_whatever_was_asked_before(uses):
    assert [update_seed(*use) for use in uses] == [derive(seed, "update", *counts) for seed, *counts in uses]


PLACES = st.tuples(st.integers(0, 5), st.integers(0, 200) | st.integers(0, 2**40), st.integers(0, 3))


@given(SEEDS, st.lists(PLACES, min_size=1))
def test_seeds_derived_in_order_are_those_derived_alone(seed, places):
    for epoch, batch, rank in places:
        assert derive_in_order(seed, "step", batch, before=(epoch,)) == derive(seed, "step", epoch, batch)
        several = derive_in_order(seed, "step", batch, before=(epoch,), after=(rank,))
        assert several == derive(seed, "step", epoch, batch, rank)


@given(st.integers(0, 2**63 - 1))
def test_seed_torch_begins_the_stream_of_manual_seed(seed):
    torch.manual_seed(seed)
    expected = [torch.randn(3), torch.rand(2), torch.randperm(5)]
    torch.randn(1)  # leaves half of a pair of normal numbers behind
    seed_torch(seed)
    assert all(map(torch.equal, [torch.randn(3), torch.rand(2), torch.randperm(5)], expected))


def draw():
    return torch.rand(4).tolist(), np.random.rand(4).tolist(), [random.random() for _ in range(4)]  # noqa: NPY002, S311  # the global generators are tested


def draw_pairs():
    """Return numbers of which a generator computes two at once and keeps the second."""
    return np.random.standard_normal(), random.gauss()  # noqa: NPY002  # as above


@given(st.integers(0, 2**63 - 1))
def test_seed_all_begins_the_streams_of_the_public_functions(seed):
    np.random.seed(seed & 0xFFFFFFFF)  # noqa: NPY002  # as above
    random.seed(seed)
    expected = draw_pairs(), draw()[1:]
    np.random.seed(0)  # noqa: NPY002  # as above
    random.seed(0)
    draw_pairs()
    seed_all(seed)
    assert (draw_pairs(), draw()[1:]) == expected


def test_seed_all_seeds_another_generator_that_numpy_was_given():
    before = np.random.get_bit_generator()
    try:
        np.random.set_bit_generator(np.random.PCG64())
        seed_all(3)
        first = draw()
        seed_all(3)
        assert draw() == first
    finally:
        np.random.set_bit_generator(before)


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**63 - 1])
def test_seed_all_seeds_all_three(seed):
    seed_all(seed)
    first = draw()
    assert not any(later == earlier for later, earlier in zip(draw(), first, strict=True))
    seed_all(seed)
    assert draw() == first
    seed_all(seed + 1 if seed < 2**62 else seed - 1)
    assert not any(other == own for other, own in zip(draw(), first, strict=True))


def test_seed_torch_leaves_the_others_alone():
    seed_all(5)
    expected = draw()[1:]
    seed_all(5)
    seed_torch(1)
    assert draw()[1:] == expected
