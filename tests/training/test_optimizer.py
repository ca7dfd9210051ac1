"""The laws of `FunctionalOptimizer`: the bits of the class, no argument written to, and a resume that is exact."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from torch.optim.optimizer import Optimizer

from noether.config.optimizer_settings import ParamGroup
from noether.core.errors import SettingsError
from noether.training.step.optimizer import FunctionalOptimizer

UPDATES = 100
SHAPES = {"a.weight": (5, 3), "a.bias": (3,), "b.weight": (4, 4), "b.scale": ()}
MATRICES = {"a.weight": (5, 3), "b.weight": (4, 4)}


def needs_no_closure(cls):
    return inspect.signature(cls.step).parameters["closure"].default is None


CLASSES = [
    cls
    for cls in map(vars(torch.optim).get, torch.optim.__all__)
    if isinstance(cls, type) and issubclass(cls, Optimizer) and cls is not Optimizer and needs_no_closure(cls)
]


class Counting(Optimizer):
    """Keeps memory in every place where a class can keep it, and decays its rate by a counter of its group."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr, "k": 0, "average": 0.0})
        self.calls = 0
        self.total = torch.zeros(())

    @torch.no_grad()
    def step(self, closure=None):
        assert closure is None
        self.calls += 1
        self.state.setdefault("global", {"sum": 0.0})["sum"] += self.calls
        for group in self.param_groups:
            group["k"] += 1
            group["average"] = 0.9 * group["average"] + group["lr"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                history = self.state[p].setdefault("history", [torch.zeros_like(p), torch.zeros_like(p)])
                history[group["k"] % 2] = history[group["k"] % 2].mul(0.5).add_(p.grad)
                p.grad.mul_(self.state["global"]["sum"] / (self.calls * group["k"]))
                self.total += p.grad.sum()
                p.add_(p.grad + history[0] + history[1], alpha=-group["average"] / group["k"])
                p.add_(self.total, alpha=1e-3)


def settings_of(cls):
    return {"lr": 0.01} | ({"weight_decay": 0.03} if "weight_decay" in inspect.signature(cls).parameters else {})


VARIANTS = [pytest.param(cls, settings_of(cls), id=cls.__name__) for cls in CLASSES] + [
    pytest.param(getattr(torch.optim, name), {"lr": 0.01, **settings}, id=f"{name}-{'-'.join(map(str, settings))}-{n}")
    for n, (name, settings) in enumerate(
        [
            ("SGD", {}),
            ("SGD", {"momentum": 0.9}),
            ("SGD", {"momentum": 0.9, "nesterov": True, "foreach": True}),
            ("SGD", {"momentum": 0.9, "nesterov": True, "fused": True, "weight_decay": 0.1}),
            ("SGD", {"momentum": 0.9, "nesterov": True, "foreach": False}),
            ("SGD", {"momentum": 0.9, "dampening": 0.1, "weight_decay": 0.1, "maximize": True}),
            ("SGD", {"momentum": 0.9, "foreach": True, "maximize": True, "nesterov": True}),
            *((name, {flag: True}) for name in ("Adam", "AdamW") for flag in ("amsgrad", "maximize")),
            *((name, {flag: True, "amsgrad": True}) for name in ("Adam", "AdamW") for flag in ("foreach", "fused")),
            *((name, {flag: True, "weight_decay": 0.1}) for name in ("Adam", "AdamW") for flag in ("foreach", "fused")),
            ("Adam", {"decoupled_weight_decay": True, "weight_decay": 0.1, "betas": [0.8, 0.9]}),
            ("Adagrad", {"fused": True, "initial_accumulator_value": 0.5}),
            ("Adagrad", {"lr_decay": 0.1, "foreach": True}),
            ("RMSprop", {"momentum": 0.9, "centered": True}),
            ("Adafactor", {"foreach": True, "weight_decay": 0.1}),
        ]
    )
]
VARIANTS.append(pytest.param(Counting, {"lr": 0.1}, id="Counting"))


def shapes_of(cls):
    return MATRICES if cls is torch.optim.Muon else SHAPES


def make_params(cls):
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes_of(cls).items()}


def make_grads(cls, update):
    generator = torch.Generator().manual_seed(1 + update)
    grads = {name: torch.randn(shape, generator=generator) for name, shape in shapes_of(cls).items()}
    return (
        {n: torch.where(g > 0, g, 0.0).to_sparse() for n, g in grads.items()}
        if cls is torch.optim.SparseAdam
        else grads
    )


def rate(update, base=0.01):
    return base * (1.0 - update / (2 * UPDATES))


def run_mutable(cls, settings, updates=UPDATES):
    params = {name: torch.nn.Parameter(param) for name, param in make_params(cls).items()}
    optimizer = cls(list(params.values()), **settings)
    for update in range(updates):
        optimizer.param_groups[0]["lr"] = rate(update)
        for param, grad in zip(params.values(), make_grads(cls, update).values(), strict=True):
            param.grad = grad
        optimizer.step()
    state = {name: dict(optimizer.state[param]) for name, param in params.items() if param in optimizer.state}
    return {name: param.detach() for name, param in params.items()}, state, optimizer


def run_functional(functional, params, opt_state, updates):
    for update in updates:
        settings = {"default": {"lr": rate(update)}}
        params, opt_state = functional.update(
            make_grads(functional.optimizer, update), opt_state, params, settings=settings
        )
    return params, opt_state


def assert_same(left, right):
    assert type(left) is type(right)
    if isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype
        assert torch.equal(left, right)
    elif isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_same(left[key], right[key])
    elif isinstance(left, (tuple, list)):
        assert len(left) == len(right)
        for one, other in zip(left, right, strict=True):
            assert_same(one, other)
    else:
        assert left == right


def tensors_in(tree):
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, (dict, tuple, list)):
        for item in tree.values() if isinstance(tree, dict) else tree:
            yield from tensors_in(item)


def with_lists(tree):
    """Return packed memory with its lists as lists, as the class keeps them."""
    if isinstance(tree, dict):
        return list(tree["__list__"]) if "__list__" in tree else {key: with_lists(value) for key, value in tree.items()}
    return tree


def start(cls, settings):
    functional, params = FunctionalOptimizer(cls, settings), make_params(cls)
    return functional, params, functional.init(params)


def test_every_class_of_torch_is_tried():
    assert {cls.__name__ for cls in CLASSES} >= {"Adam", "AdamW", "SGD", "SparseAdam", "Muon", "Adafactor", "Rprop"}


@pytest.mark.parametrize(("cls", "settings"), VARIANTS)
def test_bits_are_those_of_the_class(cls, settings):
    functional, params, opt_state = start(cls, settings)
    params, opt_state = run_functional(functional, params, opt_state, range(UPDATES))
    expected, state, _ = run_mutable(cls, settings)
    assert_same(params, expected)
    assert_same(with_lists(opt_state["state"]), state)


@pytest.mark.parametrize(("cls", "settings"), VARIANTS)
@pytest.mark.parametrize("cut", [0, 1, 37])
def test_a_resumed_run_has_the_same_bits(cls, settings, cut):
    functional, params, opt_state = start(cls, settings)
    uncut = run_functional(functional, params, opt_state, range(UPDATES))
    saved = copy.deepcopy(run_functional(functional, params, opt_state, range(cut)))
    resumed = run_functional(FunctionalOptimizer(cls, settings), *saved, range(cut, UPDATES))
    assert_same(resumed, uncut)


@pytest.mark.parametrize(("cls", "settings"), VARIANTS)
def test_no_argument_is_written_to_and_no_memory_is_shared(cls, settings):
    functional, params, opt_state = start(cls, settings)
    for update in range(3):
        arguments = (make_grads(cls, update), opt_state, params)
        before, versions = copy.deepcopy(arguments), [tensor._version for tensor in tensors_in(arguments)]  # noqa: SLF001  # counts writes
        params, opt_state = functional.update(*arguments)
        assert_same([g.to_dense() for g in arguments[0].values()], [g.to_dense() for g in before[0].values()])
        assert_same(arguments[1:], before[1:])
        assert [tensor._version for tensor in tensors_in(arguments)] == versions  # noqa: SLF001  # counts writes
        dense = [tensor for tensor in tensors_in(arguments) if not tensor.is_sparse]
        addresses = {tensor.untyped_storage().data_ptr() for tensor in dense}
        assert not addresses & {t.untyped_storage().data_ptr() for t in tensors_in((params, opt_state))}
        assert not any(tensor.requires_grad for tensor in tensors_in((params, opt_state)))


@pytest.mark.parametrize("cls", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad, Counting])
def test_a_call_does_not_change_the_next_one(cls):
    functional, params, opt_state = start(cls, {"lr": 0.1})
    params, opt_state = run_functional(functional, params, opt_state, range(2))
    first = functional.update(make_grads(cls, 2), opt_state, params)
    run_functional(functional, *first, range(3, 9))
    assert_same(functional.update(make_grads(cls, 2), opt_state, params), first)


def test_memory_in_groups_in_shared_state_and_on_the_class_is_kept():
    functional, params, opt_state = start(Counting, {"lr": 0.1})
    _, opt_state = run_functional(functional, params, opt_state, range(4))
    _, _, optimizer = run_mutable(Counting, {"lr": 0.1}, updates=4)
    assert opt_state["groups"] == {"default": {key: optimizer.param_groups[0][key] for key in ("k", "average")}}
    assert opt_state["shared"] == {"global": optimizer.state["global"]}
    assert_same(opt_state["attributes"], {"calls": optimizer.calls, "total": optimizer.total})


def test_settings_are_not_memory():
    functional, params, opt_state = start(torch.optim.AdamW, {"lr": 0.1})
    _, opt_state = functional.update(make_grads(None, 0), opt_state, params, settings={"default": {"lr": 0.5}})
    assert opt_state["groups"] == {"default": {}}
    assert set(opt_state) == {"state", "groups"}


def groups_of_three():
    return (
        ParamGroup(name="no_decay", match=("*.bias", "*.scale"), weight_decay=0.0),
        ParamGroup(name="a", match=("a.*",), lr=0.5, settings={"eps": 1e-3}),
    )


@pytest.mark.parametrize("cls", [torch.optim.AdamW, torch.optim.NAdam])
def test_groups_have_separate_settings(cls):
    functional, params = FunctionalOptimizer(cls, {"lr": 0.1, "weight_decay": 0.2}, groups_of_three()), make_params(cls)
    opt_state, mutable = functional.init(params), {n: torch.nn.Parameter(p.clone()) for n, p in params.items()}
    no_decay = {"params": [mutable["a.bias"], mutable["b.scale"]], "weight_decay": 0.0}
    own = {"params": [mutable["a.weight"]], "lr": 0.5, "eps": 1e-3}
    optimizer = cls([no_decay, own, {"params": [mutable["b.weight"]]}], lr=0.1, weight_decay=0.2)
    for update in range(UPDATES):
        rates = {"no_decay": rate(update, 0.1), "a": rate(update, 0.5)}
        for group, lr in zip(optimizer.param_groups, rates.values(), strict=False):
            group["lr"] = lr
        for param, grad in zip(mutable.values(), make_grads(cls, update).values(), strict=True):
            param.grad = grad
        optimizer.step()
        settings = {group: {"lr": lr} for group, lr in rates.items()}
        params, opt_state = functional.update(make_grads(cls, update), opt_state, params, settings=settings)
    assert_same(params, {name: param.detach() for name, param in mutable.items()})


def test_weight_decay_can_change_at_every_update():
    functional, params, opt_state = start(torch.optim.AdamW, {"lr": 0.1})
    mutable = {name: torch.nn.Parameter(param.clone()) for name, param in params.items()}
    optimizer = torch.optim.AdamW(mutable.values(), lr=0.1)
    for update in range(10):
        optimizer.param_groups[0]["weight_decay"] = rate(update)
        for param, grad in zip(mutable.values(), make_grads(None, update).values(), strict=True):
            param.grad = grad
        optimizer.step()
        settings = {"default": {"weight_decay": rate(update)}}
        params, opt_state = functional.update(make_grads(None, update), opt_state, params, settings=settings)
    assert_same(params, {name: param.detach() for name, param in mutable.items()})


def test_group_settings_are_complete():
    functional = FunctionalOptimizer(torch.optim.AdamW, {"lr": 0.1}, groups_of_three())
    settings = functional.group_settings(SHAPES)
    assert list(settings) == ["no_decay", "a", "default"]
    assert [(own["lr"], own["weight_decay"], own["eps"]) for own in settings.values()] == [
        (0.1, 0.0, 1e-8),
        (0.5, 0.01, 1e-3),
        (0.1, 0.01, 1e-8),
    ]


@pytest.mark.parametrize("cls", [torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop])
def test_frozen_parameters_are_returned_unchanged(cls):
    group = ParamGroup(name="a", match=("a.*",), frozen=True)
    functional, params = FunctionalOptimizer(cls, {"lr": 0.1}, (group,), frozenset({"b.scale"})), make_params(cls)
    grads = {"b.weight": make_grads(cls, 0)["b.weight"]}
    new_params, opt_state = functional.update(grads, functional.init(params), params)
    assert functional.trainable(params) == ("b.weight",)
    assert list(new_params) == list(params)
    assert [name for name in params if new_params[name] is params[name]] == ["a.weight", "a.bias", "b.scale"]
    assert set(opt_state["state"]) <= {"b.weight"}


@pytest.mark.parametrize("cls", [torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop])
def test_parameters_without_a_gradient_are_left_to_the_class(cls):
    settings = {"lr": 0.1, "momentum": 0.9} if cls is not torch.optim.AdamW else {"lr": 0.1}
    functional, params, opt_state = start(cls, settings)
    mutable = {name: torch.nn.Parameter(param.clone()) for name, param in params.items()}
    optimizer = cls(mutable.values(), **settings)
    for update, missing in enumerate(["a.weight", "b.scale", "a.weight", None]):
        grads = {name: None if name == missing else grad for name, grad in make_grads(cls, update).items()}
        for name, param in mutable.items():
            param.grad = None if grads[name] is None else grads[name].clone()
        optimizer.step()
        params, opt_state = functional.update(grads, opt_state, params)
    assert_same(params, {name: param.detach() for name, param in mutable.items()})
    assert_same(
        opt_state["state"], {n: dict(optimizer.state[p]) for n, p in mutable.items() if n in opt_state["state"]}
    )


class WantsFlags(Optimizer):
    """Reads all of its settings from the groups, as some published optimizers do."""

    def __init__(self, params):
        groups = list(params)
        assert all("rotate" in group for group in groups), "every group needs rotate"
        super().__init__(groups, {})

    def step(self, closure=None):
        raise NotImplementedError(closure)


def test_a_class_that_reads_its_groups_gets_their_settings():
    group = ParamGroup(name="all", match=("*",), lr=0.1, settings={"rotate": True})
    functional = FunctionalOptimizer(WantsFlags, {}, (group,))
    assert functional.group_settings(SHAPES) == {"all": {"lr": 0.1, "rotate": True}}


class Hoarding(Optimizer):
    """Stores its parameters in an attribute."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})
        self.mine = [p for group in self.param_groups for p in group["params"]]

    def step(self, closure=None):
        raise NotImplementedError(closure)


class Unsavable(Optimizer):
    """Has a set in its memory, which no checkpoint can contain."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    def step(self, closure=None):
        assert closure is None
        for p in self.param_groups[0]["params"]:
            self.state[p]["seen"] = {1, 2}


def refusal(*args, params=None):
    with pytest.raises(SettingsError) as caught:
        FunctionalOptimizer(*args).init(make_params(None) if params is None else params)
    return str(caught.value)


def test_refusals_at_construction():
    sgd, adamw = torch.optim.SGD, torch.optim.AdamW
    assert refusal(torch.optim.LBFGS) == (
        "optimizer: LBFGS calls the loss itself (a closure); take one whose step needs none"
    )
    assert "is not a class of torch.optim.Optimizer" in refusal(torch.nn.Linear)
    message = refusal(adamw, {"weight_decai": 0.1, "lr": 1})
    assert message.startswith("weight_decai: AdamW has no such setting; it has lr, betas, eps, weight_decay,")
    assert message.endswith("; did you mean 'weight_decay'?")
    assert refusal(adamw, {"lr": -1.0}) == "AdamW refuses: Invalid learning rate: -1.0"
    assert refusal(adamw, {"lr": "1e-3"}).startswith("AdamW refuses: ")
    assert "cannot be `True` together" in refusal(adamw, {"foreach": True, "fused": True})
    assert "params: SGD has no such setting" in refusal(sgd, {"params": []})


def test_refusals_of_groups_at_construction():
    sgd, adamw = torch.optim.SGD, torch.optim.AdamW
    bad = ParamGroup(name="a", match=("a.*",), settings={"betas": (2.0, 0.9)})
    assert refusal(adamw, {}, (bad,)) == "groups.a: AdamW refuses: Invalid beta parameter at index 0: 2.0"
    assert "groups.a.betas: SGD has no such setting" in refusal(sgd, {}, (bad,))
    twins = (ParamGroup(name="a", match=("a.*",)), ParamGroup(name="a", match=("b.*",)))
    assert refusal(sgd, {}, twins) == "groups.a: two groups have this name"
    assert "every group needs rotate" in refusal(WantsFlags)


def test_refusals_of_parameters():
    sgd = torch.optim.SGD
    lost = ParamGroup(name="a", match=("a.*", "*.biass"), lr=0.1)
    assert refusal(sgd, {}, (lost,)) == "groups.a.match: '*.biass' matches no parameter; the nearest is 'a.bias'"
    assert refusal(sgd, {}, (), frozenset({"a.wait"})) == (
        "frozen: 'a.wait' matches no parameter; the nearest is 'a.weight'"
    )
    everything = ParamGroup(name="all", match=("*",), frozen=True)
    assert refusal(sgd, {}, (everything,)) == "groups: all 4 parameters are frozen; leave at least one to train"
    assert refusal(torch.optim.Muon).startswith("Muon refuses: Muon only supports 2D parameters")
    assert refusal(Hoarding) == "optimizer: Hoarding keeps parameters in self.mine.0; read self.param_groups"


def test_refusals_of_an_update():
    functional, params, opt_state = start(torch.optim.SGD, {"lr": 0.1})
    for grads, memory, settings, message in [
        (
            {"a.wait": params["a.weight"]},
            opt_state,
            {},
            "gradient 'a.wait' does not match any .*; did you mean 'a.weight'",
        ),
        ({}, {"state": {"a.wait": {}}}, {}, "optimizer state 'a.wait' does not match any"),
        ({}, {"groups": {"defalt": {"k": 1}}}, {}, "optimizer state of the group 'defalt'"),
        ({}, opt_state, {"defalt": {}}, "settings of the group 'defalt' .*; did you mean 'default'"),
        ({}, opt_state, {"default": {"lrr": 1.0}}, "setting of 'default' 'lrr' does not match"),
    ]:
        with pytest.raises(ValueError, match=message):
            functional.update(grads, memory, params, settings=settings)


def test_memory_that_a_checkpoint_cannot_contain_is_refused():
    functional, params, opt_state = start(Unsavable, {})
    with pytest.raises(
        TypeError, match=r"optimizer\.state\.a\.weight\.seen is a set, which a checkpoint cannot contain"
    ):
        functional.update({}, opt_state, params)
