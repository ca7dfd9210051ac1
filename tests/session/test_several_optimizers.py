"""Runs with several optimizers: each is saved under its name and resumed exactly; a warning names what none holds."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from noether import AfterUpdate, GradNormCallback, LrCallback, Session, TrainState, compose, dispatch, on, open_run
from noether.core.callbacks import CheckpointCallback, NanGuardCallback
from noether.core.errors import StateWarning
from noether.core.tensors.live.weights import MismatchError
from noether.session.errors import SessionError
from noether.testing import assert_same

BATCHES = [torch.randn(4, 2, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]


def make_gan():
    torch.manual_seed(0)
    return nn.ModuleDict({"g": nn.Linear(2, 2), "d": nn.Linear(2, 1)})


def make_optimizers(gan, **settings):
    adam = torch.optim.Adam(gan["g"].parameters(), lr=0.05)
    return {"g": adam, "d": torch.optim.SGD(gan["d"].parameters(), **{"lr": 0.1, "momentum": 0.9, **settings})}


def play(gan, optimizers, x, *, steps_g, d_steps=1):
    """Make one update: some steps of the discriminator, and one of the generator if it is its turn."""
    for name, sign in [("d", 1)] * d_steps + [("g", -1)] * steps_g:
        loss = sign * gan["d"](gan["g"](x)).tanh().mean()
        gan.zero_grad()
        loss.backward()
        optimizers[name].step()
    return {"game": loss.detach()}


@on(AfterUpdate)
def slow_down(state, event):
    """Halve the learning rates at the third update."""
    return (state.replace(hyperparams={"lr_scale": 0.5}) if state.iteration.update == 3 else state), ()


def train(path, updates, *, every, seen=None):
    """Train to a number of updates; the generator steps at every `every`-th."""
    gan = make_gan()
    optimizers = make_optimizers(gan)
    schedulers = {"g": torch.optim.lr_scheduler.StepLR(optimizers["g"], 2, 0.5)}
    callbacks = [
        slow_down,
        LrCallback(every_n_updates=1),
        GradNormCallback(every_n_updates=1),
    ]
    with open_run(path) as directory:

        def note(effects, state, event):
            directory.interpreter(effects, state, event)
            if seen is not None:
                logged = [each.values for each in effects if hasattr(each, "values")]
                seen[str(state.iteration), type(event).__name__] = [dict(values) for values in logged]

        parts = {"model": gan, "optimizer": optimizers, "scheduler": schedulers}
        session = Session(callbacks, directory=directory, interpreter=note, max_updates=updates, **parts)
        for x in session.batches(BATCHES):
            turn = session.state.iteration.update % every == 0
            losses = play(gan, optimizers, x, steps_g=int(turn), d_steps=2)
            if turn:
                schedulers["g"].step()
            session.update(losses)
    return gan.state_dict(), {name: each.state_dict() for name, each in optimizers.items()}, schedulers["g"].last_epoch


@settings(max_examples=8)
@given(cut=st.integers(1, 6), every=st.integers(1, 3))
def test_a_run_with_two_optimizers_that_is_cut_anywhere_equals_the_uncut_one(cut, every, tmp_path_factory):
    whole, parts = {}, {}
    path = tmp_path_factory.mktemp("runs")
    uncut = train(path / "uncut", 7, every=every, seen=whole)
    train(path / "cut", cut, every=every, seen=parts)
    assert_same(train(path / "cut", 7, every=every, seen=parts), uncut)
    updates = {key: values for key, values in whole.items() if key[1] == "AfterUpdate"}
    assert_same({key: parts[key] for key in updates}, updates)
    first, last = updates["E0_U1_S4", "AfterUpdate"], updates["E1_U7_S28", "AfterUpdate"]
    rates = {key: value for values in first for key, value in values.items() if key.startswith("optim/lr")}
    assert rates == {"optim/lr/g": 0.05, "optim/lr/d": 0.1}
    assert {key: value for values in last for key, value in values.items()}["optim/lr/d"] == 0.05


def test_the_norm_is_of_the_gradients_of_all_optimizers_that_stepped():
    gan, norms = make_gan(), []
    optimizers = make_optimizers(gan)
    read = GradNormCallback(every_n_updates=1)
    note = on(AfterUpdate)(lambda state, event: (norms.append(float(event.grad_norm)), (state, ()))[1])
    session = Session([read, note], interpreter=lambda *_: None, model=gan, optimizer=optimizers, max_updates=2)
    expected = []
    for index, x in enumerate(session.batches(BATCHES)):
        gan.zero_grad()
        gan["d"](gan["g"](x)).square().mean().backward()
        names = ["g", "d"][index:]
        expected.append(float(nn.utils.get_total_norm([p.grad for name in names for p in gan[name].parameters()])))
        for name in names:
            optimizers[name].step()
        session.update(torch.tensor(0.0))
    assert norms == pytest.approx(expected)


def test_groups_of_named_optimizers_have_the_optimizer_in_their_keys():
    gan, rates = make_gan(), []
    groups = [{"params": [gan["d"].weight], "name": "w", "lr": 0.1}, {"params": [gan["d"].bias], "lr": 0.2}]
    optimizers = {**make_optimizers(gan), "d": torch.optim.SGD(groups)}
    note = on(AfterUpdate)(lambda state, event: (rates.append(dict(event.lr)), (state, ()))[1])
    session = Session([note], interpreter=lambda *_: None, model=gan, optimizer=optimizers, max_updates=1)
    for x in session.batches(BATCHES):
        session.update(play(gan, optimizers, x, steps_g=1))
    assert rates == [{"g": 0.05, "d/w": 0.1, "d/1": 0.2}]


def test_an_update_without_a_step_of_any_optimizer_is_refused_or_skipped():
    gan, skipped = make_gan(), []
    optimizers = make_optimizers(gan)
    note = on(AfterUpdate)(lambda state, event: (skipped.append(event.skipped), (state, ()))[1])
    session = Session([note], interpreter=lambda *_: None, model=gan, optimizer=optimizers, max_updates=3)
    loop = session.batches(BATCHES)
    for parameter in gan.parameters():
        parameter.grad = torch.full_like(parameter, torch.inf)
    next(loop)
    session.update(torch.tensor(0.0))
    next(loop)
    optimizers["d"].step()
    session.update(torch.tensor(0.0))
    assert skipped == [True, False]
    gan["d"].weight.grad.zero_()
    for each in (gan["d"].bias, *gan["g"].parameters()):
        each.grad = None
    next(loop)
    with pytest.raises(SessionError, match="the optimizer made no step since the last update"):
        session.update(torch.tensor(0.0))


def test_a_plain_loop_saves_and_loads_each_optimizer_under_its_name(tmp_path):
    gan = make_gan()
    optimizers = make_optimizers(gan)
    state = TrainState.from_module(gan, optimizers)
    reducer = compose(CheckpointCallback(every_n_updates=1))
    with open_run(tmp_path) as run:
        for x in BATCHES:
            losses = {"total": play(gan, optimizers, x, steps_g=1)["game"]}
            state = dispatch(state.advance(samples=4), AfterUpdate(samples=4, losses=losses), reducer, run.interpreter)
    with open_run(tmp_path) as run:
        saved = run.load()
    assert list(saved.opt_state) == ["g", "d"]
    fresh = make_gan()
    again = make_optimizers(fresh, lr=7.0)
    resumed = TrainState.from_module(fresh, again, saved=saved)
    assert_same(fresh.state_dict(), gan.state_dict())
    for name, each in optimizers.items():
        assert_same(again[name].state_dict(), each.state_dict())
    halved = resumed.replace(hyperparams={"lr_scale": 0.5}).into_module(fresh, again)
    halved.into_module(fresh, again)
    assert [each.param_groups[0]["lr"] for each in again.values()] == [0.025, 0.05]
    for other, message in [
        (
            {"g": again["g"], "critic": again["d"]},
            "the memory of optimizers named 'g', 'd', and the run has .* 'critic'",
        ),
        (torch.optim.SGD(fresh.parameters(), lr=0.1), "'g', 'd', and the run has one optimizer without a name"),
    ]:
        with pytest.raises(MismatchError, match=message):
            TrainState.from_module(fresh, other, saved=saved)


def begin_session(model, optimizer):
    Session([], interpreter=lambda *_: None, model=model, optimizer=optimizer, max_updates=1).batches(BATCHES)


BEGIN = {"session": begin_session, "from_module": TrainState.from_module}


@pytest.mark.parametrize("begin", BEGIN.values(), ids=BEGIN)
def test_parameters_that_no_optimizer_holds_are_named_once(begin, recwarn):
    gan = make_gan()
    gan["g"].bias.requires_grad_(False)
    optimizer = make_optimizers(gan)["d"]
    with pytest.warns(StateWarning, match=r"^no optimizer holds 1 of the parameters .* \(g.weight\), .* freeze them"):
        begin(gan, optimizer)
    begin(gan, optimizer)
    begin(gan, make_optimizers(gan))
    assert not recwarn.list


@pytest.mark.parametrize("begin", BEGIN.values(), ids=BEGIN)
def test_a_parameter_in_two_optimizers_is_named(begin):
    gan = make_gan()
    shared = {"a": torch.optim.SGD(gan.parameters(), lr=0.1), "b": torch.optim.SGD(gan["d"].parameters(), lr=0.1)}
    with pytest.warns(StateWarning, match=r"2 parameters are in more than one optimizer \(d.weight, d.bias\)"):
        begin(gan, shared)


def foreign(**names):
    other = nn.Linear(3, 1)
    members = [*other.named_parameters()] if names else other.parameters()
    return torch.optim.SGD(members, lr=0.1)


@pytest.mark.parametrize(("make", "message"), [
    (lambda gan: {"g": make_optimizers(gan)["g"], "d": foreign()},
     r"2 parameters of the optimizer are not .* of the model \('d': number 0 of group 0, of shape \(1, 3\), 'd'"),
    (lambda gan: foreign(named=True), r"\(weight of shape \(1, 3\), bias of shape \(1,\)\): pass model="),
    (lambda gan: {"state": make_optimizers(gan)["g"]}, "'state' cannot name an optimizer"),
    (lambda gan: {"": make_optimizers(gan)["g"], "d": make_optimizers(gan)["d"]}, "'' cannot name an optimizer"),
    (lambda gan: {"g/a": make_optimizers(gan)["g"]}, "'g/a' cannot name an optimizer"),
    (lambda gan: {"g": 3}, "takes an optimizer of torch.optim( as 'g')?, got int"),
    (lambda gan: dict.fromkeys("gd", make_optimizers(gan)["g"]), "has one optimizer under two names"),
    (lambda gan: {}, "is an empty mapping: pass None"),
], ids=["foreign", "foreign-names", "reserved", "no-name", "slash", "int", "twice", "empty"])  # fmt: skip
@pytest.mark.parametrize(("begin", "error"), [(begin_session, SessionError), (TrainState.from_module, MismatchError)])
def test_optimizers_that_do_not_fit_are_refused(begin, error, make, message):
    gan = make_gan()
    with pytest.raises(error, match=message):
        begin(gan, make(gan))


def test_schedulers_by_name_have_to_be_those_of_the_optimizers(tmp_path):
    gan = make_gan()
    optimizers = make_optimizers(gan)
    other = torch.optim.lr_scheduler.StepLR(foreign(), 2)
    parts = {"interpreter": lambda *_: None, "model": gan, "optimizer": optimizers}
    with pytest.raises(SessionError, match="the scheduler changes another optimizer"):
        Session([], scheduler={"g": other}, **parts)
    with pytest.raises(SessionError, match=r"takes several optimizers by name|several by name, as in"):
        Session([], **{**parts, "optimizer": list(optimizers.values())})
    known = torch.optim.lr_scheduler.StepLR(optimizers["g"], 2)
    torch.optim.lr_scheduler.StepLR(optimizers["d"], 2)
    with open_run(tmp_path) as directory, pytest.raises(SessionError, match="pass scheduler= to the session"):
        Session([], scheduler={"g": known}, directory=directory, **parts).batches(BATCHES)


def test_a_rollback_restores_the_memory_of_each_optimizer():
    gan, snapshots = make_gan(), []
    optimizers = make_optimizers(gan)
    guard = NanGuardCallback(action="rollback", every_n_updates=1, tolerance=1)
    session = Session([guard], interpreter=lambda *_: None, model=gan, optimizer=optimizers, max_updates=3)
    for x in session.batches(BATCHES):
        losses = play(gan, optimizers, x, steps_g=1)
        snapshots.append({name: copy.deepcopy(each.state_dict()["state"]) for name, each in optimizers.items()})
        if session.state.iteration.update == 1:
            gan["g"].weight.data.fill_(torch.nan)
            losses = {"game": torch.tensor(torch.nan)}
        session.update(losses)
        if session.state.iteration.update == 2:
            assert_same({name: each.state_dict()["state"] for name, each in optimizers.items()}, snapshots[0])
            assert gan["g"].weight.isfinite().all()
