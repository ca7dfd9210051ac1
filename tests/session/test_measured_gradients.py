"""The gradients in events of a `Session`: those of the step, or as the loop measured them before clipping."""

import pytest
import torch
from torch import nn

import noether
from noether import AfterUpdate, Session
from noether.core.tensors.tree import clone_tensors
from noether.session.errors import SessionError
from noether.testing import same

BATCHES = [torch.randn(4, 2, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]


def hear(heard):
    @noether.callback("hear", readings=("gradients", "grad_norm"))
    def note(state, event):
        if isinstance(event, AfterUpdate):
            heard.append((event, None if event.gradients is None else clone_tensors(dict(event.gradients))))
        return state, ()

    return note


def make(optimizer_of, heard, **parts):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    optimizer = optimizer_of(model)
    arguments = {"model": model, "optimizer": optimizer, "interpreter": lambda *_: None, "max_updates": 3, **parts}
    return model, optimizer, Session(hear(heard), **arguments)


def gradients_of(model, factor=1.0):
    return {name: each.grad.clone() * factor for name, each in model.named_parameters() if each.grad is not None}


def sgd(model, **settings):
    return torch.optim.SGD(model.parameters(), lr=0.1, **settings)


@pytest.mark.parametrize("early", [False, True], ids=["at-the-step", "before-clipping"])
def test_an_update_has_copies_of_the_gradients_of_the_step_or_as_the_loop_measured_them(early):
    heard, expected = [], []
    model, optimizer, session = make(lambda model: sgd(model, momentum=0.9, nesterov=True), heard)
    for batch in session.batches(BATCHES):
        loss = model(batch).square().mean()
        optimizer.zero_grad(set_to_none=False)  # in place
        loss.backward()
        if early:
            expected.append(gradients_of(model))
            session.measure_gradients()
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        if not early:
            expected.append(gradients_of(model))
        optimizer.step()
        session.update(loss)
    for (event, copies), grads in zip(heard, expected, strict=True):
        assert same(copies, grads)
        assert same(dict(event.gradients), copies)  # later updates did not change them
        torch.testing.assert_close(event.grad_norm, nn.utils.get_total_norm(list(grads.values())))


def test_an_update_has_the_gradients_of_each_optimizer_that_stepped():
    heard, steps = [], [("0",), ("0", "1"), ("1",)]
    model, optimizers, session = make(
        lambda model: {str(index): torch.optim.SGD(model[index].parameters(), lr=0.1) for index in range(2)}, heard
    )
    for stepping, batch in zip(steps, session.batches(BATCHES), strict=True):
        model.zero_grad()
        loss = model(batch).square().mean()
        loss.backward()
        for name in stepping:
            optimizers[name].step()
        session.update(loss)
    for names, (_, copies) in zip(steps, heard, strict=True):
        assert copies.keys() == {f"{name}.{part}" for name in names for part in ("weight", "bias")}


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_gradients_are_unscaled_and_a_step_that_a_scaler_leaves_out_has_none(fused, early):
    heard, expected = [], []
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    model, optimizer, session = make(
        lambda model: torch.optim.Adam(model.parameters(), fused=fused), heard, scaler=scaler
    )
    for index, batch in enumerate(session.batches(BATCHES)):
        optimizer.zero_grad()
        loss = model(batch).square().mean() * (torch.inf if index == 1 else 1.0)
        scaler.scale(loss).backward()
        expected.append(None if index == 1 else gradients_of(model, 1 / scaler.get_scale()))
        if early:
            session.measure_gradients(scale=scaler.get_scale())
        scaler.step(optimizer)
        scaler.update()
        session.update(loss)
    for (event, copies), grads in zip(heard, expected, strict=True):
        assert event.skipped == (grads is None)
        assert (copies is None) == (grads is None)
        if grads is not None:
            torch.testing.assert_close(copies, grads)


def test_gradients_that_no_callback_reads_are_not_copied():
    model = nn.Linear(2, 1)
    seen = []
    note = noether.on(AfterUpdate)(lambda state, event: (seen.append(event.gradients), (state, ()))[1])
    optimizer = sgd(model)
    session = Session(note, interpreter=lambda *_: None, model=model, optimizer=optimizer, max_updates=1)
    for batch in session.batches(BATCHES):
        loss = model(batch).mean()
        loss.backward()
        session.measure_gradients()
        optimizer.step()
        session.update(loss)
    assert seen == [None]


def test_a_loop_without_an_optimizer_is_refused_at_the_start():
    with pytest.raises(SessionError, match=r"hear reads grad.*, which this loop does not measure: pass optimizer="):
        Session(hear([]), interpreter=lambda *_: None, model=nn.Linear(2, 1), max_updates=1)
    session = Session([], interpreter=lambda *_: None, model=nn.Linear(2, 1), max_updates=1)
    with pytest.raises(SessionError, match=r"no optimizer whose gradients it can read: pass optimizer="):
        session.measure_gradients()


def test_a_run_cut_in_an_event_dispatches_it_again_with_the_gradients(tmp_path):
    heard = []

    def fail(state, event):
        if isinstance(event, AfterUpdate) and state.iteration.update == 2 and len(heard) == 2:
            raise KeyboardInterrupt
        return state, ()

    for _ in range(2):
        torch.manual_seed(0)
        model = nn.Linear(2, 1)
        optimizer = sgd(model)
        with noether.open_run(tmp_path / "run") as directory:
            session = Session([hear(heard), fail], directory=directory, model=model, optimizer=optimizer, max_updates=3)
            try:
                for batch in session.batches(BATCHES):
                    optimizer.zero_grad()
                    loss = model(batch).square().mean()
                    loss.backward()
                    optimizer.step()
                    session.update(loss)
            except KeyboardInterrupt:
                continue
    assert len(heard) == 4
    assert same(heard[1][1], heard[2][1])
