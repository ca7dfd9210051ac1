"""Traces emit the events of the trainer, and comparisons report every difference."""

import math

import pytest
import torch
from hypothesis import given, settings
from torch import nn

from noether import (
    AfterUpdate,
    BeforeTraining,
    LogScalars,
    LogText,
    Run,
    SetSummary,
    TrainingIteration,
    TrainState,
    compose,
    on,
)
from noether.core.event import AfterAccumulationStep, AtEval
from noether.testing import Reading, Trace, assert_same, differences, drive, effects_of, same
from noether.testing.strategies import iterations, losses, runs, states
from noether.training.data.indexed import TrainingData
from noether.training.step.optimizer import FunctionalOptimizer
from noether.training.step.step import Step
from noether.training.trainer import Trainer


def real_events(length, batch, micro, epochs):
    """Return the run of the trainer on a real model, and the name, iteration and samples of each event."""
    events = []

    @on(*{type(event) for event in drive(compose(), Trace(RUN)).events}, AfterAccumulationStep)
    def record(state, event):
        events.append((type(event).__name__, str(state.iteration), getattr(event, "samples", None)))
        return state, ()

    data = TrainingData([(torch.ones(1), torch.ones(1))] * length, seed=0, effective_batch_size=batch,
                        max_batch_size=micro, drop_last=False, device=torch.device("cpu"))  # fmt: skip
    model = nn.Linear(1, 1)
    optimizer = FunctionalOptimizer(torch.optim.SGD, {"lr": 0.1}, (), frozenset())
    state = TrainState.from_module(model)
    state = state.replace(opt_state=optimizer.init(state.params))
    run = Run(
        end=TrainingIteration(epoch=epochs), updates_per_epoch=data.batching.updates_per_epoch,
        samples_per_epoch=length, effective_batch_size=data.batching.effective_batch_size,
    )  # fmt: skip
    step = Step(model=model, loss=lambda outputs, batch: {"l": (outputs - batch[1]).square().mean()},
                optimizer=optimizer, lr={"default": lambda update: 0.1}, weight_decay={})  # fmt: skip
    Trainer(run=run, step=step, data=data, reducer=compose(record), interpreter=lambda *_: None)(state)
    return run, events


RUN = Run(end=TrainingIteration(epoch=1), updates_per_epoch=1, samples_per_epoch=1, effective_batch_size=1)


@pytest.mark.parametrize(("length", "batch", "micro", "epochs"), [(5, 2, None, 2), (7, 4, 2, 1), (6, 6, 3, 3)])
def test_a_trace_emits_the_events_of_the_trainer(length, batch, micro, epochs):
    run, expected = real_events(length, batch, micro, epochs)
    steps = 1 if micro is None else math.ceil(batch / micro)
    # A short last batch has fewer steps.
    last = length % batch or batch
    short = 1 if micro is None else math.ceil(last / micro)
    per_epoch = run.updates_per_epoch
    readings = tuple(
        Reading(losses=(1.0,) * (short if update % per_epoch == per_epoch - 1 else steps))
        for update in range(run.final.update)
    )
    driven = drive(compose(), Trace(run, readings))
    found = [
        (type(event).__name__, str(state.iteration), getattr(event, "samples", None))
        for event, state, _ in zip(*driven, strict=True)
    ]
    assert found == expected


@settings(max_examples=50)
@given(runs(empty=True))
def test_samples_are_counted_and_losses_weighted(trace):
    driven = drive(compose(), trace)
    start, end = trace.start().iteration, driven.states[-1].iteration
    updates = [event for event in driven.events if isinstance(event, AfterUpdate)]
    assert driven.states[-1].ended
    assert (end.epoch, end.update) == ((final := expected_end(trace)).epoch, final.update)
    assert end.sample - start.sample == sum(event.samples for event in updates)
    assert end.sample == final.sample or any(not event.samples for event in updates)
    steps = []
    for event in driven.events:
        if isinstance(event, AfterAccumulationStep):
            steps.append(event)
        elif isinstance(event, AfterUpdate):
            assert [step.samples for step in steps] == list(event.accumulated)
            assert sum(event.accumulated) == event.samples
            assert event.skipped or event.samples
            if event.samples:
                mean = sum(float(step.losses["total"]) * step.samples for step in steps) / event.samples
                close = pytest.approx(mean, rel=1e-5, nan_ok=True)
                assert float(event.losses["total"]) == close or not math.isfinite(mean)
            steps = []
    starts = [event for event in driven.events if isinstance(event, BeforeTraining)]
    assert [event.resumed for event in starts] == [trace.first_update > 0] + [True] * (len(starts) - 1)
    first, last = start.epoch + start.update, end.epoch + end.update
    assert len(starts) - 1 == len({place for place in trace.interruptions if first < place <= last})


def expected_end(trace):
    """Return the iteration at which a run ends if nothing but `trace.stop` stops it."""
    return trace.run.final if trace.stop is None else trace.run.iteration_after(min(trace.stop, trace.run.final.update))


def kinds_of(trace):
    """Return the kinds of things that a run contains."""
    updates = events_of(trace, AfterUpdate)
    yield "starts late" if trace.first_update > 50 else "starts at 0"
    yield "ends within an epoch" if trace.run.final.update % trace.run.updates_per_epoch else "ends after an epoch"
    yield "stops early" if expected_end(trace) != trace.run.final else "reaches the end"
    yield f"has {len(trace.model.groups)} parameter groups"
    yield "has own events" if type(updates[0]) is not AfterUpdate else "has events of noether"
    yield f"is interrupted {min(len(trace.interruptions), 1)} times"
    yield f"is evaluated {min(len(events_of(trace, AtEval)), 1)} times"
    for event in updates:
        yield f"has {len(event.accumulated)} accumulation steps"
        if event.samples:
            finite = math.isfinite(event.losses["total"])
            yield f"finite {bool(event.finite)}, skipped {event.skipped}, loss finite {finite}"


def events_of(trace, kind):
    return [event for event in drive(compose(), trace).events if isinstance(event, kind)]


def test_runs_contain_what_real_ones_do():
    found = set()

    @settings(max_examples=200, derandomize=True)
    @given(runs(empty=True))
    def collect(trace):
        found.update(kinds_of(trace))

    collect()
    assert found == {
        "starts late", "starts at 0", "ends within an epoch", "ends after an epoch", "stops early", "reaches the end",
        "has own events", "has events of noether",
        "has 1 parameter groups", "has 2 parameter groups", "is interrupted 0 times", "is interrupted 1 times",
        "is evaluated 0 times", "is evaluated 1 times", "has 0 accumulation steps", "has 1 accumulation steps",
        "has 2 accumulation steps", "has 3 accumulation steps", "finite True, skipped False, loss finite True",
        "finite False, skipped False, loss finite False", "finite False, skipped True, loss finite True",
        "finite False, skipped True, loss finite False",
    }  # fmt: skip


@settings(max_examples=30)
@given(runs(finite=True, interrupted=False))
def test_finite_runs_are_finite(trace):
    assert all(math.isfinite(loss) for reading in trace.readings for loss in reading.losses)
    assert trace.is_finite
    assert not any(event.skipped for event in events_of(trace, AfterUpdate))
    assert trace.interruptions == ()


@given(iterations())
def test_iterations_can_be_reached_by_a_run(iteration):
    assert iteration.epoch <= iteration.update <= iteration.sample


@settings(max_examples=50)
@given(states(), states())
def test_differences_are_reported_exactly_where_values_differ(one, other):
    assert same(one, one)
    assert same(one, other) == (list(differences(one, other)) == [])
    for path, found, expected in differences(one, other):
        assert found != expected
        assert path.startswith(".")


def test_a_difference_has_its_path_and_both_values():
    plan = [LogText("a"), LogScalars({"x": torch.tensor(1.0), "y": 0.0}), SetSummary({"n": 1})]
    other = [LogText("a"), LogScalars({"x": torch.tensor(2.0), "z": 0.0})]
    with pytest.raises(AssertionError) as error:
        assert_same(plan, other)
    assert str(error.value).splitlines() == [
        "the values differ:",
        "  [1].values['x']: found tensor(1.), expected tensor(2.)",
        "  [1].values['y']: found 0.0, expected nothing",
        "  [1].values['z']: found nothing, expected 0.0",
        "  [2]: found SetSummary(values={'n': 1}), expected nothing",
    ]
    assert_same(plan, list(plan))


def test_large_tensors_show_their_first_difference():
    one, other = torch.zeros(20), torch.zeros(20)
    other[7] = 3
    assert list(differences({"w": one}, {"w": other})) == [
        ("['w']", "torch.float32 of shape (20,) with 0.0 at 7", "torch.float32 of shape (20,) with 3.0 at 7")
    ]
    assert list(differences(one, one.double())) == [
        ("the value", "torch.float32 of shape (20,)", "torch.float64 of shape (20,)")
    ]


def test_many_differences_are_counted():
    with pytest.raises(AssertionError, match=r"  and 5 more$"):
        assert_same(list(range(15)), [-1] * 15)


@given(losses(), losses())
def test_floats_are_compared_to_the_last_bit(a, b):
    assert same(a, b) == (repr(a) == repr(b))
    assert same(a, a)
    assert not same(0.0, -0.0)


def test_effects_are_filtered_in_order():
    effects = ((LogText("a"), SetSummary({})), (), (LogText("b"),))
    assert effects_of(effects, LogText) == [LogText("a"), LogText("b")]
