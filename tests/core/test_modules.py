"""Views of the modules of a model."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from noether.core.tensors.module import has_buffers


def make_place():
    """Return a module whose buffer forward makes."""
    module = nn.Linear(1, 1)
    module.register_buffer("late", None)
    return module


SHARED = nn.BatchNorm1d(1)
LEAVES = st.sampled_from((lambda: nn.Linear(1, 1), lambda: nn.BatchNorm1d(1), nn.ReLU, make_place, lambda: SHARED))
MODELS = st.recursive(LEAVES.map(lambda make: make()), lambda inner: st.lists(inner, max_size=3).map(nn.ModuleList))


@given(MODELS)
def test_a_model_has_buffers_if_a_module_has_a_place_for_one(model):
    expected = any(len(vars(module)["_buffers"]) for module in model.modules())
    assert has_buffers(model) is expected


def test_modules_that_hold_each_other_are_searched_once():
    parent, child = nn.Module(), nn.Module()
    parent.child, child.parent = child, parent
    assert not has_buffers(parent)
    child.register_buffer("count", torch.zeros(()))
    assert has_buffers(parent)
