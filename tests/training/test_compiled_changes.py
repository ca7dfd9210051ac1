"""Models and losses that change Python objects, or need many graphs, train as without compilation, with one warning."""

from functools import partial

import pytest
import torch
from torch import nn

from noether import Session
from noether.core.callbacks import OfflineLossCallback
from noether.core.state import TrainState
from noether.core.tensors.donation import DonatedError
from noether.core.tensors.torch_internals import CompiledGraph
from noether.testing import same
from noether.training.step import compiled
from noether.training.step.compiled import CompiledStep
from noether.training.step.optimizer import FunctionalOptimizer
from noether.training.step.step import Step
from noether.training.value_schedules import Constant

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
]

CALLS = []
"""Is changed by a model."""


class Net(nn.Module):
    """Reads what it changes."""

    def __init__(self, change=lambda model: 1.0):
        super().__init__()
        self.change = [change]
        self.head = nn.Linear(3, 2)
        self.calls, self.seen, self.scale = 0, [], torch.zeros(())
        self.cached = None

    def forward(self, x):
        return self.head(x) * self.change[0](self)


def count(model):
    model.calls += 1
    return model.calls


def append(model):
    model.seen.append(1.0)
    return len(model.seen)


def set_tensor(model):
    model.scale = model.scale + 1
    return model.scale


def count_globally(model):
    CALLS.append(1)
    return len(CALLS)


def fill_cache(model):
    if model.cached is None:
        model.cached = torch.tensor(2.0)
    return model.cached


def square(outputs, batch):
    return {"square": (outputs - batch[1]).square().mean()}


def counting_closure():
    calls = 0

    def loss(outputs, batch):
        nonlocal calls
        calls += 1
        return {"square": square(outputs, batch)["square"] * calls}

    return loss


def popping_loss(outputs, batch):
    batch.append(1.0)
    return {"square": square(outputs, batch)["square"] * len(batch)}


@pytest.fixture(autouse=True)
def eager_backend(monkeypatch):
    """Trace as for any compiler, and then call torch as it is."""
    torch.compiler.reset()
    monkeypatch.setitem(CompiledGraph.__init__.__kwdefaults__, "backend", "eager")


def make_step(model, loss=square, **options):
    optimizer = FunctionalOptimizer(torch.optim.SGD, {"lr": 0.01})
    return Step(model=model, loss=loss, optimizer=optimizer, lr={"default": Constant(value=0.01)}, **options)


def train(step, *, updates=4, lengths=(4,), between=lambda model: None):
    """Return the params after each update, and the losses."""
    CALLS.clear()
    torch.manual_seed(0)
    state = TrainState.from_module(Net())
    params, losses = [], []
    for update in range(updates):
        generator = torch.Generator().manual_seed(update)
        length = lengths[update % len(lengths)]
        batch = [torch.randn(length, 3, generator=generator), torch.randn(length, 2, generator=generator)]
        between(step.model)
        state, event = step(state, [batch])
        state = state.advance(samples=length)
        params.append({name: param.clone() for name, param in state.params.items()})
        losses.append(event.losses["total"])
    return params, losses


def warnings_in(caplog):
    return [record.getMessage() for record in caplog.records if record.name.startswith("noether")]


MODELS = {
    count: "model.calls",
    append: "model.seen",
    set_tensor: "model.scale",
    count_globally: "CALLS",
}
LOSSES = {counting_closure: "loss.__closure__", lambda: popping_loss: "changes batch, "}


@pytest.mark.parametrize(
    ("change", "make_loss", "name"),
    [
        *((change, lambda: square, name) for change, name in MODELS.items()),
        *((lambda model: 1.0, make_loss, name) for make_loss, name in LOSSES.items()),
    ],
    ids=[*(change.__name__ for change in MODELS), "loss-closure", "loss-batch"],
)
def test_what_changes_python_objects_is_trained_as_it_is(change, make_loss, name, caplog):
    """As pytorch#128319, pytorch#167504 and torchrec#4338: the model counts its calls; no trial call may count."""
    found = [train(step(change, make_loss)) for step in (
        lambda change, make_loss: make_step(Net(change), make_loss()),
        lambda change, make_loss: CompiledStep(make_step(Net(change), make_loss(), donate=True)),
    )]  # fmt: skip
    assert same(*found)
    (message,) = warnings_in(caplog)
    assert message.startswith("updates are not compiled: ")
    assert name in message


def test_a_cache_that_the_first_call_fills_is_compiled(caplog):
    expected, found = train(make_step(Net(fill_cache))), train(CompiledStep(make_step(Net(fill_cache))))
    torch.testing.assert_close(found, expected)
    assert not warnings_in(caplog)


@pytest.mark.parametrize(
    ("lengths", "limit"),
    [((4, 4, 5, 6), "_MAX_GRAPHS"), ((4, 5, 6, 7), "_MAX_WITHOUT_REUSE")],
    ids=["some", "all"],
)
def test_batches_of_many_lengths_go_on_without_compilation(lengths, limit, monkeypatch, caplog):
    """As dion#23: each length takes a graph, and torch limits their number."""
    monkeypatch.setattr(compiled, limit, 2)
    expected, found = (
        train(step, updates=6, lengths=lengths)
        for step in (make_step(Net()), CompiledStep(make_step(Net(), donate=True)))
    )
    torch.testing.assert_close(found, expected)
    (message,) = warnings_in(caplog)
    assert "the batches have more than 2 shapes, and each takes a graph: pad them to a few" in message


def test_a_number_that_something_changes_before_every_update_ends_compilation(monkeypatch, caplog):
    monkeypatch.setattr(compiled, "_MAX_IN_A_ROW", 2)

    def warm_up(model):
        model.calls += 1

    steps = [make_step(Net(lambda model: model.calls)), CompiledStep(make_step(Net(lambda model: model.calls)))]
    expected, found = (train(step, between=warm_up) for step in steps)
    torch.testing.assert_close(found, expected)
    (message,) = warnings_in(caplog)
    assert "2 updates in a row had to be compiled again, because a Python value that forward or the loss" in message


@pytest.fixture
def graphs(monkeypatch):
    """Return a list of the graphs that are compiled."""
    found = []

    def backend(graph, inputs):
        found.append(graph)
        return graph

    monkeypatch.setitem(CompiledGraph.__init__.__kwdefaults__, "backend", backend)
    return found


def test_graphs_are_found_again_when_what_forward_reads_has_an_earlier_value(graphs, caplog):
    def alternate(model):
        model.calls = (model.calls + 1) % 3

    def train_net(wrap):
        return train(wrap(make_step(Net(lambda model: model.calls), donate=True)), updates=11, between=alternate)

    torch.testing.assert_close(train_net(CompiledStep), train_net(lambda step: step))
    assert len(graphs) == 3
    assert not warnings_in(caplog)


def test_graphs_that_torch_discards_are_compiled_again(graphs, caplog):
    def discard(model):
        model.calls += 1
        if model.calls == 5:
            torch.compiler.reset()

    steps = [make_step(Net()), CompiledStep(make_step(Net(), donate=True))]
    torch.testing.assert_close(*(train(step, updates=7, between=discard) for step in steps))
    assert len(graphs) == 2
    assert not warnings_in(caplog)


def strided(tensor):
    """Return the same values, with another order in memory."""
    return tensor.t().contiguous().t() if tensor.ndim > 1 else tensor


@pytest.mark.parametrize("change", [torch.Tensor.double, strided], ids=["double", "strided"])
def test_params_of_another_form_get_another_graph(change, graphs, caplog):
    """Torch does not check them; back in the first form, they have the first graph."""

    def train_forms(step):
        states = [TrainState.from_module(Net())]
        states.append(states[0].replace(params={name: change(param) for name, param in states[0].params.items()}))
        found = []
        for index in (0, 0, 1, 1, 0):
            dtype = states[index].params["head.weight"].dtype
            batch = [(torch.ones(4, 3, dtype=dtype), torch.ones(4, 2, dtype=dtype))]
            params = step(states[index], batch)[0].params
            found.append({name: param.detach().clone() for name, param in params.items()})
        return found

    torch.manual_seed(0)
    expected = train_forms(make_step(Net()))
    torch.manual_seed(0)
    torch.testing.assert_close(train_forms(CompiledStep(make_step(Net()))), expected)
    assert len(graphs) == 2
    assert not warnings_in(caplog)


def test_a_graph_that_later_cannot_be_compiled_loses_no_update(caplog):
    """The change comes when the tensors are donated already."""

    def branch(model):
        return 2.0 if model.seen and model.head.weight.sum() > 0 else 1.0

    def turn(model):
        model.calls += 1
        model.seen = [1.0] * (model.calls > 3)

    steps = [make_step(Net(branch)), CompiledStep(make_step(Net(branch), donate=True))]
    expected, found = (train(step, updates=6, between=turn) for step in steps)
    torch.testing.assert_close(found, expected)
    assert len(warnings_in(caplog)) == 1


def test_an_error_of_the_device_is_raised_and_leaves_no_half_updated_state(monkeypatch):
    failing = []

    def backend(graph, inputs):
        def run(*args):
            if failing:
                raise RuntimeError("out of memory")
            return graph(*args)

        return run

    monkeypatch.setitem(CompiledGraph.__init__.__kwdefaults__, "backend", backend)
    step = CompiledStep(make_step(Net(), donate=True))
    state, batch = TrainState.from_module(Net()), [(torch.ones(4, 3), torch.ones(4, 2))]
    for _ in range(2):
        state = step(state, batch)[0].advance(samples=4)
    failing.append(True)
    with pytest.raises(RuntimeError, match="out of memory"):
        step(state, batch)
    with pytest.raises(DonatedError):
        dict(state.params)


def run_session(plain, model):
    """Return the losses of three updates, each evaluated, and the params after them."""
    losses, optimizer = [], torch.optim.SGD(model.parameters(), lr=0.01)
    batches = [(torch.ones(size, 3), torch.zeros(size, 2)) for size in (2, 3)]
    session = Session(
        OfflineLossCallback(every_n_updates=1, dataset_key="val"), interpreter=lambda effects, state, event: None,
        model=model, optimizer=optimizer, loss=square, data={"val": batches[:1]}, max_updates=3,
    )  # fmt: skip
    for batch in session.batches(batches):
        losses.append(square(model(batch[0]), batch)["square"])
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
        session.update(losses[-1])
        losses.append(session.state.metrics["loss/val/square"].value)
    return losses, dict(plain.named_parameters()), plain.calls


@pytest.mark.filterwarnings("ignore:an update changed:noether.session.errors.ResumeWarning")
def test_a_session_takes_a_compiled_model_that_counts_its_calls():
    found = []
    for compile_model in (lambda model: model, partial(torch.compile, backend="eager")):
        torch.manual_seed(0)
        plain = Net(count)
        found.append(run_session(plain, compile_model(plain)))
    torch.testing.assert_close(*found)
    assert found[0][-1] == 6
