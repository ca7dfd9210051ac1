"""Gradients equal those of `torch.autograd.grad`, bit for bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from noether.training.step.gradients import compute_gradients


class Marked(torch.Tensor):
    """A subclass, to which torch passes each call."""


@given(seed=st.integers(0, 2**31), sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4), data=st.data())
@settings(deadline=None)
def test_gradients_have_the_bits_of_torch(seed, sizes, data):
    torch.manual_seed(seed)
    leaves = [torch.randn(size, size, requires_grad=True) for size in sizes]
    used = data.draw(st.sets(st.sampled_from(range(len(leaves))), min_size=1))
    keep = data.draw(st.sampled_from([(), (1,)]))

    def loss():
        return sum((leaves[index] @ leaves[index]).sin().mean() for index in used).reshape(keep)

    ours, theirs = compute_gradients(loss(), leaves), torch.autograd.grad(loss(), leaves, allow_unused=True)
    for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert torch.equal(a, b) if index in used else (a is None and b is None)
    assert all(leaf.grad is None for leaf in leaves)


def test_torch_differentiates_a_tensor_subclass():
    leaf = torch.ones(3, requires_grad=True)
    loss = leaf.sum().as_subclass(Marked)
    assert torch.equal(compute_gradients(loss, [leaf])[0], torch.ones(3))


def test_a_loss_of_several_numbers_is_refused():
    leaf = torch.ones(3, requires_grad=True)
    with pytest.raises(ValueError, match=r"the loss has shape \(3,\) .* take the mean over samples"):
        compute_gradients(leaf * 2, [leaf])
    with pytest.raises(ValueError, match=r"type torch.complex64, but it must be one real number"):
        compute_gradients(leaf.sum() * 1j, [leaf])
