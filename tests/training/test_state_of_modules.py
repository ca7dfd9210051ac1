"""State that modules make in forward, or that `state_dict` leaves out: a resumed run equals the uncut one."""

import re
from itertools import pairwise
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from safetensors.torch import load
from tiny_runs import make_config
from torch import nn

import noether
from noether import Session, TrainState, open_run
from noether.config import ConfigError
from noether.config.init_settings import InitSettings
from noether.core.callbacks import CheckpointCallback
from noether.core.effect import SaveCheckpoint
from noether.core.tensors.live.buffers import changed_buffers
from noether.core.tensors.live.weights import MismatchError
from noether.effects import CheckpointError
from noether.effects.checkpoints.contents import checkpoint_files, read_state
from noether.session.errors import SessionError
from noether.testing import same
from noether.training.initial_weights import load_weights
from noether.training.step.optimizer import FunctionalOptimizer
from noether.training.step.step import Step
from noether.training.weights import fit_weights


class Lazy(nn.Module):
    """Sets a buffer that the constructor registered as None."""

    def __init__(self, *, persistent=True):
        super().__init__()
        self.register_buffer("scale", None, persistent=persistent)

    def forward(self, x):
        if self.scale is None:
            self.scale = x.detach().std(0) + 1
        return x / self.scale


class Registering(nn.Module):
    """Registers a buffer in forward, as caches of rotary embeddings do."""

    def __init__(self, *, persistent=True):
        super().__init__()
        self.persistent = persistent

    def forward(self, x):
        if not hasattr(self, "shift"):
            self.register_buffer("shift", x.detach().mean(0), persistent=self.persistent)
        return x - self.shift


class Growing(nn.Module):
    """A bank of earlier inputs, of which it keeps some."""

    def __init__(self, *, persistent=True):
        super().__init__()
        self.register_buffer("bank", torch.zeros(0, 2), persistent=persistent)

    def forward(self, x):
        if self.training:
            self.bank = torch.cat([self.bank, x.detach()])[-10:]
        return x - (self.bank.mean(0) if len(self.bank) else 0)


class Converting(nn.Module):
    """Gives a buffer another dtype."""

    def __init__(self, *, persistent=True):
        super().__init__()
        self.register_buffer("mean", torch.zeros(2), persistent=persistent)

    def forward(self, x):
        self.mean = 0.9 * self.mean.double() + 0.1 * x.detach().double().mean(0)
        return x + self.mean.to(x.dtype)


class Writing(nn.Module):
    """Writes to a buffer in place, past the version counter of autograd."""

    def __init__(self, *, persistent=True):
        super().__init__()
        self.register_buffer("count", torch.zeros(()), persistent=persistent)
        self.register_buffer("table", torch.arange(6.0), persistent=False)

    def forward(self, x):
        self.count.data.add_(1)
        return x * self.table[1] / (1 + self.count)


class Extra(nn.Module):
    """Keeps extra state."""

    def __init__(self, *, persistent=True):
        super().__init__()
        self.seen = 0

    def get_extra_state(self):
        return {"seen": self.seen}

    def set_extra_state(self, state):
        self.seen = state["seen"]

    def forward(self, x):
        self.seen += 1
        return x / self.seen


KINDS = [Lazy, Registering, Growing, Converting, Writing, Extra]
BLOCKS = st.lists(st.tuples(st.sampled_from(KINDS), st.booleans()), min_size=1, max_size=3)
UPDATES = 4


def make_model(blocks):
    torch.manual_seed(0)
    return nn.Sequential(*(kind(persistent=persistent) for kind, persistent in blocks), nn.Linear(2, 1))


def batch(update):
    return torch.randn(4, 2, generator=torch.Generator().manual_seed(update))


def loss(outputs, _):
    return {"square": outputs.square().mean()}


def on_disk(state):
    files = checkpoint_files(SaveCheckpoint(), state)
    return read_state({name: b"".join(pieces) for name, pieces in files.items()}, state.iteration)


class Functional:
    """A process that makes updates with the functional step."""

    def __init__(self, blocks, *, donate):
        self.model = make_model(blocks)
        self.step = Step(
            model=self.model,
            loss=loss,
            optimizer=FunctionalOptimizer(torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
            lr={"default": lambda position: 0.1},
            donate=donate,
        )
        self.evaluate = noether.forward(self.model, loss)
        live = TrainState.from_module(self.model)
        self.start = noether.lease(live).replace(opt_state=self.step.optimizer.init(live.params))

    def update(self, state):
        self.evaluate(state, batch(-1))
        state, event = self.step(state, [batch(state.iteration.update)])
        return state.advance(samples=4), float(event.losses["total"])


def run_functional(blocks, cuts, *, donate):
    process = Functional(blocks, donate=donate)
    state, losses = process.start, []
    for update in range(UPDATES):
        if update in cuts:
            saved = on_disk(state)
            process = Functional(blocks, donate=donate)
            state = fit_weights(process.start, saved, process.model)
        state, value = process.update(state)
        losses.append(value)
    return losses, noether.lease(state)


@settings(max_examples=25)
@given(BLOCKS, st.sets(st.integers(0, UPDATES - 1)), st.booleans())
def test_a_functional_run_resumes_all_state_of_its_modules(blocks, cuts, donate):
    uncut, cut = (run_functional(blocks, each, donate=donate) for each in ((), cuts))
    assert same(cut, uncut)


def run_live(blocks, cuts):
    """Return what the README's loop makes, with a load at each cut."""
    losses, saved = [], None
    for start, end in pairwise((0, *sorted(cuts), UPDATES)):
        model = make_model(blocks)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        state = TrainState.from_module(model, optimizer, saved=saved)
        evaluate = noether.forward(model, loss)
        for update in range(start, end):
            evaluate(state, batch(-1))
            value = model(batch(update)).square().mean()
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            state = state.advance(samples=4)
            losses.append(float(value.detach()))
        saved = on_disk(state)
    return losses, {**state.buffers, **state.non_persistent}, dict(state.params), state.extra_state


@settings(max_examples=25)
@given(BLOCKS, st.sets(st.integers(0, UPDATES - 1)))
def test_a_plain_loop_resumes_all_state_of_its_modules(blocks, cuts):
    assert same(run_live(blocks, cuts), run_live(blocks, ()))


@settings(max_examples=25)
@given(BLOCKS)
def test_both_loops_compute_the_same(blocks):
    functional, state = run_functional(blocks, (), donate=True)
    live, buffers, _, extra = run_live(blocks, ())
    torch.testing.assert_close(functional, live)
    torch.testing.assert_close({**state.buffers, **state.non_persistent}, buffers)
    assert same(state.extra_state, extra)


@settings(max_examples=25)
@given(BLOCKS, st.integers(0, UPDATES), st.booleans())
def test_an_earlier_state_gives_the_same_update_again(blocks, updates, donate):
    process = Functional(blocks, donate=donate)
    first = process.update(process.start)
    again = Functional(blocks, donate=donate)
    state = again.start
    for _ in range(updates):
        state, _ = again.update(state)
    assert same(again.update(again.start), first)
    saved = noether.lease(TrainState.from_module(make_model(blocks)))
    model = make_model(blocks)
    view = TrainState.from_module(model)
    model(batch(0))
    assert same(noether.lease(saved.into_module(model)).replace(opt_state={}), saved)
    assert same(noether.lease(view).buffers, saved.buffers)


def train_session(path, blocks, updates, *, framework=None):
    """Return the losses and the session of a loop, with noether's directory or with checkpoints of a framework."""
    model = make_model(blocks)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    with open_run(path) as directory:
        saves = [CheckpointCallback(every_n_updates=1)] if framework is None else []
        session = Session(saves, directory=directory, model=model, optimizer=optimizer, max_updates=updates)
        if framework:
            model.load_state_dict(framework["model"])
            optimizer.load_state_dict(framework["optimizer"])
            session.load_state_dict(framework["session"])
        for x in session.batches(list(map(batch, range(UPDATES)))):
            value = model(x).square().mean()
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            session.update(value)
            losses.append(float(value.detach()))
        saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "session": session.state_dict()}
    return losses, saved


@pytest.mark.parametrize("persistent", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_session_resumes_all_state_of_its_modules(tmp_path, kind, persistent):
    blocks = [(kind, persistent)]
    uncut, _ = train_session(tmp_path / "uncut", blocks, 4)
    before, _ = train_session(tmp_path / "cut", blocks, 2)
    after, _ = train_session(tmp_path / "cut", blocks, 4)
    assert [*before, *after] == uncut


@pytest.mark.parametrize("kind", [Lazy, Registering, Growing, Writing])
def test_the_memory_of_a_session_has_buffers_that_no_state_dict_has(tmp_path, kind):
    blocks = [(kind, False)]
    uncut, _ = train_session(tmp_path / "uncut", blocks, 4)
    before, saved = train_session(tmp_path / "first", blocks, 2, framework={})
    after, _ = train_session(tmp_path / "second", blocks, 4, framework=saved)
    assert [*before, *after] == uncut


def test_only_changed_buffers_are_saved_beside_the_weights():
    model = make_model([(Writing, False)])
    state = TrainState.from_module(model)
    model(batch(0))
    assert (sorted(state.buffers), sorted(state.non_persistent)) == ([], ["0.count", "0.table"])
    assert sorted(changed_buffers(state)) == sorted(on_disk(state).non_persistent) == ["0.count"]
    weights = checkpoint_files(SaveCheckpoint(optimizer=False), state)
    assert list(weights) == ["weights.safetensors"]
    assert sorted(load(b"".join(weights["weights.safetensors"]))) == sorted(model.state_dict())


class Table(nn.Module):
    """A buffer whose length is a setting."""

    def __init__(self, length, *, persistent):
        super().__init__()
        self.lin = nn.Linear(2, 1)
        self.register_buffer("table", torch.arange(float(length)), persistent=persistent)


def test_a_buffer_of_another_constructor_is_refused():
    saved = on_disk(TrainState.from_module(Table(8, persistent=True)))
    longer = Table(16, persistent=True)
    with pytest.raises(MismatchError, match=r"buffer 'table' has shape \(8,\) in the state and \(16,\) in the model"):
        saved.into_module(longer)
    with pytest.raises(CheckpointError, match=r"buffer 'table' has shape"):
        fit_weights(TrainState.from_module(longer), saved, longer)
    grown = make_model([(Growing, True)])
    grown(batch(0))
    other = nn.Sequential(Growing(), nn.Linear(2, 1))
    other[0].bank = torch.zeros(1, 2)
    with pytest.raises(MismatchError, match=r"buffer '0.bank' has shape"):
        on_disk(TrainState.from_module(grown)).into_module(other)


@pytest.mark.parametrize("length", [8, 16])
def test_a_checkpoint_of_an_earlier_version_has_non_persistent_buffers_among_the_others(length):
    saved = on_disk(TrainState.from_module(Table(8, persistent=True)))
    model = Table(length, persistent=False)
    with torch.no_grad():
        model.table += 1
    fitted = fit_weights(TrainState.from_module(model), saved, model)
    first = 0.0 if length == 8 else 1.0
    assert fitted.buffers == {}
    assert fitted.non_persistent["table"].tolist() == [first + index for index in range(length)]
    saved.into_module(model)
    assert model.table.tolist() == [first + index for index in range(length)]


class Making(nn.Module):
    """Makes a part at its first call, which no optimizer gets."""

    def __init__(self):
        super().__init__()
        self.lin, self.norm = nn.Linear(2, 1), None

    def forward(self, x):
        if self.norm is None:
            self.norm = nn.LayerNorm(2)
        return self.lin(self.norm(x))


def test_a_module_that_forward_makes_is_named():
    model = Making()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    session = Session([], interpreter=lambda *_: None, model=model, optimizer=optimizer, max_updates=3)

    def train():
        for x in session.batches(list(map(batch, range(UPDATES)))):
            value = model(x).square().mean()
            value.backward()
            optimizer.step()
            session.update(value)

    with pytest.warns(UserWarning, match=r"the first updates made norm \(LayerNorm\) in the model") as caught:
        train()
    assert sum("norm" in str(each.message) for each in caught) == 1


SAVED_DTYPES = sorted({each for each in vars(torch).values() if isinstance(each, torch.dtype)}, key=str)
SAVED_DTYPES = [each for each in SAVED_DTYPES if not re.match(r"torch\.(q|bits|u?int[1-7]$)", str(each))]


@pytest.mark.filterwarnings("ignore:ComplexHalf:UserWarning")
@pytest.mark.parametrize("dtype", SAVED_DTYPES, ids=str)
def test_every_dtype_of_dense_weights_is_saved_and_restored(dtype):
    values = torch.arange(16 * dtype.itemsize, dtype=torch.uint8).view(dtype).reshape(4, 4)
    if dtype is torch.bool:
        values = torch.tensor([[True, False], [False, True]])
    model, other = nn.Module(), nn.Module()
    model.register_buffer("x", values)
    other.register_buffer("x", torch.zeros_like(values))
    on_disk(TrainState.from_module(model)).into_module(other)
    assert same(other.x, values)


@pytest.mark.filterwarnings("ignore:ComplexHalf:UserWarning")
@pytest.mark.parametrize("dtype", [torch.complex128, torch.complex32], ids=str)
def test_complex_weights_load_in_plain_torch(dtype):
    values = torch.complex(torch.randn(2, 3), torch.randn(2, 3)).to(dtype)
    model = nn.Module()
    model.register_buffer("x", values)
    file = b"".join(checkpoint_files(SaveCheckpoint(), TrainState.from_module(model))["weights.safetensors"])
    assert same(torch.view_as_complex(load(file)["x"]), values)


class Sparse(nn.Module):
    def __init__(self, *, persistent: bool):
        super().__init__()
        self.lin = nn.Linear(2, 1)
        self.register_buffer("adjacency", torch.eye(4).to_sparse(), persistent=persistent)

    def forward(self, x):
        return self.lin(self.adjacency @ x)


SPARSE = """
class Sparse(nn.Module):
    def __init__(self, persistent: bool):
        super().__init__()
        self.lin = nn.Linear(2, 1)
        self.register_buffer("adjacency", torch.eye(4).to_sparse(), persistent=persistent)
    def forward(self, x):
        return self.lin(self.adjacency @ x)
"""


def test_weights_that_no_file_can_hold_are_refused_before_training(tmp_path, tiny_module):
    model = Sparse(persistent=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with (
        open_run(tmp_path / "run") as directory,
        pytest.raises(SessionError, match=r"torch.sparse_coo on cpu"),
    ):
        Session([], directory=directory, model=model, optimizer=optimizer, max_updates=1)
    Path("tiny.py").write_text(Path("tiny.py").read_text() + SPARSE)
    config = make_config(max_epochs=1)
    with pytest.raises(ConfigError, match=r"model.*adjacency .* register a constant with persistent=False"):
        noether.train(config | {"model": {"kind": "tiny.Sparse", "persistent": True}})
    assert not list(Path().rglob("metrics.jsonl"))
    run = noether.train(config | {"model": {"kind": "tiny.Sparse", "persistent": False}})
    assert run.finished


@pytest.mark.parametrize("kind", [Lazy, Registering, Growing, Converting, Writing])
@pytest.mark.parametrize("persistent", [True, False])
def test_a_new_run_starts_from_the_buffers_of_a_checkpoint(tmp_path, kind, persistent):
    _, saved = train_session(tmp_path, [(kind, persistent)], 2)
    model = make_model([(kind, persistent)])
    fresh = TrainState.from_module(model)
    state, _ = load_weights(fresh, InitSettings(path=str(tmp_path / "checkpoints/latest")), model)
    assert same({**state.params, **state.buffers}, dict(saved["model"]))
    assert same(dict(state.non_persistent), dict(fresh.non_persistent))
