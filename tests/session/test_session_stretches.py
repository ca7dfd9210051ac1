"""A session that calls callbacks once for several deferred updates equals one that calls them at each."""

import io
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from law_examples import examples
from plain_loop import SCHEDULERS, STILL, Loop, loss, make_model
from rich.console import Console as RichConsole

import noether
from noether.core.callbacks.interval import PeriodicCallback
from noether.core.effect import LogUpdates, UpdateScalars
from noether.core.metrics import log_updates, to_numbers
from noether.core.reducer import Reducer
from noether.core.stretch import Stretch
from noether.effects import Console
from noether.effects.interpreter import Interpreter
from noether.effects.logs.jsonl import LinesFile
from noether.session.errors import SessionError
from noether.session.scheduler import SchedulerMemory
from noether.testing import assert_same

BATCHES = [(torch.randn(4, 3, generator=torch.Generator().manual_seed(n)), torch.arange(4) % 2) for n in range(6)]
CALLBACKS = [
    noether.OnlineLossCallback(every_n_updates=3),
    noether.OnlineLossCallback(every_n_epochs=1, id="epochs"),
    noether.LrCallback(every_n_updates=1),
    noether.ProgressCallback(every_n_updates=4),
    noether.TrainTimeCallback(every_n_samples=20),
    noether.GradNormCallback(every_n_updates=5),
    noether.NanGuardCallback(every_n_updates=2, tolerance=1, action="rollback"),
    noether.ReduceLROnPlateauCallback(
        every_n_updates=6, metric_key="loss/online/total/U3", tolerance=1, factor=0.5, min_delta=100.0
    ),
    noether.CheckpointCallback(every_n_updates=7, save_weights=True, save_optim=True),
]
NEEDS = {7: 0}  # the plateau reads what the first one logs


class Log:
    """What a run requests, in order, each with the counters of its event."""

    def __init__(self, *, takes_stretches):
        self.lines, self.rows = [], 0
        handlers = {
            noether.LogScalars: [self.add],
            noether.LogText: [self.add],
            noether.SetSummary: [self.add],
            noether.SaveCheckpoint: [self.save],
        }
        self.interpreter = Interpreter(handlers | ({LogUpdates: [self.add_rows]} if takes_stretches else {}))

    def add(self, effect, state, event):
        self.lines.append((str(state.iteration), effect.text if hasattr(effect, "text") else dict(effect.values)))

    def add_rows(self, effect, state, event):
        self.rows += len(effect.rows)
        self.lines += [(str(at), dict(values)) for at, _, values in effect.rows]

    def save(self, effect, state, event):
        weights = {name: tensor.clone() for name, tensor in state.params.items()}
        self.lines.append((str(state.iteration), weights, dict(state.callback_states)))


class Counter(PeriodicCallback):
    """Remembers the number of updates, and logs the number of each at which it is due."""

    def init(self, state):
        return {self.name: 0}

    def track_updates(self, state, updates):
        return state.remember(self.name, self.memory(state) + len(updates)), ()

    def periodic_callback(self, state, event, interval):
        return noether.log(state, event, {"count": state.iteration.update})

    def fire_updates(self, state, updates):
        rows = [UpdateScalars(*each, to_numbers({"count": each.iteration.update})) for each in updates]
        return log_updates(state, rows)


class FailingTracker(PeriodicCallback):
    """Raises an error if it tracks an update after the first one."""

    def track_updates(self, state, updates):
        if state.iteration.update > 1:
            raise ValueError("no such loss")
        return state, ()

    def periodic_callback(self, state, event, interval):
        return state, ()


class LoopError(Exception):
    """An error in the body of the loop."""


def train(callbacks, *, takes_stretches, scheduler="none", accumulation=1, spoiled=0, reads=(), leaves=()):  # noqa: C901  # a loop as users write it
    """Train for three epochs, and return the results and the log.

    Args:
        callbacks: The callbacks.
        takes_stretches: Whether the log takes the rows of several updates, so that updates are deferred.
        scheduler: One of `SCHEDULERS`.
        accumulation: Micro-batches of an update.
        spoiled: The batch whose update has gradients of NaN; 0 for no batch.
        reads: The batches after which the loop reads the state.
        leaves: How the loop ends early, and after which batch, such as `("break", 5)`.
    """
    log, model, read = Log(takes_stretches=takes_stretches), make_model(), []
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    lr_scheduler = SCHEDULERS[scheduler](optimizer)
    session = noether.Session(
        callbacks,
        interpreter=log.interpreter,
        model=model,
        optimizer=optimizer,
        scheduler=lr_scheduler,
        accumulation=accumulation,
        max_epochs=3,
        clock=STILL,
    )
    loss_of_batch = torch.zeros(())  # as a CUDA graph does, the loop writes each loss into the same tensor

    def make_update(count):
        if count == spoiled:
            next(model.parameters()).grad.fill_(float("nan"))
        optimizer.step()
        optimizer.zero_grad()
        if lr_scheduler is not None:
            lr_scheduler.step(*([loss_of_batch.clone()] if scheduler == "plateau" else []))
        session.update()

    def run():
        for count, batch in enumerate(batches, 1):
            losses = loss(model(batch[0]), batch)
            (sum(losses.values()) / session.accumulation_steps).backward()
            loss_of_batch.copy_(losses["ce"].detach())
            session.micro_batch({**losses, "ce": loss_of_batch}, outputs=batch[0])
            if session.completes_update:
                make_update(count)
            if count in reads:
                saved = session.state_dict()  # before `state` is read: it has to call the callbacks itself
                read.append((saved, str(session.state.iteration), dict(session.state.callback_states)))
            if leaves == ("break", count):
                break
            if leaves == ("raise", count):
                raise LoopError

    batches, error = session.batches(BATCHES), None  # a variable holds it, so an error in the loop does not close it
    try:
        run()
    except LoopError as failed:
        session.record_failure(failed)
    except FloatingPointError as diverged:  # with `spoiled`, and without the guard that rolls it back
        error = str(diverged), diverged.__notes__
    settled = session.settled_state
    return {
        "log": log.lines,
        "read": read,
        "error": error,
        "weights": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "memories": dict(session.state.callback_states),
        "metrics": dict(session.state.metrics),
        "settled": settled and (str(settled.iteration), dict(settled.callback_states)),
    }, log


@examples(200, quick=40)
@given(
    chosen=st.sets(st.sampled_from(range(len(CALLBACKS))), min_size=1),
    scheduler=st.sampled_from(sorted(SCHEDULERS)),
    spoiled=st.integers(0, 18),
    reads=st.sets(st.integers(1, 18), max_size=3),
    accumulation=st.integers(1, 2),
    leaves=st.one_of(st.just(()), st.tuples(st.sampled_from(["break", "raise"]), st.integers(1, 18))),
)
def test_a_session_is_the_same_whether_callbacks_are_called_for_each_update_or_for_several(chosen, **settings):
    needed = {NEEDS[index] for index in chosen & NEEDS.keys()}
    callbacks = [CALLBACKS[index] for index in sorted(chosen | needed)]
    once, _ = train(callbacks, takes_stretches=True, **settings)
    at_each, _ = train(callbacks, takes_stretches=False, **settings)
    assert_same(once, at_each)


@pytest.mark.parametrize("scheduler", sorted(SCHEDULERS))
def test_a_session_defers_updates(scheduler):
    _, log = train(CALLBACKS[1:3], takes_stretches=True, scheduler=scheduler)
    assert log.rows == 18


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("call", [1, 2, 3])  # at the end of two epochs, and at an update
@pytest.mark.parametrize(
    ("owner", "name", "when"),
    [
        (Reducer, "after_updates", "before"),
        (Reducer, "after_updates", "after"),
        (Stretch, "call_callbacks", "after"),
        (LinesFile, "write_updates", "before"),
        (LinesFile, "write_updates", "after"),
        (Stretch, "run_effects", "after"),
    ],
)
def test_a_run_that_is_interrupted_in_a_stretch_is_resumed_exactly(
    tmp_path, monkeypatch, owner, name, when, call, error
):
    callbacks = [CALLBACKS[index] for index in (1, 2, 3, 8)]
    whole, cut = (Loop(tmp_path / each, callbacks, "lambda") for each in ("whole", "cut"))
    whole.train()
    original, calls = getattr(owner, name), []

    def interrupt(self, *arguments):
        is_one = owner is not Stretch or bool(self._updates or self._requests)
        calls.extend([name] if is_one else [])
        if is_one and when == "before" and len(calls) == call:
            raise error
        result = original(self, *arguments)
        if is_one and when == "after" and len(calls) == call:
            raise error
        return result

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupt)
        with pytest.raises(error):
            cut.train()
    cut.train()
    assert_same(cut.result(), whole.result())
    assert cut.log == whole.log


def test_an_update_without_a_step_that_is_interrupted_before_it_counts_is_repeated(tmp_path):
    class Scheduler(torch.optim.lr_scheduler.LambdaLR):
        def state_dict(self):
            if interrupted == [self.last_epoch]:
                interrupted.clear()
                raise KeyboardInterrupt
            return super().state_dict()

    def train(path):
        model = make_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        scheduler = Scheduler(optimizer, lambda update: 1 / (1 + update))
        with noether.open_run(path, Console(RichConsole(file=io.StringIO()))) as directory:
            parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "clock": STILL}
            session = noether.Session(
                [CALLBACKS[2], Counter(every_n_epochs=1)], directory=directory, max_epochs=1, **parts
            )
            for batch in session.batches(BATCHES):
                losses = loss(model(batch[0]), batch)
                is_skipped = batch[0] is BATCHES[1][0]
                if not is_skipped:
                    sum(losses.values()).backward()
                    optimizer.step()
                    optimizer.zero_grad()
                scheduler.step()
                session.update(losses, skipped=is_skipped)
            return {"memories": dict(session.state.callback_states), "log": (path / "metrics.jsonl").read_text()}

    interrupted = []
    whole = train(tmp_path / "whole" / "run")
    interrupted.append(2)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut" / "run")
    assert_same(train(tmp_path / "cut" / "run"), whole)


def test_a_state_that_is_loaded_between_two_updates_has_the_position_of_the_scheduler(tmp_path):
    model = make_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: 1 / (1 + update))
    save = noether.CheckpointCallback(every_n_updates=3, save_weights=True, save_optim=True)
    with noether.open_run(tmp_path, Console(RichConsole(file=io.StringIO()))) as directory:
        parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "clock": STILL}
        session = noether.Session([CALLBACKS[1], save], directory=directory, max_epochs=1, **parts)
        for count, batch in enumerate(session.batches(BATCHES), 1):
            losses = loss(model(batch[0]), batch)
            sum(losses.values()).backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            session.update(losses)
            if count == 5:
                session.load(directory.load())
                assert scheduler.last_epoch == 3
    assert scheduler.last_epoch == session.state.memory("lr_scheduler")["last_epoch"] == 4


def train_outside_of_a_loop(path, callback, text):
    """Make five deferred updates, and yield the session and the optimizer before the run ends."""
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with noether.open_run(path, Console(RichConsole(file=text))) as directory:
        parts = {"model": model, "optimizer": optimizer, "clock": STILL}
        session = noether.Session(callback, directory=directory, **parts)
        session.begin()
        for batch in BATCHES[:5]:
            session.batch_arrived()
            losses = loss(model(batch[0]), batch)
            sum(losses.values()).backward()
            optimizer.step()
            optimizer.zero_grad()
            session.update(losses, samples=4)
        yield session, optimizer


def test_another_thread_reads_the_state_without_a_call_of_callbacks(tmp_path):
    loop = train_outside_of_a_loop(tmp_path, Counter(every_n_updates=9), io.StringIO())
    session, _ = next(loop)
    with ThreadPoolExecutor(1) as pool:
        state = pool.submit(lambda: session.state).result()
    (name,) = state.callback_states
    assert (state.iteration.update, state.memory(name)) == (5, 0)
    assert session.state.memory(name) == 5
    loop.close()


def test_the_panel_of_a_failed_run_has_the_values_of_deferred_updates(tmp_path):
    text = io.StringIO()
    loop = train_outside_of_a_loop(tmp_path, Counter(every_n_updates=1), text)
    next(loop)
    with pytest.raises(LoopError):
        loop.throw(LoopError())
    *_, panel = text.getvalue().partition("failed at")
    assert "count 5" in " ".join(panel.split())


def test_a_session_releases_the_optimizer_if_a_callback_fails_as_it_closes(tmp_path):
    loop = train_outside_of_a_loop(tmp_path, FailingTracker(every_n_updates=8), io.StringIO())
    session, optimizer = next(loop)
    assert optimizer._optimizer_step_pre_hooks  # noqa: SLF001  # torch has no public name for them
    with pytest.raises(ValueError, match="no such loss"):
        session.close()
    assert not optimizer._optimizer_step_pre_hooks  # noqa: SLF001
    loop.close()


def test_a_session_that_lost_updates_does_not_begin_again():
    model = torch.nn.Linear(2, 1)
    handlers = {noether.LogScalars: (), LogUpdates: ()}
    callback = FailingTracker(every_n_epochs=1)
    session = noether.Session(callback, model=model, interpreter=Interpreter(handlers), max_epochs=2, clock=STILL)
    session.begin()
    for _ in range(2):
        session.update(1.0, samples=4)
    with pytest.raises(ValueError, match="no such loss"):
        session.end_epoch()
    with pytest.raises(SessionError, match="a callback failed for the last updates"):
        session.begin()


def test_a_scheduler_whose_position_the_loop_does_not_note_is_called_at_each_update():
    sgd = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    memory = SchedulerMemory(torch.optim.lr_scheduler.StepLR(sgd, 3))
    assert not noether.compose(memory).defers_updates
