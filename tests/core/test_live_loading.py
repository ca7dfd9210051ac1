"""A saved state is loaded into a live model and optimizer whole, or not at all, whatever wraps the modules."""

import copy
import io
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console as RichConsole
from torch import nn

from noether import Run, SaveCheckpoint, Session, TrainState, forward, open_run
from noether.core.errors import NoetherError, StateWarning
from noether.core.event import AfterTraining
from noether.core.tensors.live.extra_state import ExtraStateError
from noether.core.tensors.live.optimizer import write_optimizer
from noether.core.tensors.live.weights import MismatchError, match_names, write_weights
from noether.core.tensors.module import named_modules, named_parameters, without_wrappers
from noether.core.tensors.tree import FrozenDict, map_leaves, unpack
from noether.effects import Console
from noether.testing import same
from noether.training.step.optimizer import FunctionalOptimizer
from noether.training.step.step import Step
from noether.training.weights import fit_weights


def make(outputs=1, dtype=torch.float32, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, outputs)).to(dtype)
    return model, torch.optim.Adam(model.parameters(), lr=0.1)


def train(model, optimizer, updates=2):
    dtype = next(model.parameters()).dtype
    for update in range(updates):
        optimizer.zero_grad()
        model(torch.sin(torch.arange(8.0, dtype=dtype) * (update + 1)).view(4, 2)).square().mean().backward()
        optimizer.step()
    return TrainState.from_module(model, optimizer)


def on_disk(state):
    names = ("params", "buffers", "extra_state", "opt_state")
    return state.replace(**{name: map_leaves(copy.deepcopy, getattr(state, name)) for name in names})


def contents(model, optimizer):
    return copy.deepcopy((dict(model.state_dict()), optimizer.state_dict()))


REFUSED = {
    "shape": (lambda: make(10), [r"'2.weight' has shape \(1, 3\) in the state and \(10, 3\)", r"'2.bias' has shape"]),
    "dtype": (lambda: make(dtype=torch.float64), [r"'0.weight' is torch.float32 in the state and .*float64 in the mod",
                                                  r"model.to\(torch.float32\)", r"buffer '1.running_mean' is"]),
    "groups": (lambda: regroup([[0, 1], [2, 3, 4, 5]]), ["the state has 1 parameter groups, and the optimizer 2"]),
    "size": (lambda: regroup([[0, 1, 2]]), [r"group 0 has 6 parameters in the state .* and 3 in the optimizer"]),
    "order": (lambda: regroup([[5, 4, 3, 2, 1, 0]]), [r"group 0 has 6 parameters"]),
    "module": (lambda: with_optimizer(nn.Linear(2, 3)), [r"'0.weight' is not in the model", "and 8 more"]),
}  # fmt: skip


def regroup(groups):
    model, _ = make()
    parameters = list(model.parameters())
    return model, torch.optim.Adam([{"params": [parameters[index] for index in group]} for group in groups])


def with_optimizer(model):
    return model, torch.optim.Adam(model.parameters())


@pytest.mark.parametrize(("build", "messages"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("load", ["from_module", "session"])
def test_a_state_that_does_not_fit_is_refused_as_a_whole(build, messages, load):
    saved = on_disk(train(*make(seed=1)))
    model, optimizer = build()
    before = contents(model, optimizer)
    session = Session([], interpreter=lambda *_: None, model=model, optimizer=optimizer, max_updates=9)
    load_into = session.load if load == "session" else lambda saved: saved.into_module(model, optimizer)
    with pytest.raises(MismatchError) as refused:
        load_into(saved)
    assert isinstance(refused.value, KeyError)
    assert isinstance(refused.value, ValueError)
    assert isinstance(refused.value, NoetherError)
    for message in messages:
        assert refused.match(message)
    assert same(contents(model, optimizer), before)


SHAPES = st.lists(st.integers(1, 3), min_size=1, max_size=3).map(tuple)
DTYPES = st.sampled_from([torch.float32, torch.float64, torch.float16])


class One(nn.Module):
    def __init__(self, shape, dtype, as_buffer):
        super().__init__()
        if as_buffer:
            self.register_buffer("x", torch.zeros(shape, dtype=dtype))
        else:
            self.x = nn.Parameter(torch.zeros(shape, dtype=dtype))


@given(SHAPES, SHAPES, DTYPES, DTYPES, st.booleans())
def test_only_equal_shapes_and_dtypes_are_written(ours, theirs, our_dtype, their_dtype, as_buffer):
    model, saved = One(ours, our_dtype, as_buffer), One(theirs, their_dtype, as_buffer)
    with torch.no_grad():
        saved.x += 1
    state = on_disk(TrainState.from_module(saved))
    if (ours, our_dtype) == (theirs, their_dtype):
        write_weights(model, state.params, state.buffers)
        assert same(dict(model.state_dict()), dict(saved.state_dict()))
    else:
        with pytest.raises(MismatchError, match="'x'"):
            write_weights(model, state.params, state.buffers)
        assert not model.x.any()


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq"])
def test_memory_of_another_shape_is_refused(key):
    model, optimizer = make()
    saved = on_disk(train(model, optimizer))
    memory = saved.opt_state["state"]["0.weight"]
    wrong = {**saved.opt_state["state"], "0.weight": {**memory, key: torch.zeros(1, 2)}}
    opt_state = FrozenDict({**saved.opt_state, "state": wrong})
    other, fresh = make()
    before = contents(other, fresh)
    with pytest.raises(MismatchError, match=rf"{key} of '0.weight' has shape \(1, 2\) .* the parameter has \(3, 2\)"):
        write_optimizer(opt_state, other, fresh, lr_scale=1.0)
    assert same(contents(other, fresh), before)


def test_a_checkpoint_without_members_of_groups_loads():
    """Earlier versions did not save them."""
    model, optimizer = make()
    saved = on_disk(train(model, optimizer))
    groups = tuple({k: v for k, v in group.items() if k != "params"} for group in saved.opt_state["groups"])
    saved = saved.replace(opt_state={**saved.opt_state, "groups": groups})
    other, fresh = make(seed=3)
    saved.into_module(other, fresh)
    assert same(contents(other, fresh), contents(model, optimizer))


def test_an_optimizer_that_was_made_before_a_load_is_refused():
    saved = on_disk(train(*make()))
    model, optimizer = make()
    model.load_state_dict(dict(model.state_dict()), assign=True)
    with pytest.raises(MismatchError, match=r"the optimizer does not hold '0.weight', .* make the optimizer after"):
        saved.into_module(model, optimizer)


def test_params_that_trade_places_or_are_turned_are_written_as_they_were():
    """They are views of what is written to."""
    model = nn.ParameterDict({"a": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "b": torch.eye(2)})
    state = TrainState.from_module(model)
    a, b = model["a"].detach().clone(), model["b"].detach().clone()
    state.replace(params={"a": state.params["b"], "b": state.params["a"].T}).into_module(model)
    assert torch.equal(model["a"], b)
    assert torch.equal(model["b"], a.T)


def test_a_buffer_that_is_none_is_set_by_a_load():
    saved, model = (nn.Module(), nn.Module())
    for each in (saved, model):
        each.register_buffer("late", None)
    saved.late = torch.ones(2)
    on_disk(TrainState.from_module(saved)).into_module(model)
    assert torch.equal(model.late, torch.ones(2))
    assert list(dict(model.named_buffers())) == ["late"]


# ------------------------------------------------------------------------------------------------ names of wrappers


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


class Body(nn.Module):
    """A module of the user's with a child that is named as the wrapped module of DDP."""

    def __init__(self, wrap):
        super().__init__()
        self.module, self.tail = wrap(nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2), wrap(nn.BatchNorm1d(2)))

    def forward(self, x):
        return self.tail(self.module(x))


def compiled(module):
    return torch.compile(module, backend="eager")


WRAPS = {
    "none": lambda module: module,
    "compiled": compiled,
    "data parallel": nn.DataParallel,
    "both": lambda module: compiled(nn.DataParallel(compiled(module))),
}
NAMES = ["module.weight", "module.bias", "tail.0.weight", "tail.0.bias", "tail.1.weight", "tail.1.bias"]


@pytest.mark.parametrize("first", WRAPS.values(), ids=WRAPS)
@pytest.mark.parametrize("second", WRAPS.values(), ids=WRAPS)
def test_a_run_resumes_with_other_wrappers(first, second):
    torch.manual_seed(0)
    model, optimizer = with_optimizer(first(Body(first)))
    state = train(model, optimizer)
    assert list(state.params) == list(state.opt_state["state"]) == NAMES
    assert list(state.opt_state["groups"][0]["params"]) == NAMES
    other, fresh = with_optimizer(second(Body(second)))
    on_disk(state).into_module(other, fresh)
    assert same(list(other.state_dict().values()), list(model.state_dict().values()))
    assert same(fresh.state_dict(), optimizer.state_dict())


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
def test_a_checkpoint_whose_names_have_wrappers_resumes(prefix):
    """As earlier versions saved those of `torch.compile` and DDP."""
    model, optimizer = make()
    state = on_disk(train(model, optimizer))

    def add_prefix(tree):
        return {f"{prefix}{name}": value for name, value in tree.items()}

    groups = tuple({k: v for k, v in group.items() if k != "params"} for group in state.opt_state["groups"])
    opt_state = {"state": add_prefix(state.opt_state["state"]), "groups": groups}
    saved = state.replace(params=add_prefix(state.params), buffers=add_prefix(state.buffers), opt_state=opt_state)
    other, fresh = make(seed=3)
    saved.into_module(other, fresh)
    assert same(contents(other, fresh), contents(model, optimizer))
    fitted = fit_weights(on_disk(TrainState.from_module(other)), saved, other)
    assert same((dict(fitted.params), dict(fitted.buffers)), (dict(state.params), dict(state.buffers)))
    assert fitted.opt_state["state"].keys() == state.opt_state["state"].keys()


@pytest.mark.usefixtures("process_group")
def test_names_of_distributed_data_parallel():
    model, _ = make()
    wrapped = nn.parallel.DistributedDataParallel(model)
    assert list(named_parameters(wrapped)) == list(dict(model.named_parameters()))


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
def test_states_with_wrapped_modules_are_evaluated_and_trained(wrap):
    torch.manual_seed(0)
    plain = Body(lambda module: module)
    torch.manual_seed(0)
    model = Body(wrap) if wrap is nn.DataParallel else wrap(Body(wrap))  # torch calls no bare one with other weights
    x = torch.ones(3, 2)

    def loss(outputs, batch):
        return {"mse": (outputs - batch).square().mean()}

    def step_of(module, *, donate):
        sgd = FunctionalOptimizer(torch.optim.SGD, {"lr": 0.1, "momentum": 0.9})
        return Step(model=module, loss=loss, optimizer=sgd, lr={"default": lambda position: 0.1}, donate=donate)

    for donate in (False, True):
        results = []
        for module in (plain, model):
            state = on_disk(TrainState.from_module(module))
            for _ in range(3):
                state, _ = step_of(module, donate=donate)(state, [x + torch.arange(6.0).view(3, 2)])
            evaluated = forward(module, loss)(state, x)[1]
            results.append((dict(state.params), dict(state.buffers), evaluated))
        assert same(*results)


PARTS = st.sampled_from(["module", "_orig_mod", "a", "b", "weight", "_fsdp_wrapped_module"])
PATHS = st.lists(PARTS, min_size=1, max_size=4).map(".".join)


@given(st.sets(PATHS, max_size=6), st.lists(st.sampled_from(["module", "_orig_mod"]), max_size=2))
def test_matched_names_are_unique_and_complete(names, prefix):
    saved = {".".join([*prefix, name]): name for name in names}
    matched = match_names(saved, names)
    assert sorted(matched.values()) == sorted(names)
    assert match_names({name: name for name in names}, names) == {name: name for name in names}
    if len({without_wrappers(name) for name in names}) == len(names) and not saved.keys() & names:
        assert matched == {name: name for name in names}


def test_paths_of_modules_are_those_of_torch_without_wrappers():
    model, _ = make()
    assert named_modules(model) == list(model.named_modules())


# ------------------------------------------------------------------------------------------------ extra state


class Counting(nn.Module):
    """Counts its calls, which change its outputs, in Python and in a tensor."""

    def __init__(self, extra=None):
        super().__init__()
        self.linear, self.calls, self.extra = nn.Linear(2, 2), 0, extra

    def get_extra_state(self):
        return {"calls": self.calls, "more": self.extra, "sum": torch.full((2,), float(self.calls))}

    def set_extra_state(self, state):
        assert state["sum"].tolist() == [state["calls"]] * 2
        self.calls, self.extra = state["calls"], state["more"]

    def forward(self, x):
        self.calls += 1
        return self.linear(x) * (1 + self.calls)


def counting(extra=None):
    torch.manual_seed(0)
    model = nn.Sequential(Counting(extra), nn.Linear(2, 1))
    return model, torch.optim.SGD(model.parameters(), lr=0.01)


def save(directory, state, **settings):
    state = state.advance(samples=1)
    with open_run(directory, Console(RichConsole(file=io.StringIO()))) as run:
        run.interpreter([SaveCheckpoint(**settings)], state, AfterTraining(run=Run()))
        return run.checkpoints.load(run.checkpoints.find(str(state.iteration)))


EXTRA = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3)
    | st.lists(st.floats(width=32, allow_nan=False), max_size=3).map(torch.tensor),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2)
    | st.lists(inner, max_size=2).map(tuple),
    max_leaves=6,
)  # fmt: skip


@given(EXTRA)
def test_extra_state_returns_from_a_checkpoint(tmp_path_factory, extra):
    model, optimizer = counting(extra)
    train(model, optimizer)
    saved = save(tmp_path_factory.mktemp("run"), TrainState.from_module(model, optimizer))
    other, fresh = counting("other")
    saved.into_module(other, fresh)
    assert other[0].calls == 2
    assert same(other[0].extra, unpack({"x": other[0].extra})["x"])
    assert same(dict(TrainState.from_module(other).extra_state), dict(TrainState.from_module(model).extra_state))


def test_an_asynchronous_save_has_the_extra_state_of_its_moment(tmp_path):
    model, optimizer = counting()
    with open_run(tmp_path, Console(RichConsole(file=io.StringIO())), asynchronous=True) as run:
        state = TrainState.from_module(model, optimizer)
        for _ in range(3):
            train(model, optimizer, 1)
            state = state.advance(samples=1)
            run.interpreter([SaveCheckpoint()], state, AfterTraining(run=Run()))
    tags = [run.checkpoints.load(manifest).extra_state["0"]["calls"] for manifest in run.checkpoints.manifests()]
    assert tags == [1, 2, 3]


def test_extra_state_belongs_to_the_weights_of_its_sub_module(tmp_path):
    model, _ = counting()
    model[0].calls = 5
    state = TrainState.from_module(model)
    assert save(tmp_path / "a", state, optimizer=False).extra_state["0"]["calls"] == 5
    assert save(tmp_path / "b", state, optimizer=False, models=("1",)).extra_state == {}
    assert save(tmp_path / "c", state, optimizer=False, models=("0",)).extra_state["0"]["calls"] == 5


@pytest.mark.parametrize("value", [{1, 2}, b"bytes", {1: 2}, [object()]], ids=["set", "bytes", "int key", "object"])
def test_extra_state_that_cannot_be_saved_is_refused_at_the_start(value):
    model, optimizer = counting(value)
    with pytest.raises(ExtraStateError, match=r"get_extra_state of '0' \(Counting\) returns .* it.more"):
        TrainState.from_module(model, optimizer)
    with pytest.raises(ExtraStateError, match=r"'0' \(Counting\)"):
        Session([], interpreter=lambda *_: None, model=model, optimizer=optimizer, max_updates=1)


class OneWay(nn.Linear):
    """Returns extra state, and cannot take it back."""

    def get_extra_state(self):
        return 1


class Strict(OneWay):
    """Takes only extra state of version 2."""

    def set_extra_state(self, state):
        raise ValueError("version 2 only")


def test_a_module_that_cannot_take_its_extra_state_back_is_refused_at_the_start():
    model = nn.Sequential(OneWay(2, 1))
    message = r"^'0' \(OneWay\) defines get_extra_state without set_extra_state, .*: define both$"
    with pytest.raises(ExtraStateError, match=message):
        TrainState.from_module(model)
    with pytest.raises(ExtraStateError, match=message):
        Session([], interpreter=lambda *_: None, model=model, max_updates=1)


def test_a_module_that_does_not_accept_its_extra_state_is_named():
    saved = TrainState.from_module(nn.Sequential(Strict(2, 1))).advance(samples=1)
    with pytest.raises(ExtraStateError, match=r"^set_extra_state of '0' \(Strict\) raised ValueError: version 2"):
        saved.into_module(nn.Sequential(Strict(2, 1)))


def test_a_checkpoint_without_extra_state_loads_with_one_warning():
    model, optimizer = counting()
    saved = on_disk(train(model, optimizer)).replace(extra_state={})
    other, fresh = counting()
    other[0].calls = 7
    with pytest.warns(StateWarning, match=r"no extra state of '0' \(Counting\)") as told:
        saved.into_module(other, fresh)
    assert len(told) == 1
    assert other[0].calls == 7
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TrainState.from_module(other, fresh).into_module(other, fresh)


def test_extra_state_of_another_model_is_refused():
    model, optimizer = counting()
    saved = on_disk(TrainState.from_module(model, optimizer))
    saved = saved.replace(extra_state={**saved.extra_state, "1": {"calls": 1}})
    with pytest.raises(MismatchError, match="extra state of '1' is in the state"):
        saved.into_module(*counting())


@pytest.mark.parametrize("donate", [False, True])
def test_the_functional_step_carries_extra_state(donate):
    """Two states that are trained in turns, through one model, equal states that are trained alone."""

    def loss(outputs, batch):
        return {"mse": outputs.square().mean()}

    def make_step():
        model, _ = counting()
        sgd = FunctionalOptimizer(torch.optim.SGD, {"lr": 0.1, "momentum": 0.9})
        return Step(model=model, loss=loss, optimizer=sgd, lr={"default": lambda position: 0.01}, donate=donate)

    def run(updates):
        step = make_step()
        state = on_disk(TrainState.from_module(step.model))
        for update in range(updates):
            state, _ = step(state, [torch.full((2, 2), update + 1.0)] * 2)
        return step, state

    alone = run(4)[1]
    assert alone.extra_state["0"]["calls"] == 8
    _, state = run(2)
    fresh = make_step()
    assert forward(fresh.model, loss)(state, torch.ones(2, 2))[1].shape == (2, 1)
    assert fresh.model[0].calls == 0  # an evaluation leaves the model as it was
    for update in (2, 3):
        state, _ = fresh(state, [torch.full((2, 2), update + 1.0)] * 2)
    assert same((dict(alone.params), dict(alone.extra_state)), (dict(state.params), dict(state.extra_state)))


def test_a_session_resumes_extra_state(tmp_path):
    def go(path, updates):
        model, optimizer = counting()
        with open_run(path, Console(RichConsole(file=io.StringIO()))) as run:
            session = Session([], directory=run, model=model, optimizer=optimizer, max_updates=updates)
            for batch in session.batches([torch.ones(2, 2), torch.zeros(2, 2)]):
                loss = model(batch).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                session.update(loss)
        return model

    uncut = go(tmp_path / "uncut", 6)
    go(tmp_path / "cut", 3)
    resumed = go(tmp_path / "cut", 6)
    assert resumed[0].calls == uncut[0].calls == 6
    assert same(dict(resumed.state_dict()), dict(uncut.state_dict()))
