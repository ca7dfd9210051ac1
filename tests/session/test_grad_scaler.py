"""A loop with a `GradScaler`: its scale is saved and resumed, and an update that it leaves out counts as skipped."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from noether import AfterUpdate, GradNormCallback, Session, TrainState, compose, dispatch, on, open_run
from noether.core.callbacks import CheckpointCallback, NanGuardCallback
from noether.session.errors import SessionError
from noether.session.loader import ResumeWarning
from noether.session.scaler import ScalerMemory
from noether.testing import assert_same

BATCHES = [torch.randn(4, 2, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "fused": lambda parameters: torch.optim.Adam(parameters, lr=0.1, fused=True),
}


def make_scaler(scale=2.0**22, **more):
    return torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=2, **more)


def train(path, updates, *, kind="sgd", clip=False, scaler=None, zero=False, seen=None):
    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    optimizer = OPTIMIZERS[kind](model.parameters())
    scaler = make_scaler() if scaler is None else scaler
    seen = [] if seen is None else seen

    @on(AfterUpdate)
    def note(state, event):
        norm = None if event.skipped else float(event.grad_norm)
        seen.append((state.iteration.update, event.skipped, norm))
        return state, ()

    callbacks = [GradNormCallback(every_n_updates=1), NanGuardCallback(every_n_updates=1, tolerance=1), note]
    with open_run(path) as directory:
        parts = {"model": model, "optimizer": optimizer, "scaler": scaler}
        session = Session(callbacks, directory=directory, max_updates=updates, **parts)
        for x in session.batches(BATCHES):
            with torch.autocast("cpu", dtype=torch.float16):
                loss = model(x).float().square().mean()
            scaler.scale(loss).backward()
            if clip:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 1e3)
            scaler.step(optimizer)
            scaler.update()
            if zero:
                optimizer.zero_grad()
            session.update(loss)
            optimizer.zero_grad()
    return model.state_dict(), optimizer.state_dict(), scaler.state_dict(), session.state.metrics


@settings(max_examples=8)
@given(cut=st.integers(1, 9), kind=st.sampled_from(list(OPTIMIZERS)), clip=st.booleans(), zero=st.booleans())
def test_a_run_with_a_scaler_that_is_cut_anywhere_equals_the_uncut_one(cut, kind, clip, zero, tmp_path_factory):
    path, whole, parts = tmp_path_factory.mktemp("runs"), [], []
    uncut = train(path / "uncut", 10, kind=kind, clip=clip, zero=zero, seen=whole)
    train(path / "cut", cut, kind=kind, clip=clip, zero=zero, seen=parts)
    assert_same(train(path / "cut", 10, kind=kind, clip=clip, zero=zero, scaler=make_scaler(3.0), seen=parts), uncut)
    assert_same(parts, whole)
    skipped = [each for _, each, _ in whole]
    assert skipped[0]
    assert len(skipped) == 10  # the guard does not stop at an overflow
    assert not all(skipped)
    assert uncut[2]["scale"] < 2.0**22
    assert all(norm < 100 for _, _, norm in whole if norm is not None)  # unscaled


def test_a_scaler_that_is_updated_after_the_update_is_refused():
    model, scaler = nn.Linear(2, 1), make_scaler(1.0)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    parts = {"model": model, "optimizer": sgd, "scaler": scaler, "interpreter": lambda *_: None}
    session = Session([], max_updates=9, **parts)
    loop = session.batches(BATCHES)
    loss = model(next(loop)).square().mean()
    scaler.scale(loss).backward()
    scaler.step(sgd)
    session.update(loss)
    scaler.update()
    with pytest.raises(SessionError, match=r"the scaler was updated after .* call scaler.update\(\) before it"):
        next(loop)


@pytest.mark.parametrize(("saved", "now"), [("enabled", "disabled"), ("disabled", "enabled")])
def test_a_scaler_that_was_enabled_has_to_be(saved, now, tmp_path):
    train(tmp_path, 2, scaler=make_scaler(1.0, enabled=saved == "enabled"))
    with pytest.raises(SessionError, match=f"was {saved} in the saved run, and is {now}: make it with enabled="):
        train(tmp_path, 3, scaler=make_scaler(1.0, enabled=now == "enabled"))


def begin(path, model, **parts):
    with open_run(path) as directory:
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        session = Session([], directory=directory, model=model, optimizer=sgd, max_updates=2, **parts)
        for x in session.batches(BATCHES[:1]):
            loss = model(x).square().mean()
            loss.backward()
            sgd.step()
            session.update(loss)
            break


def test_a_scale_that_the_saved_run_does_not_have_is_named(tmp_path):
    begin(tmp_path, nn.Linear(2, 1))
    with pytest.warns(ResumeWarning, match=r"E0_U1_S4 has no scale of a gradient scaler, so it begins again at 4.0"):
        begin(tmp_path, nn.Linear(2, 1), scaler=make_scaler(4.0))


def test_something_else_than_a_scaler_is_refused():
    with pytest.raises(SessionError, match=r"scaler= takes a torch.amp.GradScaler, got int"):
        Session([], interpreter=lambda *_: None, model=nn.Linear(2, 1), scaler=3)


def test_a_plain_loop_keeps_the_scale_with_a_member_of_its_reducer(tmp_path):
    def train(path, updates):
        torch.manual_seed(0)
        model, scaler = nn.Linear(2, 1), make_scaler()
        sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        memory = ScalerMemory(scaler)
        reducer = compose(memory, CheckpointCallback(every_n_updates=updates))
        with open_run(path) as directory:
            state = TrainState.from_module(model, sgd, saved=directory.load())
            if state.iteration.update:
                memory.restore(state)
            while (at := state.iteration.update) < updates:
                sgd.zero_grad()
                loss = model(BATCHES[at % 3]).square().mean()
                scaler.scale(loss).backward()
                before = scaler.get_scale()
                scaler.step(sgd)
                scaler.update()
                event = AfterUpdate(samples=4, losses={"total": loss.detach()}, skipped=scaler.get_scale() < before)
                state = dispatch(state.advance(samples=4), event, reducer, directory.interpreter)
        return model.state_dict(), sgd.state_dict(), scaler.state_dict()

    uncut = train(tmp_path / "uncut", 5)
    train(tmp_path / "cut", 2)
    assert_same(train(tmp_path / "cut", 5), uncut)
