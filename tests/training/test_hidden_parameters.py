"""Parameters and buffers that a model holds where an update of the state does not reach them."""

import functools
from collections import deque
from pathlib import Path

import pytest
import torch
from tiny_runs import make_config
from torch import nn
from torch.nn import functional

from noether import Session, TrainState, forward
from noether.config import ConfigError
from noether.core.callbacks import EMACallback, OfflineLossCallback
from noether.core.tensors.hidden_parameters import HiddenParameterError, find_held_tensors
from noether.testing import same
from noether.training.runs.train import train
from noether.training.step.optimizer import FunctionalOptimizer
from noether.training.step.step import Step


def square(outputs, batch):
    return {"square": outputs.square().mean()}


def make_step(model, loss=square, **settings):
    optimizer = FunctionalOptimizer(torch.optim.SGD, {"lr": 0.1, "momentum": 0.9})
    return Step(model=model, loss=loss, optimizer=optimizer, lr={"default": lambda _: 0.1}, **settings)


class Net(nn.Module):
    def __init__(self, hide=None):
        super().__init__()
        self.lin = nn.Linear(2, 2)
        self.norm = nn.BatchNorm1d(2)
        if hide is not None:
            self.mine = hide(self)

    def forward(self, x):
        return self.norm(self.lin(x))


class Holder:
    __slots__ = ("weights",)

    def __init__(self, weights):
        self.weights = weights


def add_hook(net):
    weight = net.lin.weight
    return net.norm.register_forward_hook(lambda module, inputs, outputs: outputs + weight.sum())


def close_over(net):
    weight = net.lin.weight
    return lambda scale: scale * weight.sum()


HIDING = {
    "list": lambda net: list(net.lin.parameters()),
    "tuple": lambda net: tuple(net.lin.parameters()),
    "dict": lambda net: dict(net.lin.named_parameters()),
    "set": lambda net: set(net.lin.parameters()),
    "deque": lambda net: deque(net.lin.parameters()),
    "nested": lambda net: [{"a": (1, [net.lin.weight])}],
    "after many numbers": lambda net: [*range(1000), net.lin.weight],
    "after many objects": lambda net: [*(object() for _ in range(1000)), net.lin.weight],
    "another object": lambda net: Holder(net.lin.weight),
    "closure": close_over,
    "default": lambda net: lambda weight=net.lin.weight: weight.sum(),
    "partial": lambda net: functools.partial(torch.sum, net.lin.weight),
    "method": lambda net: net.lin.weight.sum,
    "view": lambda net: net.lin.weight.detach()[0],
    "data": lambda net: [net.lin.weight.data],
    "optimizer": lambda net: torch.optim.SGD(net.lin.parameters()),
}


@pytest.mark.parametrize("name", HIDING)
@pytest.mark.parametrize("nested", [False, True])
def test_a_hidden_parameter_is_refused_at_construction_with_its_attribute(name, nested):
    net = Net(HIDING[name])
    attribute = "0.mine" if nested else "mine"
    with pytest.raises(HiddenParameterError, match=rf"^{attribute} holds 'lin|^{attribute} holds '0.lin"):
        make_step(nn.Sequential(net) if nested else net)


def test_a_hidden_parameter_in_a_hook_or_a_loss_is_refused():
    net = Net()
    add_hook(net)
    with pytest.raises(HiddenParameterError, match=r"^norm._forward_hooks holds 'lin.weight' a second time"):
        make_step(net)
    net = Net()
    weights = list(net.parameters())
    with pytest.raises(HiddenParameterError, match=r"lambda.* holds 'lin.weight' a second time"):
        make_step(net, lambda outputs, batch: {"l2": sum(each.square().sum() for each in weights)})


def test_parameters_that_are_not_registered_are_refused_unless_they_are_constant():
    net = Net(lambda _: [nn.Linear(2, 2)])
    with pytest.raises(HiddenParameterError, match=r"^mine holds a parameter of shape \(2, 2\) that is not registered"):
        make_step(net)
    teacher = nn.Linear(2, 2).requires_grad_(requires_grad=False)
    make_step(Net(lambda _: [teacher]))


def own_module(net):
    return [net.lin, net]


def own_method(net):
    return net.lin.forward


@pytest.mark.parametrize(
    "hide",
    [
        pytest.param(own_module, id="modules of the model"),
        pytest.param(own_method, id="a method of a module"),
        pytest.param(lambda net: lambda: net.lin.weight, id="a closure over the model"),
        pytest.param(lambda net: [name for name, _ in net.named_parameters()], id="names"),
        pytest.param(lambda net: [torch.ones(2), nn.Parameter(torch.ones(2), requires_grad=False)], id="constants"),
        pytest.param(lambda net: net.lin.weight, id="a tied parameter"),
        pytest.param(lambda net: nn.ParameterList(net.lin.parameters()), id="a tied list"),
        pytest.param(lambda net: net.lin, id="a tied module"),
    ],
)
@pytest.mark.parametrize("donate", [False, True])
def test_what_a_state_reaches_is_trained(hide, donate):
    torch.manual_seed(0)
    net = Net(hide)
    step = make_step(net, donate=donate)
    state = TrainState.from_module(net)
    for _ in range(2):
        state, event = step(state, [torch.ones(4, 2)])
    assert event.losses["total"].isfinite()


class Recurrent(nn.LSTM):
    """Torch keeps the weights of a recurrent module in a list, too."""

    def forward(self, x):
        return super().forward(x)[0]


@pytest.mark.parametrize("kind", [Recurrent, lambda *sizes: nn.Sequential(nn.GRU(*sizes))])
def test_recurrent_modules_of_torch_train_the_same_in_every_mode(kind):
    def weigh(outputs, batch):
        return square(outputs[0] if isinstance(outputs, tuple) else outputs, batch)

    results = []
    for donate in (False, True):
        torch.manual_seed(0)
        model = kind(2, 3)
        step, state = make_step(model, weigh, donate=donate), TrainState.from_module(model)
        for _ in range(3):
            state, _ = step(state, [torch.ones(4, 5, 2)])
        results.append({name: value.clone() for name, value in state.params.items()})
    assert same(*results)


class Rotary(nn.Module):
    """Keeps a second reference to a buffer that is constant, as rotary embeddings do."""

    def __init__(self, *, writes):
        super().__init__()
        self.lin, self.writes = nn.Linear(2, 2), writes
        self.register_buffer("frequencies", torch.ones(2))
        self.original = [self.frequencies]

    def forward(self, x):
        if self.writes and self.training:
            self.frequencies += 1
        return self.lin(x) * self.original[0]


@pytest.mark.parametrize("donate", [False, True])
def test_a_second_reference_to_a_buffer_is_refused_once_it_is_stale(donate):
    constant = Rotary(writes=False)
    step, state = make_step(constant, donate=donate), TrainState.from_module(constant)
    for _ in range(3):
        state, _ = step(state, [torch.ones(4, 2)])
    forward(constant, square)(state, torch.ones(4, 2))
    with pytest.raises(HiddenParameterError, match=r"^original holds 'frequencies' a second time"):
        step(state.replace(buffers={"frequencies": torch.zeros(2)}), [torch.ones(4, 2)])
    written = Rotary(writes=True)
    step, state = make_step(written, donate=donate), TrainState.from_module(written)
    state, _ = step(state, [torch.ones(4, 2)])
    with pytest.raises(HiddenParameterError, match=r"^original holds 'frequencies' a second time"):
        step(state, [torch.ones(4, 2)])


class Penalized(Net):
    def __init__(self):
        super().__init__(HIDING["list"])

    def forward(self, x):
        return super().forward(x) + sum(weight.sum() for weight in self.mine)


def test_an_evaluation_of_other_weights_is_refused_and_one_of_the_live_ones_is_not():
    model = Penalized()
    predict, state, batch = forward(model, square), TrainState.from_module(model), torch.ones(4, 2)
    losses, _ = predict(state, batch)
    with torch.autocast("cpu", torch.bfloat16), predict.evaluating():
        predict(state, batch)
    model.eval()
    assert losses["square"] == square(model(batch), batch)["square"]
    with pytest.raises(HiddenParameterError, match=r"^mine holds 'lin.weight' a second time"):
        predict(state.replace(params={name: value + 1 for name, value in state.params.items()}), batch)


@pytest.mark.parametrize("weights", [None, "ema=0.5"])
def test_a_session_trains_the_model_and_refuses_only_the_evaluation_of_an_average(weights):
    torch.manual_seed(0)
    model = Penalized()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    callbacks = [EMACallback(every_n_epochs=1, target_factors=(0.5,)),
                 OfflineLossCallback(every_n_epochs=1, dataset_key="val", weights=weights)]  # fmt: skip
    session = Session(callbacks, interpreter=lambda *_: None, model=model, optimizer=optimizer, loss=square,
                      data={"val": [torch.ones(4, 2)]}, max_epochs=1)  # fmt: skip

    def run():
        for batch in session.batches([torch.ones(4, 2)] * 2):
            losses = square(model(batch), batch)
            optimizer.zero_grad()
            losses["square"].backward()
            optimizer.step()
            session.update(losses)

    if weights is None:
        run()
        assert "loss/val/square" in session.state.metrics
    else:
        with pytest.raises(HiddenParameterError, match=r"mine holds 'lin.weight' a second time"):
            run()


def test_a_configured_model_is_refused_with_file_and_line(tiny_module):
    regularized = """
class Reg(nn.Linear):
    def __init__(self):
        super().__init__(2, 1)
        self.mine = list(self.parameters())
"""
    Path("tiny.py").write_text(Path("tiny.py").read_text() + regularized)
    with pytest.raises(ConfigError, match=r"model: mine holds 'weight' a second time, in a list, a closure"):
        train(make_config() | {"model": {"kind": "tiny.Reg"}})


def test_common_models_hold_nothing():
    layers = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
    spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(2, 2))
    models = [nn.TransformerEncoder(layers, 2), normed, spectral, nn.MultiheadAttention(4, 2), nn.LSTM(2, 2)]
    assert [find_held_tensors(model, functional.mse_loss) for model in models] == [[]] * len(models)
