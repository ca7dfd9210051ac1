"""Subclasses of the three base classes, as a user writes them."""

import dataclasses

import pytest
import torch

from noether.core.callback import listens_to
from noether.core.callbacks import CallbackBase, PeriodicCallback, PeriodicDataIteratorCallback
from noether.core.callbacks.base import HOOKS
from noether.core.effect import LogScalars, LogText
from noether.core.errors import Problem, SettingsError
from noether.core.event import (
    EVENTS,
    AfterAccumulationStep,
    AfterEpoch,
    AfterTraining,
    AfterUpdate,
    AtEval,
    BeforeTraining,
)
from noether.core.metrics import log
from noether.core.reducer import compose
from noether.core.run import Run
from noether.core.state import TrainState
from noether.core.tensors.tree import FrozenDict


class Clip(CallbackBase):
    """Halves the learning rate when the loss exceeds a threshold, and remembers how often it did."""

    threshold: float
    factor: float = 0.5

    @property
    def produces(self):
        return ("clip/times",)

    def init(self, state):
        return {self.name: 0}

    def name_parts(self):
        return (f"{self.threshold:g}",)

    def after_update(self, state, event):
        if event.losses["total"] <= self.threshold:
            return state, ()
        times = self.memory(state) + 1
        scale = state.hyperparams["lr_scale"] * self.factor
        state = state.remember(self.name, times).replace(hyperparams=state.hyperparams | {"lr_scale": scale})
        return log(state, event, {"clip/times": times})

    def after_training(self, state, event):
        return state, (LogText(f"clipped {self.memory(state)} times"),)


class Samples(PeriodicCallback):
    """Logs the samples since the last firing."""

    unit: str = "samples"

    def problems(self):
        yield from super().problems()
        if not self.unit:
            yield Problem("unit", "'' is not a name")

    def init(self, state):
        return {self.name: 0}

    def track_after_update_step(self, state, event):
        return state.remember(self.name, self.memory(state) + event.samples), (LogText("tracked"),)

    def periodic_callback(self, state, event, interval):
        return log(state.remember(self.name, 0), event, {f"{self.unit}/{interval}": self.memory(state)})


class Spread(PeriodicDataIteratorCallback):
    """Logs the difference between the largest and the smallest output on a dataset."""

    def process_data(self, state, batch, forward):
        return {"outputs": forward(state, batch)[1]}

    def process_results(self, state, event, results):
        outputs = results["outputs"]
        return log(state, event, {self.key("spread"): (outputs.max() - outputs.min()).item()})

    @property
    def produces(self):
        return (self.key("spread"),)


def test_a_subclass_of_callback_base():
    callback = Clip(threshold=1.0)
    assert callback == Clip(threshold=1.0, factor=0.5)
    assert callback.name == "Clip/1"
    assert Clip(threshold=1.0, id="mine").name == "mine"
    state, _ = compose(callback)(TrainState(), BeforeTraining())
    assert state.memory("Clip/1") == 0
    state = state.advance(samples=4)
    assert callback(state, AfterUpdate(losses={"total": 1.0})) == (state, ())
    after, effects = callback(state, AfterUpdate(losses={"total": 1.5}))
    assert effects == (LogScalars({"clip/times": 1}),)
    assert (after.hyperparams["lr_scale"], after.memory("Clip/1")) == (0.5, 1)
    assert callback(after, AfterTraining())[1] == (LogText("clipped 1 times"),)
    assert callback(state, AfterEpoch()) == (state, ())


def test_a_subclass_is_a_frozen_dataclass_with_keyword_only_fields():
    assert [field.name for field in dataclasses.fields(Clip)] == ["id", "threshold", "factor"]
    with pytest.raises(TypeError, match="positional"):
        Clip(1.0)
    with pytest.raises(TypeError, match="threshold"):
        Clip()
    with pytest.raises(dataclasses.FrozenInstanceError):
        Clip(threshold=1.0).threshold = 2.0
    assert repr(Clip(threshold=1.0)) == "Clip(id=None, threshold=1.0, factor=0.5)"
    assert hash(Clip(threshold=1.0)) == hash(Clip(threshold=1.0))


def test_a_callback_called_without_a_reducer_uses_its_initial_memory():
    after, _ = Clip(threshold=1.0)(TrainState().advance(samples=4), AfterUpdate(losses={"total": 2.0}))
    assert after.memory("Clip/1") == 1


@pytest.mark.parametrize("event_type", EVENTS)
def test_each_event_type_has_its_own_hook(event_type):
    hook = HOOKS[event_type]
    kind = type("Hook", (CallbackBase,), {hook: lambda self, state, event: (state, (LogText(type(event).__name__),))})
    callback, state = kind(), TrainState()
    assert callback(state, event_type()) == (state, (LogText(event_type.__name__),))
    assert [e for e in EVENTS if listens_to(callback, e)] == [event_type]
    assert all(callback(state, other()) == (state, ()) for other in EVENTS if other is not event_type)
    assert [e for e in EVENTS if listens_to(type("Sub", (kind,), {})(), e)] == [event_type]


def _name_event(self, state, event):
    return state, (LogText(type(event).__name__),)


@pytest.mark.parametrize(("base", "settings"), [(CallbackBase, {}), (PeriodicCallback, {"every_n_epochs": 2})])
def test_a_reducer_calls_a_subclass_that_overrides_only_call_on_every_event(base, settings):
    kind = type("Own", (base,), {"__call__": _name_event})
    for callback in (kind(**settings), type("Sub", (kind,), {})(**settings)):
        reducer, state = compose(callback), TrainState().advance(samples=4)
        for event_type in EVENTS:
            if event_type is not AfterAccumulationStep:  # a reducer refuses effects there
                assert reducer(state, event_type())[1] == (LogText(event_type.__name__),)
        with pytest.raises(ValueError, match="AfterAccumulationStep"):
            reducer(state, AfterAccumulationStep())


def test_a_reducer_calls_a_periodic_callback_that_overrides_an_event_hook():
    kind = type("Own", (PeriodicCallback,), {"after_accumulation_step": _name_event})
    assert AfterAccumulationStep in [e for e in EVENTS if listens_to(compose(kind(every_n_epochs=1)), e)]


def test_a_subclass_of_periodic_callback():
    callback, state, requests = Samples(every_n_updates=2), TrainState(), []
    for samples in (4, 4, 1, 4):
        state, effects = callback(state.advance(samples=samples), AfterUpdate(samples=samples))
        requests.append(effects)
    tracked = LogText("tracked")
    assert requests == [
        (tracked,),
        (tracked, LogScalars({"samples/update": 8})),
        (tracked,),
        (tracked, LogScalars({"samples/update": 5})),
    ]


@pytest.mark.parametrize(
    ("settings", "event_type", "expected"),
    [
        ({"every_n_epochs": 1}, AfterEpoch, "samples/epoch"),
        ({"every_n_samples": 3}, AfterUpdate, "samples/sample"),
        ({"every_n_updates": 1}, AfterUpdate, "samples/update"),
        ({"every_n_updates": 2, "at_end": True}, AfterTraining, "samples/end"),
        ({"every_n_updates": 1, "at_end": True}, AfterTraining, None),
        ({"every_n_epochs": 2}, AfterEpoch, None),
        ({"every_n_updates": 1}, AtEval, None),
    ],
)
def test_the_interval_argument_says_why_the_callback_fired(settings, event_type, expected):
    state = TrainState().advance(samples=4)
    state = state if event_type is AfterUpdate else state.next_epoch()
    _, effects = Samples(**settings)(state, event_type())
    logged = [key for effect in effects if isinstance(effect, LogScalars) for key in effect.values]
    assert logged == ([] if expected is None else [expected])


def test_problems_of_subclass_and_base_class_are_reported_together():
    with pytest.raises(SettingsError) as refused:
        Samples(unit="")
    assert [problem.setting for problem in refused.value.problems] == ["", "unit"]
    assert str(refused.value).endswith("\nunit: '' is not a name")


def test_a_subclass_of_periodic_data_iterator_callback():
    batches = [torch.tensor([1.0, 5.0]), torch.tensor([3.0])]
    run = Run(data={"val": batches}, forward=lambda state, batch: ({}, batch * state.params["w"]))
    callback = Spread(every_n_epochs=1, dataset_key="val")
    state = TrainState(params={"w": torch.tensor(2.0)}).advance(samples=4).next_epoch()
    after, effects = callback(state, AfterEpoch(run=run))
    assert effects == (LogScalars({"val/spread": 8.0}),)
    assert after.metrics["val/spread"].value == 8.0
    average = state.remember("weights/ema=0.9", {"params": {"w": torch.tensor(1.0)}, "buffers": FrozenDict()})
    again = Spread(every_n_epochs=1, dataset_key="val", weights="ema=0.9")
    assert again(average, AfterEpoch(run=run))[1] == (LogScalars({"val/spread/ema=0.9": 4.0}),)
    assert again.produces == ("val/spread/ema=0.9",)
    assert callback(state, AtEval(run=run))[1] == effects
    with pytest.raises(TypeError, match="dataset_key"):
        Spread(every_n_epochs=1)


def test_a_class_with_a_misspelt_hook_is_refused():
    class Misspelt(PeriodicCallback):
        def periodic_calback(self, state, event, interval):
            return state, ()

    class Empty(PeriodicDataIteratorCallback):
        def process_result(self, state, event, results):
            return state, ()

    with pytest.raises(SettingsError, match="Misspelt does nothing: define periodic_callback; did you mean 'periodic_"):
        Misspelt(every_n_epochs=1)
    with pytest.raises(
        SettingsError, match="Empty does nothing: define process_results; did you mean 'process_result'"
    ):
        Empty(every_n_epochs=1, dataset_key="val")


def test_at_a_standalone_evaluation_only_data_iterators_and_at_eval_act():
    class Fires(PeriodicCallback):
        def periodic_callback(self, state, event, interval):
            return state, (LogText(interval),)

    class Evaluates(Fires):
        def at_eval(self, state, event):
            return state, (LogText("own hook"),)

    run = Run(data={"val": [torch.tensor([1.0])]}, forward=None)
    state = TrainState().advance(samples=1)
    plain, own, iterator = (
        Fires(every_n_epochs=1),
        Evaluates(every_n_epochs=1),
        Spread(every_n_epochs=9, dataset_key="val"),
    )
    assert plain(state, AtEval(run=run)) == (state, ())
    assert own(state, AtEval(run=run))[1] == (LogText("own hook"),)
    assert [listens_to(each, AtEval) for each in (plain, own, iterator)] == [False, True, True]
    documented = " ".join(str(PeriodicCallback.periodic_callback.__doc__).split())
    assert "any other callback does nothing there, unless it defines `at_eval`" in documented
