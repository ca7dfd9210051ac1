"""Callbacks that are called once for several deferred updates do what they would do at each."""

from random import Random

import pytest
import torch
from law_examples import slow_except

from noether import (
    AfterAccumulationStep,
    AfterUpdate,
    EMACallback,
    EveryNSamples,
    EveryNUpdates,
    GradNormCallback,
    LogText,
    LrCallback,
    NanGuardCallback,
    OnlineLossCallback,
    ProgressCallback,
    TrainingIteration,
    TrainState,
    TrainTimeCallback,
    compose,
    every_n_epochs,
    every_n_updates,
    on,
)
from noether.core.callbacks.periodic import PeriodicCallback
from noether.core.effect import LogUpdates
from noether.core.errors import CallbackError, SettingsError
from noether.core.reducer import remaining_effects
from noether.core.stretch import Stretch
from noether.core.tensors.tree import FrozenDict
from noether.effects.interpreter import Interpreter
from noether.testing import LawError, check_stretches

CALLBACKS = {
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
def test_shipped_callbacks_may_be_called_later(seed):
    random = Random(seed)  # noqa: S311  # no secret
    names = random.sample(sorted(CALLBACKS), random.randint(1, len(CALLBACKS)))
    callbacks = [CALLBACKS[name](**random.choice(INTERVALS), at_end=random.random() < 0.3) for name in names]
    check_stretches(compose(*callbacks, *([say_update] if random.random() < 0.5 else [])), examples=10)


@pytest.mark.parametrize("name", sorted(CALLBACKS))
def test_a_callback_with_an_interval_of_one_update_obeys_the_law(name):
    check_stretches(CALLBACKS[name](every_n_updates=1), examples=10)


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


@pytest.mark.usefixtures("first_counterexample")
@pytest.mark.parametrize("kind", [CountsCalls, ReadsTheState, ReadsOutputs])
def test_the_law_catches_what_depends_on_the_call(kind):
    with pytest.raises(LawError, match="several updates"):
        check_stretches(kind(every_n_epochs=1), examples=200)


def test_the_law_catches_an_effect_that_comes_too_late():
    with pytest.raises(LawError, match=r"requested LogText\(.*\) for deferred updates"):
        check_stretches(LogsText(every_n_epochs=1), examples=200)


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
    ],
)
def test_a_callback_that_has_to_see_each_update_defers_none(callback):
    assert not make_stretch(callback).defer(*update(1))


class OtherFirings(LrCallback):
    def periodic_callback(self, state, event, interval):
        return state, (LogText("lr"),)


class OtherUpdates(LrCallback):
    def after_update(self, state, event):
        return state, (LogText("lr"),)


class OtherEvents(LrCallback):
    def __call__(self, state, event):
        return state, (LogText("lr"),)


@pytest.mark.parametrize("kind", [OtherFirings, OtherUpdates, OtherEvents])
def test_a_subclass_with_other_firings_sees_each_update(kind):
    reducer, (state, event) = compose(kind(every_n_updates=1)), update(2)
    assert not reducer.can_defer(state, event)
    assert reducer(state, event)[1] == (LogText("lr"),)


class CountsFirings(LrCallback):
    """Fires as its parent does, and counts."""

    def init(self, state):
        return {"firings": 0}

    def periodic_callback(self, state, event, interval):
        state, effects = super().periodic_callback(state, event, interval)
        return state.remember("firings", state.memory("firings") + 1), effects

    def fire_updates(self, state, updates):
        state, effects = super().fire_updates(state, updates)
        return state.remember("firings", state.memory("firings") + len(updates)), effects


def test_a_subclass_that_defines_both_kinds_of_firings_may_be_called_later():
    check_stretches(CountsFirings(every_n_updates=1), examples=10)


class StartsLater(LrCallback):
    @property
    def schedule(self):
        return EveryNUpdates(1).starting(TrainingIteration(update=3)) | EveryNSamples(20)


def test_deferred_firings_keep_to_the_window_of_their_schedule():
    check_stretches(StartsLater(every_n_updates=1), examples=20)


def test_an_update_with_a_line_of_progress_is_deferred():
    stretch = make_stretch(ProgressCallback(every_n_updates=2))
    held = [stretch.defer(*update(number, duration_s=0.1)) for number in range(1, 6)]
    state = stretch.call_callbacks(update(5)[0])
    assert held == [True] * 5
    assert [(memory["lines"], memory["since_updates"]) for memory in state.callback_states.values()] == [(2, 1)]


class Says(OnlineLossCallback):
    def track_after_update_step(self, state, event):
        state, effects = super().track_after_update_step(state, event)
        return state, (*effects, LogText(f"{state.iteration}"))


class SaysAfter(OnlineLossCallback):
    def after_update(self, state, event):
        state, effects = super().after_update(state, event)
        return state, (*effects, LogText(f"{state.iteration}"))


@pytest.mark.parametrize("kind", [Says, SaysAfter])
def test_a_subclass_that_extends_the_hook_of_single_updates_tracks_them(kind):
    reducer, (state, event) = compose(kind(every_n_updates=2)), update(1, losses={"total": 0.5})
    assert not reducer.can_defer(state, event)
    state, effects = reducer(state, event)
    assert effects == (LogText("E0_U1_S2"),)
    assert state.memory(f"{kind.__name__}/U2")["sums"]["total"] == 1.0


def test_an_update_without_samples_is_no_firing_for_an_interval_of_one_sample():
    reducer, state, rows = compose(LrCallback(every_n_samples=1)), TrainState(), []
    stretch = Stretch(reducer, Interpreter({LogUpdates: [lambda effect, *_: rows.extend(effect.rows)]}))
    for samples in (2, 2, 0, 0, 2):
        state, event = state.advance(samples=samples), AfterUpdate(samples=samples, lr={"default": 0.1})
        assert len(compose(LrCallback(every_n_samples=1))(state, event)[1]) == bool(samples)
        assert stretch.defer(state, event)
    stretch.run_effects(stretch.call_callbacks(state))
    assert [row.iteration.update for row in rows] == [1, 2, 5]


@pytest.mark.parametrize("hook", ["can_defer", "fire_updates"])
def test_a_class_that_only_defers_updates_does_nothing(hook):
    kind = type("Waits", (PeriodicCallback,), {hook: getattr(LrCallback, hook)})
    with pytest.raises(SettingsError, match="Waits does nothing: define periodic_callback"):
        kind(every_n_updates=1)


class Stops(CountsCalls):
    def track_updates(self, state, updates):
        return state.request_stop("enough"), ()


class Scales(CountsCalls):
    def track_updates(self, state, updates):
        return state.replace(hyperparams=FrozenDict(lr_scale=0.5)), ()


@pytest.mark.parametrize(
    ("kind", "late"),
    [(Stops, "changed state.stop"), (Scales, "changed state.hyperparams"), (LogsText, "requested LogT")],
)
def test_what_comes_too_late_for_deferred_updates_is_refused(kind, late):
    stretch, (state, event) = make_stretch(kind(every_n_epochs=1)), update(1)
    assert stretch.defer(state, event)
    with pytest.raises(CallbackError, match=rf"{kind.__name__}/E1 {late}.*let can_defer return False"):
        stretch.call_callbacks(state)
    assert compose(kind(every_n_epochs=1))(state, event)  # alone, an update may be answered


def test_an_update_at_which_a_gate_opens_is_not_deferred():
    reducer = compose(say_update, every_n_epochs(1)(lambda state, event: (state, ())))
    stretch, held = Stretch(reducer, Interpreter({LogUpdates: []})), []
    for number in range(1, 8):
        state, event = update(number)
        held.append(stretch.defer(state, event))
        if not held[-1]:
            reducer(stretch.call_callbacks(state), event)
    assert held == [True, True, False, True, True, False, True]


@pytest.mark.parametrize("clock", [[0.0, 0.1, 0.2, 0.3], [5.0, 5.2, 4.0, 4.1]], ids=["slow", "set back"])
def test_a_stretch_ends_after_a_quarter_of_a_second(clock):
    stretch = make_stretch(OnlineLossCallback(every_n_epochs=1))
    held = [stretch.defer(*update(number + 1, time_s=time_s)) for number, time_s in enumerate(clock)]
    assert held == ([True, True, True, False] if clock[0] == 0 else [True, True, False, False])


def test_an_update_that_takes_long_is_not_deferred():
    assert not make_stretch(OnlineLossCallback(every_n_epochs=1)).defer(*update(1, duration_s=0.3))


def test_a_deferred_update_keeps_no_outputs():
    state, event = update(1, outputs=torch.ones(3), losses=FrozenDict(total=torch.ones(())))
    assert make_stretch(OnlineLossCallback(every_n_epochs=1)).defer(state, event)
    assert (event.outputs, sorted(event.losses)) == (None, ["total"])


@pytest.mark.parametrize("interpreter", [lambda effects, state, event: None, Interpreter({})])
def test_an_interpreter_that_takes_single_updates_defers_none(interpreter):
    assert not Stretch(compose(say_update), interpreter).defer(*update(1))


def test_an_error_names_the_callback_and_keeps_the_updates():
    class Fails(CountsCalls):
        def track_updates(self, state, updates):
            raise ValueError("no such loss")

    lr = LrCallback(every_n_updates=1)
    stretch, (state, event) = make_stretch(lr, Fails(every_n_epochs=1, id="mine")), update(2, lr={"default": 0.1})
    assert stretch.defer(state, event)
    for _ in range(2):  # the updates are not forgotten
        with pytest.raises(ValueError, match="no such loss") as caught:
            stretch.call_callbacks(state)
        assert "raised by the callback 'mine'" in caught.value.__notes__[0]
        assert [len(effect.rows) for effect in remaining_effects(caught.value)] == [1]  # of the callback before


def test_a_class_tracks_updates_in_one_way():
    class TracksTwice(CountsCalls):
        def track_updates(self, state, updates):
            return state, ()

        def track_after_update_step(self, state, event):
            return state, ()

    with pytest.raises(SettingsError, match="defines track_updates and track_after_update_step: keep one of them"):
        TracksTwice(every_n_updates=1)


def test_a_subclass_tracks_updates_as_its_base_does():
    class Tracks(CountsCalls):
        def track_after_update_step(self, state, event):
            return state, ()

    class TracksSeveral(Tracks):
        def track_updates(self, state, updates):
            return state, ()

    with pytest.raises(SettingsError, match="track_after_update_step, the latter in Tracks: keep one of them"):
        TracksSeveral(every_n_updates=1)
    Tracks(every_n_updates=1)  # which may call `track_updates` of its base


def test_a_class_that_tracks_each_update_cannot_say_which_are_deferred():
    class Waits(PeriodicCallback):
        def track_after_update_step(self, state, event):
            return state, ()

        def can_defer(self, state, event):
            return False

    with pytest.raises(SettingsError, match="Waits defines can_defer, called only before track_updates"):
        Waits(every_n_updates=1)
