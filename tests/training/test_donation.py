"""A step that writes in place gives the bits of one that does not, even if other code references the tensors."""

import copy

import pytest
import torch
from hypothesis import given as drawn
from hypothesis import strategies as st
from law_examples import examples
from torch import nn
from torch.utils.checkpoint import checkpoint

from noether.core.callbacks import EMACallback
from noether.core.event import AfterUpdate
from noether.core.metrics import log
from noether.core.reducer import compose
from noether.core.state import TrainState
from noether.core.tensors import torch_internals
from noether.core.tensors.donation import DonatedError, DonatedTree, lease
from noether.core.tensors.donation import donate as donate_state
from noether.core.tensors.forward import forward
from noether.core.tensors.tree import tensors
from noether.testing import same
from noether.training.step.optimizer import FunctionalOptimizer
from noether.training.step.step import Step
from noether.training.value_schedules import Constant

OPTIMIZERS = {
    "adamw fused": (torch.optim.AdamW, {"fused": True}),
    "adam fused": (torch.optim.Adam, {"fused": True, "weight_decay": 0.1}),
    "adamw": (torch.optim.AdamW, {}),
    "adam foreach, amsgrad": (torch.optim.Adam, {"foreach": True, "amsgrad": True}),
    "adamw fused, amsgrad": (torch.optim.AdamW, {"fused": True, "amsgrad": True}),
    "sgd": (torch.optim.SGD, {}),
    "sgd fused": (torch.optim.SGD, {"fused": True}),
    "sgd, nesterov": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "by its class": (torch.optim.RMSprop, {}),
}


class Net(nn.Module):
    """Has tied weights, batch norm, dropout, a parameter that only some updates use, and one that it returns."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.norm, self.dropout = nn.BatchNorm1d(3), nn.Dropout(0.3)
        self.scale, self.sometimes = nn.Parameter(torch.tensor(0.5)), nn.Parameter(torch.ones(3))

    def forward(self, x):
        hidden = self.dropout(self.norm(self.first(x).relu()))
        hidden = hidden * self.sometimes if x.sum() > 0 else hidden
        return {"out": self.second(hidden) * self.scale, "scale": self.scale}


def loss(outputs, batch):
    return {"square": (outputs["out"] - batch[1]).square().mean()}


def make_step(model, optimizer, *, donate, **options):
    cls, values = OPTIMIZERS[optimizer]
    functional = FunctionalOptimizer(cls, {"lr": 0.1, **values})
    return Step(
        model=model, loss=loss, optimizer=functional, lr={"default": Constant(value=0.1)}, donate=donate, **options
    )


class Plain(nn.Module):
    """Uses each parameter at every update, and returns none."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        return {"out": self.second(self.first(x).relu())}


def initial_state(step):
    torch.manual_seed(0)
    state = lease(TrainState.from_module(type(step.model)()))  # values, without the module
    return state.replace(opt_state=step.optimizer.init(state.params))


def make_batch(number, *, finite=True):
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(4, 3, generator=generator)
    return x if finite else x * torch.nan, torch.randn(4, 3, generator=generator)


def values_of(state):
    names = ("params", "buffers", "opt_state", "metrics", "iteration", "callback_states")
    return {name: getattr(state, name) for name in names}


AVERAGE = compose(EMACallback(every_n_epochs=1, target_factors=(0.5, 0.9)))


def update_averages(state):
    """Return the state after the callback updated its averages."""
    return AVERAGE(state, AfterUpdate(samples=4))[0]


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("update"), st.integers(0, 30), st.booleans()),
        st.sampled_from(
            [("lease",), ("copy",), ("hold",), ("metric",), ("drop",), ("back",), ("change",), ("evaluate",)]
        ),
    ),
    min_size=1,
    max_size=25,
)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@examples(25, quick=8)
@drawn(
    actions=ACTIONS,
    nonfinite=st.sampled_from(["apply", "skip"]),
    clip=st.sampled_from([None, 0.1]),
    begins_donated=st.booleans(),
)
def test_bits_are_those_of_the_pure_step_whatever_holds_tensors(optimizer, actions, nonfinite, clip, begins_donated):
    """Between updates, in any order: lease or copy a state, reference tensors, go back to a saved state, change it."""
    options = {"nonfinite": nonfinite, "clip_grad_norm": clip}
    ours, theirs = (make_step(Net().train(), optimizer, donate=donate, **options) for donate in (True, False))
    donated, pure = initial_state(ours), initial_state(theirs)
    donated = donate_state(donated) if begins_donated else donated
    saved_states, tensor_pairs = [], []
    for action, *more in actions:
        if action == "update":
            number, finite = more
            before, batches = donated, [make_batch(number, finite=finite or nonfinite == "apply")] * (1 + number % 2)
            (donated, event), (pure, expected) = ours(donated, batches), theirs(pure, batches)
            donated, pure = (update_averages(state.advance(samples=4)) for state in (donated, pure))
            tensor_pairs.append((event.outputs, copy.deepcopy(expected.outputs)))
            assert same(event.losses, expected.losses)
            assert is_readable(before) or (not event.skipped and isinstance(before.params, DonatedTree))
        elif action in {"lease", "copy"}:
            saved_states.append((lease(donated) if action == "lease" else copy.deepcopy(donated), pure))
        elif action == "hold":
            tensor_pairs += [
                (tensor.view(-1), pure_tensor.clone().view(-1)) for tensor, pure_tensor in pair_tensors(donated, pure)
            ]
        elif action == "metric":
            donated, pure = (log_scale(state) for state in (donated, pure))
        elif action == "drop":
            tensor_pairs, saved_states = [], saved_states[:1]
        elif action == "back" and saved_states:
            donated, pure = saved_states[-1]
        elif action == "change":
            donated, pure = (
                state.replace(params=state.params | {"scale": torch.tensor(2.0)}) for state in (donated, pure)
            )
        elif action == "evaluate":
            assert same(*(forward(ours.model, loss)(state, make_batch(0)) for state in (donated, pure)))
        assert same(values_of(donated), values_of(pure))
        assert all(same(values_of(mine), values_of(pures)) for mine, pures in saved_states)
        assert all(same(mine, expected) for mine, expected in tensor_pairs)


def is_readable(state):
    try:
        return bool(dict(state.params)) and bool(dict(state.opt_state))
    except DonatedError:
        return False


def pair_tensors(donated, pure):
    names = ("params", "opt_state", "callback_states")
    trees = [{name: getattr(state, name) for name in names} for state in (donated, pure)]
    return [(mine, pures) for (_, mine), (_, pures) in zip(*map(tensors, trees), strict=True)]


def log_scale(state):
    return log(state, AfterUpdate(samples=4), {"scale": state.params["scale"]})[0]


def train(step, updates, state=None):
    """Return the state after some updates; from the third on they write in place."""
    state = initial_state(step) if state is None else state
    for number in range(updates):
        state, _ = step(state, [make_batch(2 * number)])
        state = state.advance(samples=4)
    return state


def pointers(state):
    return {name: tensor.data_ptr() for name, tensor in tensors({"params": state.params, "opt_state": state.opt_state})}


@pytest.fixture
def step():
    return make_step(Plain().train(), "adamw fused", donate=True)


def test_an_update_writes_to_the_tensors_of_the_state_before(step):
    state = train(step, 3)
    before = pointers(state)
    after = train(step, 1, state)
    assert pointers(after) == before
    assert {name: parameter.data_ptr() for name, parameter in step.model.named_parameters()} == {
        name: tensor.data_ptr() for name, tensor in after.params.items()
    }


def test_a_donated_state_says_so_when_it_is_read(step):
    state = train(step, 3)
    train(step, 1, state)
    for read in (
        lambda: state.params["scale"],
        lambda: dict(state.opt_state),
        lambda: len(state.params),
        lambda: step(state, [make_batch(0)]),
    ):
        with pytest.raises(DonatedError, match=r"the next update overwrote its tensors.*noether.lease\(state\)"):
            read()
    assert "donated" in repr(state.params)


def test_only_shared_tensors_are_copied_and_their_memory_is_used_again(step):
    state = train(step, 3)
    first = pointers(state)
    view = state.params["first.weight"][0]
    state = train(step, 1, state)
    moved = {name for name, pointer in pointers(state).items() if pointer != first[name]}
    assert moved == {"params.first.weight"}
    del view
    view = state.params["first.weight"][0]
    assert pointers(train(step, 1, state)) == first
    del view


def test_leases_take_turns_with_two_sets_of_tensors(step):
    state = train(step, 3)
    addresses = []
    for _ in range(6):
        addresses.append(pointers(state))
        snapshot = lease(state)
        state = train(step, 1, state)
        del snapshot
    assert addresses[0] != addresses[1]
    assert addresses[0::2] == [addresses[0]] * 3
    assert addresses[1::2] == [addresses[1]] * 3


def test_an_error_in_the_middle_of_an_update_leaves_no_partial_update(step, monkeypatch):
    state = train(step, 3)
    snapshot = lease(state)
    expected = copy.deepcopy(dict(snapshot.params))
    monkeypatch.setattr(torch_internals, "fused_adamw_", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        step(state, [make_batch(0)])
    with pytest.raises(DonatedError):
        dict(state.params)
    assert same(dict(snapshot.params), expected)


def test_two_steps_of_one_model_do_not_write_to_each_others_states(step):
    other = make_step(step.model, "adamw fused", donate=True)
    pure = make_step(Plain().train(), "adamw fused", donate=False)
    mine, theirs, copies = train(step, 3), train(other, 4), []
    for _ in range(3):
        copies += [(tensor, tensor.clone()) for tensor in mine.params.values()]
        mine, theirs = train(step, 1, mine), train(other, 1, theirs)
    assert all(torch.equal(tensor, before) for tensor, before in copies)
    expected = train(pure, 3)
    for _ in range(3):
        expected = train(pure, 1, expected)
    assert same(dict(mine.params), dict(expected.params))


def check_turns(optimizers, updates):
    """Check that optimizers which take turns after so many updates give the bits of steps that do not donate."""
    model, results = Plain(), []
    for donate in (True, False):
        steps = [
            Step(model=model, loss=loss, optimizer=each, lr={"default": Constant(value=0.1)}, donate=donate)
            for each in optimizers
        ]
        state = initial_state(steps[0])
        for number in range(8):
            state, _ = steps[number // updates % 2](state, [make_batch(number)])
        results.append(dict(lease(state).params))
    assert same(*results)


def test_two_optimizers_may_take_turns_with_the_tensors_of_a_state():
    settings = [{"fused": True}, {"fused": True, "weight_decay": 0.5}]
    check_turns([FunctionalOptimizer(torch.optim.AdamW, {"lr": 0.1, **each}) for each in settings], updates=1)


@pytest.mark.parametrize("frozen", [("second.weight", "second.bias"), ()])
def test_an_optimizer_may_train_other_parameters_of_a_donated_state_than_the_one_before(frozen):
    names = [("first.weight", "first.bias"), frozen]
    sgds = [FunctionalOptimizer(torch.optim.SGD, {"lr": 0.1}, frozen=frozenset(each)) for each in names]
    check_turns(sgds, updates=2)


def test_no_update_writes_to_a_copy(step):
    state = train(step, 3)
    snapshot = copy.copy(state.params)
    assert type(snapshot).__name__ == "FrozenDict"
    train(step, 1, state)
    assert same(dict(snapshot), dict(train(step, 3, initial_state(step)).params))


@pytest.mark.parametrize("optimizer", ["adamw fused", "adam foreach, amsgrad", "adamw"])
def test_the_first_memory_is_that_of_the_class(optimizer):
    """A run whose initial state is donated copies nothing, from its first update on."""
    step, pure = (make_step(Plain().train(), optimizer, donate=donate) for donate in (True, False))
    begins = donate_state(initial_state(step))
    where = {name: tensor.data_ptr() for name, tensor in begins.params.items()}
    after, expected = train(step, 1, begins), train(pure, 1)
    assert same(values_of(after), values_of(expected))
    assert {name: tensor.data_ptr() for name, tensor in after.params.items()} == where
    assert same(values_of(train(step, 2, after)), values_of(train(pure, 2, expected)))


class Rebinding(Plain):
    """Assigns other data to a parameter, which torch does not count as a write."""

    def forward(self, x):
        self.first.weight.data = self.first.weight.data.clamp(-1, 1)
        return super().forward(x)


def test_a_lease_keeps_its_values_though_the_model_released_the_tensor():
    step = make_step(Rebinding().train(), "adamw fused", donate=True)
    state, _ = step(donate_state(initial_state(step)), [make_batch(0)])
    for number in range(1, 4):
        snapshot = lease(state)
        before = copy.deepcopy(dict(snapshot.params))
        state, _ = step(state, [make_batch(number)])
        assert same(dict(snapshot.params), before)


class HandsBack(torch.autograd.Function):
    """Returns in its backward pass a parameter that requires gradients."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.weight = weight
        return x * weight.sum()

    @staticmethod
    def backward(ctx, grad):
        return None, ctx.weight


class HandingBack(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return {"out": HandsBack.apply(x, self.weight)}


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "sgd, nesterov", "adamw fused"])
def test_no_graph_grows_behind_the_tensors(optimizer):
    step = make_step(HandingBack().train(), optimizer, donate=True)
    state = donate_state(initial_state(step))
    for number in range(3):
        state, _ = step(state, [make_batch(number)])
    assert not [name for name, tensor in tensors((state.params, state.opt_state)) if tensor.requires_grad]


class Checkpointed(Plain):
    """Computes its hidden layer again in the backward pass."""

    def forward(self, x):
        return {"out": self.second(checkpoint(self.first, x, use_reentrant=False).relu())}


@pytest.mark.parametrize("donate", [False, True])
def test_checkpointed_layers_use_the_weights_of_the_state_in_the_backward_pass(donate):
    plain, again = (make_step(model.train(), "adamw fused", donate=donate) for model in (Plain(), Checkpointed()))
    expected, found = donate_state(initial_state(plain)), donate_state(initial_state(again))
    for number in range(4):
        (expected, _), (found, _) = plain(expected, [make_batch(number)]), again(found, [make_batch(number)])
        assert same(dict(found.params), dict(expected.params))
