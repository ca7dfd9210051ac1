"""The state is immutable, and is written into a live model and read from it without loss."""

import copy
import dataclasses
import gc
import pickle
import weakref
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from noether.core.errors import SettingsError
from noether.core.iteration import TrainingIteration
from noether.core.metrics import log
from noether.core.state import Measured, TrainState
from noether.core.tensors.batch import model_arguments
from noether.core.tensors.forward import forward
from noether.core.tensors.tree import FrozenDict, freeze, leaves, map_leaves, storages, tensors
from noether.testing import same

# ------------------------------------------------------------------------------------------------ frozen mappings

READING = {"copy", "get", "items", "keys", "values", "fromkeys"}
WRITING = {
    "clear": (),
    "pop": ("a",),
    "popitem": (),
    "setdefault": ("b", 1),
    "update": ({"b": 1},),
    "__setitem__": ("a", 2),
    "__delitem__": ("a",),
    "__ior__": ({"b": 1},),
}


def test_every_method_of_a_dict_is_known_to_read_or_to_write():
    public = {name for name in dir(dict) if not name.startswith("_")}
    assert public == READING | {name for name in WRITING if not name.startswith("_")}


@pytest.mark.parametrize(("method", "arguments"), WRITING.items())
def test_a_frozen_dict_is_not_written_to(method, arguments):
    frozen = FrozenDict(a=1)
    with pytest.raises(TypeError, match=r"^a state is never written to: make a new one, e.g. state.replace"):
        getattr(frozen, method)(*arguments)
    assert dict(frozen) == {"a": 1}


def test_a_frozen_dict_refuses_attributes_and_statements():
    frozen = FrozenDict(a=1)
    with pytest.raises(TypeError):
        frozen |= {"b": 2}
    with pytest.raises(TypeError):
        frozen["a"] += 1
    with pytest.raises(AttributeError):
        frozen.b = 2
    assert dict(frozen) == {"a": 1}


def test_a_frozen_dict_is_united_copied_hashed_and_sent():
    frozen = FrozenDict(a=1, b=FrozenDict(c=2))
    assert frozen | {"a": 3} == {"a": 3, "b": {"c": 2}}
    assert type(frozen | {}) is FrozenDict
    for other in (copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen))):  # our own bytes  # noqa: S301  # our own bytes
        assert other == frozen
        assert type(other) is type(other["b"]) is FrozenDict
    assert hash(frozen) == hash(FrozenDict(b=FrozenDict(c=2), a=1))


TREES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    | st.lists(inner, max_size=3).map(tuple),
    max_leaves=8,
)  # fmt: skip


@given(TREES)
def test_freezing_is_done_once_and_leaves_the_leaves(tree):
    frozen = freeze(tree)
    assert freeze(frozen) is frozen
    assert same(list(leaves(frozen)), list(leaves(tree)))
    assert same(map_leaves(lambda leaf: leaf, tree), frozen)


def test_tensors_and_storages_of_a_tree():
    weight = torch.zeros(4)
    tree = {"a": (1, weight), "b": {"c": weight[2:], "empty": torch.zeros(0)}}
    assert [name for name, _ in tensors(tree)] == ["a.1", "b.c", "b.empty"]
    assert storages(tree) == {weight.data_ptr()}


# ------------------------------------------------------------------------------------------------ the state


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(TrainState)])
def test_no_field_of_a_state_is_assigned_to(field):
    state = TrainState()
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(state, field, None)
    with pytest.raises(dataclasses.FrozenInstanceError):
        delattr(state, field)
    with pytest.raises((AttributeError, TypeError)):  # slots: there is nowhere to put it
        state.anything = 1


@pytest.mark.parametrize("field", ["params", "buffers", "opt_state", "hyperparams", "metrics", "callback_states"])
def test_mappings_of_a_state_are_frozen_copies(field):
    given = {"a": 1}
    state = TrainState(**{field: given})
    given["a"] = 2
    assert getattr(state, field) == {"a": 1}
    with pytest.raises(TypeError, match="a state is never written to"):
        getattr(state, field)["a"] = 2
    assert getattr(state.replace(**{field: {"b": 1}}), field) == {"b": 1}
    assert getattr(state, field) == {"a": 1}


def test_a_new_state_is_at_the_start():
    state = TrainState()
    assert (state.iteration, state.previous) == (TrainingIteration(), TrainingIteration())
    assert dict(state.hyperparams) == {"lr_scale": 1.0}
    assert (state.stop, state.ended, state.seed) == (None, False, 0)
    assert (state.params, state.buffers, state.opt_state, state.metrics, state.callback_states) == ({},) * 5


def test_counters_move():
    state = TrainState(ended=True).advance(samples=4)
    assert (state.iteration, state.previous, state.ended) == (TrainingIteration(0, 1, 4), TrainingIteration(), False)
    state = state.next_epoch()
    assert (state.iteration, state.previous) == (TrainingIteration(1, 1, 4), TrainingIteration())
    state = state.advance(samples=3)
    assert (state.iteration, state.previous) == (TrainingIteration(1, 2, 7), TrainingIteration(1, 1, 4))


def test_memory():
    state = TrainState()
    remembered = state.remember("a", {"x": [1, {"y": 2}]})
    assert remembered.memory("a") == {"x": (1, {"y": 2})}
    assert remembered.remember("a", remembered.memory("a")) is remembered
    assert remembered.remember("b", 1).memory("a") is remembered.memory("a")
    with pytest.raises(TypeError):
        remembered.memory("a")["x"][1]["y"] = 3
    with pytest.raises(KeyError, match="no memory is named 'a'; memories: none"):
        state.memory("a")
    with pytest.raises(KeyError, match="no memory is named 'c'; memories: 'a'"):
        remembered.memory("c")


def test_none_is_a_memory():
    state = TrainState().remember("a", None)
    assert state.memory("a") is None
    assert state.remember("a", None) is state
    assert TrainState().remember("a", None) is not TrainState()


def test_the_first_reason_to_stop_stays():
    assert TrainState().request_stop("a").request_stop("b").stop == "a"
    stopped = TrainState().request_stop("")
    assert stopped.request_stop("b") is stopped


def test_a_state_can_be_copied_and_sent():
    state, _ = log(TrainState(params={"w": torch.ones(2)}).advance(samples=2), None, {"a": 1.0})
    state = state.remember("m", {"t": (torch.zeros(1), None)})
    for other in (copy.deepcopy(state), pickle.loads(pickle.dumps(state))):  # our own bytes  # noqa: S301  # our own bytes
        assert same(other, state)
        assert type(other.metrics["a"]) is Measured
        assert other.params["w"] is not state.params["w"]


# ------------------------------------------------------------------------------------------------ a live model


class Net(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.first, self.norm, self.last = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)

    def forward(self, x):
        return self.last(self.norm(self.first(x)).relu())


OPTIMIZERS = {
    "adam": lambda model: torch.optim.Adam(model.parameters(), lr=0.01),
    "amsgrad": lambda model: torch.optim.AdamW(model.parameters(), lr=0.01, amsgrad=True),
    "momentum": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
    "groups": lambda model: torch.optim.Adam(
        [
            {"params": model.first.parameters(), "lr": 0.02},
            {"params": [*model.norm.parameters(), *model.last.parameters()]},
        ]
    ),
    "lbfgs": lambda model: torch.optim.LBFGS(model.parameters(), lr=0.05, max_iter=2),  # lists in its memory
}


def train(model, optimizer, updates, start=0):
    """Return the losses of some updates on data that depend on the update."""
    losses = []
    for update in range(start, start + updates):
        x = torch.sin(torch.arange(15.0) * (update + 1)).view(5, 3)

        def closure(x=x):
            optimizer.zero_grad()
            loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
            loss.backward()
            return loss

        losses.append(optimizer.step(closure).item())
    return losses


def on_disk(state):
    """Return the state as a save would hold it: a copy that the live objects do not change."""
    copied = {name: map_leaves(copy.deepcopy, getattr(state, name))
              for name in ("params", "buffers", "opt_state")}  # fmt: skip
    return state.replace(**copied)


def contents(model, optimizer):
    return copy.deepcopy((dict(model.state_dict()), optimizer.state_dict()))


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_a_restored_state_trains_on_bit_for_bit(name, scale):
    model = Net()
    optimizer = OPTIMIZERS[name](model)
    train(model, optimizer, 3)
    state = TrainState.from_module(model, optimizer, seed=3)
    state = state.replace(hyperparams={"lr_scale": scale}).into_module(model, optimizer)
    train(model, optimizer, 2, start=3)
    saved = on_disk(state)
    expected = train(model, optimizer, 4, start=5)

    other = Net(seed=9)
    fresh = OPTIMIZERS[name](other)
    restored = saved.into_module(other, fresh)
    assert restored.seed == 3
    assert train(other, fresh, 4, start=5) == expected
    assert same(contents(other, fresh), contents(model, optimizer))
    saved.into_module(other, fresh)  # training did not write to the saved tensors
    assert train(other, fresh, 4, start=5) == expected


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_into_module_resets_a_trained_model(name):
    """It replaces the optimizer's memory of later updates, and the scale of its learning rates."""
    model = Net()
    optimizer = OPTIMIZERS[name](model)
    saved = on_disk(TrainState.from_module(model, optimizer))
    expected = train(model, optimizer, 3)
    state = TrainState.from_module(model, optimizer).replace(hyperparams={"lr_scale": 0.25})
    state.into_module(model, optimizer)
    train(model, optimizer, 2)
    saved.into_module(model, optimizer)
    assert train(model, optimizer, 3) == expected


def test_the_scale_is_applied_once():
    model = Net()
    optimizer = OPTIMIZERS["groups"](model)
    state = TrainState.from_module(model, optimizer).replace(hyperparams={"lr_scale": 0.5})
    for _ in range(3):
        state = state.into_module(model, optimizer)
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.0005]
    saved = on_disk(state)
    other = Net()
    fresh = OPTIMIZERS["groups"](other)
    for _ in range(3):
        state = saved.into_module(other, fresh)
    assert [group["lr"] for group in fresh.param_groups] == [0.01, 0.0005]
    state.replace(hyperparams={"lr_scale": 1.0}).into_module(other, fresh)
    assert [group["lr"] for group in fresh.param_groups] == [0.02, 0.001]
    state.replace(hyperparams={}).into_module(other, fresh)
    assert [group["lr"] for group in fresh.param_groups] == [0.02, 0.001]


def test_a_state_from_a_module_changes_with_the_model():
    model = Net()
    optimizer = OPTIMIZERS["momentum"](model)
    state = TrainState.from_module(model, optimizer)
    assert dict(state.opt_state["state"]) == {}
    before = state.params["last.bias"].clone()
    train(model, optimizer, 1)
    assert not torch.equal(state.params["last.bias"], before)
    assert torch.equal(state.params["last.bias"], model.last.bias)
    assert set(state.opt_state["state"]) == {name for name, _ in model.named_parameters()}
    assert state.buffers["norm.num_batches_tracked"].item() == 1
    assert not state.params["last.bias"].requires_grad
    assert list(state.opt_state) == ["state", "groups"]
    assert len(state.opt_state) == 2
    with pytest.raises(TypeError):
        state.opt_state["state"] = {}


def test_a_state_borrowed_from_one_model_goes_into_another():
    model, other = Net(), Net(seed=5)
    optimizer = OPTIMIZERS["adam"](model)
    train(model, optimizer, 3)
    fresh = OPTIMIZERS["adam"](other)
    TrainState.from_module(model, optimizer).into_module(other, fresh)
    assert same(contents(other, fresh), contents(model, optimizer))
    train(other, fresh, 1)
    assert not torch.equal(other.last.bias, model.last.bias)  # the two models share no tensor


def test_writing_into_the_model_that_it_views_changes_nothing():
    model = Net()
    optimizer = OPTIMIZERS["adam"](model)
    train(model, optimizer, 2)
    before = contents(model, optimizer)
    TrainState.from_module(model, optimizer).into_module(model, optimizer)
    assert same(contents(model, optimizer), before)


def test_a_state_without_optimizer_leaves_the_optimizer_as_it_is():
    model = Net()
    optimizer = OPTIMIZERS["adam"](model)
    train(model, optimizer, 2)
    before = copy.deepcopy(optimizer.state_dict())
    TrainState.from_module(model).into_module(model, optimizer)
    assert same(optimizer.state_dict(), before)


def test_a_dispatch_that_changes_params_reaches_the_model():
    model = Net()
    state = TrainState.from_module(model)
    state = state.replace(params=state.params | {"last.bias": torch.tensor([7.0])}).into_module(model)
    assert model.last.bias.item() == 7.0
    assert state.params["last.bias"].data_ptr() == model.last.bias.data_ptr()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.replace(params={**s.params, "more": torch.zeros(1)}), "parameter 'more' is not in the model"),
        (lambda s: s.replace(params={}), "parameter 'first.bias' is not in the state"),
        (lambda s: s.replace(buffers={}), "buffer 'norm.num_batches_tracked' is not in the state"),
    ],
)
def test_a_state_of_another_model_is_refused(change, message):
    with pytest.raises(KeyError, match=message):
        change(TrainState.from_module(Net())).into_module(Net())


def test_forward_has_the_weights_of_the_state_and_leaves_the_model_alone():
    model = Net()
    model.norm.eval()
    state = on_disk(TrainState.from_module(Net(seed=4)))
    before = copy.deepcopy(model.state_dict())
    predict = forward(model, lambda outputs, batch: {"mse": (outputs - batch[1]).square().mean()})
    batch = (torch.ones(6, 3), torch.zeros(6, 1))
    losses, outputs = predict(state, batch)
    other = Net(seed=4).eval()
    with torch.no_grad():
        assert torch.equal(outputs, other(batch[0]))
    assert losses["total"] == losses["mse"] == outputs.square().mean()
    assert not outputs.requires_grad
    assert (model.training, model.norm.training) == (True, False)
    assert same(dict(model.state_dict()), dict(before))


def mse(outputs, batch):
    return {"mse": (outputs - batch[1]).square().mean()}


class Square(torch.nn.Module):
    """Has a square parameter, and counts the changes of its mode."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        self.changes = 0

    def train(self, mode=True):  # noqa: FBT002  # as torch has it
        self.changes += 1
        return super().train(mode)

    def forward(self, x):
        return x @ self.weight


def test_a_view_of_a_parameter_is_not_mistaken_for_it():
    model, batch = Square(), (torch.eye(2), torch.zeros(2, 2))
    predict, state = forward(model, mse), TrainState.from_module(model)
    assert torch.equal(predict(state, batch)[1], model.weight)
    turned = state.replace(params={"weight": state.params["weight"].T})  # at the same address, of the same shape
    assert torch.equal(predict(turned, batch)[1], model.weight.T)
    other = state.replace(params={"weight": state.params["weight"] + 1})
    assert torch.equal(predict(other, batch)[1], model.weight + 1)


def test_an_evaluation_changes_the_mode_once_and_back_even_if_it_fails():
    model, batch = Square().train(), (torch.eye(2), torch.zeros(2, 2))
    predict, state = forward(model, mse), TrainState.from_module(model)
    model.changes = 0
    with predict.evaluating():
        losses = [predict(state, batch)[0]["mse"] for _ in range(3)]
        assert not model.training
    assert (model.changes, model.training, len(set(map(float, losses)))) == (1, True, 1)
    with pytest.raises(KeyError, match="no"), predict.evaluating():
        raise KeyError("no")
    assert model.training
    assert torch.equal(predict(state, batch)[0]["mse"], losses[0])
    assert model.training


def test_a_model_put_into_training_mode_during_an_evaluation():
    model, batch = torch.nn.Dropout(0.5), (torch.ones(100, 1), torch.zeros(100, 1))
    predict, state = forward(model, mse), TrainState()
    with predict.evaluating():
        for _ in range(3):
            assert torch.equal(predict(state, batch)[1], batch[0])
            model.train()  # as loading the next batch may do
    assert model.training


class Returning(torch.nn.Linear):
    """Returns a parameter unchanged."""

    def forward(self, x):
        return {"out": super().forward(x), "bias": self.bias}


def test_forward_returns_no_parameter():
    model = Returning(2, 1)
    state = TrainState.from_module(model)
    predict = forward(model, lambda outputs, _: {"bias": outputs["bias"].sum(), "own": outputs["bias"][0]})
    losses, outputs = predict(state, (torch.ones(3, 2),))
    for tensor in (*losses.values(), *outputs.values()):
        assert not tensor.requires_grad
        assert tensor is not model.bias


def test_a_replaced_module_is_not_mistaken_for_that_of_the_state():
    model, batch = torch.nn.Sequential(torch.nn.Linear(2, 1)), (torch.ones(3, 2), torch.zeros(3, 1))
    state, predict = on_disk(TrainState.from_module(model)), forward(model, mse)
    expected = predict(state, batch)[1]
    model[0] = torch.nn.Linear(2, 1)
    assert torch.equal(predict(state, batch)[1], expected)


def test_autocast_around_evaluations_caches_no_weights():
    model, batch = Square(), (torch.eye(2), torch.zeros(2, 2))
    predict, state = forward(model, mse), TrainState.from_module(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = predict(state, batch)[1]
        with torch.no_grad():
            model.weight.mul_(2)
        assert torch.equal(predict(state, batch)[1], before * 2)


def test_forward_computes_in_a_precision():
    model, batch = Square(), (torch.eye(2), torch.zeros(2, 2))
    state = TrainState.from_module(model)
    assert forward(model, mse, precision=torch.bfloat16)(state, batch)[1].dtype == torch.bfloat16
    assert forward(model, mse)(state, batch)[1].dtype == torch.float32


class Taking(torch.nn.Module):
    """Takes inputs by name."""

    def forward(self, image, mask=None):
        return image


class Any(Taking):
    """Takes any keyword."""

    def forward(self, **inputs):
        return inputs


def plain(image):
    return image


@pytest.mark.parametrize("batch", [{"image": 1, "label": 2, "self": 3}, {"mask": 1, "image": 2}])
def test_a_model_gets_the_entries_that_its_forward_names(batch):
    wrapped = Taking()
    wrapped.forward = plain
    for _ in range(2):  # the signature is read once
        named = {name: value for name, value in batch.items() if name in ("image", "mask")}
        assert model_arguments(Taking(), batch) == ((), named)
        assert model_arguments(Any(), batch) == ((), batch)
        assert model_arguments(wrapped, batch) == ((), {"image": batch["image"]})


def test_the_cache_of_signatures_keeps_no_model_alive():
    model = Taking()
    model.forward = partial(plain)
    model.forward.__dict__["model"] = model
    model_arguments(model, {"image": 1})
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_memory_goes_to_the_device_of_the_model():
    model = torch.nn.Linear(2, 1, device="meta")
    live = TrainState.from_module(model)
    saved = live.replace(params=dict(live.params)).remember("sums", {"a": torch.ones(2), "n": 3})
    after = TrainState.from_module(model, saved=saved)
    assert after.memory("sums")["a"].device.type == "meta"
    assert after.memory("sums")["n"] == 3
    on_cpu = torch.nn.Linear(2, 1)
    held = TrainState.from_module(on_cpu).remember("sums", {"a": torch.ones(2)})
    assert TrainState.from_module(on_cpu, saved=held).callback_states is held.callback_states


@pytest.mark.parametrize("samples", [-1, 2.0, True, "4", None, torch.tensor(4)])
def test_counts_advance_by_whole_numbers_only(samples):
    start = TrainingIteration(0, 5, 20)
    with pytest.raises(SettingsError, match=r"^samples: .* is not a whole number of at least 0"):
        start.advance(samples=samples)
    with pytest.raises(SettingsError, match=r"^samples: "):
        TrainState(iteration=start).advance(samples=samples)
