"""Compiled updates are those of the step, up to the last bits; where they cannot be compiled, the step makes them."""

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
from noether.training.step.optimizer import FunctionalOptimizer, ParamGroup
from noether.training.step.step import Step
from noether.training.value_schedules import Constant, Linear

pytestmark = [
    # The compiler itself imports what torch has deprecated.
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
]

TOLERANCE = 1e-5
"""Of one update in single precision, relative to the norm of a tensor."""


class Net(nn.Module):
    """Has batch norm, a frozen layer, and returns one of its parameters."""

    dropout = 0.0  # with it, the graph draws other random numbers

    def __init__(self):
        super().__init__()
        self.frozen = nn.Linear(3, 4)
        # Without bias: its gradient before batch norm is zero but for rounding, which Adam would make steps of.
        self.hidden = nn.Sequential(nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(self.dropout))
        self.head, self.scale = nn.Linear(8, 2), nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        return {"out": self.head(self.hidden(self.frozen(x))) * self.scale, "scale": self.scale}


class Dropping(Net):
    """Drops out."""

    dropout = 0.3


class Branching(Net):
    """Does what no graph can: looks at a value in the middle."""

    def forward(self, x):
        return super().forward(x if x.sum() > 0 else -x)


class Idle(Net):
    """Has a parameter that it does not use."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.ones(2))


def loss(outputs, batch):
    return {"square": (outputs["out"] - batch[1]).square().mean(), "small": outputs["scale"].square() * 0.01}


def step_of(model, *, cls=torch.optim.AdamW, settings=None, **options):
    groups = (ParamGroup(name="frozen", match=("frozen.*",), frozen=True), ParamGroup(name="bias", match=("*.bias",)))
    lr = {name: Linear(start=0.1, end=0.0, updates=30) for name in ("bias", "default")}
    optimizer = FunctionalOptimizer(cls, {"lr": 0.1, **(settings or {})}, groups)
    return Step(model=model.train(), loss=loss, optimizer=optimizer, lr=lr, **options)


def begun(step):
    torch.manual_seed(0)
    state = TrainState.from_module(type(step.model)(), seed=3)
    return state.replace(opt_state=step.optimizer.init(state.params))


def batches_of(update):
    """Two micro-batches, the second of them short; every third update has one batch only."""
    generator = torch.Generator().manual_seed(update)
    pairs = [(torch.randn(n, 3, generator=generator), torch.randn(n, 2, generator=generator)) for n in (4, 3)]
    return pairs[:1] if update % 3 == 0 else pairs


def trained(step, updates, state):
    for _ in range(updates):
        batches = batches_of(state.iteration.update)
        state, outputs = step(state, batches)
        state = state.advance(samples=outputs.samples)
    return state, outputs


def values(state):
    return {name: getattr(state, name) for name in ("params", "buffers", "opt_state", "iteration")}


def apart(ours, theirs):
    """Return the largest distance of two mappings of tensors, each relative to the norm of the tensor."""
    pairs = [(ours[name].double(), theirs[name].double()) for name in theirs]
    return max(float((a - b).norm() / b.norm().clamp(min=1.0)) for a, b in pairs)


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.name.startswith("noether")]


@pytest.mark.parametrize(
    ("cls", "settings"),
    [(torch.optim.AdamW, {"fused": True}), (torch.optim.SGD, {"momentum": 0.9})],
    ids=["adamw", "sgd"],
)
def test_updates_are_those_of_the_step_up_to_the_last_bits(cls, settings, caplog):
    """Each from the same state: over many, Adam makes steps of what is zero but for rounding."""
    torch.compiler.reset()
    options = {"cls": cls, "settings": settings, "clip_grad_norm": 0.5}
    eager, compiled = step_of(Net(), **options), CompiledStep(step_of(Net(), **options))
    state = begun(eager)
    for _ in range(8):
        (expected, told), (found, outputs) = trained(eager, 1, state), trained(compiled, 1, state)
        assert apart(found.params, expected.params) < TOLERANCE
        assert apart(found.buffers, expected.buffers) < TOLERANCE
        assert apart(outputs.losses, told.losses) < TOLERANCE
        assert same(outputs.outputs[0]["scale"], state.params["scale"])  # as it was before the update
        assert apart({"norm": outputs.grad_norm}, {"norm": told.grad_norm}) < TOLERANCE
        assert (outputs.samples, outputs.accumulated, outputs.lr) == (told.samples, told.accumulated, told.lr)
        assert bool(outputs.finite)
        state = expected
    assert not warnings_of(caplog)


def test_donated_or_resumed_compiled_updates_have_the_same_bits(caplog):
    torch.compiler.reset()
    options = {"settings": {"fused": True}}
    compiled = {donate: CompiledStep(step_of(Dropping(), **options, donate=donate)) for donate in (False, True)}
    start = begun(step_of(Dropping(), **options))
    states = {donate: trained(step, 20, start) for donate, step in compiled.items()}
    assert same(values(states[True][0]), values(states[False][0]))

    # Gone on with in another process: the kernels are those of the run that nothing stopped.
    cut, _ = trained(CompiledStep(step_of(Dropping(), **options, donate=True)), 7, start)
    resumed = CompiledStep(step_of(Dropping(), **options, donate=True))
    assert same(values(trained(resumed, 13, copy.deepcopy(cut))[0]), values(states[True][0]))

    donated, _ = trained(compiled[True], 1, states[True][0])
    with pytest.raises(DonatedError):
        dict(states[True][0].params)
    assert dict(donated.params)
    assert not warnings_of(caplog)


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
def test_what_cannot_be_compiled_is_done_by_the_step_and_a_warning_says_why(model, options, why, caplog):
    torch.compiler.reset()
    eager, compiled = step_of(model(), **options), CompiledStep(step_of(model(), **options, donate=True))
    with caplog.at_level(logging.WARNING):
        state, _ = trained(compiled, 4, begun(eager))
    assert same(values(state), values(trained(eager, 4, begun(eager))[0]))
    (message,) = warnings_of(caplog)
    assert why.lower() in message.lower()
    assert message.startswith("updates are not compiled: ")


def test_who_listens_to_accumulation_steps_is_heard(caplog):
    eager, compiled = step_of(Net()), CompiledStep(step_of(Net()))
    heard = []

    def observe(state, seen):
        heard.append(seen.accumulation_step)
        return state

    states = [step(begun(eager), batches_of(1), observe)[0] for step in (eager, compiled)]
    assert same(*map(values, states))
    assert heard == [0, 1, 0, 1]
    assert "a callback listens to accumulation steps" in caplog.text


def test_a_tensor_that_is_held_keeps_its_value_whoever_had_the_model_in_between():
    """The count of who holds a tensor takes the model for one of them, also where another step has it now."""
    torch.compiler.reset()
    compiled = CompiledStep(step_of(Net(), donate=True))
    eager = step_of(compiled.eager.model, donate=True)
    state, _ = trained(compiled, 3, begun(eager))
    held = state.params["head.weight"]
    before = held.clone()
    trained(eager, 3, begun(eager))
    trained(compiled, 1, state)
    assert torch.equal(held, before)


def test_who_listens_later_is_heard_all_the_same():
    torch.compiler.reset()
    compiled, heard = CompiledStep(step_of(Net())), []
    state, _ = trained(compiled, 3, begun(compiled.eager))
    compiled(state, batches_of(1), lambda state, seen: (heard.append(seen.accumulation_step), state)[1])
    assert heard == [0, 1]


def test_a_weight_decay_that_stays_is_compiled():
    torch.compiler.reset()
    decay = {"default": Constant(value=0.1)}
    eager, compiled = step_of(Net(), weight_decay=decay), CompiledStep(step_of(Net(), weight_decay=decay))
    assert apart(trained(compiled, 4, begun(eager))[0].params, trained(eager, 4, begun(eager))[0].params) < TOLERANCE


class Scaling(nn.Module):
    """Has a number and a mode that somebody may change while it is trained."""

    factor = 1.0

    def __init__(self):
        super().__init__()
        self.head, self.dropout = nn.Linear(3, 2, bias=False), nn.Dropout(0.5)

    def forward(self, x):
        return self.dropout(self.head(x)) * self.factor


POWER = 2.0


def power(outputs, batch):
    return {"power": ((outputs - batch[1]).abs() ** POWER).mean()}


def test_what_changes_in_the_model_or_its_loss_is_compiled_anew(monkeypatch):
    """Half of torch's checks are left out; these are not among them."""
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
        assert apart(ours.params, expected.params) < TOLERANCE
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
    """What a loss does."""

    MEAN = "mean"
    SUM = "sum"


MODE, REDUCTIONS = Mode.MEAN, {"reduce": torch.mean}


def reduced(outputs, batch):
    reduce = torch.sum if MODE is Mode.SUM else REDUCTIONS["reduce"]
    return {"reduced": reduce((outputs - batch[1]).square())}


@pytest.mark.parametrize("change", [("MODE", Mode.SUM), ("REDUCTIONS", {"reduce": torch.amax})])
def test_values_of_any_kind_that_a_loss_reads_are_watched(monkeypatch, change):
    torch.compiler.reset()
    optimizer = FunctionalOptimizer(torch.optim.SGD, {"lr": 0.1})
    step = Step(model=nn.Linear(3, 2), loss=reduced, optimizer=optimizer, lr={"default": Constant(value=0.1)})
    state, batch = TrainState.from_module(step.model), [(torch.ones(4, 3), torch.ones(4, 2))]
    state = state.replace(opt_state=optimizer.init(state.params))
    compiled = CompiledStep(step)
    for _ in range(2):
        (expected, _), (ours, _) = step(state, batch), compiled(state, batch)
        assert apart(ours.params, expected.params) < TOLERANCE
        monkeypatch.setitem(globals(), *change)


def test_buffers_and_params_are_known_by_their_names():
    torch.compiler.reset()
    step = step_of(Net(), settings={"fused": True})
    compiled, (state, _) = CompiledStep(step), trained(step, 2, begun(step))
    trained(compiled, 1, state)
    turned = state.replace(buffers=dict(reversed(state.buffers.items())), params=dict(reversed(state.params.items())))
    (expected, _), (found, _) = trained(step, 1, turned), trained(compiled, 1, turned)
    assert apart(found.params, expected.params) < TOLERANCE
    assert apart(found.buffers, expected.buffers) < TOLERANCE


def test_a_loop_without_gradients_compiles_as_well(caplog):
    torch.compiler.reset()
    step = step_of(Net(), settings={"fused": True})
    state, _ = trained(step, 1, begun(step))
    with torch.no_grad():
        (expected, _), (found, _) = trained(step, 1, state), trained(CompiledStep(step), 1, state)
    assert apart(found.params, expected.params) < TOLERANCE
    assert not warnings_of(caplog)
