"""The interpreter: a table from effect type to handlers."""

from dataclasses import dataclass

import pytest
import torch

from noether import (
    AfterTraining,
    AfterUpdate,
    Effect,
    LogScalars,
    LogText,
    MeasurePeakMemory,
    Run,
    SaveCheckpoint,
    SaveTensors,
    SetSummary,
    TrainState,
)
from noether.effects import Interpreter, UnhandledEffectError, open_run


@dataclass(frozen=True)
class Ring(Effect):
    times: int


def recorder(calls, name="handler"):
    return lambda effect, state, event: calls.append((name, effect, state, event))


def test_handlers_are_called_in_their_order_with_effect_state_and_event():
    calls, state, event = [], TrainState(), AfterTraining()
    interpreter = Interpreter({Ring: [recorder(calls, "first")]}).with_handlers(Ring, recorder(calls, "second"))
    interpreter([Ring(1), Ring(2)], state, event)
    assert [(name, effect.times) for name, effect, *_ in calls] == [
        ("first", 1),
        ("second", 1),
        ("first", 2),
        ("second", 2),
    ]
    assert all(call[2] is state and call[3] is event for call in calls)


def test_handling_returns_a_new_interpreter():
    calls = []
    interpreter = Interpreter({})
    interpreter.with_handlers(Ring, recorder(calls))
    with pytest.raises(LookupError, match="no handler for the effect Ring"):
        interpreter([Ring(1)], TrainState(), AfterTraining())
    assert calls == []


def test_an_effect_that_nobody_handles_is_named_with_the_nearest_and_nothing_is_done():
    calls = []

    class LogScalar(Effect):
        pass

    interpreter = Interpreter({LogText: [recorder(calls)], LogScalars: [recorder(calls)]})
    with pytest.raises(LookupError) as error:
        interpreter([LogText("hello"), LogScalar()], TrainState(), AfterTraining())
    assert str(error.value) == (
        "no handler for the effect LogScalar; did you mean 'LogScalars'?; add one with "
        "interpreter.with_handlers(LogScalar, handler). Handled: LogText, LogScalars"
    )
    assert calls == []


def test_an_effect_may_have_no_handler_at_all():
    Interpreter({Ring: []})([Ring(1)], TrainState(), AfterTraining())


@pytest.mark.parametrize(("rank", "written"), [(0, True), (1, False)])
def test_only_the_first_rank_writes(tmp_path, rank, written):
    run = open_run(tmp_path, rank=rank)
    state = TrainState(params={"weight": torch.ones(2)}).advance(samples=1)
    effects = [
        LogScalars({"a": 1}),
        SetSummary({"b": 2}),
        SaveCheckpoint(),
        SaveTensors(name="c", tensors={"c": torch.ones(1)}),
    ]
    run.interpreter(effects, state, AfterUpdate(samples=1, run=Run(rank=rank, world_size=2)))
    run.close()
    found = {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*")}
    assert found == ({"metrics.jsonl", "summary.json", "checkpoints", "tensors"} if written else set())


def test_every_rank_refuses_what_nobody_handles():
    with pytest.raises(LookupError, match="Ring"):
        Interpreter({})([Ring(1)], TrainState(), AfterTraining(run=Run(rank=1, world_size=2)))


def test_logs_are_written_before_the_checkpoint_of_the_event(tmp_path):
    """So a checkpoint is never ahead of the logs, which a resume cuts back to it."""
    run, seen = open_run(tmp_path), []
    interpreter = run.interpreter.with_handlers(
        SaveCheckpoint, lambda *_: seen.append((tmp_path / "metrics.jsonl").read_text())
    )
    interpreter([SaveCheckpoint(), LogScalars({"a": 1})], TrainState().advance(samples=1), AfterUpdate(samples=1))
    assert '"a": 1' in seen[0]


def test_a_request_that_stands_alone_reaches_its_handlers_as_it_is():
    calls, effect = [], LogScalars({"a": 1, "b": 0.5}, frozenset({"b"}))
    Interpreter({LogScalars: [recorder(calls), recorder(calls)]})((effect,), TrainState(), AfterTraining())
    assert [call[1] is effect for call in calls] == [True, True]


def test_tensors_are_read_for_the_handlers_of_scalars():
    calls, effect = [], LogScalars({"a": torch.tensor(1), "b": torch.tensor(0.5), "c": 2}, frozenset({"b"}))
    Interpreter({LogScalars: [recorder(calls)]})([effect], TrainState(), AfterTraining())
    ((_, read, *_),) = calls
    assert read == LogScalars({"a": 1, "b": 0.5, "c": 2}, frozenset({"b"}))
    assert not any(isinstance(value, torch.Tensor) for value in read.values.values())


# ------------------------------------------------------------------------------------------------ measured effects


def measured(calls):
    """Return a measure of rings, which counts how often it was called."""

    def measure(effect, state, event):
        calls.append((effect, state, event))
        return {f"rings/{effect.times}": float(len(calls))}

    return {Ring: measure}


def test_what_is_measured_is_logged_in_the_line_of_its_event():
    calls, logged, state, event = [], [], TrainState(), AfterTraining()
    interpreter = Interpreter({LogScalars: [recorder(logged)]}, measured(calls))
    interpreter([Ring(3), LogScalars({"loss": torch.tensor(0.5)}, frozenset({"loss"})), Ring(4)], state, event)
    ((_, line, *_),) = logged
    assert line.values == {"rings/3": 1.0, "loss": 0.5, "rings/4": 2.0}
    assert line.quiet == {"loss"}
    assert [effect for effect, *_ in calls] == [Ring(3), Ring(4)]
    assert all(call[1] is state and call[2] is event for call in calls)


def test_what_is_measured_is_logged_where_nothing_else_is():
    logged = []
    Interpreter({LogScalars: [recorder(logged)]}, measured([]))([Ring(3)], TrainState(), AfterTraining())
    assert [line.values for _, line, *_ in logged] == [{"rings/3": 1.0}]


def test_measures_are_kept_by_handling():
    calls, logged = [], []
    first = Interpreter({LogScalars: [recorder(logged)]}, measured(calls))
    second = first.with_handlers(LogText, recorder([])).with_handlers(LogScalars, recorder(logged, "another"))
    second([Ring(3), LogText("hello")], TrainState(), AfterTraining())
    assert [(name, line.values) for name, line, *_ in logged] == [
        ("handler", {"rings/3": 1.0}),
        ("another", {"rings/3": 1.0}),
    ]
    assert len(calls) == 1


def test_who_handles_what_is_measured_is_called_too():
    calls, logged, rings, event = [], [], [], AfterTraining()
    interpreter = Interpreter({LogScalars: [recorder(logged)]}, measured(calls)).with_handlers(Ring, recorder(rings))
    interpreter([Ring(3)], TrainState(), event)
    assert [effect for _, effect, *_ in rings] == [Ring(3)]
    assert [line.values for _, line, *_ in logged] == [{"rings/3": 1.0}]


def test_nothing_is_measured_on_another_rank():
    calls, logged = [], []
    interpreter = Interpreter({LogScalars: [recorder(logged)]}, measured(calls))
    interpreter([Ring(3)], TrainState(), AfterTraining(run=Run(rank=1, world_size=2)))
    assert calls == logged == []


def test_nothing_is_measured_where_an_effect_of_the_event_is_refused():
    calls = []
    interpreter = Interpreter({LogScalars: []}, measured(calls))
    with pytest.raises(LookupError, match="no handler for the effect LogText"):
        interpreter([Ring(3), LogText("hello")], TrainState(), AfterTraining())
    assert calls == []


def test_measured_effects_are_among_those_that_are_handled():
    class Rong(Effect):
        pass

    interpreter = Interpreter({LogScalars: []}, measured([]))
    with pytest.raises(LookupError) as error:
        interpreter([Rong()], TrainState(), AfterTraining())
    assert str(error.value) == (
        "no handler for the effect Rong; did you mean 'Ring'?; add one with interpreter.with_handlers(Rong, handler). "
        "Handled: LogScalars, Ring"
    )
    with pytest.raises(LookupError, match=r"Handled: none$"):
        Interpreter({})([Rong()], TrainState(), AfterTraining())


def test_a_run_measures_memory_into_the_line_of_the_event(tmp_path):
    seen = []
    interpreter = open_run(tmp_path).interpreter.with_handlers(LogScalars, recorder(seen))
    interpreter([MeasurePeakMemory(key="memory/E1"), LogScalars({"a": 1})], TrainState(), AfterTraining())
    ((_, line, *_),) = seen
    assert line.values["memory/E1"] > 1_000_000
    assert line.values["a"] == 1


def test_what_is_measured_needs_somebody_who_logs_it():
    interpreter = Interpreter({}, measures={MeasurePeakMemory: lambda effect, state, event: {effect.key: 1}})
    with pytest.raises(UnhandledEffectError, match="no handler for the effect LogScalars"):
        interpreter([MeasurePeakMemory()], TrainState(), AfterTraining())
