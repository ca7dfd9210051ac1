"""Callbacks are pickled and copied, and go to spawned processes, where they decide the same."""

import copy
import multiprocessing
import pickle

import module_callbacks
import pytest

from noether.config.errors import ConfigError, LocatedProblem, Place
from noether.core.combinators import every_n_updates
from noether.core.declarations import DeclarationError, Misfit
from noether.core.effect import LogText
from noether.core.errors import Problem, SettingsError
from noether.core.event import AfterUpdate
from noether.core.reducer import compose
from noether.core.state import TrainState


@pytest.mark.parametrize("name", module_callbacks.EXAMPLES)
def test_a_pickled_callback_decides_the_same(name):
    example = module_callbacks.EXAMPLES[name]
    expected = module_callbacks.texts_of_a_run(example)
    assert any("Log" in text for text in expected)
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        assert module_callbacks.texts_of_a_run(pickle.loads(pickle.dumps(example, protocol))) == expected  # noqa: S301  # the bytes are from here


@pytest.mark.parametrize("name", module_callbacks.EXAMPLES)
@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy])
def test_a_copied_callback_decides_the_same(name, duplicate):
    example = module_callbacks.EXAMPLES[name]
    assert module_callbacks.texts_of_a_run(duplicate(example)) == module_callbacks.texts_of_a_run(example)


def test_callbacks_of_a_function_are_copied_and_their_captured_values_with_them():
    counts = [0]
    local = every_n_updates(2)(lambda state, event: (state, (LogText(str(counts)),)))
    duplicate = copy.deepcopy(compose(local))
    state = TrainState().advance(samples=1).advance(samples=1)
    assert duplicate(state, AfterUpdate())[1] == (LogText("[0]"),)


def test_a_decorated_function_of_a_module_is_pickled_by_name():
    for decorated in (module_callbacks.gated, module_callbacks.tracked, module_callbacks.Group.inner):
        assert pickle.loads(pickle.dumps(decorated)) is decorated  # noqa: S301  # the bytes are from here
    assert pickle.loads(pickle.dumps(compose(module_callbacks.gated))).members == (module_callbacks.gated,)  # noqa: S301  # the bytes are from here


def test_a_callback_without_a_name_in_a_module_is_refused_with_its_name():
    @every_n_updates(2)
    def hidden(state, event):
        return state, ()

    with pytest.raises((pickle.PicklingError, AttributeError), match=r"<locals>\.hidden"):
        pickle.dumps(hidden)


def test_a_spawned_process_decides_the_same():
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found = pool.apply(module_callbacks.texts_by_name, (module_callbacks.EXAMPLES,))
    assert found == module_callbacks.texts_by_name(module_callbacks.EXAMPLES)


@pytest.mark.parametrize(
    "error",
    [
        SettingsError([Problem("keep", "-1 is not a whole number of at least 1"), Problem("", "no interval is set")]),
        DeclarationError([Misfit(module_callbacks.texts_of_a_run, "a and b both produce 'loss'")]),
        ConfigError([LocatedProblem(Place("a.yaml", 3), ("callbacks", 2), "is missing")]),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_of_a_spawned_process_says_the_same_in_its_parent(error):
    error.add_note("raised by the callback 'say'")
    loaded = pickle.loads(pickle.dumps(error))  # noqa: S301  # the bytes are from here
    assert (type(loaded), str(loaded), loaded.__notes__) == (type(error), str(error), error.__notes__)
    assert vars(loaded).keys() == vars(error).keys()
