"""Counters of an optimizer's steps are incremented to the bits of torch."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from noether.core.tensors.step_counters import make_increment
from noether.testing import same

STARTS = st.lists(st.integers(0, 100) | st.integers(2**24 - 3, 2**24 + 3), min_size=1, max_size=4)
"""Beyond 2**24, a counter of single precision stays where it is."""


@given(
    STARTS, st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.int64]), st.sampled_from([(), (2,)])
)
def test_counters_have_the_bits_of_torch(starts, dtype, shape):
    counters = [torch.full(shape, start, dtype=dtype) for start in starts]
    expected = [counter.clone() for counter in counters]
    increment = make_increment(counters)
    for _ in range(5):
        increment()
        torch._foreach_add_(expected, 1)  # the optimizers of torch call it
    assert same(counters, expected)


def test_a_counter_that_was_dropped_is_still_held():
    increment = make_increment([torch.tensor(0.0)])
    others = [torch.tensor(float(value)) for value in range(100)]  # would take the memory
    increment()
    assert [float(other) for other in others] == list(range(100))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_increment_adds_no_user_to_the_storage(dtype):
    """Else each update would copy the counters, as those that something else holds."""
    counter = torch.tensor(0.0, dtype=dtype)
    before = torch._C._storage_Use_Count(counter.untyped_storage()._cdata)  # noqa: SLF001  # as `OwnedStorages`
    increment = make_increment([counter])
    increment()
    assert torch._C._storage_Use_Count(counter.untyped_storage()._cdata) == before  # noqa: SLF001  # as above
    assert counter == 1


def test_a_counter_whose_memory_was_moved_is_incremented_there():
    counter = torch.tensor(0.0)
    increment = make_increment([counter])
    increment()
    before = counter.data_ptr()
    counter.detach().share_memory_()
    others = [torch.tensor(float(value)) for value in range(100)]  # would take the memory that it left
    increment()
    assert counter.data_ptr() != before
    assert counter == 2
    assert [float(other) for other in others] == list(range(100))
