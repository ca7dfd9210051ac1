"""Groups that a loop adds, freezes and unfreezes while it trains: a run that is cut anywhere resumes exactly."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from noether import AfterUpdate, LrCallback, Session, TrainState, compose, dispatch, open_run
from noether.core.callbacks import CheckpointCallback
from noether.core.errors import StateWarning
from noether.core.tensors.live.weights import MismatchError
from noether.session.errors import SessionError
from noether.session.optimizer_watch import name_groups
from noether.testing import assert_same

BATCHES = [torch.randn(4, 2, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
LAYERS = 4
OPTIMIZERS = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.1),
    "momentum": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda groups: torch.optim.Adam(groups, lr=0.1, betas=(0.8, 0.9)),
}
actions = st.one_of(
    st.tuples(st.just("add"), st.booleans()),
    st.tuples(st.sampled_from(["freeze", "unfreeze"]), st.integers(0, LAYERS - 1)),
    st.just(("rename", 0)),
    st.just(("rate", 0)),
)


def make(kind, *, named=False):
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(2, 2) for _ in range(LAYERS)))
    net[:-1].requires_grad_(False)
    members = ((f"head.{name}", each) for name, each in net[-1].named_parameters()) if named else net[-1].parameters()
    return net, OPTIMIZERS[kind](list(members))


def act(net, optimizer, action, argument, *, named=False):
    """Do what a finetuning callback does once, at one update."""
    if action == "add" and len(optimizer.param_groups) < LAYERS:
        index = LAYERS - 1 - len(optimizer.param_groups)
        net[index].requires_grad_(True)
        members = net[index].named_parameters(prefix=str(index)) if named else net[index].parameters()
        name = {"name": "body"} if argument else {}
        optimizer.add_param_group({"params": list(members), "lr": 0.01 * (index + 1), **name})
    elif action in {"freeze", "unfreeze"}:
        if any(p is net[argument].bias for group in optimizer.param_groups for p in group["params"]):
            net[argument].requires_grad_(action == "unfreeze")
    elif action == "rename":
        optimizer.param_groups[-1]["name"] = "renamed"
    elif action == "rate":
        optimizer.param_groups[-1]["lr"] *= 0.5


def step(net, optimizer, x):
    loss = net(x).square().mean()
    optimizer.zero_grad()
    if loss.requires_grad:
        loss.backward()
    optimizer.step()
    return loss.detach()


def train_session(path, kind, plan, updates, *, named=False):
    net, optimizer = make(kind, named=named)
    with open_run(path) as directory:
        callbacks = [LrCallback(every_n_updates=1)]
        session = Session(callbacks, directory=directory, model=net, optimizer=optimizer, max_updates=updates)
        for x in session.batches(BATCHES):
            at = session.state.iteration.update
            if at < len(plan):
                act(net, optimizer, *plan[at], named=named)
            session.update(step(net, optimizer, x))
        metrics = {key: each.value for key, each in session.state.metrics.items()}
    return describe(net, optimizer), metrics


def train_plain(path, kind, plan, updates, *, named=False):
    net, optimizer = make(kind, named=named)
    reducer = compose(CheckpointCallback(every_n_updates=updates))
    with open_run(path) as directory:
        state = TrainState.from_module(net, optimizer, saved=directory.load())
        while (at := state.iteration.update) < updates:
            if at < len(plan):
                act(net, optimizer, *plan[at], named=named)
            event = AfterUpdate(samples=4, losses={"total": step(net, optimizer, BATCHES[at % 3])})
            state = dispatch(state.advance(samples=4), event, reducer, directory.interpreter)
    return describe(net, optimizer), {}


def describe(net, optimizer):
    trained = {name: parameter.requires_grad for name, parameter in net.named_parameters()}
    return net.state_dict(), optimizer.state_dict(), trained


@pytest.mark.filterwarnings("ignore:requires_grad of .* differs:noether.core.errors.StateWarning")
@pytest.mark.parametrize("train", [train_session, train_plain])
@settings(max_examples=10)
@given(
    plan=st.lists(actions, max_size=6),
    cut=st.integers(1, 6),
    kind=st.sampled_from(list(OPTIMIZERS)),
    named=st.booleans(),
)
def test_a_run_that_adds_and_freezes_groups_is_exact_wherever_it_is_cut(
    train, plan, cut, kind, named, tmp_path_factory
):
    path = tmp_path_factory.mktemp("runs")
    uncut = train(path / "uncut", kind, plan, 7, named=named)
    train(path / "cut", kind, plan, cut, named=named)
    assert_same(train(path / "cut", kind, plan, 7, named=named), uncut)


def test_a_group_is_there_when_the_loop_asks_for_it(tmp_path):
    plan = [("add", True)]
    train_session(tmp_path, "adam", plan, 2)
    net, optimizer = make("adam")
    with open_run(tmp_path) as directory:
        TrainState.from_module(net, optimizer, saved=directory.load())
    added = optimizer.param_groups[1]
    assert (added["name"], added["lr"], added["betas"], len(added["params"])) == ("body", 0.03, (0.8, 0.9), 2)
    assert added["params"][0] is net[2].weight
    assert net[2].weight.requires_grad
    assert not net[1].weight.requires_grad


def test_parameters_that_a_resumed_process_froze_are_named(tmp_path):
    train_session(tmp_path, "sgd", [], 1)
    net, optimizer = make("sgd")
    net.requires_grad_(False)
    with open_run(tmp_path) as directory:
        saved = directory.load()
    with pytest.warns(StateWarning, match=r"requires_grad of 3.weight, 3.bias differs .* after the state is loaded"):
        TrainState.from_module(net, optimizer, saved=saved)
    assert net[3].weight.requires_grad


def test_a_saved_state_without_frozen_names_leaves_them(tmp_path):
    train_session(tmp_path, "sgd", [], 1)
    net, optimizer = make("sgd")
    net[3].bias.requires_grad_(False)
    with open_run(tmp_path) as directory:
        saved = directory.load()
    groups = [
        {key: value for key, value in group.items() if key != "frozen_params"} for group in saved.opt_state["groups"]
    ]
    older = saved.replace(opt_state={**saved.opt_state, "groups": tuple(groups)})
    TrainState.from_module(net, optimizer, saved=older)
    assert not net[3].bias.requires_grad


def regroup(net, *groups):
    return torch.optim.SGD([{"params": [p for i in group for p in net[i].parameters()]} for group in groups], lr=0.1)


@pytest.mark.parametrize(("groups", "message"), [
    ([[3], [2], [1]], r"has 2 parameter groups, and the optimizer 3: make it .* \(0: 3.weight, 3.bias; body: 2.weight"),
    ([[3, 2]], r"group 1 of the state has 2.weight, 2.bias, which the optimizer holds in another group"),
    ([[2]], r"group 0 has 2 parameters in the state \(3.weight, 3.bias\), and 2 in the optimizer \(2.weight, 2.bias\)"),
    ([[2], [3]], r"group 0 has 2 parameters in the state \(3.weight, 3.bias\)"),
], ids=["more", "another-group", "other", "order"])  # fmt: skip
def test_groups_that_cannot_be_rebuilt_are_refused_by_name(groups, message, tmp_path):
    train_session(tmp_path, "sgd", [("add", True)], 2)
    net, _ = make("sgd")
    optimizer = regroup(net, *groups)
    before = describe(net, optimizer)
    with open_run(tmp_path) as directory, pytest.raises(MismatchError, match=message):
        TrainState.from_module(net, optimizer, saved=directory.load())
    assert_same(describe(net, optimizer), before)


def test_the_key_of_the_first_group_stays_when_others_are_added(tmp_path):
    # Lightning-AI/pytorch-lightning#7835
    plan = [("rate", 0), ("add", False), ("add", True), ("rate", 0)]
    _, metrics = train_session(tmp_path, "adam", plan, 5)
    assert {key: value for key, value in metrics.items() if "/lr" in key} == {
        "optim/lr": 0.05, "optim/lr/1": 0.03, "optim/lr/body": 0.01,
    }  # fmt: skip


@given(
    st.lists(st.sampled_from([None, "head", "head/1", "1", "0"]), min_size=2, max_size=6), st.sampled_from(["", "g"])
)
def test_groups_have_different_names_that_an_added_group_does_not_change(names, optimizer):
    # Lightning-AI/pytorch-lightning#10024: two groups of one name
    groups = [{} if name is None else {"name": name} for name in names]
    found = name_groups(groups, optimizer)
    assert len(set(found)) == len(found) == len(groups)
    if len(groups) > 2 or optimizer:
        assert name_groups(groups[:-1], optimizer) == found[:-1]


def train_scheduled(path, updates, *, repair=False):
    net, optimizer = make("adam")
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: 1 / (1 + update))
    with open_run(path) as directory:
        parts = {"directory": directory, "model": net, "optimizer": optimizer, "scheduler": scheduler}
        session = Session([], max_updates=updates, **parts)
        if repair and session.load():
            scheduler.lr_lambdas.append(lambda update: 1)
        for x in session.batches(BATCHES):
            if session.state.iteration.update == 0:
                act(net, optimizer, "add", True)
                optimizer.param_groups[1]["initial_lr"] = 0.03
                scheduler.base_lrs.append(0.03)
                scheduler.lr_lambdas.append(lambda update: 1)
            loss = step(net, optimizer, x)
            scheduler.step()
            session.update(loss)
    return describe(net, optimizer)


def test_a_scheduler_without_a_function_for_an_added_group_is_refused(tmp_path):
    uncut = train_scheduled(tmp_path / "uncut", 4)
    train_scheduled(tmp_path / "cut", 2)
    with pytest.raises(
        SessionError, match=r"LambdaLR has 1 functions, and its optimizer 2 parameter groups: .* append"
    ):
        train_scheduled(tmp_path / "cut", 4)
    assert_same(train_scheduled(tmp_path / "cut", 4, repair=True), uncut)
