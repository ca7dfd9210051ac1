"""`GradNormCallback`: intervals compared with numpy, and the norm of the step with that of torch."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import clip_grad_norm_

from noether.core.callbacks import GradNormCallback
from noether.core.event import AfterEpoch, AfterTraining, AfterUpdate
from noether.core.reducer import compose
from noether.core.state import TrainState
from noether.testing import same
from noether.training.step.optimizer import FunctionalOptimizer
from noether.training.step.step import Step
from noether.training.value_schedules import Constant

NAN = math.nan
NORMS = st.floats(0, 1e6)


def go(callback, updates, state=None):
    """Return the state after `(norm, skipped)` updates, and the values logged at each."""
    state, logs = state or TrainState(), []
    for norm, skipped in updates:
        event = AfterUpdate(samples=4, grad_norm=norm, skipped=skipped)
        state, effects = callback(state.advance(samples=4), event)
        logs.append([dict(effect.values) for effect in effects])
    return state, logs


def numbers(logs):
    return [[{key: float(value) for key, value in values.items()} for values in each] for each in logs]


@given(st.lists(st.tuples(NORMS, st.booleans()), min_size=1, max_size=20), st.integers(1, 5), st.booleans())
def test_mean_and_maximum_of_every_interval(updates, n, as_tensors):
    made = [(torch.tensor(norm, dtype=torch.float64) if as_tensors else norm, skipped) for norm, skipped in updates]
    _, logs = go(GradNormCallback(every_n_updates=n), made)
    applied = []
    for update, ((norm, skipped), logged) in enumerate(zip(updates, logs, strict=True), 1):
        applied += [] if skipped else [norm]
        if update % n or not applied:  # an interval of only skipped updates logs nothing
            assert logged == []
            continue
        (values,) = logged
        assert list(values) == [f"optim/grad_norm/mean/U{n}", f"optim/grad_norm/max/U{n}"]
        mean, largest = values.values()
        np.testing.assert_allclose(mean.item(), np.mean(applied), rtol=1e-12)
        assert largest.item() == np.max(applied)
        applied = []


@given(st.lists(st.tuples(NORMS, st.booleans()), max_size=15), st.integers(1, 5), st.integers(0, 15))
def test_a_resumed_run_continues_with_its_norms(updates, n, cut):
    uncut, logs = go(GradNormCallback(every_n_updates=n), updates)
    state, first = go(GradNormCallback(every_n_updates=n), updates[:cut])
    state, rest = go(GradNormCallback(every_n_updates=n), updates[cut:], state)
    assert same(first + rest, logs)
    assert same(state, uncut)


def test_firings_at_an_epoch_and_at_the_end():
    callback = GradNormCallback(every_n_epochs=1, at_end=True)
    state, logs = go(callback, [(3.0, False), (1.0, False)])
    assert logs == [[], []]
    state, effects = callback(state.next_epoch(), AfterEpoch())
    assert effects[0].values == {"optim/grad_norm/mean/E1": 2.0, "optim/grad_norm/max/E1": 3.0}
    assert callback(state, AfterTraining()) == (state, ())
    state, _ = go(callback, [(0.5, False)], state)
    _, effects = callback(state, AfterTraining())
    assert effects[0].values == {"optim/grad_norm/mean/E1": 0.5, "optim/grad_norm/max/E1": 0.5}


def test_skipped_updates_do_not_count():
    _, logs = go(GradNormCallback(every_n_updates=3), [(math.inf, True), (2.0, False), (NAN, True)])
    assert numbers(logs)[-1] == [{"optim/grad_norm/mean/U3": 2.0, "optim/grad_norm/max/U3": 2.0}]


def test_nan_of_an_applied_update_is_logged_in_its_interval_only():
    _, logs = go(GradNormCallback(every_n_updates=2), [(NAN, False), (1.0, False), (2.0, False), (NAN, False),
                                                       (3.0, False), (5.0, False)])  # fmt: skip
    of_nan = {"optim/grad_norm/mean/U2": NAN, "optim/grad_norm/max/U2": NAN}
    assert same(numbers(logs)[1::2], [[of_nan], [of_nan], [{"optim/grad_norm/mean/U2": 4.0,
                                                            "optim/grad_norm/max/U2": 5.0}]])  # fmt: skip


def test_an_infinite_norm_is_logged():
    _, logs = go(GradNormCallback(every_n_updates=2), [(math.inf, False), (1.0, False)])
    assert set(numbers(logs)[-1][0].values()) == {math.inf}


def test_an_event_without_the_norm_is_refused():
    with pytest.raises(
        ValueError,
        match=r"^GradNormCallback/U2: the loop measures no gradient norm; pass AfterUpdate\(grad_norm=...\)$",
    ):
        go(GradNormCallback(every_n_updates=2), [(None, False)])
    go(GradNormCallback(every_n_updates=1), [(None, True)])  # a skipped update needs no norm


def test_single_precision_norms_are_summed_in_double_without_their_graph():
    norms = [torch.tensor(1e8), torch.tensor(1.0)] * 50
    _, logs = go(GradNormCallback(every_n_updates=100), [(norm, False) for norm in norms])
    assert logs[-1][0]["optim/grad_norm/mean/U100"].item() == 50000000.5
    state, _ = go(GradNormCallback(every_n_updates=2), [(torch.ones((), requires_grad=True) * 2, False)])
    memory = state.memory("GradNormCallback/U2")
    assert not memory["sum"].requires_grad
    assert not memory["max"].requires_grad


def test_the_callback_declares_the_reading():
    callback = GradNormCallback(every_n_samples=512)
    assert callback.readings == compose(callback).readings == ("grad_norm",)
    assert callback.produces == ("optim/grad_norm/mean/S512", "optim/grad_norm/max/S512")


# --- the real step


class Partly(nn.Module):
    """A model with a frozen parameter, an unused one, a 0-dimensional one, and others."""

    def __init__(self):
        super().__init__()
        self.body, self.head, self.unused = nn.Linear(3, 5), nn.Linear(5, 2), nn.Linear(3, 2)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.body.bias.requires_grad_(requires_grad=False)

    def forward(self, x):
        return self.head(self.body(x).tanh()) * self.scale


def squares(outputs, batch):
    return {"mse": (outputs - batch[1]).square().mean()}


def make_model():
    torch.manual_seed(3)
    return Partly()


def make_batches(update, sizes):
    generator = torch.Generator().manual_seed(update)
    return [(torch.randn(size, 3, generator=generator), torch.randn(size, 2, generator=generator)) for size in sizes]


def make_step(model, **settings):
    frozen = frozenset(name for name, param in model.named_parameters() if not param.requires_grad)
    optimizer = FunctionalOptimizer(torch.optim.SGD, {"lr": 0.5, "momentum": 0.9}, (), frozen)
    state = TrainState.from_module(copy.deepcopy(model), seed=1)
    state = state.replace(opt_state=optimizer.init(state.params))
    return Step(model=model, loss=squares, optimizer=optimizer, lr={"default": Constant(value=0.5)}, **settings), state


def torch_norm(model, params, batches):
    """Return the norm that torch measures in a mutable loop, on a copy of the model."""
    model = copy.deepcopy(model)
    model.load_state_dict({**model.state_dict(), **params})
    samples = sum(len(x) for x, _ in batches)
    for batch in batches:
        loss = squares(model(batch[0]), batch)["mse"]
        (loss if len(batches) == 1 else loss * (len(batch[0]) / samples)).backward()
    return clip_grad_norm_(model.parameters(), math.inf)


CLIPS = [
    {},
    {"clip_grad_norm": 1e-3},
    {"clip_grad_norm": 1e3},
    {"clip_grad_value": 1e-3},
    {"clip_grad_value": 1e-3, "clip_grad_norm": 1e-3},
    {"clip_grad_value": 0.05, "clip_grad_norm": 1e3},
    {"nonfinite": "skip"},
]


@pytest.mark.parametrize("clip", CLIPS, ids=str)
@pytest.mark.parametrize("sizes", [(6,), (4, 1, 3)], ids=["whole", "accumulated"])
def test_the_step_measures_the_norm_of_torch_before_clipping(clip, sizes):
    model = make_model()
    step, state = make_step(model, grad_norm=True, **clip)
    for update in range(5):
        batches = make_batches(update, sizes)
        expected = torch_norm(model, state.params, batches)
        state, outputs = step(state, batches)
        assert same(outputs.grad_norm, expected)
        assert outputs.grad_norm > 0
        state = state.advance(samples=outputs.samples)


@pytest.mark.parametrize("clip", CLIPS, ids=str)
@pytest.mark.parametrize("sizes", [(6,), (4, 1, 3)], ids=["whole", "accumulated"])
def test_measuring_does_not_change_the_update(clip, sizes):
    model = make_model()
    (measuring, ours), (plain, theirs) = make_step(model, grad_norm=True, **clip), make_step(model, **clip)
    for update in range(5):
        batches = make_batches(update, sizes)
        (ours, measured), (theirs, unmeasured) = measuring(ours, batches), plain(theirs, batches)
        assert same(ours, theirs)
        assert same(measured.losses, unmeasured.losses)
        # without clipping by norm, only the callback needs it
        assert (unmeasured.grad_norm is None) == ("clip_grad_norm" not in clip)
        ours, theirs = (state.advance(samples=measured.samples) for state in (ours, theirs))


def test_the_callback_logs_the_norms_of_a_step():
    model, callback = make_model(), GradNormCallback(every_n_updates=3)
    step, state = make_step(model, grad_norm="grad_norm" in compose(callback).readings)
    norms = []
    for update in range(3):
        batches = make_batches(update, (6,))
        norms.append(torch_norm(model, state.params, batches).item())
        state, outputs = step(state, batches)
        event = AfterUpdate(samples=outputs.samples, grad_norm=outputs.grad_norm, skipped=outputs.skipped)
        state, effects = callback(state.advance(samples=outputs.samples), event)
    values = {key: value.item() for key, value in effects[0].values.items()}
    assert values == pytest.approx({"optim/grad_norm/mean/U3": np.mean(norms), "optim/grad_norm/max/U3": max(norms)})
