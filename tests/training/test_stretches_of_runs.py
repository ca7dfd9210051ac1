"""A run that calls callbacks once for several deferred updates equals one that calls them at each."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from law_examples import examples
from torch import nn

from noether import (
    AfterUpdate,
    CheckpointCallback,
    LogScalars,
    LogText,
    LrCallback,
    OnlineLossCallback,
    ProgressCallback,
    Run,
    SaveCheckpoint,
    SetSummary,
    TrainingIteration,
    TrainState,
    TrainTimeCallback,
    compose,
    every_n_updates,
    log,
)
from noether.core.callbacks.periodic import PeriodicCallback
from noether.core.effect import LogUpdates
from noether.core.tensors.donation import donate
from noether.effects.interpreter import Interpreter
from noether.session.timing import Clock
from noether.testing import assert_same
from noether.training.step.optimizer import FunctionalOptimizer
from noether.training.step.step import Step
from noether.training.trainer import Trainer

BATCHES = [torch.arange(6.0).reshape(3, 2) / (index + 3) for index in range(5)]


class Ticks:
    """A clock that ticks at each reading, so that a run has the same times whenever it runs."""

    def __init__(self, tick_s):
        self.now_s, self.tick_s = 0.0, tick_s

    def __call__(self):
        self.now_s += self.tick_s
        return self.now_s


class Batches:
    """The same batches in each epoch; the one of update `fails_at` cannot be read."""

    def __init__(self, fails_at=None):
        self.fails_at = fails_at

    def next_batches(self, state, *, last=None):
        if state.iteration.update + 1 == self.fails_at:
            raise OSError("the disk is gone")
        return state, (BATCHES[state.iteration.update % len(BATCHES)],)

    def close(self):
        """Do nothing."""


class Log:
    """What a run requests, in order, each with the counters and the time of its event."""

    def __init__(self, *, takes_stretches):
        self.lines, self.stretches = [], []
        handlers = {LogScalars: [self.add], LogText: [self.add], SetSummary: [self.add], SaveCheckpoint: [self.save]}
        stretches = {LogUpdates: [self.add_rows]} if takes_stretches else {}
        self.interpreter = Interpreter(handlers | stretches)

    def add(self, effect, state, event):
        content = effect.text if isinstance(effect, LogText) else dict(effect.values)
        self.lines.append((str(state.iteration), event.time_s, content))

    def add_rows(self, effect, state, event):
        self.stretches.append(len(effect.rows))
        self.lines += [(str(at), event.time_s, dict(values)) for at, event, values in effect.rows]

    def save(self, effect, state, event):
        self.lines.append((str(state.iteration), event.time_s, dict(state.params), dict(state.callback_states)))


def measure(outputs, batch):
    return {"square": (outputs - batch[:, :1]).square().mean()}


def start():
    return donate(TrainState(params={"weight": torch.ones(1, 2), "bias": torch.zeros(1)}))


def train(state, callbacks, log, *, resumed=False, **settings):
    return make_trainer(callbacks, log, **settings)(state, resumed=resumed)


def make_trainer(callbacks, log, *, epochs=3, tick_s=0.001, fails_at=None, loss=measure, **settings):
    step = Step(
        model=nn.Linear(2, 1),
        loss=loss,
        optimizer=FunctionalOptimizer(torch.optim.AdamW, {"lr": 0.1}),
        lr={"default": lambda position: 0.1 / (1 + position // 2)},
        donate=True,
    )
    run = Run(
        end=TrainingIteration(epoch=epochs),
        updates_per_epoch=len(BATCHES),
        samples_per_epoch=3 * len(BATCHES),
        effective_batch_size=3,
    )
    ticks = Ticks(tick_s)
    return Trainer(
        run=run,
        step=step,
        data=Batches(fails_at),
        reducer=compose(*callbacks),
        interpreter=log.interpreter,
        clock=Clock(elapsed_s=ticks, wall_s=ticks),
        **settings,
    )


@every_n_updates(4)
def count_memories(state, event):
    return log(state, event, {"memories": len(state.callback_states), "metrics": len(state.metrics)})


CALLBACKS = [
    LrCallback(every_n_updates=1),
    ProgressCallback(every_n_updates=4),
    ProgressCallback(every_n_epochs=1),
    OnlineLossCallback(every_n_updates=3),
    OnlineLossCallback(every_n_epochs=1, id="epochs"),
    TrainTimeCallback(every_n_samples=10),
    CheckpointCallback(every_n_updates=6, save_weights=True, save_optim=True),
    count_memories,
]
CHOICES = st.lists(st.sampled_from(CALLBACKS), unique_by=id, min_size=1)
TICKS = st.sampled_from([0.0001, 0.02, 1.0])


def stop_after(checks):
    """Return a function that says True from its call after `checks` others on."""
    count = itertools.count()
    return lambda: next(count) >= checks


@examples(200, quick=25)
@given(callbacks=CHOICES, tick_s=TICKS, stops=st.one_of(st.none(), st.integers(0, 18)))
def test_a_run_is_the_same_whether_callbacks_are_called_for_each_update_or_for_several(callbacks, tick_s, stops):
    runs = []
    for takes_stretches in (False, True):
        log, finished = Log(takes_stretches=takes_stretches), []
        interrupted = {} if stops is None else {"interrupted": stop_after(stops)}
        state = train(start(), callbacks, log, tick_s=tick_s, finish=finished.append, **interrupted)
        if stops is not None and not state.ended:
            state = train(finished[-1] if finished else start(), callbacks, log, tick_s=tick_s, resumed=bool(finished))
        runs.append((state, log.lines))
    assert_same(runs[1], runs[0])


@examples(100, quick=15)
@given(callbacks=CHOICES, tick_s=TICKS, fails_at=st.integers(1, 15))
def test_an_error_finds_the_state_after_the_last_update(callbacks, tick_s, fails_at):
    def fail(*, takes_stretches):
        log, failed = Log(takes_stretches=takes_stretches), []
        with pytest.raises(OSError, match="the disk is gone"):
            train(start(), callbacks, log, tick_s=tick_s, fails_at=fails_at, fail=lambda *args: failed.append(args[1]))
        return failed[0], log.lines

    assert_same(fail(takes_stretches=True), fail(takes_stretches=False))


def test_a_learning_rate_of_each_update_is_logged_for_several():
    log = Log(takes_stretches=True)
    train(start(), CALLBACKS[:2], log, epochs=2)
    # A line of progress at updates 4 and 8, or the end of an epoch at 5 and 10, comes after each of these.
    assert log.stretches == [3, 2, 2, 3]
    assert [line[0] for line in log.lines if isinstance(line[2], dict)] == [
        f"E{u > 5:d}_U{u}_S{3 * u}" for u in range(1, 11)
    ]


def test_a_callback_that_sees_each_update_is_called_at_each():
    seen = []

    def watch(state, event):
        if isinstance(event, AfterUpdate):
            seen.append((state.iteration.update, state.params["bias"].item()))
        return state, ()

    train(start(), [*CALLBACKS, watch], log := Log(takes_stretches=True), epochs=2)
    assert [update for update, _ in seen] == list(range(1, 11))
    assert (len({bias for _, bias in seen}), log.stretches) == (10, [])


def test_an_error_of_a_callback_about_several_updates_loses_the_run_up_to_the_last_checkpoint():
    class Fails(PeriodicCallback):
        def track_updates(self, state, updates):
            if state.iteration.update > 3:
                raise ValueError("no such loss")
            return state, ()

        def periodic_callback(self, state, event, interval):
            return state, ()

    failed = []
    with pytest.raises(ValueError, match="no such loss") as caught:
        train(start(), [Fails(every_n_epochs=1)], Log(takes_stretches=True), fail=lambda *args: failed.append(args[1]))
    assert failed == [None]
    assert any("the state is not saved" in note for note in caught.value.__notes__)


def fail_to_log(log):
    """Make the log fail where it gets the effects of several updates, as a background save that failed before does."""
    inner = log.interpreter

    class Fails:
        interpret_stretch = staticmethod(lambda effects, state, updates: fail("the disk is full"))

        def __call__(self, effects, state, event):
            inner(effects, state, event)

    log.interpreter = Fails()
    return log


def fail(text):
    raise ValueError(text)


@pytest.mark.parametrize("ending", ["interrupted", "failed"])
def test_a_failed_log_leaves_no_update_out_of_the_state_that_is_saved(ending):
    settings = {"interrupted": stop_after(3)} if ending == "interrupted" else {"fails_at": 4}
    callbacks, settled, expected = [OnlineLossCallback(every_n_epochs=1)], [], []
    with pytest.raises((ValueError, OSError)):
        train(
            start(),
            callbacks,
            fail_to_log(Log(takes_stretches=True)),
            fail=lambda *args: settled.append(args[1]),
            **settings,
        )
    train(start(), callbacks, Log(takes_stretches=False), interrupted=stop_after(3), finish=expected.append)
    assert_same(settled, expected)


def test_deferred_updates_are_logged_although_the_failed_one_overwrote_their_state(monkeypatch):
    advance = TrainState.advance

    def count(state, *, samples):
        return fail("too many samples") if state.iteration.update == 3 else advance(state, samples=samples)

    monkeypatch.setattr(TrainState, "advance", count)
    lines = []
    for takes_stretches in (False, True):
        log, settled = Log(takes_stretches=takes_stretches), []
        with pytest.raises(ValueError, match="too many samples"):
            train(start(), CALLBACKS[:1], log, fail=lambda *args, settled=settled: settled.append(args[1]))
        lines.append(log.lines)
        assert settled == [None]
    assert len(lines[0]) == 3
    assert_same(lines[1], lines[0])


def test_a_trainer_that_failed_trains_another_run():
    class Fails(PeriodicCallback):
        def init(self, state):
            return {self.name: 0}

        def track_updates(self, state, updates):
            if failing:
                raise ValueError("no such loss")
            return state.remember(self.name, self.memory(state) + len(updates)), ()

        def periodic_callback(self, state, event, interval):
            return state, ()

    failing = [True]
    trainer = make_trainer([Fails(every_n_epochs=1, id="count")], Log(takes_stretches=True))
    with pytest.raises(ValueError, match="no such loss"):
        trainer(start())
    failing.clear()
    assert trainer(start()).memory("count") == 15
