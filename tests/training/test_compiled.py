"""Compiled updates equal those of the plain step up to the last bits; the plain step makes all others."""

import copy
import logging
from enum import Enum
from itertools import pairwise

import pytest
import torch
from torch import nn

from noether.core.state import TrainState
from noether.core.tensors.donation import DonatedError
from noether.testing import same
from noether.training.step.compiled import CompiledStep
from noether.training.step.gradients import total_norm
from noether.training.step.optimizer import FunctionalOptimizer, ParamGroup
from noether.training.step.step import Step
from noether.training.value_schedules import Constant, Linear

pytestmark = [
    # The compiler imports a module that torch has deprecated.
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
]

TOLERANCE = 1e-5
"""Largest distance after one update in single precision, relative to the norm of a tensor."""


class Net(nn.Module):
    """Has batch norm, a frozen layer, and returns one of its parameters."""

    dropout = 0.0  # with it, the graph draws other random numbers

    def __init__(self):
        super().__init__()
        self.frozen = nn.Linear(3, 4)
        # Without bias: its gradient before batch norm is only a rounding error, which Adam would amplify.
        self.hidden = nn.Sequential(nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(self.dropout))
        self.head, self.scale = nn.Linear(8, 2), nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        return {"out": self.head(self.hidden(self.frozen(x))) * self.scale, "scale": self.scale}


class Dropping(Net):
    """Drops out."""

    dropout = 0.3


class Small(nn.Module):
    """Has a frozen layer and drops out; it compiles in a fraction of the time."""

    def __init__(self):
        super().__init__()
        self.frozen, self.dropout, self.head = nn.Linear(3, 4), nn.Dropout(0.3), nn.Linear(4, 2)
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        return {"out": self.head(self.dropout(self.frozen(x))) * self.scale, "scale": self.scale}


class Branching(Net):
    """Branches on a value, which torch cannot compile into one graph."""

    def forward(self, x):
        return super().forward(x if x.sum() > 0 else -x)


class Idle(Net):
    """Has a parameter that it does not use."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.ones(2))


def loss(outputs, batch):
    return {"square": (outputs["out"] - batch[1]).square().mean(), "small": outputs["scale"].square() * 0.01}


def make_step(model, *, cls=torch.optim.AdamW, settings=None, **options):
    groups = (ParamGroup(name="frozen", match=("frozen.*",), frozen=True), ParamGroup(name="bias", match=("*.bias",)))
    lr = {name: Linear(start=0.1, end=0.0, updates=30) for name in ("bias", "default")}
    optimizer = FunctionalOptimizer(cls, {"lr": 0.1, **(settings or {})}, groups)
    return Step(model=model.train(), loss=loss, optimizer=optimizer, lr=lr, **options)


def initial_state(step):
    torch.manual_seed(0)
    state = TrainState.from_module(type(step.model)(), seed=3)
    return state.replace(opt_state=step.optimizer.init(state.params))


def make_batches(update):
    """Two micro-batches, the second of them short; every third update has one batch only."""
    generator = torch.Generator().manual_seed(update)
    pairs = [(torch.randn(n, 3, generator=generator), torch.randn(n, 2, generator=generator)) for n in (4, 3)]
    return pairs[:1] if update % 3 == 0 else pairs


def train(step, updates, state):
    for _ in range(updates):
        batches = make_batches(state.iteration.update)
        state, outputs = step(state, batches)
        state = state.advance(samples=outputs.samples)
    return state, outputs


def values_of(state):
    return {name: getattr(state, name) for name in ("params", "buffers", "opt_state", "iteration")}


def distance(ours, theirs):
    """Return the largest distance of two mappings of tensors, each relative to the norm of the tensor."""
    pairs = [(ours[name].double(), theirs[name].double()) for name in theirs]
    return max(float((a - b).norm() / b.norm().clamp(min=1.0)) for a, b in pairs)


def warnings_in(caplog):
    return [record.getMessage() for record in caplog.records if record.name.startswith("noether")]


@pytest.mark.parametrize(
    ("cls", "settings"),
    [
        pytest.param(torch.optim.AdamW, {"fused": True}, id="adamw", marks=pytest.mark.slow),
        pytest.param(torch.optim.SGD, {"momentum": 0.9}, id="sgd"),
    ],
)
def test_updates_are_those_of_the_step_up_to_the_last_bits(cls, settings, caplog):
    """Both start each update from the same state: over many updates, Adam amplifies rounding errors."""
    torch.compiler.reset()
    options = {"cls": cls, "settings": settings, "clip_grad_norm": 0.5, "gradients": lambda state: True}
    options["weight_decay"] = {"default": Constant(value=0.1)}
    eager, compiled = make_step(Net(), **options), CompiledStep(make_step(Net(), **options))
    state = initial_state(eager)
    for _ in range(8):
        (expected, plain_event), (found, event) = train(eager, 1, state), train(compiled, 1, state)
        assert distance(found.params, expected.params) < TOLERANCE
        assert distance(found.buffers, expected.buffers) < TOLERANCE
        assert distance(event.losses, plain_event.losses) < TOLERANCE
        assert same(event.outputs[0]["scale"], state.params["scale"])  # as it was before the update
        assert distance({"norm": event.grad_norm}, {"norm": plain_event.grad_norm}) < TOLERANCE
        assert event.gradients.keys() == plain_event.gradients.keys()
        assert distance(event.gradients, plain_event.gradients) < TOLERANCE
        torch.testing.assert_close(total_norm(event.gradients), event.grad_norm)  # before clipping
        assert (event.samples, event.accumulated) == (plain_event.samples, plain_event.accumulated)
        assert event.lr == plain_event.lr
        assert bool(event.finite)
        state = expected
    assert not warnings_in(caplog)


@pytest.mark.parametrize(
    ("model", "options"),
    [
        pytest.param(Small, {"cls": torch.optim.SGD, "settings": {"momentum": 0.9}}, id="small"),
        pytest.param(Dropping, {"settings": {"fused": True}}, id="dropping", marks=pytest.mark.slow),
    ],
)
def test_donated_or_resumed_compiled_updates_have_the_same_bits(model, options, caplog):
    torch.compiler.reset()
    compiled = {donate: CompiledStep(make_step(model(), **options, donate=donate)) for donate in (False, True)}
    start = initial_state(make_step(model(), **options))
    states = {donate: train(step, 20, start) for donate, step in compiled.items()}
    assert same(values_of(states[True][0]), values_of(states[False][0]))

    # A resumed process computes with the same kernels as the uncut run.
    cut, _ = train(CompiledStep(make_step(model(), **options, donate=True)), 7, start)
    resumed = CompiledStep(make_step(model(), **options, donate=True))
    assert same(values_of(train(resumed, 13, copy.deepcopy(cut))[0]), values_of(states[True][0]))

    donated, _ = train(compiled[True], 1, states[True][0])
    with pytest.raises(DonatedError):
        dict(states[True][0].params)
    assert dict(donated.params)
    assert not warnings_in(caplog)


@pytest.mark.parametrize(
    ("model", "options", "why"),
    [
        (Branching, {}, "data-dependent"),
        (Idle, {}, "the optimizer has no memory of a parameter that got no gradient"),
        (Idle, {"cls": torch.optim.SGD}, "the parameter 'unused' gets no gradient"),
        (Net, {"cls": torch.optim.RMSprop}, "torch.compile can trace Adam, AdamW and SGD, not RMSprop"),
        (Net, {"nonfinite": "skip"}, "nonfinite: skip decides in the middle of an update"),
        (Net, {"weight_decay": {"default": Linear(start=0.1, end=0.0, updates=5)}}, "the weight decay has a schedule"),
    ],
)
def test_the_plain_step_replaces_updates_that_do_not_compile_and_a_warning_says_why(model, options, why, caplog):
    torch.compiler.reset()
    eager, compiled = make_step(model(), **options), CompiledStep(make_step(model(), **options, donate=True))
    with caplog.at_level(logging.WARNING):
        state, _ = train(compiled, 4, initial_state(eager))
    assert same(values_of(state), values_of(train(eager, 4, initial_state(eager))[0]))
    (message,) = warnings_in(caplog)
    assert why.lower() in message.lower()
    assert message.startswith("updates are not compiled: ")


def test_observers_of_accumulation_steps_are_called(caplog):
    eager, compiled = make_step(Net()), CompiledStep(make_step(Net()))
    observed = []

    def observe(state, seen):
        observed.append(seen.accumulation_step)
        return state

    states = [step(initial_state(eager), make_batches(1), observe)[0] for step in (eager, compiled)]
    assert same(*map(values_of, states))
    assert observed == [0, 1, 0, 1]
    assert "a callback listens to accumulation steps" in caplog.text


def test_a_view_keeps_its_value_though_another_step_used_the_model_in_between():
    """The number of users of a storage includes the model's parameter, also after another step has bound it."""
    torch.compiler.reset()
    compiled = CompiledStep(make_step(Small(), donate=True))
    eager = make_step(compiled.eager.model, donate=True)
    state, _ = train(compiled, 3, initial_state(eager))
    view = state.params["head.weight"]
    before = view.clone()
    train(eager, 3, initial_state(eager))
    train(compiled, 1, state)
    assert torch.equal(view, before)


def test_observers_that_come_later_are_called():
    torch.compiler.reset()
    compiled, observed = CompiledStep(make_step(Small())), []
    state, _ = train(compiled, 3, initial_state(compiled.eager))
    compiled(state, make_batches(1), lambda state, seen: (observed.append(seen.accumulation_step), state)[1])
    assert observed == [0, 1]


class Scaling(nn.Module):
    """Has a number and a mode that may change during training."""

    factor = 1.0

    def __init__(self):
        super().__init__()
        self.head, self.dropout = nn.Linear(3, 2, bias=False), nn.Dropout(0.5)

    def forward(self, x):
        return self.dropout(self.head(x)) * self.factor


POWER = 2.0


def power(outputs, batch):
    return {"power": ((outputs - batch[1]).abs() ** POWER).mean()}


def test_changes_of_the_model_or_its_loss_are_compiled_again(monkeypatch):
    """Half of torch's guards are skipped; these are not among them."""
    torch.compiler.reset()
    optimizer = FunctionalOptimizer(torch.optim.SGD, {"lr": 0.1})
    model = Scaling().train()
    model.dropout.eval()
    step = Step(model=model, loss=power, optimizer=optimizer, lr={"default": Constant(value=0.1)})
    state, batch = TrainState.from_module(model), [(torch.ones(4, 3), torch.ones(4, 2))]
    state = state.replace(opt_state=optimizer.init(state.params))
    compiled, found = CompiledStep(step), []

    def check():
        (expected, _), (ours, _) = step(state, batch), compiled(state, batch)
        assert distance(ours.params, expected.params) < TOLERANCE
        found.append(ours.params["head.weight"])

    check()
    model.factor = 3.0
    check()
    monkeypatch.setitem(globals(), "POWER", 4.0)
    check()
    assert not any(torch.equal(a, b) for a, b in pairwise(found))
    model.dropout.train()
    dropped = compiled(state, batch)[0].params["head.weight"]
    assert not torch.equal(dropped, found[-1])


class Mode(Enum):
    """Reduction of a loss."""

    MEAN = "mean"
    SUM = "sum"


MODE, REDUCTIONS = Mode.MEAN, {"reduce": torch.mean}


def reduction_loss(outputs, batch):
    reduce = torch.sum if MODE is Mode.SUM else REDUCTIONS["reduce"]
    return {"reduced": reduce((outputs - batch[1]).square())}


@pytest.mark.parametrize("change", [("MODE", Mode.SUM), ("REDUCTIONS", {"reduce": torch.amax})])
def test_changes_of_any_global_that_a_loss_reads_are_seen(monkeypatch, change):
    torch.compiler.reset()
    optimizer = FunctionalOptimizer(torch.optim.SGD, {"lr": 0.1})
    step = Step(model=nn.Linear(3, 2), loss=reduction_loss, optimizer=optimizer, lr={"default": Constant(value=0.1)})
    state, batch = TrainState.from_module(step.model), [(torch.ones(4, 3), torch.ones(4, 2))]
    state = state.replace(opt_state=optimizer.init(state.params))
    compiled = CompiledStep(step)
    for _ in range(2):
        (expected, _), (ours, _) = step(state, batch), compiled(state, batch)
        assert distance(ours.params, expected.params) < TOLERANCE
        monkeypatch.setitem(globals(), *change)


def test_buffers_and_params_are_matched_by_name():
    torch.compiler.reset()
    step = make_step(Net(), settings={"fused": True})
    compiled, (state, _) = CompiledStep(step), train(step, 2, initial_state(step))
    train(compiled, 1, state)
    turned = state.replace(buffers=dict(reversed(state.buffers.items())), params=dict(reversed(state.params.items())))
    (expected, _), (found, _) = train(step, 1, turned), train(compiled, 1, turned)
    assert distance(found.params, expected.params) < TOLERANCE
    assert distance(found.buffers, expected.buffers) < TOLERANCE


def test_a_loop_without_gradients_compiles_as_well(caplog):
    torch.compiler.reset()
    step = make_step(Net(), settings={"fused": True})
    state, _ = train(step, 1, initial_state(step))
    with torch.no_grad():
        (expected, _), (found, _) = train(step, 1, state), train(CompiledStep(step), 1, state)
    assert distance(found.params, expected.params) < TOLERANCE
    assert not warnings_in(caplog)
