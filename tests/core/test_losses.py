"""What a loss function may return: one loss, or several by name, each with a weight or without."""

import copy
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from noether import Mean, TrainState, forward
from noether.core.tensors.losses import WeightedLosses, detach_losses, loss_weights, read_losses, sum_as_total
from noether.core.tensors.means import read_weight

ONE = torch.tensor(1.0)


def loss_function(outputs, batch):
    """Stand for the user's function in messages."""


def test_one_tensor_is_the_loss():
    assert dict(read_losses(ONE, loss_function)) == {"loss": 1.0, "total": 1.0}
    weighted = read_losses(Mean(ONE, weight=3), loss_function)
    assert dict(weighted) == {"loss": 1.0, "total": 1.0}
    assert loss_weights(weighted) == {"loss": 3}


def test_losses_are_named_and_summed():
    assert dict(read_losses({"a": ONE, "b": 2 * ONE}, loss_function)) == {"a": 1, "b": 2, "total": 3}
    assert dict(read_losses({"total": ONE}, loss_function)) == {"total": 1}
    assert loss_weights(read_losses({"a": ONE, "b": Mean(ONE)}, loss_function)) == {}


@pytest.mark.parametrize("wrong", [{}, {"total": ONE, "a": ONE}, {"total": ONE, "a": Mean(ONE, weight=0)}], ids=str)
def test_names_that_cannot_be_summed_are_refused(wrong):
    with pytest.raises(
        ValueError, match=r"test_losses\.loss_function must return named losses, 'total' not among them"
    ):
        read_losses(wrong, loss_function)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (None, "returned nothing: return the loss, a 0-dimensional tensor, or several by name"),
        (0.5, r"returned a float: return .* without \.item\(\)"),
        ((ONE, ONE), "returned a tuple: return the loss"),
        (torch.ones(1), r"returned the loss 'loss' of shape \(1,\), but it must be one real number: take the mean"),
        (torch.ones(4), r"returned the loss 'loss' of shape \(4,\)"),
        ({"mse": torch.ones(2)}, r"returned the loss 'mse' of shape \(2,\), .* mse\.mean\(\)"),
        ({"mse": Mean(torch.ones(2), weight=2)}, r"returned the loss 'mse' of shape \(2,\)"),
        ({"mse": 0.5}, r"returned the loss 'mse' as a float: return a 0-dimensional tensor, without \.item\(\)"),
        ({"mse": None}, "returned the loss 'mse' as None"),
        ({"mse": ONE * 1j}, "returned the loss 'mse' of type torch.complex64, but it must be one real number"),
        ({"mse": ONE, "n": ONE.long()}, "returned the loss 'n' of type torch.int64, but it must be one real number of"),
        ({"mse": np.float32(1)}, "returned the loss 'mse' as a float32: return a 0-dimensional tensor"),
        ({3: ONE}, "returned the loss 3, whose name is not text"),
    ],
    ids=["none", "float", "tuple", "shape-1", "shape-4", "named-vector", "mean-vector", "named-float", "named-none",
         "complex", "whole-number", "number-of-numpy", "number-as-name"],
)  # fmt: skip
def test_other_results_are_refused_with_the_name_of_the_function(result, message):
    with pytest.raises(TypeError, match=rf"test_losses\.loss_function {message}") as refused:
        read_losses(result, loss_function)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "weight", [-1, math.nan, math.inf, True, "3", torch.ones(1), torch.tensor(-2.0), torch.tensor(math.nan), 1j,
               torch.tensor(True), np.ones(2)],
    ids=str,
)  # fmt: skip
def test_a_weight_is_one_finite_number_of_at_least_0(weight):
    with pytest.raises(ValueError, match=r"the weight of 'ce' is .*: pass Mean\(\.\.\., weight=n\), one finite number"):
        read_losses({"ce": Mean(ONE, weight=weight)}, loss_function)


@pytest.mark.parametrize("weight", [7, 7.0, torch.tensor(7), torch.tensor(7.0), np.int64(7), np.float32(7)], ids=repr)
def test_a_weight_is_read_as_a_plain_number(weight):
    value = read_weight("ce", weight)
    assert type(value) in {int, float}
    assert value == 7


def test_a_loss_of_weight_0_is_left_out():
    losses = read_losses({"ce": Mean(ONE * math.nan, weight=0), "size": ONE}, loss_function)
    assert dict(losses) == {"size": 1, "total": 1}
    assert dict(read_losses({"ce": Mean(ONE * math.nan, weight=0)}, loss_function)) == {}


def test_losses_with_weights_are_copied_and_detached_as_they_are():
    losses = WeightedLosses({"ce": torch.ones((), requires_grad=True)}, {"ce": 3})
    for other in (detach_losses(losses), copy.copy(losses), copy.deepcopy(losses)):
        assert isinstance(other, WeightedLosses)
        assert dict(other) == {"ce": 1.0}
        assert other.weights == {"ce": 3}
    assert not detach_losses(losses)["ce"].requires_grad


@given(st.dictionaries(st.sampled_from(["a", "b", "total"]), st.integers(-9, 9).map(Fraction), min_size=1))
def test_the_total_is_the_sum_of_the_others(means):
    others = [mean for name, mean in means.items() if name != "total"]
    assert sum_as_total(means) == ({**means, "total": sum(others)} if others and "total" in means else means)


def test_forward_returns_tensors_and_their_weights():
    model = torch.nn.Linear(2, 1)
    predict = forward(
        model, lambda outputs, batch: {"ce": Mean(outputs.mean(), weight=len(batch)), "l1": outputs.sum()}
    )
    losses, _ = predict(TrainState.from_module(model), torch.ones(3, 2))
    assert list(losses) == ["ce", "l1", "total"]
    assert all(isinstance(loss, torch.Tensor) for loss in losses.values())
    assert loss_weights(losses) == {"ce": 3}
