"""Types of effects that a callback declares: kept by all decorators, and refused where they are no types of effects."""

import functools

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from noether import (
    AfterEpoch,
    Effect,
    LogText,
    callback,
    compose,
    every_n_epochs,
    every_n_updates,
    on,
    when,
)
from noether.core.callback import declaration_of
from noether.core.callbacks.base import CallbackBase
from noether.core.errors import CallbackError, SettingsError
from noether.core.wrappers import bind_settings
from noether.effects.handled_effects import find_unhandled


class Ring(Effect):
    pass


class Knock(Effect):
    pass


class Bell(CallbackBase):
    effects = (Ring,)

    def after_epoch(self, state, event):
        return state, (Ring(),)


class Door(CallbackBase):
    @property
    def effects(self):
        return (Knock, Ring)


def ring(state, event):
    return state, (Ring(),)


def quiet(state, event, *, volume=1):
    return state, ()


LEAVES = {
    "class": (Bell(), {Ring}),
    "property": (Door(), {Knock, Ring}),
    "function": (callback("ring", effects=(Ring,))(ring), {Ring}),
    "above": (callback("outer", effects=(Knock,))(callback("inner", effects=(Ring,))(ring)), {Knock, Ring}),
    "none": (quiet, set()),
    "settings": (bind_settings(callback("quiet", effects=(Knock,))(quiet), {"volume": 2}), {Knock}),
}
AROUND = {
    "epochs": every_n_epochs(2),
    "updates": every_n_updates(3, at_end=True),
    "on": on(AfterEpoch),
    "when": when(lambda state, event: False),
    "callback": callback("named"),
    "compose": compose,
}
NESTED = st.recursive(
    st.sampled_from(sorted(LEAVES)).map(LEAVES.__getitem__),
    lambda inner: st.lists(inner, min_size=1, max_size=3).map(
        lambda pairs: (compose(*(each for each, _ in pairs)), set().union(*(kinds for _, kinds in pairs)))
    ),
    max_leaves=5,
)


@given(NESTED, st.lists(st.sampled_from(["callback", "compose"]), max_size=3), st.sampled_from(sorted(AROUND)))
@settings(max_examples=60)
def test_all_decorators_keep_the_declared_effects(nested, around, gate):
    decorated, kinds = nested
    for name in [gate, *around]:
        decorated = AROUND[name](decorated)
    declared = declaration_of(decorated).effects
    assert (set(declared), len(declared)) == (kinds, len(set(declared)))
    named = [text.split(" which")[0].split()[-1].rstrip(",") for text in find_unhandled(decorated, lambda _: False)]
    assert sorted(named) == sorted(kind.__name__ for kind in kinds)
    assert list(find_unhandled(decorated, kinds.__contains__)) == []


REFUSED = {
    "class": (Ring, "effects is the class Ring, not a tuple: write (Ring,)"),
    "text": ("Ring", "effects is 'Ring', not a tuple: write (MyEffect,)"),
    "None": (None, "effects is None, not a tuple: write (MyEffect,)"),
    "effect": ((LogText("a"),), "effects holds LogText(text='a'), not a type of effect: write LogText"),
    "other": ((int,), "effects holds <class 'int'>, not a type of effect: write a subclass of noether.Effect"),
    "method": (lambda self: (), "effects is a method, not a tuple: write @property above def effects"),
}


@pytest.mark.parametrize(("declared", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_tuple_of_types_of_effects_is_refused(declared, message):
    kind = type("Broken", (CallbackBase,), {"effects": declared, "__module__": __name__})
    with pytest.raises(SettingsError) as in_class:
        kind()
    assert str(in_class.value) == f"Broken: {message}"
    with pytest.raises(CallbackError) as in_decorator:
        callback("broken", effects=declared)(ring)
    assert str(in_decorator.value) == f"broken: {message}"

    def plain(state, event):
        return state, ()

    plain.effects = declared
    with pytest.raises(CallbackError) as in_function:
        compose(plain)
    assert str(in_function.value) == f"plain: {message}"


def test_a_partial_that_hides_declared_effects_is_refused():
    hiding = functools.partial(Bell())
    with pytest.raises(CallbackError, match="the wrapper around Bell hides its effects: wrap"):
        compose(hiding)
    hiding.effects = Bell.effects
    assert declaration_of(compose(hiding)).effects == (Ring,)


def test_the_message_names_callback_effect_and_what_to_write():
    (text,) = find_unhandled(every_n_epochs(2)(callback("night", effects=(Knock,))(quiet)), lambda _: False)
    module = __name__
    assert text == (
        "night requests the effect Knock, which has no handler: write a function handle_knock(effect, state, event), "
        f"and name it in YAML, run.handlers: {{{module}.Knock: {module}.handle_knock}}, or in Python, "
        f"interpreter=directory.interpreter.with_handlers({module}.Knock, handle_knock)"
    )
