"""A step that writes to the tensors it is given does what one that writes to none does, whoever holds them."""

import copy

import pytest
import torch
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from noether.core.callbacks import EMACallback
from noether.core.event import AfterUpdate
from noether.core.metrics import log
from noether.core.reducer import compose
from noether.core.state import TrainState
from noether.core.tensors import torch_internals
from noether.core.tensors.donation import DonatedError, DonatedTree, lease
from noether.core.tensors.donation import donate as given
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
    """Has tied weights, batch norm, dropout, a parameter that is not used at every update, and one that it returns."""

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


def step_of(model, optimizer, *, donate, **options):
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


def begun(step):
    torch.manual_seed(0)
    state = TrainState.from_module(type(step.model)())
    return state.replace(opt_state=step.optimizer.init(state.params))


def batch_of(number, *, finite=True):
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(4, 3, generator=generator)
    return x if finite else x * torch.nan, torch.randn(4, 3, generator=generator)


def values(state):
    names = ("params", "buffers", "opt_state", "metrics", "iteration", "callback_states")
    return {name: getattr(state, name) for name in names}


AVERAGE = compose(EMACallback(every_n_epochs=1, target_factors=(0.5, 0.9)))


def averaged(state):
    """Return the state after the callback has moved its averages."""
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
@settings(max_examples=25, deadline=None)
@drawn(
    actions=ACTIONS,
    nonfinite=st.sampled_from(["apply", "skip"]),
    clip=st.sampled_from([None, 0.1]),
    begins_donated=st.booleans(),
)
def test_whoever_holds_what_the_bits_are_those_of_the_pure_step(optimizer, actions, nonfinite, clip, begins_donated):
    """States are leased, copied, held in part, gone back to and changed between updates, in any order."""
    options = {"nonfinite": nonfinite, "clip_grad_norm": clip}
    ours, theirs = (step_of(Net().train(), optimizer, donate=donate, **options) for donate in (True, False))
    donated, pure = begun(ours), begun(theirs)
    donated = given(donated) if begins_donated else donated
    kept, held = [], []
    for action, *more in actions:
        if action == "update":
            number, finite = more
            before, batches = donated, [batch_of(number, finite=finite or nonfinite == "apply")] * (1 + number % 2)
            (donated, told), (pure, expected) = ours(donated, batches), theirs(pure, batches)
            donated, pure = (averaged(state.advance(samples=4)) for state in (donated, pure))
            held.append((told.outputs, copy.deepcopy(expected.outputs)))
            assert same(told.losses, expected.losses)
            assert readable(before) or (not told.skipped and isinstance(before.params, DonatedTree))
        elif action in {"lease", "copy"}:
            kept.append((lease(donated) if action == "lease" else copy.deepcopy(donated), pure))
        elif action == "hold":
            held += [(tensor.view(-1), pure_tensor.clone().view(-1)) for tensor, pure_tensor in paired(donated, pure)]
        elif action == "metric":
            donated, pure = (noted(state) for state in (donated, pure))
        elif action == "drop":
            held, kept = [], kept[:1]
        elif action == "back" and kept:
            donated, pure = kept[-1]
        elif action == "change":
            donated, pure = (
                state.replace(params=state.params | {"scale": torch.tensor(2.0)}) for state in (donated, pure)
            )
        elif action == "evaluate":
            assert same(*(forward(ours.model, loss)(state, batch_of(0)) for state in (donated, pure)))
        assert same(values(donated), values(pure))
        assert all(same(values(mine), values(pures)) for mine, pures in kept)
        assert all(same(mine, expected) for mine, expected in held)


def readable(state):
    try:
        return bool(dict(state.params)) and bool(dict(state.opt_state))
    except DonatedError:
        return False


def paired(donated, pure):
    names = ("params", "opt_state", "callback_states")
    trees = [{name: getattr(state, name) for name in names} for state in (donated, pure)]
    return [(mine, pures) for (_, mine), (_, pures) in zip(*map(tensors, trees), strict=True)]


def noted(state):
    return log(state, AfterUpdate(samples=4), {"scale": state.params["scale"]})[0]


def trained(step, updates, state=None):
    """Return the state after some updates; from the third on they write in place."""
    state = begun(step) if state is None else state
    for number in range(updates):
        state, _ = step(state, [batch_of(2 * number)])
        state = state.advance(samples=4)
    return state


def pointers(state):
    return {name: tensor.data_ptr() for name, tensor in tensors({"params": state.params, "opt_state": state.opt_state})}


@pytest.fixture
def step():
    return step_of(Plain().train(), "adamw fused", donate=True)


def test_an_update_writes_to_the_tensors_of_the_state_before(step):
    state = trained(step, 3)
    before = pointers(state)
    after = trained(step, 1, state)
    assert pointers(after) == before
    assert {name: parameter.data_ptr() for name, parameter in step.model.named_parameters()} == {
        name: tensor.data_ptr() for name, tensor in after.params.items()
    }


def test_a_donated_state_says_so_when_it_is_read(step):
    state = trained(step, 3)
    trained(step, 1, state)
    for read in (
        lambda: state.params["scale"],
        lambda: dict(state.opt_state),
        lambda: len(state.params),
        lambda: step(state, [batch_of(0)]),
    ):
        with pytest.raises(DonatedError, match=r"the update after it wrote to its tensors.*noether.lease\(state\)"):
            read()
    assert "donated" in repr(state.params)


def test_only_what_is_held_is_copied_and_what_was_left_is_used_again(step):
    state = trained(step, 3)
    first = pointers(state)
    held = state.params["first.weight"][0]
    state = trained(step, 1, state)
    moved = {name for name, pointer in pointers(state).items() if pointer != first[name]}
    assert moved == {"params.first.weight"}
    del held
    held = state.params["first.weight"][0]
    assert pointers(trained(step, 1, state)) == first
    del held


def test_leases_take_turns_with_two_sets_of_tensors(step):
    state = trained(step, 3)
    seen = []
    for _ in range(6):
        seen.append(pointers(state))
        kept = lease(state)
        state = trained(step, 1, state)
        del kept
    assert seen[0] != seen[1]
    assert seen[0::2] == [seen[0]] * 3
    assert seen[1::2] == [seen[1]] * 3


def test_what_fails_in_the_middle_of_an_update_leaves_no_half_of_one(step, monkeypatch):
    state = trained(step, 3)
    kept = lease(state)
    expected = copy.deepcopy(dict(kept.params))
    monkeypatch.setattr(torch_internals, "foreach_add_", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        step(state, [batch_of(0)])
    with pytest.raises(DonatedError):
        dict(state.params)
    assert same(dict(kept.params), expected)


def test_two_steps_of_one_model_do_not_write_to_each_others_states(step):
    other = step_of(step.model, "adamw fused", donate=True)
    pure = step_of(Plain().train(), "adamw fused", donate=False)
    mine, theirs, held = trained(step, 3), trained(other, 4), []
    for _ in range(3):
        held += [(tensor, tensor.clone()) for tensor in mine.params.values()]
        mine, theirs = trained(step, 1, mine), trained(other, 1, theirs)
    assert all(torch.equal(tensor, before) for tensor, before in held)
    expected = trained(pure, 3)
    for _ in range(3):
        expected = trained(pure, 1, expected)
    assert same(dict(mine.params), dict(expected.params))


def test_a_copy_is_nobodys_to_write_to(step):
    state = trained(step, 3)
    kept = copy.copy(state.params)
    assert type(kept).__name__ == "FrozenDict"
    trained(step, 1, state)
    assert same(dict(kept), dict(trained(step, 3, begun(step)).params))


@pytest.mark.parametrize("optimizer", ["adamw fused", "adam foreach, amsgrad", "adamw"])
def test_the_first_memory_is_that_of_the_class(optimizer):
    """A run that begins with what nobody else needs copies nothing, from its first update on."""
    step, pure = (step_of(Plain().train(), optimizer, donate=donate) for donate in (True, False))
    begins = given(begun(step))
    where = {name: tensor.data_ptr() for name, tensor in begins.params.items()}
    after, expected = trained(step, 1, begins), trained(pure, 1)
    assert same(values(after), values(expected))
    assert {name: tensor.data_ptr() for name, tensor in after.params.items()} == where
    assert same(values(trained(step, 2, after)), values(trained(pure, 2, expected)))


class Rebinding(Plain):
    """Puts other memory behind a parameter, which torch does not count as writing to it."""

    def forward(self, x):
        self.first.weight.data = self.first.weight.data.clamp(-1, 1)
        return super().forward(x)


def test_what_is_held_is_left_alone_though_the_model_let_go_of_it():
    step = step_of(Rebinding().train(), "adamw fused", donate=True)
    state, _ = step(given(begun(step)), [batch_of(0)])
    for number in range(1, 4):
        kept = lease(state)
        before = copy.deepcopy(dict(kept.params))
        state, _ = step(state, [batch_of(number)])
        assert same(dict(kept.params), before)


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
    step = step_of(HandingBack().train(), optimizer, donate=True)
    state = given(begun(step))
    for number in range(3):
        state, _ = step(state, [batch_of(number)])
    assert not [name for name, tensor in tensors((state.params, state.opt_state)) if tensor.requires_grad]


class Checkpointed(Plain):
    """Computes its hidden layer again in the backward pass."""

    def forward(self, x):
        return {"out": self.second(checkpoint(self.first, x, use_reentrant=False).relu())}


@pytest.mark.parametrize("donate", [False, True])
def test_what_is_computed_again_in_the_backward_pass_has_the_weights_of_the_state(donate):
    plain, again = (step_of(model.train(), "adamw fused", donate=donate) for model in (Plain(), Checkpointed()))
    expected, found = given(begun(plain)), given(begun(again))
    for number in range(4):
        (expected, _), (found, _) = plain(expected, [batch_of(number)]), again(found, [batch_of(number)])
        assert same(dict(found.params), dict(expected.params))
