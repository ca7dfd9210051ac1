"""Callbacks inside of decorators and reducers, at any depth: the same checks and results as side by side."""

import functools
import sys
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from law_examples import examples
from loop_traces import drive, outcomes

from noether.core.callbacks import BestMetricCallback, EMACallback, OfflineLossCallback, OnlineLossCallback
from noether.core.combinators import callback, every_n_epochs, every_n_updates, on, when
from noether.core.declarations import DeclarationError
from noether.core.effect import LogScalars, LogText, MeasurePeakMemory, SaveCheckpoint, SaveTensors, SetSummary
from noether.core.event import AfterEpoch, AfterUpdate, BeforeTraining
from noether.core.iteration import TrainingIteration
from noether.core.metrics import log
from noether.core.overwrites import OverwriteError
from noether.core.reducer import compose
from noether.core.run import Run
from noether.core.schedules.schedule import EveryNEpochs, EveryNSamples, EveryNUpdates
from noether.core.state import TrainState
from noether.testing import same
from noether.testing.strategies import run_lengths, schedules

RUN = Run(end=TrainingIteration(epoch=2), updates_per_epoch=6, samples_per_epoch=24, effective_batch_size=4)


# ------------------------------------------------------------------------------------------------ nested and flat


def is_odd(state, event):
    return state.iteration.update % 2 == 1


def on_updates(state, event):
    return isinstance(event, AfterUpdate)


@st.composite
def leaves(draw):
    """A callback that may produce, consume and remember; names and keys are few, so that many do not fit."""
    name, consumes = draw(st.sampled_from("abcde")), draw(st.sets(st.sampled_from("xyz"), max_size=1))
    produces = draw(st.sets(st.sampled_from("xyz"), max_size=1))

    def act(state, event):
        if isinstance(event, BeforeTraining) and event.resumed:
            return state, ()
        state = state.remember(name, state.memory(name) + 1)
        if not isinstance(event, AfterUpdate | AfterEpoch):
            return state, ()
        state, effects = log(state, event, {key: float(state.memory(name)) for key in sorted(produces)})
        return state, (*(effects if produces else ()), LogText(f"{name} {type(event).__name__} {state.iteration}"))

    return callback(name, init=lambda state: 0, produces=tuple(produces), consumes=tuple(consumes))(act)


@st.composite
def wrappers(draw):
    kind = draw(st.sampled_from(("on", "when", "callback", "compose")))
    if kind == "on":
        return on(*draw(st.sets(st.sampled_from((AfterUpdate, AfterEpoch, BeforeTraining)), min_size=1)))
    if kind == "when":
        return when(draw(st.sampled_from((is_odd, on_updates))))
    return compose if kind == "compose" else callback("name")


@st.composite
def trees(draw, depth=3):
    """Return a nested callback, and the list of the callbacks that it equals side by side."""
    if depth == 0 or draw(st.booleans()):
        leaf = draw(leaves())
        return leaf, [leaf]
    children = [draw(trees(depth=depth - 1)) for _ in range(draw(st.integers(1, 3)))]
    flat = [leaf for _, parts in children for leaf in parts]
    nested = compose(*(child for child, _ in children))
    for wrap in draw(st.lists(wrappers(), max_size=2)):
        nested, flat = _wrap_both(wrap, nested, flat)
    if draw(st.integers(0, 2)) == 0:  # a schedule goes around everything else
        gate = when(draw(schedules(9)), at_end=draw(st.booleans()))
        nested, flat = _wrap_both(gate, nested, flat)
    return nested, flat


def _wrap_both(wrap, nested, flat):
    try:
        return wrap(nested), [wrap(leaf) for leaf in flat]
    except TypeError:  # one inside has a schedule: both are refused
        for each in (nested, compose(*flat)):
            with pytest.raises(TypeError, match="already has a schedule"):
                wrap(each)
        return nested, flat


def result_of(member, run):
    """Return the outcomes of a run, or how many reasons there are against it."""
    try:
        return outcomes(drive(compose(member), run))
    except DeclarationError as error:
        return len(error.misfits)


@examples(150, quick=30)
@given(trees(), run_lengths(max_epochs=2))
def test_nested_callbacks_are_checked_and_act_as_those_side_by_side(tree, run):
    nested, flat = tree
    found, expected = result_of(nested, run), result_of(compose(*flat), run)
    assert type(found) is type(expected)
    assert found == expected if isinstance(found, int) else same(found, expected)


class Counting:
    """Counts how often its declarations are read."""

    def __init__(self):
        self.reads = 0

    @property
    def readings(self):
        self.reads += 1
        return ()

    produces = consumes = effects = readings

    def __call__(self, state, event):
        return state, ()


def count_reads(levels, run):
    inner = nested = Counting()
    for level in range(levels):
        nested = on(AfterUpdate)(nested) if level % 2 else callback("outer")(compose(nested))
    reducer = compose(nested)
    assert (reducer.readings, reducer.produces, reducer.consumes, reducer.effects) == ((), (), (), ())
    drive(reducer, run)
    return inner.reads


def test_each_level_adds_the_same_work():
    run = Run(end=TrainingIteration(update=2), updates_per_epoch=2, samples_per_epoch=4, effective_batch_size=2)
    assert 0 < count_reads(16, run) <= 4 * count_reads(8, run)


def add(name, n):
    return callback(name, init=lambda state: 0)(lambda s, e: (s.remember(name, s.memory(name) + n), ()))


WRAPPERS = {
    "on": on(AfterUpdate),
    "when": when(on_updates),
    "callback": callback("outer"),
    "on in when": lambda inner: when(on_updates)(on(AfterUpdate)(inner)),
    "callback in callback": lambda inner: callback("outer")(callback("inner", init=lambda state: 1)(inner)),
    "reducers": lambda inner: compose(compose(inner), add("other", 1)),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_two_memories_of_one_name_are_refused_at_any_depth(wrap):
    for each in (wrap(compose(add("a", 1), add("a", 10))), compose(add("a", 1), wrap(compose(add("a", 10))))):
        with pytest.raises(DeclarationError, match="2 callbacks have a memory named 'a'"):
            compose(each)(TrainState(), BeforeTraining())


def test_a_decorator_does_not_hide_the_memory_below_it():
    with pytest.raises(DeclarationError, match="2 callbacks have a memory named 'a'"):
        compose(callback("a", init=lambda state: 1)(add("a", 1)))(TrainState(), BeforeTraining())


@pytest.mark.parametrize("wrap", [WRAPPERS["callback"], WRAPPERS["callback in callback"], WRAPPERS["reducers"]])
def test_a_consumer_before_its_producer_is_refused_at_any_depth(wrap):
    best = BestMetricCallback(every_n_epochs=1, metric_key="loss/val/mse")
    loss = OfflineLossCallback(every_n_epochs=1, dataset_key="val")
    event = BeforeTraining(run=RUN.replace(data={"val": []}, forward=None))
    compose(wrap(compose(loss, best)))(TrainState(), event)
    with pytest.raises(DeclarationError, match="consumes 'loss/val/mse': list it after"):
        compose(wrap(compose(best, loss)))(TrainState(), event)


# ------------------------------------------------------------------------------------------------ hidden trackers


def quiet(inner):
    def call(state, event):
        state, _ = inner(state, event)
        return state, ()

    return call


def named_quiet(inner):
    return functools.wraps(lambda state, event: None)(quiet(inner))


class Quiet:
    def __init__(self, inner):
        self.inner = [inner]

    def __call__(self, state, event):
        return self.inner[0](state, event)[0], ()


GLOBAL_LOSS = OnlineLossCallback(every_n_updates=2)


def call_global(state, event):
    return GLOBAL_LOSS(state, event)


class Slot:
    __slots__ = ("inner",)

    def __init__(self, inner):
        self.inner = {"a": [inner]}

    def __call__(self, state, event):
        return self.inner["a"][0](state, event)


def call_default(state, event, inner=GLOBAL_LOSS):
    return inner(state, event)


def call_keyword(state, event, *, inner=GLOBAL_LOSS):
    return inner(state, event)


def call_given(state, event, *, inner):
    return inner(state, event)


def call_hook(state, event):
    return GLOBAL_LOSS.after_update(state, event)


def call_each(callbacks):
    def call(state, event):
        for each in callbacks:
            state, _ = each(state, event)
        return state, ()

    return call


def track(body):
    return callback("mean", init=lambda state: 0, track=lambda memory, event: memory)(body)


@pytest.mark.parametrize(
    "limit",
    [every_n_updates(2), every_n_epochs(1), when(EveryNSamples(8)), on(AfterUpdate), on(AfterEpoch), when(is_odd)],
)
@pytest.mark.parametrize(
    "hidden",
    [
        quiet(OnlineLossCallback(every_n_updates=2)),
        quiet(quiet(OnlineLossCallback(every_n_updates=2))),
        named_quiet(OnlineLossCallback(every_n_updates=2)),
        Quiet(OnlineLossCallback(every_n_updates=2)),
        Quiet(quiet(track(lambda state, event: (state, ())))),
        quiet(compose(track(lambda state, event: (state, ())))),
        OnlineLossCallback(every_n_updates=2).after_update,
        call_global,
        call_default,
        call_keyword,
        call_hook,
        call_each([GLOBAL_LOSS]),
        functools.partial(call_given, inner=GLOBAL_LOSS),
        Slot(GLOBAL_LOSS),
        quiet(every_n_updates(3)(lambda state, event: (state, ()))),
        callback("outer")(compose(Quiet(EMACallback(every_n_updates=2, target_factors=(0.5,))))),
    ],
)
def test_what_tracks_or_has_a_schedule_is_found_inside_of_functions_and_objects(hidden, limit):
    with pytest.raises(TypeError, match=r"tracks every update|already has a schedule"):
        limit(hidden)
    with pytest.raises(TypeError, match=r"tracks every update|already has a schedule"):
        limit(compose(lambda state, event: (state, ()), hidden))


def test_data_that_a_callback_holds_is_not_searched():
    cycle = [Quiet(lambda state, event: (state, ()))]
    cycle.append(cycle)
    holder = Quiet(lambda state, event: (state, ()))
    holder.data, holder.cycle, holder.itself = list(range(10**6)), cycle, holder
    assert every_n_updates(1)(holder)(TrainState().advance(samples=1), AfterUpdate())[1] == ()


def test_a_function_may_read_the_attributes_of_a_scheduled_callback():
    ema = EMACallback(every_n_updates=2, target_factors=(0.5,))

    @every_n_updates(2)
    def show(state, event):
        return state, (LogText(ema.name),)

    state = TrainState().advance(samples=1).advance(samples=1)
    assert show(state, AfterUpdate())[1] == (LogText(ema.name),)


def test_a_partial_does_not_hide_memory_and_readings():
    norm = callback("norm", init=lambda state: 0, readings=("grad_norm",))(lambda state, event: (state, ()))
    with pytest.raises(TypeError, match="the wrapper around norm hides its init"):
        compose(functools.partial(norm))
    with pytest.raises(TypeError, match="the wrapper around norm hides its init"):
        compose(functools.wraps(norm)(lambda state, event: norm(state, event)))  # noqa: PLW0108  # a user's decorator
    reads = callback("norm", readings=("grad_norm",))(lambda state, event: (state, ()))
    with pytest.raises(TypeError, match="the wrapper around norm hides its readings"):
        compose(functools.partial(reads))


def test_a_wrapper_around_a_callback_without_memory_is_accepted():
    say = every_n_updates(2)(lambda state, event: (state, (LogText("x"),)))
    timed = functools.wraps(say)(lambda state, event: say(state, event))  # noqa: PLW0108  # a user's decorator
    state = TrainState().advance(samples=1)
    assert compose(timed)(state, AfterUpdate())[1] == ()
    assert compose(timed)(state.advance(samples=1), AfterUpdate())[1] == (LogText("x"),)


# ------------------------------------------------------------------------------------------------ lost values


def request(*effects):
    return every_n_updates(1)(lambda state, event: (state, effects))


def named(name, *effects):
    def body(state, event):
        return state, effects

    return callback(name)(every_n_updates(1)(body))


LOST = {
    "metric": (LogScalars({"norm": 1.0}), LogScalars({"norm": 2.0})),
    "summary entry": (SetSummary({"norm": "a"}), SetSummary({"norm": "b"})),
    "tensor": (
        SaveTensors(name="out", tensors={"norm": object()}),
        SaveTensors(name="out", tensors={"norm": object()}),
    ),
    "peak": (MeasurePeakMemory(key="norm"), MeasurePeakMemory(key="norm")),
    "measured metric": (MeasurePeakMemory(key="norm"), LogScalars({"norm": 2.0})),
}


@pytest.mark.parametrize(("first", "second"), LOST.values(), ids=LOST)
@pytest.mark.parametrize("wrap", [compose, on(AfterUpdate).__call__, callback("outer")])
def test_two_values_for_one_name_at_one_event_are_refused(first, second, wrap):
    one, two = callback("one")(lambda s, e: (s, (first,))), callback("two")(lambda s, e: (s, (second,)))
    for reducer in (compose(wrap(one), wrap(two)), compose(wrap(compose(one, two)))):
        with pytest.raises(OverwriteError, match=r"both write the .*'.*norm' at one AfterUpdate"):
            reducer(TrainState().advance(samples=1), AfterUpdate())
    with pytest.raises(OverwriteError, match="one and two both write"):
        compose(one, two)(TrainState().advance(samples=1), AfterUpdate())
    with pytest.raises(OverwriteError, match=r"both writes the .*'.*norm' twice at one AfterUpdate: write it once"):
        compose(callback("both")(lambda s, e: (s, (first, second))))(TrainState().advance(samples=1), AfterUpdate())


def test_values_that_are_not_lost_are_accepted():
    value = object()
    pairs = [
        (LogScalars({"norm": 1.0}), LogScalars({"loss": 2.0})),
        (LogScalars({"norm": 1.0}), LogScalars({"norm": 1.0})),
        (LogScalars({"norm": 1.0}), SetSummary({"norm": 2.0})),
        (SetSummary({"norm": value}), SetSummary({"norm": value})),
        (SaveCheckpoint(pointers=("latest",)), SaveCheckpoint(pointers=("latest",), tag="other")),
    ]
    for first, second in pairs:
        _, effects = compose(request(first), request(second))(TrainState().advance(samples=1), AfterUpdate())
        assert effects == (first, second)


def test_one_name_at_two_events_is_accepted():
    state = TrainState().advance(samples=1)
    reducer = compose(on(AfterUpdate)(request_value(1.0)), on(AfterEpoch)(request_value(2.0)))
    assert len(reducer(state, AfterUpdate())[1]) == len(reducer(state.next_epoch(), AfterEpoch())[1]) == 1


def request_value(value):
    return lambda state, event: log(state, event, {"norm": value})


# ------------------------------------------------------------------------------------------------ threads


def test_threads_share_a_reducer():
    intervals = (2, 3, 5, 7)
    reducer = compose(*(when(EveryNUpdates(n) | EveryNEpochs(n))(name_interval(n)) for n in intervals))
    expected, found = outcomes(drive(reducer, LONG)), []

    def run_once():
        found.append(outcomes(drive(reducer, LONG)))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=run_once) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert len(found) == len(threads)
    assert all(same(each, expected) for each in found)


LONG = RUN.replace(end=TrainingIteration(epoch=30))


def name_interval(n):
    return lambda state, event: (state, (LogText(str(n)),))


@settings(max_examples=60, deadline=None)
@given(st.lists(schedules(12), min_size=1, max_size=4), run_lengths(max_epochs=2), st.data())
def test_a_reducer_answers_the_same_after_any_history(parts, run, data):
    used = compose(*(when(each)(name_interval(index)) for index, each in enumerate(parts)))
    trace = list(drive(used, run))
    for index in data.draw(st.lists(st.integers(0, len(trace) - 1), max_size=20)):
        event, before, *_ = trace[index]
        unused = compose(*used.members)
        assert same(used(before, event), unused(before, event))
