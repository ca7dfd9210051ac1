"""Callbacks that hear of several updates at once do what they would do at each."""

from random import Random

import pytest
import torch
from law_examples import slow_except

from noether import (
    AfterAccumulationStep,
    AfterUpdate,
    EMACallback,
    GradNormCallback,
    LogText,
    LrCallback,
    NanGuardCallback,
    OnlineLossCallback,
    ProgressCallback,
    TrainState,
    TrainTimeCallback,
    compose,
    every_n_epochs,
    every_n_updates,
    on,
)
from noether.core.callbacks.periodic import PeriodicCallback
from noether.core.effect import LogUpdates
from noether.core.stretch import Stretch
from noether.core.tensors.tree import FrozenDict
from noether.effects.interpreter import Interpreter
from noether.testing import LawError, check_stretches

FOLLOWING = {
    "lr": LrCallback,
    "progress": ProgressCallback,
    "online loss": lambda **interval: OnlineLossCallback(nan="log", **interval),
    "train time": TrainTimeCallback,
    "gradient norm": GradNormCallback,
    "nan guard": lambda **interval: NanGuardCallback(tolerance=2, action="rollback", **interval),
}
INTERVALS = [
    *({"every_n_updates": n} for n in (1, 1, 2, 5)), *({"every_n_samples": n} for n in (3, 20)),
    *({"every_n_epochs": n} for n in (1, 2)),
]  # fmt: skip


@every_n_updates(3)
def say_update(state, event):
    return state, (LogText(f"{state.iteration} {sorted(state.callback_states)}"),)


@pytest.mark.parametrize("seed", slow_except(range(6), range(40)))
def test_shipped_callbacks_may_hear_of_updates_later(seed):
    random = Random(seed)  # noqa: S311  # no secret
    names = random.sample(sorted(FOLLOWING), random.randint(1, len(FOLLOWING)))
    callbacks = [FOLLOWING[name](**random.choice(INTERVALS), at_end=random.random() < 0.3) for name in names]
    check_stretches(compose(*callbacks, *([say_update] if random.random() < 0.5 else [])), examples=10)


@pytest.mark.parametrize("name", sorted(FOLLOWING))
def test_a_callback_with_an_interval_of_one_update_obeys_the_law(name):
    check_stretches(FOLLOWING[name](every_n_updates=1), examples=10)


class CountsCalls(PeriodicCallback):
    def init(self, state):
        return {self.name: 0}

    def track_updates(self, state, updates):
        return state.remember(self.name, self.memory(state) + 1), ()

    def periodic_callback(self, state, event, interval):
        return state, (LogText(str(self.memory(state))),)


class ReadsTheState(CountsCalls):
    def track_updates(self, state, updates):
        return state.remember(self.name, self.memory(state) + state.iteration.update * len(updates)), ()


class ReadsOutputs(CountsCalls):
    def track_updates(self, state, updates):
        count = sum(1 for update in updates if update.event.outputs)
        return state.remember(self.name, self.memory(state) + count), ()


class LogsText(CountsCalls):
    def track_updates(self, state, updates):
        return state, (LogText("tracked"),)


@pytest.mark.parametrize("kind", [CountsCalls, ReadsTheState, ReadsOutputs, LogsText])
def test_the_law_catches_what_depends_on_the_call(kind):
    with pytest.raises(LawError, match="several updates"):
        check_stretches(kind(every_n_epochs=1), examples=200)


def make_stretch(*callbacks, **limits):
    return Stretch(compose(*callbacks), Interpreter({LogUpdates: []}), **limits)


def update(number, *, time_s=0.0, **fields):
    state = TrainState()
    for _ in range(number):
        state = state.advance(samples=2)
    return state, AfterUpdate(samples=2, time_s=time_s, **fields)


@pytest.mark.parametrize(
    "callback",
    [
        lambda state, event: (state, ()),
        on(AfterUpdate)(lambda state, event: (state, ())),
        on(AfterAccumulationStep)(lambda state, event: (state, ())),
        EMACallback(every_n_epochs=1, target_factors=(0.9,), save_latest_weights=True),
        ProgressCallback(every_n_updates=1),
        LrCallback(every_n_updates=1, at_end=True),
    ],
)
def test_a_callback_that_has_to_see_each_update_lets_none_wait(callback):
    assert not make_stretch(callback).holds(*update(1))


def test_an_update_at_which_a_gate_opens_does_not_wait():
    reducer = compose(say_update, every_n_epochs(1)(lambda state, event: (state, ())))
    stretch, held = Stretch(reducer, Interpreter({LogUpdates: []})), []
    for number in range(1, 8):
        state, event = update(number)
        held.append(stretch.holds(state, event))
        if not held[-1]:
            reducer(stretch.tell(state), event)
    assert held == [True, True, False, True, True, False, True]


@pytest.mark.parametrize("clock", [[0.0, 0.1, 0.2, 0.3], [5.0, 5.2, 4.0, 4.1]], ids=["slow", "set back"])
def test_a_stretch_ends_after_a_quarter_of_a_second(clock):
    stretch = make_stretch(OnlineLossCallback(every_n_epochs=1))
    held = [stretch.holds(*update(number + 1, time_s=time_s)) for number, time_s in enumerate(clock)]
    assert held == ([True, True, True, False] if clock[0] == 0 else [True, True, False, False])


def test_an_update_that_takes_long_does_not_wait():
    assert not make_stretch(OnlineLossCallback(every_n_epochs=1)).holds(*update(1, duration_s=0.3))


def test_an_update_that_waits_keeps_no_outputs():
    state, event = update(1, outputs=torch.ones(3), losses=FrozenDict(total=torch.ones(())))
    assert make_stretch(OnlineLossCallback(every_n_epochs=1)).holds(state, event)
    assert (event.outputs, sorted(event.losses)) == (None, ["total"])


@pytest.mark.parametrize("interpreter", [lambda effects, state, event: None, Interpreter({})])
def test_an_interpreter_that_takes_single_updates_hears_of_each(interpreter):
    assert not Stretch(compose(say_update), interpreter).holds(*update(1))


def test_an_error_names_the_callback_and_keeps_the_updates():
    class Fails(CountsCalls):
        def track_updates(self, state, updates):
            raise ValueError("no such loss")

    stretch, (state, event) = make_stretch(Fails(every_n_epochs=1, id="mine")), update(1)
    assert stretch.holds(state, event)
    for _ in range(2):  # the updates are not forgotten
        with pytest.raises(ValueError, match="no such loss") as caught:
            stretch.tell(state)
        assert "raised by the callback 'mine'" in caught.value.__notes__[0]
