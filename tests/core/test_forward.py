"""Forward passes of one evaluation: what is read once at its start is read again once it changes."""

import copy

import pytest
import torch
from torch import nn

from noether.core.state import TrainState
from noether.core.tensors.donation import DonatedError, donate
from noether.core.tensors.forward import forward

BATCH = (torch.eye(2), torch.zeros(2, 1))


def mse(outputs, batch):
    return {"mse": (outputs - batch[1]).square().mean()}


def plain(state):
    return TrainState(params={name: param.clone() for name, param in state.params.items()})


def write_data(model):
    model.weight.data = torch.full((1, 2), 5.0)


def flip_data(model):
    model.weight.data = model.weight.data.flip(1)


def register(model):
    model.weight = nn.Parameter(torch.full((1, 2), 5.0))


def load(model):
    model.load_state_dict({"weight": torch.full((1, 2), 5.0)}, assign=True)


def write_in_place(model):
    model.weight.data.fill_(5.0)


def live(state):
    return state


IN_PLACE = [write_data, flip_data, write_in_place]


@pytest.mark.parametrize(
    ("view", "change"),
    [(view, change) for view in (live, plain) for change in (*IN_PLACE, register, load)]
    + [(donate, change) for change in IN_PLACE],
)
def test_weights_that_change_during_an_evaluation_give_what_a_new_evaluation_gives(view, change):
    model = nn.Linear(2, 1, bias=False)
    state, predict = view(TrainState.from_module(model)), forward(model, mse)
    with predict.evaluating(state):
        predict(state, BATCH)
        change(model)
        during = predict(state, BATCH)[1]
    assert torch.equal(during, predict(state, BATCH)[1])


def test_each_call_of_an_evaluation_has_the_weights_of_its_state():
    model = nn.Linear(2, 1, bias=False)
    own, predict = TrainState.from_module(model), forward(model, mse)
    other = own.replace(params={"weight": torch.tensor([[7.0, 8.0]])})
    with predict.evaluating(own):
        found = [predict(state, BATCH)[1] for state in (own, other, own, other)]
    assert [each.flatten().tolist() for each in found] == [model.weight.flatten().tolist(), [7.0, 8.0]] * 2


def test_an_evaluation_refuses_a_state_that_an_update_took_meanwhile():
    model = nn.Linear(2, 1)
    state, predict = donate(TrainState.from_module(model)), forward(model, mse)
    with predict.evaluating(state):
        predict(state, BATCH)
        state.params.take()
        for param in model.parameters():
            param.data = param.data.clone()  # as an update does while there are views of them
        with pytest.raises(DonatedError):
            predict(state, BATCH)


class Caching(nn.Linear):
    """Registers its first buffers in forward, or assigns them to a place that is there."""

    def forward(self, x):
        if "calls" not in dict(self.named_buffers()):
            self.register_buffer("calls", torch.zeros(()), persistent=False)
        self.calls = self.calls + 1
        return super().forward(x) * self.calls


def test_an_evaluation_leaves_no_buffer_in_a_model_without_buffers():
    model = Caching(2, 1)
    state, predict = TrainState.from_module(model), forward(model, mse)
    with predict.evaluating(state):
        outputs = [predict(state, BATCH)[1] for _ in range(3)]
        assert not list(model.buffers())
    assert all(torch.equal(outputs[0], each) for each in outputs)


class Emptying(nn.BatchNorm1d):
    """Deletes its buffers in forward."""

    def forward(self, x):
        outputs = super().forward(x)
        for name in list(self._buffers):
            del self._buffers[name]
        return outputs


def test_an_evaluation_restores_the_buffers_that_a_model_deletes():
    model = Emptying(2)
    before = copy.deepcopy(dict(model.named_buffers()))
    state, predict = TrainState.from_module(model), forward(model, lambda outputs, batch: outputs.mean())
    predict(state, BATCH)
    assert dict(model.named_buffers()).keys() == before.keys()


class Merging(nn.Module):
    """Has another module in evaluation mode."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def train(self, mode=True):  # noqa: FBT002  # as torch has it
        self.layer = nn.Linear(2, 1) if mode else Caching(2, 1)
        return super().train(mode)

    def forward(self, x):
        return self.layer(x)


def test_an_evaluation_reads_the_modules_that_a_model_has_in_evaluation_mode():
    model = Merging()
    predict = forward(model, mse)
    with predict.evaluating():
        outputs = [predict(TrainState.from_module(model), BATCH)[1] for _ in range(3)]
    assert all(torch.equal(outputs[0], each) for each in outputs)


@pytest.mark.parametrize("enabled", [True, False])
def test_a_failing_forward_leaves_autograd_as_it_was(enabled):
    model = nn.Linear(2, 1)
    predict = forward(model, mse)
    with torch.set_grad_enabled(enabled):
        with pytest.raises(RuntimeError):
            predict(TrainState.from_module(model), (torch.ones(3, 3), None))
        assert torch.is_grad_enabled() is enabled
        assert not predict(TrainState.from_module(model), BATCH)[1].requires_grad
        assert torch.is_grad_enabled() is enabled
