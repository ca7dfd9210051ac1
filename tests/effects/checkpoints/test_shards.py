"""Shards: which rank writes what is a function of shapes, placements and ranks, and every element is written once."""

import itertools
import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from noether.effects.checkpoints.shards import Region, assign_regions, split_regions, whole_region

SHAPES = st.lists(st.integers(0, 6), max_size=3).map(tuple)


@st.composite
def layouts(draw):
    """Draw the shapes of a tensor and of a mesh, and which dimension of the tensor each dimension of the mesh cuts."""
    shape = draw(SHAPES)
    mesh = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple))
    dimension = st.none() | st.sampled_from(range(len(shape))) if shape else st.none()
    return shape, mesh, tuple(draw(dimension) for _ in mesh)


@given(layouts(), st.randoms(use_true_random=False))
def test_every_element_of_a_tensor_is_written_once(layout, random):
    shape, mesh, dimensions = layout
    ranks = list(range(math.prod(mesh)))
    regions = split_regions(shape, mesh, tuple(ranks), dimensions)
    count = torch.zeros(shape, dtype=torch.int64)
    for region in regions.values():
        assert 0 not in region.shape
        count[region.slices_in(whole_region(shape))] += 1
    assert torch.equal(count, torch.ones(shape, dtype=torch.int64))
    moved = random.sample(ranks, len(ranks))  # the ranks may be anywhere in the mesh
    assert split_regions(shape, mesh, tuple(moved), dimensions) == {moved[rank]: each for rank, each in regions.items()}


@given(st.integers(0, 9), st.integers(1, 5))
def test_chunks_are_those_of_torch(size, count):
    chunks = [Region((0,), (size,)).chunk(0, index, count).shape[0] for index in range(count)]
    expected = [len(each) for each in torch.arange(size).chunk(count)] if size else []
    assert [each for each in chunks if each] == expected


@given(SHAPES, st.data())
def test_the_common_part_of_regions_is_in_both(shape, data):
    def region():
        begins = tuple(data.draw(st.integers(0, size)) for size in shape)
        return Region(
            begins, tuple(data.draw(st.integers(0, size - at)) for at, size in zip(begins, shape, strict=True))
        )

    def elements(each):
        return set(itertools.product(*(range(at, at + size) for at, size in zip(*each, strict=True))))

    a, b = region(), region()
    common = a.intersect(b)
    assert elements(common) == elements(a) & elements(b)
    if 0 not in common.shape:
        values = torch.arange(math.prod(shape)).reshape(shape)
        part = values[a.slices_in(whole_region(shape))]
        assert torch.equal(part[common.slices_in(a)], values[common.slices_in(whole_region(shape))])


def test_large_tensors_go_to_the_rank_with_the_fewest_bytes_and_small_ones_to_the_first():
    sizes = {"a": 4 << 20, "b": 3 << 20, "c": 2 << 20, "small": 1 << 20, "number": 1}
    tensors = {name: torch.empty(size, dtype=torch.uint8) for name, size in sizes.items()}
    plan = assign_regions(tensors, 2)
    assert plan == assign_regions(dict(reversed(tensors.items())), 2)
    assert {name: next(iter(regions)) for name, regions in plan.items()} == {
        "a": 1, "b": 0, "c": 1, "small": 0, "number": 0
    }  # fmt: skip
