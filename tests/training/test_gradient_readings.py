"""`AfterUpdate.gradients` are those of the mean loss, before clipping, in memory to which nothing writes."""

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from torch.func import functional_call

import noether
from noether import HistogramCallback, Run, TrainState, dispatch
from noether.core.pending import dispatch_pending, set_pending
from noether.core.tensors.tree import clone_tensors
from noether.effects.checkpoints.state_codec import decode_state, encode_state
from noether.testing import same
from noether.training.step.loss_scaling import LossScaling
from noether.training.step.optimizer import FunctionalOptimizer
from noether.training.step.step import Step
from noether.training.value_schedules import Constant


class Partly(nn.Module):
    """A model with a frozen parameter, an unused one, a 0-dimensional one, and rows that are looked up."""

    def __init__(self):
        super().__init__()
        self.rows, self.head, self.unused = nn.Embedding(5, 3, sparse=True), nn.Linear(3, 2), nn.Linear(3, 2)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.head.bias.requires_grad_(requires_grad=False)

    def forward(self, places):
        return self.head(self.rows(places).tanh()) * self.scale


class Dense(Partly):
    def __init__(self):
        super().__init__()
        self.rows.sparse = False


class Greedy(torch.optim.Optimizer):
    """Writes to the gradients that it gets, and keeps them."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self.state[param]["last"] = param.grad.mul_(group["lr"])
                    param.sub_(param.grad)


def squares(outputs, batch):
    return {"mse": (outputs - batch[1]).square().mean()}


def always(state):
    return True


def make_step(kind, cls, settings, **options):
    torch.manual_seed(3)
    model = kind()
    frozen = frozenset(name for name, param in model.named_parameters() if not param.requires_grad)
    optimizer = FunctionalOptimizer(cls, {"lr": 0.1, **settings}, (), frozen)
    state = TrainState.from_module(copy.deepcopy(model), seed=1)
    state = state.replace(opt_state=optimizer.init(state.params))
    lr = {"default": Constant(value=0.1)}
    return Step(model=model, loss=squares, optimizer=optimizer, lr=lr, gradients=always, **options), state


def make_batches(update, sizes):
    generator = torch.Generator().manual_seed(update)
    return [
        (torch.randint(5, (size,), generator=generator), torch.randn(size, 2, generator=generator)) for size in sizes
    ]


def gradients_of_mean(params, batches):
    """Return what `torch.autograd.grad` gives for the mean loss over all samples at once."""
    names = [name for name in params if name in {"rows.weight", "head.weight", "scale"}]
    leaves = {name: param.detach().clone().requires_grad_(name in names) for name, param in params.items()}
    places, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
    loss = squares(functional_call(Dense(), leaves, (places,)), (places, targets))["mse"]
    return dict(zip(names, torch.autograd.grad(loss, [leaves[name] for name in names]), strict=True))


@pytest.mark.parametrize("sizes", [(6,), (4, 1, 3)], ids=["whole", "accumulated"])
@pytest.mark.parametrize(
    ("kind", "cls", "settings", "options"),
    [
        pytest.param(Dense, torch.optim.AdamW, {"fused": True}, {"donate": True}, id="adamw-donated"),
        pytest.param(Dense, torch.optim.SGD, {"momentum": 0.9, "nesterov": True}, {"donate": True}, id="nesterov"),
        pytest.param(Dense, torch.optim.SGD, {"momentum": 0.9}, {"clip_grad_norm": 1e-3}, id="clipped"),
        pytest.param(Dense, torch.optim.SGD, {}, {"clip_grad_value": 1e-3, "nonfinite": "skip"}, id="checked"),
        pytest.param(Dense, torch.optim.SGD, {}, {"loss_scaling": LossScaling(init_scale=8.0)}, id="scaled"),
        pytest.param(Dense, Greedy, {}, {}, id="written-by-the-optimizer"),
        pytest.param(Partly, torch.optim.SGD, {}, {}, id="sparse"),
    ],
)
def test_they_are_those_of_the_mean_loss_and_stay_as_they_are(kind, cls, settings, options, sizes):
    step, state = make_step(kind, cls, settings, **options)
    kept = []
    for update in range(4):
        batches = make_batches(update, sizes)
        expected = gradients_of_mean(state.params, batches)
        state, event = step(state, batches)
        assert event.gradients.keys() == expected.keys()
        for name, grad in event.gradients.items():
            torch.testing.assert_close(grad, expected[name], msg=name)
            assert (grad.layout, grad.requires_grad) == (torch.strided, False)
        kept.append((event.gradients, clone_tensors(dict(event.gradients))))
        state = state.advance(samples=event.samples)
    for gradients, copies in kept:
        assert same(dict(gradients), copies)


def test_an_update_that_is_skipped_has_none():
    step, state = make_step(Dense, torch.optim.SGD, {}, nonfinite="skip")
    places, targets = make_batches(0, (4,))[0]
    for batches in ([(places, targets * torch.inf)], []):
        _, event = step(state, batches)
        assert (event.skipped, event.gradients) == (True, None)
    _, event = make_step(Dense, torch.optim.SGD, {}, nonfinite="apply")[0](state, [(places, targets * torch.inf)])
    assert not event.gradients["scale"].isfinite()


def test_they_are_copied_only_where_a_callback_reads_them():
    settings = {"every_n_updates": 2}
    assert HistogramCallback(**settings).readings == ()
    assert noether.compose(HistogramCallback(of=("weights", "gradients"), **settings)).readings == ("gradients",)
    step, state = make_step(Dense, torch.optim.SGD, {})
    assert replace(step, gradients=None)(state, make_batches(0, (4,)))[1].gradients is None


@pytest.mark.parametrize(
    ("interval", "sizes", "copied"),
    [
        ({"every_n_updates": 2}, (4,), [False, True, False, True]),
        ({"every_n_samples": 10}, (3, 1), [False, False, True, False]),
    ],
    ids=["updates", "samples"],
)
def test_the_step_copies_them_where_a_firing_needs_them(interval, sizes, copied):
    reducer = noether.compose(HistogramCallback(of=("gradients",), **interval))
    step, state = make_step(Dense, torch.optim.SGD, {})
    step, found, fired = replace(step, gradients=partial(reducer.reads, "gradients")), [], []
    for update in range(4):
        state, event = step(state, make_batches(update, sizes))
        found.append(event.gradients is not None)
        state = state.advance(samples=event.samples)
        state = dispatch(state, event, reducer, lambda effects, *_: fired.append(bool(effects)))
    assert found == fired == copied


def test_a_pending_event_has_them_after_a_resume():
    callback = HistogramCallback(every_n_updates=1, of=("gradients",), bins=3)
    step, state = make_step(Dense, torch.optim.SGD, {})
    state, event = step(state, make_batches(0, (4,)))
    state = state.advance(samples=event.samples)
    pending = set_pending(state, event.complete(run=Run(run_id="first")))
    seen = []
    dispatch(state, event, callback, lambda effects, *_: seen.append(effects))
    resumed = decode_state(encode_state(pending))
    dispatch_pending(resumed, Run(run_id="first"), callback, lambda effects, *_: seen.append(effects))
    (uncut, again) = seen
    assert [each.key for each in uncut] == ["gradients/scale", "gradients/rows.weight", "gradients/head.weight"]
    assert [(each.key, each.counts.tolist(), each.edges.tolist()) for each in again] == [
        (each.key, each.counts.tolist(), each.edges.tolist()) for each in uncut
    ]
