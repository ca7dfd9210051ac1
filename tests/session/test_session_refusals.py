"""Errors of a Session name the mistake and say what to write instead."""

import logging

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import noether
from noether import Run, Session, TrainingIteration
from noether.session.errors import SessionError
from noether.testing import assert_same

BATCHES = [torch.ones(4, 2)] * 3
MODEL = nn.Linear(2, 1)


def ignore(effects, state, event):
    pass


def make(callbacks=(), **settings):
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    settings = {"model": model, "optimizer": optimizer, "interpreter": ignore, "max_epochs": 2, **settings}
    return Session(list(callbacks), **settings), model, optimizer


def other_scheduler():
    return torch.optim.lr_scheduler.StepLR(torch.optim.SGD(MODEL.parameters(), lr=0.1), 1)


class Ring(noether.Effect):
    pass


@noether.callback("bell", effects=(Ring,))
@noether.every_n_epochs(1)
def ring(state, event):
    return state, (Ring(),)


def test_a_declared_effect_without_a_handler_is_refused_unless_a_function_runs_the_effects(tmp_path):
    rung = []
    with noether.open_run(tmp_path) as directory:
        for settings in ({"interpreter": None, "directory": directory}, {"interpreter": directory.interpreter}):
            with pytest.raises(SessionError, match=r"^bell requests the effect Ring, which has no handler: write"):
                make([ring], **settings)
        extended = directory.interpreter.with_handlers(Ring, lambda effect, state, event: rung.append(state.iteration))
        for interpreter in (extended, extended.__call__):
            session, _, optimizer = make([ring], interpreter=interpreter)
            for batch in session.batches(BATCHES):
                optimizer.step()
                session.update(batch.mean())
    assert [each.epoch for each in rung] == [1, 2, 1, 2]


def run(session, body):
    iterate(session.batches(BATCHES), body)


def iterate(batches, body):
    for batch in batches:
        body(batch)


EVALUATE = noether.OfflineLossCallback(every_n_epochs=1, dataset_key="val")


@pytest.mark.parametrize(("settings", "message"), [
    ({"interpreter": None}, r"no interpreter to run effects: pass directory=noether\.open_run\('runs/mine'\)"),
    ({"directory": "runs/mine"}, r"pass directory=noether\.open_run\('runs/mine'\)"),
    ({"max_updates": 3}, "max_epochs and max_updates are given, and a run has one end: keep one of them"),
    ({"run": Run(end=TrainingIteration(epoch=1))}, r"max_epochs and run=Run\(end=\.\.\.\) are given"),
    ({"max_epochs": 0}, "max_epochs: 0 is not a whole number of at least 1"),
    ({"accumulation": 0}, "accumulation: 0 is not a whole number of at least 1"),
    ({"callbacks": [EVALUATE]}, r"iterates 'val', and the run has no data; pass data=\{'val': loader\} and loss="),
    ({"callbacks": [EVALUATE], "data": {"vall": []}}, "did you mean 'vall'"),
    ({"callbacks": [EVALUATE], "data": {"val": []}}, "no loss to evaluate it with: pass loss="),
    ({"callbacks": [EVALUATE], "data": {"val": []}, "loss": lambda *_: 0}, "iterates 'val', which is empty: pass data"),
    ({"callbacks": [EVALUATE], "data": {"val": DataLoader([])}, "loss": lambda *_: 0}, "'val', which is empty"),
    ({"callbacks": [noether.OfflineLossCallback(every_n_epochs=1, dataset_key="val", batch_size=2)],
      "data": {"val": BATCHES}, "loss": lambda *_: 0}, r"has a batch_size, and data\['val'\] is in batches already"),
    ({"data": [torch.ones(2)]}, r"takes loaders by dataset key: pass data=\{'val': loader\}, not a list"),
    ({"data": {"val": iter(BATCHES)}}, r"data\['val'\] is an iterator, which can be read once: pass a DataLoader"),
    ({"callbacks": [noether.ReduceLROnPlateauCallback(every_n_epochs=1, metric_key="loss/val/total", tolerance=1)],
      "optimizer": None}, "scales the learning rate of the optimizer: pass optimizer="),
    ({"data": {}, "run": Run(data={})}, r"data= and run=Run\(data=\.\.\.\) are given"),
    ({"loss": len, "run": Run(forward=len)}, r"loss= and run=Run\(forward=\.\.\.\) are given"),
    ({"optimizer": torch.optim.SGD(MODEL.parameters(), lr=0.1)}, "2 parameters of the optimizer are not parameters of"),
    ({"model": None, "optimizer": None}, r"model= takes a torch\.nn\.Module, not None"),
    ({"loss": "mse"}, r"loss= takes a function \(outputs, batch\) -> loss, not 'mse'"),
    ({"loss": nn.MSELoss()}, r"MSELoss takes \(outputs, targets\): .* loss=lambda outputs, batch: criterion\(outputs"),
    ({"precision": "bf16"}, r"precision= takes a dtype, such as torch\.bfloat16, not 'bf16'"),
    ({"interpreter": 5}, r"interpreter= takes a function \(effects, state, event\) -> None, not 5"),
    ({"seed": 2**64}, r"pass a whole number below 2\*\*63"),
    ({"run": {}}, r"run= takes a noether\.Run, not \{\}"),
    ({"optimizer": 3}, r"takes an optimizer of torch\.optim, got int"),
    ({"scheduler": 3}, r"takes a scheduler with state_dict\(\), got int"),
    ({"scheduler": other_scheduler()}, "the scheduler changes another optimizer"),
    ({"callbacks": [noether.GradNormCallback(every_n_updates=1)], "optimizer": None}, "reads grad_norm, .* optimizer="),
])  # fmt: skip
def test_parts_that_cannot_work_together_are_refused_at_construction(settings, message):
    with pytest.raises((SessionError, noether.NoetherError), match=message):
        make(**settings)


def test_every_refusal_is_an_error_of_noether():
    assert issubclass(SessionError, noether.NoetherError)
    assert issubclass(SessionError, ValueError)


def forget_step(session, model, optimizer, batch):
    model(batch).mean().backward()
    session.update(model(batch).mean())


def update_twice(session, model, optimizer, batch):
    model(batch).mean().backward()
    optimizer.step()
    session.update(0.5)
    session.update(0.5)


def update_twice_without_losses(session, model, optimizer, batch):
    optimizer.step()
    session.update(0.5)
    session.update()


def forget_losses(session, model, optimizer, batch):
    optimizer.step()
    session.update()


def report_a_vector(session, model, optimizer, batch):
    session.update(model(batch))


def report_text(session, model, optimizer, batch):
    session.update({"mse": "0.5"})


def report_a_total(session, model, optimizer, batch):
    session.update({"mse": 0.5, "total": 0.5})


def report(losses):
    def loop(session, model, optimizer, batch):
        optimizer.step()
        session.update(losses)

    return loop


def forget_update(session, model, optimizer, batch):
    optimizer.step()


@pytest.mark.parametrize(("loop", "message"), [
    (forget_step, r"made no step since the last update: call optimizer\.step\(\) before session\.update\(losses\)"),
    (update_twice, r"were reported before: call session\.update\(losses\) once per batch"),
    (update_twice_without_losses, r"update\(\.\.\.\) was called twice: call it once per update"),
    (forget_losses, r"does not know the losses of the batch: call session\.update\(losses\)"),
    (report_a_vector, r"loss 'total' has shape \(4, 1\): report its mean over samples, loss\.mean\(\)"),
    (report_text, "loss 'mse' is of type str: report a real number"),
    (report_a_total, r"'total' is reported beside \['mse'\], .* leave 'total' out in session\.update\(losses\)"),
    (report({0: 0.5}), r"the name of a loss is 0, of type int: use text, \{'mse': loss\}"),
    (report(True), "loss 'total' is of type bool: report a real number"),
    (report(1j), "loss 'total' is of type complex: report a real number"),
    (report(np.bool_(True)), "loss 'total' is of type bool: report a real number"),
    (report(np.complex64(1)), "loss 'total' is of type complex64: report a real number"),
    (report(torch.tensor(1j)), r"loss 'total' has dtype torch\.complex64: report a real number"),
    (report(torch.tensor(True)), r"loss 'total' has dtype torch\.bool: report a real number"),
    (forget_update, r"the last batch was not reported: call session\.update\(losses\) for every batch"),
])  # fmt: skip
def test_a_mistake_in_the_loop_says_what_to_write(loop, message):
    session, model, optimizer = make()
    with pytest.raises((ValueError, TypeError), match=message):
        run(session, lambda batch: loop(session, model, optimizer, batch))


@pytest.mark.parametrize(
    ("readings", "message"),
    [
        ({"samples": "4"}, r"AfterAccumulationStep\.samples: '4' is not a whole number >= 0"),
        ({"samples": -4}, r"AfterAccumulationStep\.samples: -4 is not"),
        ({"grad_norm": torch.ones(2)}, r"AfterUpdate\.grad_norm: a Tensor of shape \(2,\) is not a number"),
        ({"finite": "yes"}, r"AfterUpdate\.finite: 'yes' is not True, False, a 0-dimensional tensor or None"),
        ({"skipped": 1}, r"AfterUpdate\.skipped: 1 is not True or False"),
        ({"forward_s": -0.1}, r"AfterUpdate\.forward_s: -0\.1 is not a finite number of seconds >= 0"),
        ({"backward_s": float("nan")}, r"AfterUpdate\.backward_s: nan is not"),
        ({"optimizer_s": "1 s"}, r"AfterUpdate\.optimizer_s: '1 s' is not"),
    ],
)
def test_an_invalid_reading_is_refused_with_its_name(readings, message):
    session, model, optimizer = make()
    for batch in session.batches(BATCHES):
        loss = model(batch).square().mean()
        loss.backward()
        optimizer.step()
        with pytest.raises(noether.NoetherError, match=message):
            session.update(loss, **readings)
        break


@pytest.mark.parametrize("number", [np.float16(0.5), np.float32(0.5), np.float64(0.5), np.int64(2), 0.5])
def test_numbers_of_numpy_are_losses_as_those_of_python(number):
    seen = []
    note = noether.on(noether.AfterUpdate)(lambda state, event: (seen.append(event.losses["total"]), (state, ()))[1])
    session, _, optimizer = make([note], max_updates=1, max_epochs=None)
    run(session, lambda batch: (optimizer.step(), session.update(number)))
    assert seen == [float(number)]
    assert type(seen[0]) in {int, float}


def get_nothing(state, event):
    pass


@pytest.mark.parametrize(("callbacks", "message"), [
    ([noether.OnlineLossCallback], r"holds the class OnlineLossCallback: write OnlineLossCallback\(\.\.\.\)"),
    (noether.OnlineLossCallback, r"write OnlineLossCallback\(\.\.\.\)"),
    (None, r"callbacks= takes one callback or a list of them, .* not None; pass \[\] for none"),
    ("OnlineLossCallback", "callbacks= takes one callback or a list of them, .* not 'OnlineLossCallback'"),
    ([[get_nothing]], "callbacks= takes one callback or a list of them"),
])  # fmt: skip
def test_an_object_that_is_no_callback_is_refused_with_the_name_of_the_argument(callbacks, message):
    with pytest.raises(SessionError, match=message):
        Session(callbacks, interpreter=ignore, model=MODEL)


def test_any_iterable_of_callbacks_is_accepted():
    heard = []
    callback = noether.on(noether.AfterUpdate)(lambda state, event: (heard.append(state.iteration), (state, ()))[1])
    for callbacks in ((each for each in [callback]), {callback}, callback):
        model = nn.Linear(2, 1)
        session = Session(callbacks, interpreter=ignore, model=model, max_updates=1)
        run(session, lambda batch: session.update(0.5))  # noqa: B023  # called in this pass
    assert len(heard) == 3


@pytest.mark.parametrize(("callback", "message"), [
    (get_nothing, r"get_nothing returned None, not \(state, effects\): write `return state, \(\)`"),
    (lambda state, event: state, r"returned a TrainState, not \(state, effects\)"),
    (noether.on(noether.AfterUpdate)(get_nothing), "get_nothing.* returned None"),
])  # fmt: skip
def test_a_callback_that_returns_something_else_is_named(callback, message):
    session, _, optimizer = make([callback])
    with pytest.raises(TypeError, match=message):
        run(session, lambda batch: (optimizer.step(), session.update(0.5)))


@pytest.mark.parametrize(("loader", "message"), [
    (DataLoader(torch.ones(3, 2), batch_size=8, drop_last=True), "3 samples with batch_size=8: pass drop_last=False"),
    ([], r"the loader is empty \(its len\(\) is 0\), a list"),
])  # fmt: skip
def test_an_empty_loader_is_refused_before_the_first_event(loader, message):
    heard = []
    session, _, _ = make([lambda state, event: (heard.append(event), (state, ()))[1]])
    with pytest.raises(SessionError, match=message):
        session.batches(loader)
    assert heard == []


def test_a_loss_function_that_returns_a_number_is_named():
    def loss(outputs, batch):
        return outputs.mean().item()

    session, _, optimizer = make([EVALUATE], data={"val": BATCHES}, loss=loss)
    with pytest.raises(SessionError, match=r"loss= returned a float: return a tensor, .* without \.item\(\)"):
        run(session, lambda batch: (optimizer.step(), session.update(0.5)))


@pytest.mark.parametrize("loader", [DataLoader(["a", "b"]), ["a", "b"]], ids=["loader", "list"])
def test_a_batch_of_unknown_size_says_how_to_give_it(loader):
    session, _, optimizer = make()
    message = r"is found in the batch, a (str|list): pass run=noether\.Run\(batch_size=\.\.\.\), a function"
    with pytest.raises(ValueError, match=message):
        iterate(session.batches(loader), lambda batch: (optimizer.step(), session.update(0.5)))
    make(run=Run(batch_size=len))[0].batches(["a", "b"])


def test_a_session_is_iterated_once():
    session, _, optimizer = make()
    run(session, lambda batch: (optimizer.step(), session.update(0.5)))
    with pytest.raises(ValueError, match=r"yields every epoch, once: write one loop, without `for epoch in \.\.\.`"):
        session.batches(BATCHES)
    with pytest.raises(ValueError, match="there is no batch to report"):
        session.update(0.5)
    with pytest.raises(ValueError, match="pass samples="):
        make()[0].update(0.5)
    with pytest.raises(ValueError, match=r"inside of `for batch in session\.batches\(loader\):`"):
        _ = make()[0].completes_update


def test_accumulation_says_when_to_update():
    session, _, optimizer = make(accumulation=2)
    with pytest.raises(ValueError, match=r"has 1 of accumulation=2 micro-batches: .* `if session\.completes_update:`"):
        run(session, lambda batch: (optimizer.step(), session.update(0.5)))
    session, _, _ = make(accumulation=2)
    with pytest.raises(ValueError, match=r"and the update was not: call optimizer\.step\(\) and then"):
        run(session, lambda batch: session.micro_batch(0.5))


def test_a_scheduler_that_is_stepped_too_late_is_named():
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    session, *_ = make(model=model, optimizer=optimizer, scheduler=scheduler)
    with pytest.raises(ValueError, match=r"stepped after session\.update\(\.\.\.\): call scheduler\.step\(\) before"):
        run(session, lambda batch: (optimizer.step(), session.update(0.5), scheduler.step()))


def test_a_scheduler_of_which_the_session_does_not_know_is_refused(tmp_path):
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    with noether.open_run(tmp_path / "run") as directory:
        session, *_ = make(model=model, optimizer=optimizer, directory=directory)
        with pytest.raises(ValueError, match="pass scheduler= to the session"):
            session.batches(BATCHES)


def test_an_iterator_yields_one_epoch():
    with pytest.raises(ValueError, match="which yields one epoch, and max_epochs is 2: pass an iterable"):
        make()[0].batches(iter(BATCHES))
    session, _, optimizer = make(max_epochs=None, max_updates=4)
    with pytest.warns(noether.session.errors.ResumeWarning):
        batches = session.batches(iter(BATCHES))
    with pytest.raises(ValueError, match="yielded 0 batches in epoch 1"):
        iterate(batches, lambda batch: (optimizer.step(), session.update(0.5)))


def test_a_loop_that_is_left_inside_of_an_update_says_so(caplog, tmp_path):
    session, _, optimizer = make()
    for _ in session.batches(BATCHES):
        optimizer.step()
        break
    assert "between two states that can be resumed, before update 1 was complete" in caplog.text
    with caplog.at_level(logging.INFO), noether.open_run(tmp_path / "run") as directory:
        session, _, optimizer = make(directory=directory, interpreter=None)
        for _ in session.batches(BATCHES):
            optimizer.step()
            session.update(0.5)
            break
    assert "the loop ended at E0_U1_S4, before the run, which is saved without AfterTraining" in caplog.text


def test_a_left_loop_scales_no_later_step():
    session, _, optimizer = make()
    for _ in session.batches(BATCHES):
        optimizer.step()
        session.update(0.5)
        break
    optimizer.step()
    assert session.steps == 0


def test_losses_are_detached():
    kept = []
    note = noether.on(noether.AfterUpdate)(lambda state, event: (kept.append(event.losses), (state, ()))[1])
    session, model, optimizer = make([note])
    for batch in session.batches(BATCHES):
        losses = {"mse": model(batch).square().mean(), "l1": model(batch).abs().mean()}
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        session.update(losses)
    assert not any(loss.requires_grad for losses in kept for loss in losses.values())
    assert_same(kept[0]["total"], kept[0]["mse"] + kept[0]["l1"])
