"""A Session applies the decisions of callbacks to a plain loop: learning rates, stops, rollbacks, skipped steps."""

import math

import pytest
import torch
from torch import nn

import noether
from noether import AfterUpdate, Run, Session, on
from noether.testing import assert_same


def ignore(effects, state, event):
    pass


def halve_at(update):
    @on(AfterUpdate)
    def halve(state, event):
        if state.iteration.update != update:
            return state, ()
        return state.replace(hyperparams={**state.hyperparams, "lr_scale": 0.5}), ()

    return halve


def hear(heard):
    @on(AfterUpdate)
    def callback(state, event):
        heard.append(event)
        return state, ()

    return callback


BATCHES = [torch.ones(4, 2), torch.ones(4, 2), torch.ones(3, 2)]


def parts(lr=1.0, **settings):
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    return model, optimizer, {"model": model, "optimizer": optimizer, "interpreter": ignore, **settings}


def train(session, model, optimizer, step=None, loss=lambda outputs: outputs.square().mean()):
    for batch in session.batches(BATCHES):
        value = loss(model(batch))
        optimizer.zero_grad()
        value.backward()
        (step or optimizer.step)()
        session.update(value)


@pytest.mark.parametrize("make", [
    None,
    lambda sgd: torch.optim.lr_scheduler.LambdaLR(sgd, lambda update: 0.9**update),
    lambda sgd: torch.optim.lr_scheduler.StepLR(sgd, step_size=2, gamma=0.1),
])  # fmt: skip
def test_lr_scale_multiplies_the_rate_of_any_scheduler(make):
    model, optimizer, settings = parts()
    scheduler = make and make(optimizer)
    rates, seen, heard = [], [], []

    def step():
        seen.append(optimizer.param_groups[0]["lr"])
        before = model.bias.detach().clone()
        gradient = model.bias.grad.clone()
        optimizer.step()
        rates.append(float((before - model.bias.detach()) / gradient))
        if scheduler is not None:
            scheduler.step()

    session = Session([halve_at(2), hear(heard)], scheduler=scheduler, max_epochs=2, **settings)
    train(session, model, optimizer, step)
    expected = [lr * (1.0 if index < 2 else 0.5) for index, lr in enumerate(seen)]
    assert rates == pytest.approx(expected, rel=1e-3)
    assert [event.lr["default"] for event in heard] == pytest.approx(expected)
    assert len(rates) == 6


def test_a_stop_ends_the_loop_and_training():
    model, optimizer, settings = parts()
    ends = []
    note = on(noether.AfterTraining)(lambda state, event: (ends.append(state.stop), (state, ()))[1])
    session = Session([noether.FixedUpdateEarlyStopping(stop_at_update=4), note], max_epochs=9, **settings)
    train(session, model, optimizer)
    assert (session.state.iteration.update, ends) == (4, ["stop_at_update: 4 is reached"])


@pytest.mark.parametrize(("end", "iteration"), [
    ({"max_epochs": 2}, "E2_U6_S22"), ({"max_updates": 4}, "E1_U4_S15"), ({"max_samples": 12}, "E1_U4_S15"),
    ({"max_samples": 11}, "E1_U3_S11"), ({"run": Run(end=noether.TrainingIteration(update=1))}, "E0_U1_S4"),
])  # fmt: skip
def test_training_ends_at_its_end(end, iteration):
    model, optimizer, settings = parts()
    session = Session([], **settings, **end)
    train(session, model, optimizer)
    assert (str(session.state.iteration), session.state.ended) == (iteration, True)


class Poison:
    """Makes the loss or the gradients of some updates not finite."""

    def __init__(self, model, optimizer, where, updates):
        self.model, self.optimizer, self.where, self.updates, self.count = model, optimizer, where, updates, 0

    def loss(self, outputs):
        self.count += 1
        value = outputs.square().mean()
        return value * math.nan if self.where == "loss" and self.count in self.updates else value

    def step(self):
        if self.where == "gradients" and self.count in self.updates:
            self.model.bias.grad.fill_(math.nan)
        self.optimizer.step()


@pytest.mark.parametrize("where", ["loss", "gradients"])
def test_a_guard_rolls_back_values_that_are_not_finite(where):
    model, optimizer, settings = parts(lr=0.1)
    weights = []
    guard = noether.NanGuardCallback(every_n_updates=1, tolerance=1, action="rollback")
    note = on(AfterUpdate)(
        lambda state, event: (weights.append({n: p.clone() for n, p in state.params.items()}), (state, ()))[1]
    )
    poison = Poison(model, optimizer, where, {3})
    session = Session([guard, note], max_epochs=2, **settings)
    train(session, model, optimizer, poison.step, poison.loss)
    assert_same(weights[2], weights[1])  # the snapshot of the update before
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert session.state.memory(guard.name)["rollbacks"] == 1


def test_frozen_parameters_stay_frozen_after_a_rollback():
    model, _, settings = parts()
    model.weight.requires_grad_(requires_grad=False)
    frozen = model.weight.clone()
    optimizer = settings["optimizer"] = torch.optim.Adam([model.bias], lr=0.1)
    poison = Poison(model, optimizer, "gradients", {3})
    guard = noether.NanGuardCallback(every_n_updates=1, tolerance=1, action="rollback")
    session = Session(guard, max_epochs=2, **settings)
    train(session, model, optimizer, poison.step, poison.loss)
    assert session.state.memory(guard.name)["rollbacks"] == 1
    assert (model.weight.requires_grad, session.run.frozen) == (False, {"weight"})
    assert torch.equal(model.weight, frozen)
    assert bool(model.bias.isfinite().all())


def test_a_guard_stops_after_updates_in_a_row():
    model, optimizer, settings = parts()
    poison = Poison(model, optimizer, "loss", {2, 3})
    session = Session(noether.NanGuardCallback(every_n_epochs=1, tolerance=2), max_epochs=2, **settings)
    train(session, model, optimizer, poison.step, poison.loss)
    assert (session.stop, session.state.iteration.update) == ("2 updates in a row were not finite", 3)


def test_readings_are_measured_only_where_declared():
    for callbacks, expected in (([], (None, None)), ([noether.GradNormCallback(every_n_updates=1)], (True, None))):
        model, optimizer, settings = parts()
        heard = []
        train(Session([*callbacks, hear(heard)], max_epochs=1, **settings), model, optimizer)
        assert [(event.grad_norm and bool(event.grad_norm > 0), event.finite) for event in heard] == [expected] * 3


def test_the_norm_that_the_loop_reports_is_used():
    model, optimizer, settings = parts()
    heard = []
    session = Session([noether.GradNormCallback(every_n_updates=1), hear(heard)], max_epochs=1, **settings)
    for batch in session.batches(BATCHES):
        value = model(batch).square().mean()
        optimizer.zero_grad()
        value.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        optimizer.step()
        session.update(value, grad_norm=norm)
    assert all(float(event.grad_norm) > 1e-3 for event in heard)


@pytest.mark.parametrize("zeroed", ["before", "after"])
def test_a_step_that_a_scaler_leaves_out_is_skipped(zeroed):
    model, optimizer, settings = parts(lr=0.01)
    heard = []
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    session = Session([noether.NanGuardCallback(every_n_epochs=1, tolerance=9), hear(heard)], max_epochs=2, **settings)
    for index, batch in enumerate(session.batches(BATCHES)):
        value = model(batch).square().mean() * (math.inf if index == 2 else 1.0)
        if zeroed == "before":
            optimizer.zero_grad()
        scaler.scale(value).backward()
        scaler.step(optimizer)
        scaler.update()
        if zeroed == "after":
            optimizer.zero_grad()
        session.update(value)
    assert [event.skipped for event in heard] == [False, False, True, False, False, False]
    assert [bool(event.finite) for event in heard] == [True, True, False, True, True, True]


def test_a_closure_computes_gradients_that_are_measured():
    model, _, settings = parts()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=1, lr=1e-3)
    heard = []
    settings["optimizer"] = optimizer
    session = Session([noether.GradNormCallback(every_n_updates=1), hear(heard)], max_epochs=1, **settings)
    for batch in session.batches(BATCHES):

        def closure(batch=batch):
            optimizer.zero_grad()
            value = model(batch).square().mean()
            value.backward()
            return value

        session.update(optimizer.step(closure))
    assert all(float(event.grad_norm) > 0 for event in heard)


def test_accumulation_ends_an_epoch_with_a_smaller_update():
    heard, divisors = [], []
    model, optimizer, settings = parts(accumulation=2)
    session = Session(hear(heard), max_epochs=2, **settings)
    for batch in session.batches(BATCHES):
        value = model(batch).square().mean()
        divisors.append(session.accumulation_steps)
        (value / session.accumulation_steps).backward()
        session.micro_batch({"mse": value})
        if session.completes_update:
            optimizer.step()
            optimizer.zero_grad()
            session.update()
    assert [event.accumulated for event in heard] == [(4, 4), (3,)] * 2
    assert divisors == [2, 2, 1] * 2


def test_epochs_of_unknown_length_end_with_the_loader():
    class Unsized:
        def __iter__(self):
            return iter(BATCHES)

    for accumulation in (1, 2):
        heard = []
        model, optimizer, settings = parts(accumulation=accumulation)
        ends = noether.OnlineLossCallback(every_n_epochs=1)
        session = Session([ends, hear(heard)], max_epochs=2, **settings)
        for batch in session.batches(Unsized()):
            value = model(batch).square().mean()
            value.backward()
            session.micro_batch(value)
            if session.completes_update:
                optimizer.step()
                optimizer.zero_grad()
                session.update()
        assert str(session.state.iteration) == f"E2_U{6 if accumulation == 1 else 4}_S22"
        assert not hasattr(session.run, "updates_per_epoch")
        assert session.state.metrics["loss/online/total/E1"].iteration.epoch == 2


def test_a_scheduler_can_be_stepped_at_the_last_batch_of_an_epoch():
    model, optimizer, settings = parts()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.1)
    session = Session([], max_epochs=2, scheduler=scheduler, **settings)
    for batch in session.batches(BATCHES):
        value = model(batch).square().mean()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        if session.is_last_batch:
            scheduler.step()
        session.update(value)
    assert scheduler.last_epoch == 2


def test_set_epoch_is_called_where_it_exists():
    epochs = []

    class Loader(list):
        def set_epoch(self, epoch):
            epochs.append(epoch)

    model, optimizer, settings = parts()
    session = Session([], max_epochs=3, **settings)
    for batch in session.batches(Loader(BATCHES)):
        optimizer.step()
        session.update(model(batch).mean())
    assert epochs == [0, 1, 2]


def test_an_evaluation_restores_the_generators_that_it_shares_with_training():
    generator = torch.Generator()
    epochs = []

    class Shared(torch.utils.data.TensorDataset):
        def set_epoch(self, epoch):
            epochs.append(epoch)

    dataset = Shared(torch.arange(8.0)[:, None].repeat(1, 2), torch.zeros(8, 1))
    val = torch.utils.data.DataLoader(dataset, batch_size=2, shuffle=True, generator=generator)
    sampler = torch.utils.data.RandomSampler(dataset, replacement=True, num_samples=80, generator=generator)
    orders = []
    for callbacks in ([], [noether.OfflineLossCallback(every_n_updates=1, dataset_key="val")]):
        _, optimizer, settings = parts()
        loss = {"loss": lambda y, batch: nn.functional.mse_loss(y, batch[1])}
        session = Session(callbacks, data={"val": val}, max_epochs=2, **loss, **settings)
        seen = []
        for batch in session.batches(torch.utils.data.DataLoader(dataset, batch_size=8, sampler=sampler)):
            seen.append(batch[0])
            optimizer.step()
            session.update(0.5)
        orders.append(torch.cat(seen))
    assert torch.equal(*orders)
    assert epochs == [0, 1, 0, 1]


def test_a_loss_function_may_return_one_loss():
    model, optimizer, settings = parts()
    data = {"val": [(torch.ones(2, 2), torch.zeros(2, 1))]}
    evaluate = noether.OfflineLossCallback(every_n_epochs=1, dataset_key="val")
    session = Session(
        evaluate, data=data, loss=lambda y, batch: nn.functional.mse_loss(y, batch[1]), max_epochs=1, **settings
    )
    train(session, model, optimizer)
    assert "loss/val/total" in session.state.metrics


def test_an_iterator_that_is_closed_late_leaves_a_later_session_its_optimizer():
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    parts = {"model": model, "optimizer": optimizer, "interpreter": lambda effects, state, event: None}
    loader = [torch.ones(4, 2)] * 4
    first, later = (noether.Session([], max_epochs=1, **parts) for _ in range(2))
    stale = first.batches(loader)
    next(stale)  # as a progress bar in a variable holds it after `break`
    for batch in later.batches(loader):
        loss = model(batch).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        later.update(loss)
        stale.close()
    assert later.state.iteration.update == 4
