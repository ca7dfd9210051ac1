"""The functional step gives the bits of the usual mutable loop, and writes to none of its arguments."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from noether import TrainState
from noether.config.optimizer_settings import ParamGroup
from noether.core.event import AfterAccumulationStep
from noether.core.tensors.tree import storages, tensors
from noether.session.randomness import derive
from noether.testing import same
from noether.training.step.optimizer import FunctionalOptimizer
from noether.training.step.step import Step
from noether.training.value_schedules import Constant, Cosine

UPDATES = 25
SEED = 3
UNEQUAL = (4, 2, 3)
SGD, ADAMW = torch.optim.SGD, torch.optim.AdamW
MOMENTUM = {"lr": 0.1, "momentum": 0.9}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tensors of a few numbers: threads would only wait for each other, for seconds on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Net(nn.Sequential):
    """Has batch norm and dropout: buffers and random numbers beside the weights."""

    def __init__(self):
        super().__init__(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.4), nn.Linear(6, 2))


class Smooth(nn.Sequential):
    """Has no batch norm and no dropout, so that its mean loss does not depend on how a batch is split."""

    def __init__(self):
        super().__init__(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2))
        self.double()


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(3, 3), nn.Linear(3, 3)
        self.outer.weight = self.inner.weight
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        return self.head(self.outer(self.inner(x).relu()))


class Summed(nn.Module):
    """Autograd hands out one tensor as the gradient of both parameters."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(3, 2))

    def forward(self, x):
        return x @ (self.one + self.two)


class PartlyUsed(nn.Module):
    """One parameter never has a gradient, another in some updates only."""

    def __init__(self):
        super().__init__()
        self.head, self.sometimes, self.never = nn.Linear(3, 2), nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x):
        return self.head(x) + (self.sometimes(x) if x.sum() > 0 else 0)


class Assigning(nn.Module):
    """Assigns to its buffers, where batch norm writes to them in place."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 2)
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("calls", torch.tensor(0), persistent=False)

    def forward(self, x):
        self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
        self.calls = self.calls + 1
        return self.head(x - self.mean)


class Named(nn.Module):
    """Takes two entries of a dict batch by name, and returns a dict."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 2)

    def forward(self, points, scale):
        return {"scores": self.head(points * scale[:, None])}


class Frozen(Net):
    def __init__(self):
        super().__init__()
        self[0].requires_grad_(requires_grad=False)


class Mixed(nn.Module):
    """A scale without dimensions and of lower precision than the rest."""

    def __init__(self):
        super().__init__()
        self.scale, self.head = nn.Parameter(torch.tensor(1.5)), nn.Linear(3, 2)
        self.head.double()

    def forward(self, x):
        return self.head(x.double()) * self.scale


def entropy(outputs, batch):
    return {"entropy": functional.cross_entropy(outputs, batch[1])}


def several(outputs, batch):
    return {**entropy(outputs, batch), "size": 0.1 * outputs.square().mean(), "spread": 1e-2 * outputs.var()}


def named_entropy(outputs, batch):
    return {"entropy": functional.cross_entropy(outputs["scores"], batch["label"])}


def make_batch(index, size=5, dtype=torch.float32):
    generator = torch.Generator().manual_seed(index)
    points = torch.randn(size, 3, generator=generator, dtype=dtype)
    return points, (points.sum(1) > 0).long()


def unequal(update):
    return [make_batch(3 * update + n, size) for n, size in enumerate(UNEQUAL)]


def make_named_batch(index):
    points, label = make_batch(index)
    return {"points": points, "scale": torch.linspace(1, 2, len(points)), "label": label, "unread": label}


@dataclass(frozen=True, kw_only=True)
class Case:
    """Parts of both loops; `batches` returns the micro-batches of an update."""

    model: Callable[[], nn.Module] = Net
    loss: Callable[[Any, Any], Mapping[str, torch.Tensor]] = entropy
    optimizer: type[torch.optim.Optimizer] = SGD
    settings: dict[str, Any] = field(default_factory=lambda: MOMENTUM)
    groups: tuple[ParamGroup, ...] = ()
    lr: dict[str, Callable[[int], float]] = field(default_factory=lambda: {"default": Constant(value=0.1)})
    weight_decay: dict[str, Callable[[int], float]] = field(default_factory=dict)
    batches: Callable[[int], list[Any]] = lambda update: [make_batch(update)]
    lr_scale: float = 1.0
    rank: int = 0
    more: dict[str, Any] = field(default_factory=dict)


def make_model(case):
    torch.manual_seed(0)
    return case.model().train()


def make_step(case, model=None):
    """Return the step of a case and the state to start from."""
    model = model or make_model(case)
    frozen = frozenset(name for name, param in model.named_parameters() if not param.requires_grad)
    optimizer = FunctionalOptimizer(case.optimizer, case.settings, case.groups, frozen)
    state = TrainState.from_module(model, seed=SEED).replace(hyperparams={"lr_scale": case.lr_scale})
    state = state.replace(opt_state=optimizer.init(state.params))
    values = {"lr": case.lr, "weight_decay": case.weight_decay}
    return Step(model=model, loss=case.loss, optimizer=optimizer, rank=case.rank, **values, **case.more), state


def functional_loop(case, updates=UPDATES):
    """Yield the results of every update of the functional step."""
    step, state = make_step(case)
    for update in range(updates):
        batches = case.batches(update)
        state, outputs = step(state, batches)
        yield {
            "losses": outputs.losses,
            "grad_norm": outputs.grad_norm,
            "lr": outputs.lr,
            "outputs": outputs.outputs,
            "params": state.params,
            "buffers": {**state.buffers, **state.non_persistent},
            "opt_state": state.opt_state["state"],
        }
        state = state.advance(samples=outputs.samples)


def size_of(batch):
    return len(next(iter(batch.values())) if isinstance(batch, dict) else batch[0])


def call_model(model, batch):
    return model(batch["points"], batch["scale"]) if isinstance(batch, dict) else model(batch[0])


def param_groups(case, model):
    """Return the model's parameters as torch's optimizers take groups, and the names of the groups."""
    members = {group.name: [] for group in case.groups if not group.frozen} | {"default": []}
    own = {group.name: group.overrides() for group in case.groups} | {"default": {}}
    for name, param in model.named_parameters():
        group = next((g for g in case.groups if any(pattern.strip("*") in name for pattern in g.match)), None)
        if group is not None and group.frozen:
            param.requires_grad_(requires_grad=False)
        elif param.requires_grad:
            members["default" if group is None else group.name].append(param)
    return [{"params": params, **own[name]} for name, params in members.items()], list(members)


def mutable_loop(case, updates=UPDATES):
    """Yield the same results as `functional_loop`, computed by the usual mutable loop."""
    model = make_model(case)
    groups, names = param_groups(case, model)
    optimizer = case.optimizer(groups, **case.settings)
    precision = case.more.get("precision")
    for update in range(updates):
        torch.default_generator.manual_seed(derive(SEED, "update", update, case.rank))
        for name, group in zip(names, optimizer.param_groups, strict=True):
            group["lr"] = case.lr[name](update) * case.lr_scale
            if name in case.weight_decay:
                group["weight_decay"] = case.weight_decay[name](update)
        batches = case.batches(update)
        samples = sum(map(size_of, batches))
        optimizer.zero_grad()
        mean, returned = {}, []
        for batch in batches:
            share = size_of(batch) / samples
            with nullcontext() if precision is None else torch.autocast("cpu", dtype=precision):
                outputs = call_model(model, batch)
                losses = case.loss(outputs, batch)
                total = sum(losses.values())
            (total * share).backward()
            for name, loss in {**losses, "total": total}.items():
                mean[name] = mean[name] + loss.detach() * share if name in mean else loss.detach() * share
            returned.append(outputs)
        norm = None
        if "clip_grad_value" in case.more:
            clip_grad_value_(model.parameters(), case.more["clip_grad_value"])
        if "clip_grad_norm" in case.more:
            norm = clip_grad_norm_(model.parameters(), case.more["clip_grad_norm"])
        optimizer.step()
        yield {
            "losses": mean,
            "grad_norm": norm,
            "lr": {name: group["lr"] for name, group in zip(names, optimizer.param_groups, strict=True)},
            "outputs": tuple(returned),
            "params": clone_values(dict(model.named_parameters())),
            "buffers": clone_values(dict(model.named_buffers())),
            "opt_state": {
                name: clone_values(optimizer.state[param])
                for name, param in model.named_parameters()
                if param in optimizer.state
            },
        }


def clone_values(tree):
    return {name: leaf.detach().clone() for name, leaf in tree.items()}


NO_DECAY = ParamGroup(name="no_decay", match=("*bias",), weight_decay=0.0)
HEAD = ParamGroup(name="head", match=("4.*",), lr=0.02, settings={"momentum": 0.5})
FALLING = Cosine(start=0.1, end=0.001, updates=20)
CASES = {
    "sgd": Case(),
    "sgd-foreach": Case(settings={**MOMENTUM, "foreach": True}),
    "sgd-fused": Case(settings={**MOMENTUM, "fused": True}),
    "adamw": Case(optimizer=ADAMW, settings={"lr": 0.1}),
    "adamw-foreach": Case(optimizer=ADAMW, settings={"lr": 0.1, "foreach": True}),
    "adamw-fused": Case(optimizer=ADAMW, settings={"lr": 0.1, "fused": True}),
    "a-class-without-kernel": Case(optimizer=torch.optim.NAdam, settings={"lr": 0.1}),
    "other-rank": Case(rank=5),
    "clip-norm": Case(more={"clip_grad_norm": 0.1}),
    "clip-norm-seldom": Case(more={"clip_grad_norm": 1.0}),
    "clip-value": Case(more={"clip_grad_value": 0.05}),
    "clip-both": Case(more={"clip_grad_value": 0.05, "clip_grad_norm": 0.1}),
    "clip-mixed-precision": Case(model=Mixed, more={"clip_grad_norm": 0.1, "nonfinite": "skip"}),
    "schedule": Case(lr={"default": FALLING}),
    "schedules": Case(
        optimizer=ADAMW,
        settings={"lr": 0.1},
        lr={"default": FALLING},
        weight_decay={"default": Cosine(start=0.0, end=0.5, updates=20)},
    ),
    "lr-scale": Case(lr={"default": FALLING}, lr_scale=0.3),
    "groups": Case(
        optimizer=ADAMW,
        settings={"lr": 0.1, "weight_decay": 0.5},
        groups=(NO_DECAY,),
        lr={"default": FALLING, "no_decay": Constant(value=0.03)},
    ),
    "groups-with-settings": Case(groups=(HEAD,), lr={"default": FALLING, "head": Constant(value=0.02)}),
    "frozen-by-module": Case(model=Frozen, more={"clip_grad_norm": 0.1}),
    "frozen-by-group": Case(groups=(ParamGroup(name="first", match=("0.*",), frozen=True),)),
    "several-losses": Case(loss=several),
    "unused-parameters": Case(model=PartlyUsed, more={"clip_grad_norm": 0.5}),
    "unused-adamw-fused": Case(model=PartlyUsed, optimizer=ADAMW, settings={"lr": 0.1, "fused": True}),
    "tied-weights": Case(model=Tied),
    "one-gradient-for-two": Case(model=Summed, more={"clip_grad_norm": 0.1}),
    "one-gradient-for-two-by-class": Case(model=Summed, optimizer=torch.optim.NAdam, settings={"lr": 0.1}),
    "assigned-buffer": Case(model=Assigning),
    "dict-batches": Case(model=Named, loss=named_entropy, batches=lambda update: [make_named_batch(update)]),
    "bf16": Case(more={"precision": torch.bfloat16}),
    "bf16-tied-clipped": Case(model=Tied, more={"precision": torch.bfloat16, "clip_grad_norm": 0.1}),
    "accumulation": Case(batches=unequal),
    "accumulation-of-all": Case(
        loss=several,
        optimizer=ADAMW,
        settings={"lr": 0.1, "fused": True},
        batches=unequal,
        more={"precision": torch.bfloat16, "clip_grad_norm": 0.1, "nonfinite": "skip"},
    ),
    "accumulation-unused": Case(model=PartlyUsed, batches=unequal),
    "accumulation-tied": Case(model=Tied, batches=unequal),
    "accumulation-one-gradient-for-two": Case(model=Summed, batches=unequal, more={"clip_grad_norm": 0.1}),
    "accumulation-assigned-buffer": Case(model=Assigning, batches=unequal),
}


@pytest.mark.parametrize("name", CASES)
def test_step_has_the_bits_of_the_mutable_loop(name):
    case = CASES[name]
    loops = zip(functional_loop(case), mutable_loop(case), strict=True)
    updates = [(update, ours, theirs) for update, (ours, theirs) in enumerate(loops)]
    assert len(updates) == UPDATES
    for update, ours, theirs in updates:
        assert [key for key in ours if not same(ours[key], theirs[key])] == [], update
    start = dict(make_model(case).named_parameters())
    assert any(not torch.equal(start[key], param) for key, param in updates[-1][1]["params"].items())


def test_cases_show_what_they_are_named_for():
    last = {name: list(functional_loop(case))[-1] for name, case in CASES.items()}
    for name in ("clip-norm", "clip-value", "schedule", "lr-scale", "other-rank", "frozen-by-group", "bf16"):
        assert not same(last[name]["params"], last["sgd"]["params"]), name
    # (some updates of "clip-norm-seldom" are clipped and some are not)
    norms = [each["grad_norm"] for each in functional_loop(CASES["clip-norm-seldom"])]
    assert min(norms) < 1 < max(norms)
    assert last["sgd"]["buffers"]["1.num_batches_tracked"] == UPDATES
    assert last["accumulation"]["buffers"]["1.num_batches_tracked"] == UPDATES * len(UNEQUAL)
    assert last["accumulation-assigned-buffer"]["buffers"]["calls"] == UPDATES * len(UNEQUAL)
    assert last["tied-weights"]["params"].keys() == {"inner.weight", "inner.bias", "outer.bias", *HEADS}
    assert last["unused-parameters"]["opt_state"].keys() == {*HEADS, "sometimes.weight", "sometimes.bias"}
    assert last["frozen-by-module"]["opt_state"].keys() == {"1.weight", "1.bias", "4.weight", "4.bias"}
    assert last["bf16"]["outputs"][0].dtype == torch.bfloat16


HEADS = ("head.weight", "head.bias")


def test_unused_parameter_has_no_gradient_in_some_updates_only():
    used = [bool(make_batch(update)[0].sum() > 0) for update in range(UPDATES)]
    assert {True, False} <= set(used)


# Accumulation


def split_batch(batch, sizes):
    return list(zip(*(part.split(sizes) for part in batch), strict=True))


SIZES = st.lists(st.integers(1, 5), min_size=1, max_size=4)


@given(SIZES, st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_accumulation_is_the_mean_over_samples(sizes, index):
    """In float64, where two orders of summation differ by some 1e-16."""
    case = Case(model=Smooth, loss=lambda out, batch: {**entropy(out, batch), "size": out.square().mean()})
    step, state = make_step(case)
    batch = make_batch(index, sum(sizes), torch.float64)
    whole, at_once = step(state, [batch])
    parts, accumulated = step(state, split_batch(batch, sizes))
    assert accumulated.samples == at_once.samples == sum(sizes)
    assert accumulated.losses.keys() == at_once.losses.keys() == {"entropy", "size", "total"}
    for ours, theirs in ((accumulated.losses, at_once.losses), (parts.params, whole.params)):
        for key in ours:
            torch.testing.assert_close(ours[key], theirs[key], rtol=1e-12, atol=1e-14)
    assert not same(parts.params, state.params)


@given(st.lists(SIZES, min_size=1, max_size=4))
@settings(max_examples=25, deadline=None)
def test_any_accumulation_has_the_bits_of_the_mutable_loop(updates):
    # (batch norm refuses a single sample)
    case = Case(batches=lambda update: [make_batch(10 * update + n, 1 + k) for n, k in enumerate(updates[update])])
    for ours, theirs in zip(functional_loop(case, len(updates)), mutable_loop(case, len(updates)), strict=True):
        assert [key for key in ours if not same(ours[key], theirs[key])] == []


def test_an_update_of_one_micro_batch_has_its_samples_and_outputs():
    step, state = make_step(Case())
    _, outputs = step(state, [make_batch(0)])
    assert (len(outputs.outputs), outputs.samples) == (1, 5)
    assert outputs.outputs[0].shape == (5, 2)


def test_observe_sees_every_micro_batch_with_nothing_applied():
    step, start = make_step(CASES["accumulation"])
    batches = CASES["accumulation"].batches(0)
    seen = []

    def observe(state, accumulated):
        assert vars(state)["params"] is vars(start)["params"]  # which is the view of the live module
        assert vars(state)["buffers"] is vars(start)["buffers"]  # which is the view of the live module
        assert state.opt_state is start.opt_state
        assert state.iteration == start.iteration
        assert isinstance(accumulated, AfterAccumulationStep)
        seen.append(accumulated)
        samples = state.memory("samples") if seen[1:] else 0
        return state.remember("samples", samples + accumulated.samples)

    state, outputs = step(start, batches, observe)
    assert [each.accumulation_step for each in seen] == [0, 1, 2]
    assert {each.accumulation_steps for each in seen} == {3}
    assert tuple(each.samples for each in seen) == UNEQUAL
    assert same(tuple(each.outputs for each in seen), outputs.outputs)
    for each, batch in zip(seen, batches, strict=True):
        assert same(each.losses["entropy"], entropy(each.outputs, batch)["entropy"])
        assert not each.outputs.requires_grad
        assert not each.losses["total"].requires_grad
    assert state.memory("samples") == sum(UNEQUAL)
    unobserved, _ = step(start, batches)
    assert same(state.replace(callback_states={}), unobserved)


# Purity


def snapshot(*trees):
    """Return identities, write counts and copies of all tensors of `trees`; any write to one changes them."""
    found = [tensor for tree in trees for _, tensor in tensors(tree)]
    counted = [(id(tensor), tensor.data_ptr(), tensor._version, tensor.requires_grad) for tensor in found]  # noqa: SLF001  # torch has no public name for it
    return counted, [tensor.clone() for tensor in found]


PURE = ("adamw-fused", "adamw", "sgd-foreach", "clip-both", "accumulation", "assigned-buffer", "tied-weights", "bf16")


@pytest.mark.parametrize("name", PURE)
def test_step_writes_to_none_of_its_arguments(name):
    case = CASES[name]
    model = make_model(case)
    step, state = make_step(case, model)
    for update in range(3):  # the second has optimizer memory to spoil
        batches = case.batches(update)
        arguments = (state.params, state.buffers, state.opt_state, batches, dict(model.named_buffers()))
        before, clones = snapshot(*arguments)
        live = [(name, id(param), param.grad) for name, param in model.named_parameters()]
        new, outputs = step(state, batches)
        after, now = snapshot(*arguments)
        assert after == before
        assert all(map(same, now, clones))
        assert [(name, id(param), param.grad) for name, param in model.named_parameters()] == live
        assert storages(new.params).isdisjoint(storages(state.params))
        assert storages(new.buffers).isdisjoint(storages(state.buffers))
        assert storages(new.opt_state).isdisjoint(storages((state.opt_state, state.params, new.params)))
        results = (new.params, new.buffers, new.opt_state, outputs.losses, outputs.outputs)
        assert not any(tensor.requires_grad for _, tensor in tensors(results))
        assert new.iteration == state.iteration  # the caller counts
        state = new.advance(samples=outputs.samples)


@pytest.mark.parametrize("name", PURE)
def test_same_input_gives_the_same_output_whatever_was_drawn_before(name):
    case = CASES[name]
    step, state = make_step(case)
    for update in range(2):
        first, outputs = step(state, case.batches(update))
        torch.rand(7)
        torch.randn(3)
        with torch.no_grad():  # the caller's mode does not matter
            again, outputs_again = step(state, case.batches(update))
        assert same(first, again)
        assert same(vars(outputs), vars(outputs_again))
        state = first.advance(samples=outputs.samples)


@given(st.lists(st.booleans(), min_size=1, max_size=12))
@settings(max_examples=25, deadline=None)
def test_two_runs_through_one_step_are_independent(turns):
    case = Case(optimizer=ADAMW, settings={"lr": 0.1})
    step, start = make_step(case)
    runs = {run: start.replace(seed=int(run)) for run in (False, True)}

    def advance(state):
        state, outputs = step(state, [make_batch(state.iteration.update)])
        return state.advance(samples=outputs.samples)

    for run in turns:
        runs[run] = advance(runs[run])
    for run, state in runs.items():
        alone = start.replace(seed=int(run))
        for _ in range(turns.count(run)):
            alone = advance(alone)
        assert same(state, alone)


def test_random_numbers_are_those_of_seed_update_and_rank():
    dropout = Case(model=lambda: nn.Sequential(nn.Linear(3, 6), nn.Dropout(0.5), nn.Linear(6, 2)))
    step, state = make_step(dropout)
    other_rank, _ = make_step(replace(dropout, rank=1), step.model)
    batch = make_batch(0, 16)
    places = [
        (step, state),
        (step, state.replace(seed=SEED + 1)),
        (step, state.advance(samples=16)),
        (other_rank, state),
    ]
    losses = [float(at(place, [batch])[1].losses["total"]) for at, place in places]
    assert len(set(losses)) == len(places)
    # Counts of samples and epochs change nothing.
    assert float(step(state.next_epoch(), [batch])[1].losses["total"]) == losses[0]


@given(st.floats(0, 4), st.integers(0, 30))
@settings(max_examples=30, deadline=None)
def test_lr_scale_multiplies_the_schedule(scale, update):
    step, state = make_step(Case(lr={"default": FALLING}))
    scaled_step, _ = make_step(Case(lr={"default": lambda position: FALLING(position) * scale}), step.model)
    for _ in range(update):
        state = state.advance(samples=5)
    ours, outputs = step(state.replace(hyperparams={"lr_scale": scale}), [make_batch(0)])
    theirs, _ = scaled_step(state, [make_batch(0)])
    assert outputs.lr == {"default": FALLING(update) * scale}
    assert same(ours.params, theirs.params)
    assert same(ours.opt_state, theirs.opt_state)


def test_outputs_carry_lr_and_weight_decay_of_each_group():
    case = CASES["groups"]
    decay = {"default": Cosine(start=0.0, end=0.5, updates=20), "no_decay": Constant(value=0.0)}
    step, state = make_step(replace(case, weight_decay=decay))
    state = state.advance(samples=5).replace(hyperparams={"lr_scale": 0.5})
    _, outputs = step(state, [make_batch(0)])
    assert outputs.lr == {"no_decay": 0.015, "default": FALLING(1) * 0.5}
    assert outputs.weight_decay == {"no_decay": 0.0, "default": decay["default"](1)}  # not scaled
    assert outputs.grad_norm is None


# Nonfinite losses and gradients


class Root(nn.Module):
    """Its weight begins at zero: the loss of ones is finite and its gradient is not."""

    def __init__(self):
        super().__init__()
        self.norm, self.weight = nn.BatchNorm1d(3), nn.Parameter(torch.zeros(3))

    def forward(self, x):
        self.norm(x)
        return (x * self.weight).sum(1).sqrt()


def mean_of(outputs, batch):
    return {"fit": outputs.mean(), "bias": 0.1 * batch[0].mean()}


GOOD, NAN_LOSS, INF_GRAD = "good", "NaN in the loss", "inf in a gradient"
BATCHES = {
    GOOD: (torch.arange(12.0).reshape(4, 3), torch.zeros(4)),
    NAN_LOSS: (torch.full((4, 3), torch.nan), torch.zeros(4)),
    INF_GRAD: (torch.ones(4, 3), torch.zeros(4)),
}


def make_root(mode, start=1.0, **more):
    case = Case(model=Root, loss=mean_of, optimizer=ADAMW, settings={"lr": 0.1}, more={"nonfinite": mode, **more})
    step, state = make_step(case)
    good, outputs = step(state.replace(params={**state.params, "weight": torch.ones(3)}), [BATCHES[GOOD]])
    assert outputs.finite
    # An optimizer with memory, and a weight at which a gradient can be infinite.
    good = good.replace(params={**good.params, "weight": torch.full((3,), start)})
    return step, good.advance(samples=4)


@pytest.mark.parametrize("mode", ["skip", "raise", "apply"])
def test_finite_update_is_the_same_in_every_mode(mode):
    step, state = make_root(mode)
    new, outputs = step(state, [BATCHES[GOOD]])
    applied, _ = make_root("apply")[0](state, [BATCHES[GOOD]])
    assert outputs.finite
    assert not outputs.skipped
    assert same(new, applied)
    assert not same(new.params, state.params)


@pytest.mark.parametrize("bad", [NAN_LOSS, INF_GRAD])
def test_bad_batches_are_bad_as_named(bad):
    step, state = make_root("apply", start=0.0)
    new, outputs = step(state, [BATCHES[bad]])
    assert bool(outputs.losses["total"].isfinite()) is (bad == INF_GRAD)
    assert bool(outputs.finite) is (bad == INF_GRAD)  # `apply` does not look at the gradients
    assert not outputs.skipped
    assert not new.params["weight"].isfinite().any()


@pytest.mark.parametrize("clip", [{}, {"clip_grad_norm": 1.0}])
@pytest.mark.parametrize("bad", [NAN_LOSS, INF_GRAD])
def test_skip_changes_only_the_counters(bad, clip):
    step, state = make_root("skip", start=0.0, **clip)
    new, outputs = step(state, [BATCHES[bad]])
    assert new is state
    assert (outputs.finite, outputs.skipped, outputs.samples) == (False, True, 4)
    assert outputs.losses.keys() == {"fit", "bias", "total"}
    assert outputs.lr == {"default": 0.1}
    # The caller counts the update; the next one is as if there had been no skipped one.
    after = new.advance(samples=outputs.samples)
    assert (after.iteration.update, after.iteration.sample) == (2, 8)
    after = after.replace(params={**after.params, "weight": torch.ones(3)})
    ours, good = step(after, [BATCHES[GOOD]])
    assert good.finite
    assert ours.buffers["norm.num_batches_tracked"] == 2
    assert int(ours.opt_state["state"]["weight"]["step"]) == 2


@pytest.mark.parametrize("mode", ["skip", "raise"])
@pytest.mark.parametrize("place", range(3))
def test_one_bad_micro_batch_spoils_its_update_and_no_memory(mode, place):
    step, state = make_root(mode)
    batches = [BATCHES[GOOD]] * 3
    batches[place] = BATCHES[NAN_LOSS]
    seen = []

    def observe(state, accumulated):
        seen.append(bool(accumulated.losses["total"].isfinite()))
        return state.remember("seen", len(seen))

    if mode == "raise":
        with pytest.raises(FloatingPointError, match="update 2"):
            step(state, batches, observe)
    else:
        new, outputs = step(state, batches, observe)
        assert outputs.skipped
        assert new.memory("seen") == 3
        assert vars(new)["params"] is vars(state)["params"]  # likewise
        assert vars(new)["buffers"] is vars(state)["buffers"]  # likewise
        assert new.opt_state is state.opt_state
    assert seen == [n != place for n in range(3)]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (NAN_LOSS, "update 2: loss 'fit' is nan, loss 'bias' is nan, loss 'total' is nan (and 1 more); nothing was"),
        (INF_GRAD, "update 2: the gradient of 'weight' is not finite; nothing was applied"),
    ],
)
def test_raise_names_what_is_wrong_and_applies_nothing(bad, message):
    step, state = make_root("raise", start=0.0)
    before, clones = snapshot(state.params, state.buffers, state.opt_state)
    with pytest.raises(FloatingPointError) as raised:
        step(state, [BATCHES[bad]])
    assert str(raised.value).startswith(message)
    assert str(raised.value).endswith("trainer.nonfinite: skip")
    after, now = snapshot(state.params, state.buffers, state.opt_state)
    assert after == before
    assert all(map(same, now, clones))
    # The step can make further updates.
    good = state.replace(params={**state.params, "weight": torch.ones(3)})
    assert not same(step(good, [BATCHES[GOOD]])[0].params, good.params)


class Words(nn.Module):
    """Sparse gradients, and a parameter without entries."""

    def __init__(self):
        super().__init__()
        self.words, self.none = nn.Embedding(5, 3, sparse=True), nn.Parameter(torch.zeros(0, 3))

    def forward(self, x):
        return self.words(x).sum() + self.none.sum()


@pytest.mark.parametrize("mode", ["skip", "raise"])
def test_sparse_and_empty_gradients_are_checked(mode):
    case = Case(model=Words, settings={"lr": 0.1}, more={"nonfinite": mode})
    step, state = make_step(replace(case, loss=lambda outputs, _: {"sum": outputs}))
    new, outputs = step(state, [torch.tensor([1, 1, 2])])
    assert outputs.finite
    moved = (new.params["words.weight"] != state.params["words.weight"]).any(1)
    assert moved.tolist() == [False, True, True, False, False]
    infinite, _ = make_step(replace(case, loss=lambda outputs, _: {"root": (outputs - outputs.detach()).sqrt()}))
    if mode == "skip":
        assert infinite(state, [torch.tensor([1])])[0] is state
    else:
        with pytest.raises(FloatingPointError, match=r"the gradient of 'words\.weight' is not finite"):
            infinite(state, [torch.tensor([1])])


class Clamping(nn.Linear):
    """Writes to its own weight, as weight clipping is often written."""

    def forward(self, inputs):
        with torch.no_grad():
            self.weight.clamp_(-1, 1)
        return super().forward(inputs)


def test_a_model_that_writes_to_its_parameters_is_refused():
    model = Clamping(2, 1)
    step = Step(
        model=model,
        loss=lambda outputs, _: {"mean": outputs.mean()},
        optimizer=FunctionalOptimizer(torch.optim.SGD, {"lr": 0.1}),
        lr={"default": lambda _: 0.1},
    )
    with pytest.raises(ValueError, match="the model writes to its parameter 'weight' in forward"):
        step(TrainState.from_module(model), [torch.ones(2, 2)])


@dataclass
class Answer:
    scores: torch.Tensor
    name: str = "answer"


class Answering(nn.Linear):
    def forward(self, inputs):
        return [Answer(super().forward(inputs))]


def test_outputs_keep_their_types_and_are_detached():
    model = Answering(2, 1)
    step = Step(
        model=model,
        loss=lambda outputs, _: {"mean": outputs[0].scores.mean()},
        optimizer=FunctionalOptimizer(torch.optim.SGD, {"lr": 0.1}),
        lr={"default": lambda _: 0.1},
    )
    _, outputs = step(TrainState.from_module(model), [torch.ones(2, 2)])
    (((answer,)),) = outputs.outputs
    assert isinstance(answer, Answer)
    assert answer.name == "answer"
    assert not answer.scores.requires_grad
