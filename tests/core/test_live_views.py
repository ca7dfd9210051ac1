"""A state made from a live module shows what the module has at each access, and what is remembered of it stays."""

import copy
import io
import pickle
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console as RichConsole
from torch import nn

from noether import (
    AfterUpdate,
    BeforeTraining,
    Effect,
    SaveCheckpoint,
    TrainState,
    callback,
    compose,
    dispatch,
    every_n_updates,
    log,
    open_run,
)
from noether.core.errors import StateWarning, WeightsError
from noether.core.tensors.donation import lease, was_donated
from noether.core.tensors.stored_weights import use_weights
from noether.core.tensors.tree import FrozenDict
from noether.effects import Console
from noether.testing import same

BLOCKS = st.sampled_from(["linear", "norm", "lazy", "plain"])


class Plain(nn.Module):
    """A module with a parameter that may be None, and buffers of all kinds."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2))
        self.register_parameter("offset", None)
        self.register_buffer("table", torch.arange(3))
        self.register_buffer("late", None)


MAKE = {
    "linear": lambda: nn.Linear(2, 2),
    "norm": lambda: nn.BatchNorm1d(2),
    "lazy": lambda: nn.Sequential(nn.Linear(2, 2), nn.Tanh()),
    "plain": Plain,
}


def build(kinds):
    return nn.Sequential(*(MAKE[kind]() for kind in kinds))


def assign_buffer(model, pick):
    owners = [(m, name) for m in model.modules() for name, b in m.named_buffers(recurse=False) if b.is_floating_point()]
    if owners:
        module, name = owners[pick % len(owners)]
        setattr(module, name, torch.full_like(getattr(module, name), float(pick)))


def assign_data(model, pick):
    parameters = list(model.parameters())
    chosen = parameters[pick % len(parameters)]
    chosen.data = chosen.data + 1


def load_with_assign(model, pick):
    values = {name: tensor + pick for name, tensor in model.state_dict().items()}
    model.load_state_dict(values, assign=True)


def convert(model, pick):
    model.to(torch.float64 if pick % 2 else torch.float32)


def register(model, pick):
    model[pick % len(model)].register_buffer(f"new_{pick}", torch.full((1,), float(pick)))


def fill_late(model, pick):
    for module in model.modules():
        if isinstance(module, Plain):
            module.late = torch.full((2,), float(pick))
            module.offset = nn.Parameter(torch.full((2,), float(pick)))


def replace_module(model, pick):
    model[pick % len(model)] = nn.Linear(2, 2)


def write_in_place(model, pick):
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.copy_(torch.full_like(tensor, pick))


def parametrize(model, pick):
    for module in model.modules():
        if isinstance(module, nn.Linear) and not hasattr(module, "parametrizations"):
            nn.utils.parametrizations.weight_norm(module)
            return


def move_module(model, pick):
    model.append(model.pop(pick % len(model)) if len(model) > 1 else nn.Linear(2, 2))


MUTATIONS = [
    assign_buffer, assign_data, load_with_assign, convert, register, fill_late, replace_module, write_in_place,
    parametrize, move_module,
]  # fmt: skip
STEPS = st.lists(st.tuples(st.sampled_from(MUTATIONS), st.integers(0, 9)), max_size=6)


def expected_of(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


@given(st.lists(BLOCKS, min_size=1, max_size=3), STEPS)
def test_a_state_equals_the_state_dict_at_every_access(kinds, steps):
    model = build(kinds)
    state = TrainState.from_module(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for mutate, pick in steps:
        mutate(model, pick)
        state = state.advance(samples=1)
        assert same({**state.params, **state.buffers}, dict(model.state_dict()))
        assert list(state.params) == [name for name, _ in model.named_parameters()]
        assert list(state.buffers) == [name for name, _ in model.named_buffers()]
        assert not any(tensor.requires_grad for tensor in (*state.params.values(), *state.buffers.values()))


@given(st.lists(BLOCKS, min_size=1, max_size=2), STEPS)
def test_a_remembered_state_stays_as_it_was(kinds, steps):
    model = build(kinds)
    state = TrainState.from_module(model)
    state = state.remember("weights", {"params": state.params, "buffers": state.buffers})
    before = copy.deepcopy(state.memory("weights"))
    for mutate, pick in steps:
        mutate(model, pick)
    assert same(state.memory("weights"), before)


@given(st.lists(BLOCKS, min_size=1, max_size=2), STEPS, st.booleans())
def test_a_checkpoint_equals_the_model_at_its_moment(tmp_path_factory, kinds, steps, asynchronous):
    model = build(kinds)
    path = tmp_path_factory.mktemp("run")
    save = callback("save")(lambda state, event: (state, (SaveCheckpoint(),)))
    with open_run(path, Console(RichConsole(file=io.StringIO())), asynchronous=asynchronous) as run:
        state = TrainState.from_module(model)
        moments = {}
        for mutate, pick in steps:
            mutate(model, pick)
            state = dispatch(state.advance(samples=1), AfterUpdate(samples=1), save, run.interpreter)
            moments[str(state.iteration)] = expected_of(model)
        write_in_place(model, 77)
    for tag, moment in moments.items():
        saved = run.checkpoints.load(run.checkpoints.find(tag))
        assert same({**saved.params, **saved.buffers}, moment)


def test_copies_of_a_state_view_nothing():
    model = nn.Linear(2, 1)
    optimizer = torch.optim.Adam(model.parameters())
    state = TrainState.from_module(model, optimizer)
    copies = [copy.deepcopy(state), pickle.loads(pickle.dumps(state))]  # noqa: S301  # our own bytes
    expected = expected_of(model)
    model.weight.data = torch.full((1, 2), 9.0)
    for each in copies:
        assert same(dict(each.params), expected)
        assert type(vars(each)["params"]) is type(vars(each)["opt_state"]) is FrozenDict
    assert TrainState.params == {}


# ------------------------------------------------------------------------------------------------ what is remembered


def trained():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    step(model, optimizer)
    return model, optimizer


def step(model, optimizer):
    optimizer.zero_grad()
    model(torch.tensor([[1.0, 2.0], [3.0, 5.0]])).square().sum().backward()
    model[0].weight.grad += 1
    optimizer.step()


TAKE = {
    "params": lambda state: state.params,
    "one": lambda state: state.params["0.weight"],
    "transposed": lambda state: state.params["0.weight"].T,
    "view": lambda state: state.params["0.weight"][0].reshape(2, 1),
    "nested": lambda state: {"a": (1, {"b": (state.params["0.weight"],)})},
    "buffer": lambda state: state.buffers["1.running_mean"],
    "exp_avg": lambda state: state.opt_state["state"]["0.weight"]["exp_avg"],
    "opt_state": lambda state: state.opt_state["state"],
}


@pytest.mark.parametrize("take", TAKE.values(), ids=TAKE)
@pytest.mark.parametrize("field", ["remember", "callback_states", "metrics", "hyperparams", "effect"])
def test_a_tensor_of_a_live_object_is_copied_where_it_is_read_later(take, field):
    model, optimizer = trained()
    state = TrainState.from_module(model, optimizer)
    read = set_field(state, field, take(state))
    before = copy.deepcopy(read())
    step(model, optimizer)
    assert same(read(), before)
    assert not same(take(state), before)


@dataclass(frozen=True)
class Show(Effect):
    """An effect whose handler reads a tree later."""

    tree: object


def set_field(state, field, value):
    """Put a value into a field of the state, or into an effect; return a function that reads it there."""
    if field == "remember":
        state = state.remember("kept", value)
        return lambda: state.memory("kept")
    if field == "effect":
        found = []
        dispatch(
            state, AfterUpdate(samples=1), lambda state, event: (state, (Show(value),)), lambda e, *_: found.extend(e)
        )
        _, (effect,) = compose(lambda state, event: (state, (Show(value),)))(state, AfterUpdate(samples=1))
        assert same(effect.tree, found[0].tree)
        return lambda: effect.tree
    state = state.replace(**{field: {**getattr(state, field), "kept": value}})
    return lambda: getattr(state, field)["kept"]


def test_a_measured_tensor_of_a_live_object_is_copied():
    model, optimizer = trained()
    state = TrainState.from_module(model, optimizer)
    state, _ = log(state.advance(samples=1), AfterUpdate(samples=1), {"weight": state.params["0.weight"][0, 0]})
    before = float(state.metrics["weight"].value)
    step(model, optimizer)
    assert float(state.metrics["weight"].value) == before


def test_memory_of_its_own_is_not_copied():
    model, optimizer = trained()
    state = TrainState.from_module(model, optimizer)
    total, pair = torch.ones(3), torch.zeros(4)
    memory = FrozenDict(total=total, parts=(pair[:2], pair[2:]), count=3)
    assert state.remember("sum", memory).memory("sum") is memory


def test_best_weights_of_a_live_loop_stay():
    @callback("best", init=lambda state: (float("inf"), {}))
    @every_n_updates(1)
    def best(state, event):
        if float(event.losses["total"]) < state.memory("best")[0]:
            state = state.remember("best", (float(event.losses["total"]), state.params))
        return state, ()

    model, optimizer = trained()
    reducer, state = compose(best), TrainState.from_module(model, optimizer)
    state, _ = reducer(state, BeforeTraining())
    for loss in (0.5, 0.1, 5.0):
        step(model, optimizer)
        if loss == 0.1:
            expected = copy.deepcopy(dict(state.params))
        state, _ = reducer(state.advance(samples=1), AfterUpdate(samples=1, losses={"total": loss}))
    assert same(dict(state.memory("best")[1]), expected)


# ------------------------------------------------------------------------------------------------ the optimizer


def test_a_replaced_parameter_is_named_once():
    model, optimizer = trained()
    state = TrainState.from_module(model, optimizer)
    model.load_state_dict(dict(model.state_dict()), assign=True)
    with pytest.warns(StateWarning, match="the optimizer does not train '0.weight', '0.bias', '1.weight', '1.bias': "):
        assert dict(state.opt_state["state"]) == {}
    assert dict(state.opt_state["state"]) == {}  # no second warning, which would be an error
    assert dict(TrainState.from_module(model, optimizer).opt_state["state"]) == {}


def test_the_memory_of_a_parameter_has_the_name_that_it_has_now():
    model, optimizer = trained()
    state = TrainState.from_module(model, optimizer)
    moved = nn.Sequential(*reversed(list(model)))
    assert set(TrainState.from_module(moved, optimizer).opt_state["state"]) == {
        "0.weight", "0.bias", "1.weight", "1.bias",
    }  # fmt: skip
    nn.utils.parametrizations.weight_norm(model[0])
    with pytest.warns(StateWarning, match="does not train"):  # weight_norm makes two parameters of one
        assert "0.bias" in state.opt_state["state"]


@pytest.mark.parametrize("part", ["params", "buffers", "opt_state"])
def test_a_lease_of_a_live_state_keeps_its_values(part):
    model, optimizer = trained()
    kept = lease(TrainState.from_module(model, optimizer))
    before = copy.deepcopy(getattr(kept, part))
    step(model, optimizer)
    assert same(getattr(kept, part), before)
    assert not was_donated(kept)


def test_averages_of_another_shape_are_refused():
    state = TrainState.from_module(nn.Linear(2, 3)).remember("weights/a", {"params": {"bias": torch.ones(1)}})
    with pytest.raises(WeightsError, match=r"a: params: 'bias' has shape \(1,\), and \(3,\) in the model"):
        use_weights(state, "a")
    state = state.remember("weights/a", {"params": {"module.bias": torch.ones(3), "b": torch.ones(3)}})
    with pytest.raises(WeightsError, match="a: params have 'b', and the model does not"):
        use_weights(state, "a")
    state = state.remember("weights/a", {"params": {"module.bias": torch.ones(3)}})
    assert use_weights(state, "a").params["bias"].tolist() == [1.0] * 3


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize(
    "compile_model", [torch.jit.script, lambda model: torch.jit.trace(model, torch.ones(4, 2))], ids=["script", "trace"]
)
def test_a_state_reads_a_module_of_torchscript_as_one_of_python(compile_model):
    def train(wrap):
        torch.manual_seed(0)
        model = wrap(nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.PReLU(2))))
        optimizer = torch.optim.Adam(model.parameters())
        state = TrainState.from_module(model, optimizer)
        model(torch.arange(8.0).reshape(4, 2)).square().sum().backward()
        optimizer.step()
        return state

    state, expected = train(compile_model), train(lambda model: model)
    assert list(state.params) == ["0.weight", "0.bias", "1.0.weight"]
    torch.testing.assert_close(dict(state.params), dict(expected.params))
    assert state.opt_state["state"].keys() == expected.opt_state["state"].keys()
