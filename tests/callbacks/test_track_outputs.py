"""`TrackOutputsCallback`: chosen outputs, their means, their files, and refused outputs."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from noether.core.callbacks import TrackOutputsCallback
from noether.core.callbacks.track_outputs import TrackAdditionalOutputsCallback
from noether.core.declarations import DeclarationError
from noether.core.effect import LogScalars, SaveTensors
from noether.core.errors import OutputError, SettingsError
from noether.core.event import AfterEpoch, AfterTraining, AfterUpdate, AtEval, BeforeTraining
from noether.core.metric_keys import keys_overlap
from noether.core.reducer import compose
from noether.core.state import TrainState
from noether.core.tensors.tree import tensors
from noether.effects import open_run
from noether.effects.interpreter import merge_effects
from noether.testing import same

NAN = math.nan
PATTERNS = "; if only some updates have it, write patterns: [drift]"
VALUES = st.floats(-1e3, 1e3)


def go(callback, updates, state=None):
    """Return the state after updates with these readings, and the requests at each."""
    state, requests = state or TrainState(), []
    for readings in updates:
        event = AfterUpdate(**{"samples": 4, **readings})
        state, effects = callback(state.advance(samples=event.samples), event)
        requests.append(effects)
    return state, requests


def outputs(**named):
    return {"outputs": named}


def logged_values(effects):
    """Return the values that the effects of one event log, as numbers."""
    return {
        key: float(value)
        for effect in effects
        if isinstance(effect, LogScalars)
        for key, value in effect.values.items()
    }


def saved_tensors(effects):
    """Return the name and the tensors of the only effect that saves."""
    (effect,) = (effect for effect in effects if isinstance(effect, SaveTensors))
    return effect.name, {name: tensor.tolist() for name, tensor in effect.tensors.items()}


# --- which outputs

NAMED = {"residual": 1.0, "attention_in": 2.0, "attention_out": 3.0, "residual_norm": 4.0}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"keys": ("residual",)}, ["residual"]),
        ({"keys": ("residual_norm", "residual")}, ["residual", "residual_norm"]),
        ({"patterns": ("attention",)}, ["attention_in", "attention_out"]),
        ({"patterns": ("out", "norm")}, ["attention_out", "residual_norm"]),
        ({"keys": ("residual",), "patterns": ("_in",)}, ["residual", "attention_in"]),
        ({"keys": ("residual",), "patterns": ("residual",)}, ["residual", "residual_norm"]),
    ],
)
@pytest.mark.parametrize("reduce", ["mean", "last"])
def test_keys_match_whole_names_and_patterns_parts_of_names(settings, expected, reduce):
    _, (effects,) = go(TrackOutputsCallback(every_n_updates=1, reduce=reduce, **settings), [outputs(**NAMED)])
    assert logged_values(effects) == {f"{name}/U1": NAMED[name] for name in expected}


def test_other_outputs_may_have_any_type():
    _, (effects,) = go(
        TrackOutputsCallback(every_n_updates=1, keys=("loss",)), [outputs(loss=2.0, field="a text", more={"x": None})]
    )
    assert logged_values(effects) == {"loss/U1": 2.0}


# --- means


@st.composite
def random_updates(draw):
    """Draw an update: samples and outputs of each accumulation step, and whether it is skipped."""
    sizes = draw(st.lists(st.integers(1, 8), min_size=1, max_size=4))
    steps = [draw(st.lists(VALUES, min_size=size, max_size=size)) for size in sizes]
    return sizes, steps, draw(st.booleans())


def event_of(sizes, steps, skipped, *, per_sample):
    """Return the readings of an update whose output is one value per sample, or their mean."""
    values = [torch.tensor(step, dtype=torch.float64) for step in steps]
    made = tuple({"drift": value if per_sample else value.mean()} for value in values)
    return {"samples": sum(sizes), "accumulated": tuple(sizes), "outputs": made, "skipped": skipped}


@given(st.lists(random_updates(), min_size=1, max_size=12), st.integers(1, 4), st.booleans())
def test_the_mean_does_not_depend_on_accumulation(updates, n, per_sample):
    made = [event_of(*update, per_sample=per_sample) for update in updates]
    _, requests = go(TrackOutputsCallback(every_n_updates=n, keys=("drift",)), made)
    seen = []
    for update, ((_, steps, skipped), effects) in enumerate(zip(updates, requests, strict=True), 1):
        seen += [] if skipped else [value for step in steps for value in step]
        if update % n or not seen:  # an interval of only skipped updates logs nothing
            assert effects == ()
            continue
        assert list(logged_values(effects)) == [f"drift/U{n}"]
        np.testing.assert_allclose(logged_values(effects)[f"drift/U{n}"], np.mean(seen), rtol=1e-10, atol=1e-10)
        seen = []


@given(st.lists(st.tuples(st.integers(1, 64), VALUES), min_size=1, max_size=15), st.integers(1, 80))
def test_the_mean_of_an_interval_in_samples_weights_updates_by_samples(updates, n):
    made = [{"samples": size, **outputs(drift=torch.tensor(value, dtype=torch.float64))} for size, value in updates]
    _, requests = go(TrackOutputsCallback(every_n_samples=n, keys=("drift",)), made)
    since, sample = [], 0
    for (size, value), effects in zip(updates, requests, strict=True):
        since.append((size, value))
        crossed = (sample + size) // n > sample // n
        sample += size
        assert bool(effects) == crossed
        if crossed:
            sizes, values = zip(*since, strict=True)
            expected = np.average(values, weights=sizes)
            np.testing.assert_allclose(logged_values(effects)[f"drift/S{n}"], expected, rtol=1e-10, atol=1e-10)
            since = []


def test_the_mean_computed_by_hand():
    step = {"samples": 4, "accumulated": (3, 1)}
    _, (first, second) = go(
        TrackOutputsCallback(every_n_updates=2, keys=("drift", "steps")),
        [
            {**step, "outputs": ({"drift": torch.tensor([1.0, 3.0]), "steps": 2}, {"drift": 6.0, "steps": 4})},
            {"samples": 12, "outputs": {"drift": torch.tensor([[7.0, 9.0]]), "steps": torch.tensor(1)}},
        ],
    )
    # drift: (2 * 3 + 6 * 1) / 4 = 3, and (3 * 4 + 8 * 12) / 16; steps: 2.5, and (2.5 * 4 + 1 * 12) / 16
    assert first == ()
    assert logged_values(second) == {"drift/U2": 6.75, "steps/U2": 1.375}


def test_accumulation_steps_without_sizes_have_equal_weights():
    _, (effects,) = go(
        TrackOutputsCallback(every_n_updates=1, keys=("drift",)), [{"outputs": [{"drift": 1.0}, {"drift": 4.0}]}]
    )
    assert logged_values(effects) == {"drift/U1": 2.5}


def test_single_precision_outputs_are_summed_in_double_without_their_graph():
    values = [torch.tensor(1e8), torch.tensor(1.0)] * 50
    _, requests = go(TrackOutputsCallback(every_n_updates=100, keys=("a",)), [outputs(a=value) for value in values])
    assert logged_values(requests[-1]) == {"a/U100": 50000000.5}
    graph = torch.ones((), requires_grad=True) * 2
    for reduce in ("mean", "last"):
        callback = TrackOutputsCallback(every_n_epochs=1, keys=("a",), reduce=reduce)
        state, _ = go(callback, [outputs(a=graph)])
        kept = [tensor for _, tensor in tensors(state.memory(callback.name))]
        assert kept
        assert not any(tensor.requires_grad for tensor in kept)


def test_skipped_updates_do_not_count():
    updates = [{**outputs(a=NAN), "skipped": True}, outputs(a=2.0), {"outputs": None, "skipped": True}]
    _, requests = go(TrackOutputsCallback(every_n_updates=3, keys=("a",)), updates)
    assert logged_values(requests[-1]) == {"a/U3": 2.0}
    state, _ = go(TrackOutputsCallback(every_n_epochs=1, keys=("a",), reduce="last"), updates)
    _, effects = TrackOutputsCallback(every_n_epochs=1, keys=("a",), reduce="last")(state.next_epoch(), AfterEpoch())
    assert logged_values(effects) == {"a/E1": 2.0}


@pytest.mark.parametrize("reduce", ["mean", "last"])
@pytest.mark.parametrize("at_end", [False, True])
def test_an_interval_of_only_skipped_updates_logs_nothing(reduce, at_end):
    callback = TrackOutputsCallback(every_n_updates=2, keys=("a",), reduce=reduce, at_end=at_end, save_output=True)
    skipped = {**outputs(a=NAN), "skipped": True}
    _, requests = go(callback, [skipped, outputs(a=1.0), skipped, skipped, outputs(a=2.0), outputs(a=4.0)])
    assert requests[3] == ()
    assert logged_values(requests[5]) == {"a/U2": 3.0 if reduce == "mean" else 4.0}


def test_nan_of_an_applied_update_is_logged_in_its_interval_only():
    _, requests = go(TrackOutputsCallback(every_n_updates=2, keys=("a",)), [outputs(a=a) for a in (NAN, 1.0, 2.0, 3.0)])
    assert same([logged_values(effects) for effects in requests[1::2]], [{"a/U2": NAN}, {"a/U2": 2.5}])


@given(st.lists(VALUES, min_size=1, max_size=12), st.integers(1, 4), st.sampled_from(["mean", "last"]),
       st.integers(0, 12))  # fmt: skip
def test_a_resumed_run_continues_with_its_outputs(values, n, reduce, cut):
    def fresh():
        return TrackOutputsCallback(every_n_updates=n, keys=("a",), reduce=reduce, at_end=True)

    updates = [outputs(a=value) for value in values]
    uncut, requests = go(fresh(), updates)
    state, first = go(fresh(), updates[:cut])
    state, rest = go(fresh(), updates[cut:], state)
    assert same(first + rest, requests)
    assert same(state, uncut)
    assert same(fresh()(state, AfterTraining()), fresh()(uncut, AfterTraining()))


# --- the last update


def test_last_is_the_output_of_the_update_at_the_firing():
    callback = TrackOutputsCallback(every_n_updates=2, keys=("a",), reduce="last")
    state, requests = go(callback, [outputs(a=torch.tensor([a, a + 1.0])) for a in (1.0, 2.0, 3.0, 4.0)])
    assert [logged_values(effects) for effects in requests] == [{}, {"a/U2": 2.5}, {}, {"a/U2": 4.5}]
    assert dict(state.callback_states) == {}  # the event has all values


def test_last_is_weighted_over_accumulation_steps():
    step = {"samples": 4, "accumulated": (3, 1), "outputs": ({"a": 1.0}, {"a": 5.0})}
    _, (effects,) = go(TrackOutputsCallback(every_n_updates=1, keys=("a",), reduce="last"), [step])
    assert logged_values(effects) == {"a/U1": 2.0}


@pytest.mark.parametrize(("reduce", "at_epoch", "at_end"), [("mean", 2.0, 7.0), ("last", 3.0, 9.0)])
def test_firings_at_an_epoch_and_at_the_end(reduce, at_epoch, at_end):
    callback = TrackOutputsCallback(every_n_epochs=1, keys=("a",), reduce=reduce, at_end=True)
    state, requests = go(callback, [outputs(a=1.0), outputs(a=3.0)])
    assert requests == [(), ()]
    state, effects = callback(state.next_epoch(), AfterEpoch())
    assert logged_values(effects) == {"a/E1": at_epoch}
    assert callback(state, AfterTraining()) == (state, ())
    state, _ = go(callback, [outputs(a=5.0), outputs(a=9.0)], state)
    assert logged_values(callback(state, AfterTraining())[1]) == {"a/E1": at_end}


@pytest.mark.parametrize(("reduce", "expected"), [("mean", 6.0), ("last", 7.0)])
def test_at_end_with_an_interval_in_updates(reduce, expected):
    callback = TrackOutputsCallback(every_n_updates=3, keys=("a",), reduce=reduce, at_end=True)
    state, _ = go(callback, [outputs(a=a) for a in (1.0, 2.0, 3.0, 5.0, 7.0)])
    assert logged_values(callback(state, AfterTraining())[1]) == {"a/U3": expected}


@pytest.mark.parametrize("reduce", ["mean", "last"])
def test_nothing_is_logged_without_an_update(reduce):
    callback, state = TrackOutputsCallback(every_n_epochs=1, keys=("a",), reduce=reduce, at_end=True), TrainState()
    assert callback(state.next_epoch(), AfterEpoch())[1] == ()
    assert callback(state, AfterTraining())[1] == ()
    assert callback(state, AtEval()) == (state, ())


# --- logged and saved


@pytest.mark.parametrize(("verbose", "quiet"), [(False, {"a/U1", "b/U1"}), (True, set())])
def test_verbose_shows_outputs_on_the_console_too(verbose, quiet):
    callback = TrackOutputsCallback(every_n_updates=1, keys=("a", "b"), verbose=verbose)
    state, ((effect,),) = go(callback, [outputs(a=1.0, b=2.0)])
    assert effect.quiet == quiet
    assert logged_values([effect]) == {"a/U1": 1.0, "b/U1": 2.0}
    assert state.metrics["a/U1"].value == 1.0  # other callbacks can read it in both cases


def test_means_are_saved():
    callback = TrackOutputsCallback(every_n_updates=2, keys=("a",), patterns=("b",), save_output=True)
    step = {"samples": 8, "outputs": {"a": torch.tensor([1.0, 2.0]), "b0": 5.0}}
    _, (_, effects) = go(callback, [step, step])
    assert logged_values(effects) == {"a/U2": 1.5, "b0/U2": 5.0}
    assert saved_tensors(effects) == ("outputs/U2/E0_U2_S16", {"a": 1.5, "b0": 5.0})


def test_last_outputs_are_saved_whole_with_accumulation_steps_concatenated():
    callback = TrackOutputsCallback(every_n_updates=1, keys=("a", "b"), reduce="last", save_output=True)
    steps = (
        {"a": torch.tensor([[1, 2], [3, 4], [5, 6]]), "b": 1.0},
        {"a": torch.tensor([[7, 8]]), "b": 3.0},
    )
    _, (effects,) = go(callback, [{"samples": 4, "accumulated": (3, 1), "outputs": steps}])
    assert saved_tensors(effects) == ("outputs/U1/E0_U1_S4", {"a": [[1, 2], [3, 4], [5, 6], [7, 8]], "b": 1.5})
    assert effects[1].tensors["a"].dtype == torch.int64
    assert logged_values(effects) == {"a/U1": 4.5, "b/U1": 1.5}


def test_outputs_saved_at_an_epoch_are_named_after_it():
    callback = TrackOutputsCallback(every_n_epochs=1, keys=("a",), reduce="last", save_output=True)
    state, _ = go(callback, [outputs(a=torch.tensor([1.0, 2.0]))] * 2)
    _, effects = callback(state.next_epoch(), AfterEpoch())
    assert saved_tensors(effects) == ("outputs/E1/E1_U2_S8", {"a": [1.0, 2.0]})


def test_saved_outputs_need_not_be_logged():
    callback = TrackOutputsCallback(every_n_updates=1, keys=("a",), log_output=False, save_output=True)
    state, (effects,) = go(callback, [outputs(a=1.0)])
    assert [type(effect) for effect in effects] == [SaveTensors]
    assert dict(state.metrics) == {}
    assert callback.produces == ()


# --- several callbacks


def test_two_callbacks_with_one_interval_track_different_keys():
    reducer = compose(
        TrackOutputsCallback(every_n_updates=2, keys=("a",), save_output=True),
        TrackOutputsCallback(every_n_updates=2, keys=("b",), save_output=True),
        TrackOutputsCallback(every_n_updates=1, keys=("b",), reduce="last"),
    )
    state, _ = reducer(TrainState(), BeforeTraining())
    _, requests = go(reducer, [outputs(a=1.0, b=10.0), outputs(a=3.0, b=30.0)], state)
    effects = merge_effects(requests[-1])
    assert logged_values(effects) == {"a/U2": 2.0, "b/U2": 20.0, "b/U1": 30.0}
    assert saved_tensors(effects) == ("outputs/U2/E0_U2_S8", {"a": 2.0, "b": 20.0})


def test_two_callbacks_with_one_interval_save_into_one_file(tmp_path):
    directory = open_run(tmp_path)
    reducer = compose(*(TrackOutputsCallback(every_n_updates=1, keys=(key,), save_output=True) for key in "ab"))
    state, (effects,) = go(reducer, [outputs(a=1.0, b=2.0)])
    directory.interpreter(effects, state, AfterUpdate(samples=4))
    kept = load_file(tmp_path / "tensors/outputs/U1/E0_U1_S4.safetensors")
    assert same(kept, {"a": torch.tensor(1.0).double(), "b": torch.tensor(2.0).double()})


def test_two_callbacks_that_log_one_key_are_refused():
    reducer = compose(
        TrackOutputsCallback(every_n_updates=1, keys=("drift",)),
        TrackOutputsCallback(every_n_updates=1, patterns=("rif",)),
    )
    with pytest.raises(DeclarationError) as refused:
        reducer(TrainState(), BeforeTraining())
    assert str(refused.value) == (
        "TrackOutputsCallback/U1/rif and TrackOutputsCallback/U1/drift both produce '*rif*/U1'; remove one"
    )


def test_produces_and_name():
    callback = TrackOutputsCallback(every_n_samples=512, keys=("a", "b"), patterns=("att",))
    assert callback.produces[:2] == ("a/S512", "b/S512")
    for key in ("attention/S512", "my_attention_out/S512", "layer1/attention/S512", "attention/layer1/S512"):
        assert any(keys_overlap(pattern, key) for pattern in callback.produces[2:]), key
    assert not any(keys_overlap(pattern, "attention/U1") for pattern in callback.produces)
    assert callback.name == "TrackOutputsCallback/S512/a,b,att"
    assert callback.readings == ()
    assert TrackAdditionalOutputsCallback is TrackOutputsCallback


# --- refusals


@pytest.mark.parametrize("reduce", ["mean", "last"])
@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ({"drifts": 1.0, "b": 2.0}, "no 'drift'; it returns 'drifts', 'b'; did you mean 'drifts'?"),
        ({"b": 2.0}, f"no 'drift'; it returns 'b'{PATTERNS}"),
        ({}, f"no 'drift'; it returns none{PATTERNS}"),
        (({"b": 2.0},), f"no 'drift'; it returns 'b'{PATTERNS}"),
        (None, "nothing; to track outputs, return a dict"),
        ((torch.ones(2),), "a Tensor; to track outputs, return a dict"),
        (([1.0],), "a list; to track outputs, return a dict"),
        (({"drift": 1.0}, torch.ones(2)), "a Tensor; to track outputs, return a dict"),
    ],
)
def test_missing_outputs_are_refused(reduce, returned, message):
    with pytest.raises(OutputError) as refused:
        go(TrackOutputsCallback(every_n_updates=1, keys=("drift",), reduce=reduce), [{"outputs": returned}])
    assert str(refused.value) == f"TrackOutputsCallback/U1/drift: the model returns {message}"


def test_a_misspelt_key_is_refused_at_the_first_update():
    with pytest.raises(OutputError, match=r"returns no 'drfit'; it returns 'drift'; did you mean 'drift'\?$"):
        go(TrackOutputsCallback(every_n_epochs=10, keys=("drfit",)), [outputs(drift=1.0)])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, ["no outputs are chosen; give keys or patterns"]),
        ({"keys": ()}, ["no outputs are chosen; give keys or patterns"]),
        (
            {"keys": ("a",), "reduce": "lst"},
            ["reduce: 'lst' is not one of 'mean', 'last'; did you mean 'last'?"],
        ),
        ({"keys": ("a",), "reduce": "sum"}, ["reduce: 'sum' is not one of 'mean', 'last'"]),
        (
            {"patterns": ("a",), "log_output": False},
            ["log_output and save_output are both false; set at least one of them to true"],
        ),
        (
            {"every_n_updates": 0, "reduce": "max", "log_output": False},
            [
                "every_n_updates: 0 is not a whole number of at least 1",
                "no outputs are chosen; give keys or patterns",
                "reduce: 'max' is not one of 'mean', 'last'",
                "log_output and save_output are both false; set at least one of them to true",
            ],
        ),
    ],
)
def test_all_problems_of_the_settings_are_reported_at_once(settings, expected):
    with pytest.raises(SettingsError) as refused:
        TrackOutputsCallback(**{"every_n_updates": 1, **settings})
    assert [str(problem) for problem in refused.value.problems] == expected
    assert str(refused.value) == "\n".join(expected)


def test_an_output_of_some_updates_is_averaged_over_those():
    callback = TrackOutputsCallback(every_n_updates=3, patterns=("a",))
    _, requests = go(callback, [outputs(a=1.0), outputs(b=7.0), outputs(a=2.0, ba=5.0)])
    assert logged_values(requests[-1]) == {"a/U3": 1.5, "ba/U3": 5.0}


def test_a_pattern_that_matches_nothing_logs_nothing():
    _, requests = go(TrackOutputsCallback(every_n_updates=1, patterns=("a",)), [outputs(b=1.0)])
    assert requests == [()]


@pytest.mark.parametrize("chosen", [{"keys": ("a", "b")}, {"patterns": ("a", "b")}], ids=["keys", "patterns"])
def test_the_mean_of_an_output_counts_the_accumulation_steps_that_have_it(chosen):
    callback = TrackOutputsCallback(every_n_updates=2, **chosen)
    updates = [
        {"outputs": ({"a": 1.0}, {"b": 7.0}), "accumulated": (1, 3)},
        {"outputs": ({"b": 1.0}, {"a": 3.0, "b": 1.0}), "accumulated": (1, 3)},
    ]
    _, requests = go(callback, updates)
    assert logged_values(requests[-1]) == {"a/U2": (1 + 3 * 3) / 4, "b/U2": (3 * 7 + 4 * 1) / 7}
    last = TrackOutputsCallback(every_n_updates=2, reduce="last", **chosen)
    assert logged_values(go(last, updates)[1][-1]) == {"a/U2": 3.0, "b/U2": 1.0}


@given(VALUES)
def test_a_python_number_is_logged_exactly(value):
    for reduce in ("mean", "last"):
        _, requests = go(
            TrackOutputsCallback(every_n_updates=1, keys=("a",), reduce=reduce), [{"samples": 1, **outputs(a=value)}]
        )
        assert logged_values(requests[0]) == {"a/U1": value}
