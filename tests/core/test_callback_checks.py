"""Common slips in callbacks: refused where they are composed if that shows them, else at the event, with the fix."""

import functools
import re
from dataclasses import FrozenInstanceError

import pytest

from noether.core.callbacks import (
    BestCheckpointCallback,
    CallbackBase,
    CheckpointCallback,
    EMACallback,
    OfflineLossCallback,
    OnlineLossCallback,
    PeriodicCallback,
    PeriodicDataIteratorCallback,
)
from noether.core.combinators import callback, every_n_epochs, every_n_samples, every_n_updates, on, when
from noether.core.effect import LogText
from noether.core.errors import CallbackError, SettingsError
from noether.core.event import AfterEpoch, AfterUpdate, BeforeTraining
from noether.core.loop import dispatch
from noether.core.metrics import log
from noether.core.reducer import compose
from noether.core.schedules.schedule import EveryNUpdates
from noether.core.state import TrainState

STATE = TrainState().advance(samples=1)


def nothing(state, event):
    return state, ()


# ------------------------------------------------------------------------------------------------ results


async def wait(state, event):
    return state, ()


SLIPS = {
    "no return": (lambda s, e: None, "returned None, not (state, effects): write `return state, ()`"),
    "state only": (lambda s, e: s, "returned a TrainState, not (state, effects)"),
    "effects only": (lambda s, e: (LogText("x"),), "returned (LogText), not (state, effects)"),
    "three": (lambda s, e: (s, (), 3), "returned (TrainState, tuple, int), not (state, effects)"),
    "swapped": (lambda s, e: ((), s), "returned (tuple, TrainState), not (state, effects)"),
    "another state": (lambda s, e: (object(), ()), "returned (object, tuple), not (state, effects)"),
    "coroutine": (lambda s, e: wait(s, e), "returned a coroutine, not (state, effects)"),  # noqa: PLW0108  # hides it
    "list": (
        lambda s, e: (s, [LogText("x")]),
        "returned a list as effects, not a tuple: write `return state, (effect,)`",
    ),
    "empty list": (lambda s, e: (s, []), "returned a list as effects, not a tuple"),
    "no effects": (lambda s, e: (s, None), "returned None as effects, not a tuple"),
    "bare effect": (lambda s, e: (s, LogText("x")), "returned LogText(text='x') as effects, not a tuple"),
}
TEXT = (
    lambda s, e: (s, ("loss is 3",)),
    "returned 'loss is 3' among its effects: effects are objects such as LogText(",
)


@pytest.mark.parametrize(("body", "message"), [*SLIPS.values(), TEXT], ids=[*SLIPS, "text"])
@pytest.mark.parametrize("wrap", [lambda body: body, every_n_updates(1), on(AfterUpdate), callback("other")])
def test_a_wrong_result_is_refused_with_the_name_of_the_callback(body, message, wrap):
    @functools.wraps(body)
    def slips(state, event):
        return body(state, event)

    slips.__name__, slips.__wrapped__ = "slips", nothing
    wrapped = wrap(slips)
    with pytest.raises(CallbackError) as refused:
        compose(wrapped)(STATE, AfterUpdate())
    assert str(refused.value).startswith(("slips ", "other "))
    assert message in str(refused.value)


@pytest.mark.parametrize(("body", "message"), SLIPS.values(), ids=SLIPS)
def test_dispatch_refuses_a_wrong_result_of_a_callback_without_reducer(body, message):
    with pytest.raises(CallbackError) as refused:
        dispatch(STATE, AfterUpdate(), body, lambda effects, state, event: None)
    assert message in str(refused.value)


class Hooks(PeriodicCallback):
    """Returns what a test sets from its hooks."""

    tracked: object = ((),)
    fired: object = ((),)

    def track_after_update_step(self, state, event):
        return self.tracked

    def periodic_callback(self, state, event, interval):
        return self.fired


@pytest.mark.parametrize("interval", [{"every_n_updates": 1}, {"every_n_epochs": 1}])
def test_hooks_are_named_by_errors(interval):
    hooks = Hooks(**interval, tracked=STATE)
    with pytest.raises(CallbackError, match=r"^Hooks/.1\.track_after_update_step returned a TrainState, not"):
        hooks(STATE, AfterUpdate())
    with pytest.raises(CallbackError, match=r"^Hooks/.1.* returned a TrainState, not"):
        compose(hooks)(STATE, AfterUpdate())
    hooks = Hooks(every_n_updates=1, tracked=(STATE, ()), fired=None)
    with pytest.raises(CallbackError, match=r"^Hooks/U1\.periodic_callback returned None, not"):
        compose(hooks)(STATE, AfterUpdate())
    with pytest.raises(CallbackError, match=r"^Hooks/E1 returned None, not"):
        compose(Hooks(every_n_epochs=1, fired=None))(STATE.next_epoch(), AfterEpoch())


def test_memory_functions_return_memory():
    def forgets(memory, event):
        pass

    with pytest.raises(CallbackError, match="track of 'seen' returned None, not the memory: write `return memory`"):
        callback("seen", init=lambda state: 0, track=forgets)(nothing)(STATE, AfterUpdate())
    empty = callback("seen", init=lambda state: None, track=forgets)(nothing)
    assert empty(STATE, AfterUpdate())[0].memory("seen") is None

    class Bare(CallbackBase):
        def init(self, state):
            return 3

    with pytest.raises(CallbackError, match=r"init of Bare returned 3, not {name: memory}"):
        compose(Bare())(STATE, BeforeTraining())


def test_a_predicate_returns_true_or_false():
    def forgets(state, event):
        pass

    with pytest.raises(CallbackError, match="the predicate 'forgets' of when returned None, not True or False"):
        when(forgets)(nothing)(STATE, AfterUpdate())


# ------------------------------------------------------------------------------------------------ what is no callback


def generate(state, event):
    yield state


class Class:
    def __call__(self, state, event):
        return state, ()


class AsyncInstance:
    async def __call__(self, state, event):
        return state, ()


DECORATORS = {
    "every_n_updates": every_n_updates(1),
    "every_n_epochs": every_n_epochs(1),
    "every_n_samples": every_n_samples(1),
    "schedule": when(EveryNUpdates(1)),
    "predicate": when(lambda state, event: True),
    "on": on(AfterUpdate),
    "callback": callback("c"),
    "compose": compose,
}


@pytest.mark.parametrize("decorate", DECORATORS.values(), ids=DECORATORS)
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (Class, "got <class .*Class'>: pass an instance, Class"),
        (None, "got None"),
        (3, "got 3"),
        ("noether.core.callbacks.LrCallback", "got 'noether.core"),
        ([nothing], "got .*nothing"),
        (wait, "got 'wait', which is an async function"),
        (generate, "got 'generate', which is a generator function"),
        (AsyncInstance(), "got 'AsyncInstance', which is an async function"),
        (functools.partial(wait), "got 'wait', which is an async function"),
        (lambda state: (state, ()), r"got '<lambda>', which takes \(state\), not \(state, event\)"),
        (lambda event, state: (state, ()), r"got '<lambda>', which takes \(event, state\), not \(state, event\)"),
        (lambda **settings: None, r"got '<lambda>', which takes \(\*\*settings\), not \(state, event\)"),
        (lambda: None, r"got '<lambda>', which takes \(\), not \(state, event\)"),
    ],
)
def test_decorators_refuse_other_objects_with_one_message(decorate, wrong, message):
    with pytest.raises(CallbackError, match=rf" takes callbacks \(state, event\) -> \(state, effects\), {message}"):
        decorate(wrong)


@pytest.mark.parametrize("right", [lambda *args: (args[0], ()), lambda s, e, *, text="x": (s, ()), Class()])
@pytest.mark.parametrize("decorate", DECORATORS.values(), ids=DECORATORS)
def test_decorators_accept_whatever_can_be_called(decorate, right):
    assert compose(decorate(right))(STATE, AfterUpdate()) == (STATE, ())


def test_a_setting_without_value_is_refused_where_the_function_is_composed():
    def greet(state, event, *, text):
        return state, (LogText(text),)

    greets = every_n_updates(1)(greet)
    with pytest.raises(CallbackError, match=r"greet has no value for text: pass functools.partial\(greet, text=...\)"):
        compose(greets)
    assert compose(functools.partial(greet, text="x"))(STATE, AfterUpdate())[1] == (LogText("x"),)


@pytest.mark.parametrize("wrong", [None, 3, EveryNUpdates, wait, generate, lambda state: True, lambda: True])
def test_when_refuses_what_is_neither_schedule_nor_predicate(wrong):
    with pytest.raises(TypeError, match=r"^when takes a schedule such as EveryNUpdates\(2\), or a predicate"):
        when(wrong)


@pytest.mark.parametrize("other", [None, 3, EveryNUpdates])
def test_a_schedule_is_united_with_a_schedule_only(other):
    for unite in (lambda: EveryNUpdates(2) | other, lambda: other | EveryNUpdates(2)):
        with pytest.raises(TypeError, match=r"^a schedule can be united with a schedule only, like EveryNUpdates\(2\)"):
            unite()


def test_the_arguments_of_callback_are_checked():
    with pytest.raises(TypeError, match="callback takes the name of the memory"):
        callback(nothing)
    with pytest.raises(TypeError, match=r"callback 'x': its init takes \(\), not \(state\)"):
        callback("x", init=lambda: 0)
    with pytest.raises(TypeError, match="callback 'x': its init is 0, not a function"):
        callback("x", init=0)
    with pytest.raises(TypeError, match=r"callback 'x': its track takes \(memory\), not \(memory, event\)"):
        callback("x", init=lambda state: 0, track=lambda memory: memory)
    for name in ("produces", "consumes", "readings"):
        with pytest.raises(TypeError, match=rf"x: {name} is 'loss', not a tuple: write \('loss',\)"):
            callback("x", **{name: "loss"})


# ------------------------------------------------------------------------------------------------ hooks


def subclass(base=CallbackBase, **methods):
    return type("Mine", (base,), methods)


async def async_hook(self, state, event):
    return state, ()


HOOKS = [
    (CallbackBase, {"after_update": lambda self, state: None}, r"after_update takes \(state\), not \(state, event\)"),
    (CallbackBase, {"after_epoch": lambda self, event, state: None}, r"after_epoch takes \(event, state\), not"),
    (CallbackBase, {"at_eval": lambda self, **kwargs: None}, r"at_eval takes \(\*\*kwargs\), not \(state, event\)"),
    (CallbackBase, {"before_training": async_hook}, "before_training is an async function"),
    (CallbackBase, {"after_training": None}, "after_training is None, not a function"),
    (CallbackBase, {"init": lambda self: {}}, r"init takes \(\), not \(state\): write def init\(self, state\)"),
    (
        PeriodicCallback,
        {"periodic_callback": lambda self, *, interval_type, **kwargs: None},
        r"periodic_callback takes \(\*, interval_type, \*\*kwargs\), not .*: write def periodic_callback\(self, sta",
    ),
    (
        PeriodicCallback,
        {"track_after_update_step": lambda self, state: None},
        r"track_after_update_step takes \(state\), not \(state, event\)",
    ),
    (
        PeriodicDataIteratorCallback,
        {"process_data": lambda self, batch, *, model: None},
        r"process_data takes \(batch, \*, model\), not \(state, batch, forward\)",
    ),
    (
        PeriodicDataIteratorCallback,
        {"process_results": lambda self, results: None},
        r"process_results takes \(results\), not \(state, event, results\)",
    ),
]


def nothing_in(self, state, event):
    return state, ()


def settings_of(base):
    interval = {} if base is CallbackBase else {"every_n_epochs": 1}
    return interval | ({"dataset_key": "val"} if base is PeriodicDataIteratorCallback else {})


@pytest.mark.parametrize(("base", "methods", "message"), HOOKS)
def test_a_hook_that_cannot_be_called_is_refused_at_construction(base, methods, message):
    with pytest.raises(SettingsError, match=rf"^Mine\.{message}"):
        subclass(base, **methods)(**settings_of(base))


@pytest.mark.parametrize("hook", [lambda self, *args: (args[0], ()), lambda self, s, e: (s, ()),
                                  lambda self, state, event, more=1: (state, ()), staticmethod(nothing)])  # fmt: skip
def test_a_hook_may_have_other_names_and_further_parameters(hook):
    assert subclass(after_update=hook)()(STATE, AfterUpdate()) == (STATE, ())


@pytest.mark.parametrize(
    ("base", "name", "hook"),
    [
        (CallbackBase, "after_epochs", "after_epoch"),
        (CallbackBase, "on_after_update", "after_update"),
        (CallbackBase, "before_trainning", "before_training"),
        (PeriodicCallback, "track_after_update", "track_after_update_step"),
        (PeriodicCallback, "periodic_callbacks", "periodic_callback"),
    ],
)
def test_a_misspelt_hook_is_refused_with_the_right_name(base, name, hook):
    methods = {"after_training": nothing_in} if base is PeriodicCallback else {}
    with pytest.raises(SettingsError, match=rf"^Mine\.{name} is no hook, so it is never called; did you mean '{hook}'"):
        subclass(base, **methods, **{name: lambda self, state, event: (state, ())})(**settings_of(base))
    subclass(base, **methods, **{hook: lambda self, *args: (args[0], ()), name: lambda self: None})(**settings_of(base))


def test_a_single_value_for_a_list_is_refused():
    with pytest.raises(SettingsError, match=r"^target_factors: 0.999 is not a list; write \[0.999\]$"):
        EMACallback(every_n_updates=1, target_factors=0.999)


@pytest.mark.parametrize("name", ["on_train_epoch_end", "_periodic_callback", "periodic_callback"])
def test_a_class_of_which_no_method_is_called_is_refused(name):
    with pytest.raises(
        SettingsError, match=rf"^Mine does nothing, as noether never calls {name}: define one of before_"
    ):
        subclass(**{name: nothing_in})()


@pytest.mark.parametrize("base", [CallbackBase, PeriodicCallback])
@pytest.mark.parametrize("name", ["_after_training", "after_trainings"])
def test_a_name_close_to_a_hook_is_refused_beside_other_hooks(base, name):
    hook = "after_update" if base is CallbackBase else "periodic_callback"
    with pytest.raises(
        SettingsError, match=rf"^Mine\.{name} is no hook, so it is never called; did you mean 'after_tr"
    ):
        subclass(base, **{hook: lambda self, *args: (args[0], ()), name: nothing_in})(**settings_of(base))


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (EMACallback, {"target_factors": None}, r"^target_factors: None is not a list; leave it out$"),
        (BestCheckpointCallback, {"metric_key": ["loss/val"]}, r"^metric_key: \['loss/val'\] is not text$"),
        (BestCheckpointCallback, {"metric_key": None}, "^metric_key: None is not text$"),
        (CheckpointCallback, {"save_weights": "yes"}, "^save_weights: 'yes' is not True or False$"),
        (CheckpointCallback, {"at_end": "no"}, "^at_end: 'no' is not True or False$"),
        (OfflineLossCallback, {"dataset_key": "val", "weights": 0.9}, "^weights: 0.9 is not text$"),
    ],
)
def test_a_setting_of_another_type_is_refused(kind, settings, message):
    with pytest.raises(SettingsError, match=message):
        kind(every_n_epochs=1, **settings)


def test_an_assignment_to_a_callback_says_where_settings_and_memory_are():
    class Count(CallbackBase):
        def after_update(self, state, event):
            self.count = 1
            return state, ()

    class Init(CallbackBase):
        def __init__(self, count):
            self.count = count

    right = (
        "cannot assign to field 'count' of {}, which is frozen: a setting is a field of the class, `count: ...`, with"
    )
    with pytest.raises(FrozenInstanceError, match=re.escape(right.format("Count"))):
        Count()(STATE, AfterUpdate())
    with pytest.raises(FrozenInstanceError, match=re.escape(right.format("Init"))):
        Init(3)


@pytest.mark.parametrize(
    ("effects", "message"),
    [
        (
            lambda state, event: log(state, event, {"a": 1.0}),
            r"a state among its effects: write `return log\(\.\.\.\)`",
        ),
        (lambda state, event: (LogText,), r"the class LogText among its effects: write LogText\(\.\.\.\)"),
        (
            lambda state, event: ((LogText("x"),),),
            r"a tuple among its effects: write `return state, \(\*first, \*second",
        ),
    ],
)
def test_what_is_no_effect_is_refused_with_what_to_write(effects, message):
    def mine(state, event):
        return state, effects(state, event)

    with pytest.raises(CallbackError, match=f"^mine returned {message}"):
        compose(mine)(STATE, AfterUpdate())


def test_declarations_that_are_methods_or_text_are_refused():
    with pytest.raises(CallbackError, match="consumes is a method, not a tuple: write @property above def consumes"):
        compose(subclass(after_update=nothing_in, consumes=lambda self: ("loss",))())
    with pytest.raises(SettingsError, match=r"readings is 'grad_norm', not a tuple: write \('grad_norm',\)"):
        subclass(after_update=nothing_in, readings="grad_norm")()


def test_a_gate_around_a_reducer_names_the_member_that_tracks():
    with pytest.raises(
        CallbackError, match=r"^OnlineLossCallback/U1 tracks every update, but behind when it would miss"
    ):
        when(lambda state, event: True)(compose(OnlineLossCallback(every_n_updates=1)))


@pytest.mark.parametrize("values", [0.5, None, [("loss", 0.5)]])
def test_metrics_without_names_are_refused(values):
    with pytest.raises(TypeError, match=r"^log takes values by metric key, such as "):
        log(STATE, AfterUpdate(), values)
