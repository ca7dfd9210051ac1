"""Interpreter: handlers by effect type, ranks, and measured effects."""

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
    TrainingIteration,
    TrainState,
)
from noether.core.effect import LogUpdateText
from noether.effects import Interpreter, UnhandledEffectError, open_run


@dataclass(frozen=True)
class Ring(Effect):
    times: int


def recorder(calls, name="handler"):
    return lambda effect, state, event: calls.append((name, effect, state, event))


def test_handlers_are_called_in_order_with_effect_state_and_event():
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


def test_with_handlers_returns_a_new_interpreter():
    calls = []
    interpreter = Interpreter({})
    interpreter.with_handlers(Ring, recorder(calls))
    with pytest.raises(LookupError, match="no handler for the effect Ring"):
        interpreter([Ring(1)], TrainState(), AfterTraining())
    assert calls == []


def test_an_effect_without_a_handler_is_an_error_that_suggests_a_name():
    calls = []

    class LogScalar(Effect):
        pass

    interpreter = Interpreter({LogText: [recorder(calls)], LogScalars: [recorder(calls)]})
    with pytest.raises(LookupError) as error:
        interpreter([LogText("hello"), LogScalar()], TrainState(), AfterTraining())
    assert str(error.value) == (
        "no handler for the effect LogScalar; did you mean 'LogScalars'?; add one with "
        "interpreter.with_handlers(LogScalar, handler), or by run.handlers in YAML. Handled: LogText, LogScalars"
    )
    assert calls == []


def test_a_text_of_an_update_without_a_handler_names_the_effect_whose_handlers_run_it():
    text = LogUpdateText(TrainingIteration(update=1), AfterUpdate(), LogText("half"))
    with pytest.raises(LookupError, match=r"no handler for the effect LogText; add one with .*\(LogText, handler\)"):
        Interpreter({})([text], TrainState(), AfterUpdate())


def test_an_empty_list_of_handlers_ignores_the_effect():
    Interpreter({Ring: []})([Ring(1)], TrainState(), AfterTraining())


@pytest.mark.parametrize(("rank", "written"), [(0, True), (1, False)])
def test_only_rank_0_writes(tmp_path, rank, written):
    directory = open_run(tmp_path, rank=rank)
    state = TrainState(params={"weight": torch.ones(2)}).advance(samples=1)
    effects = [
        LogScalars({"a": 1}),
        SetSummary({"b": 2}),
        SaveCheckpoint(),
        SaveTensors(name="c", tensors={"c": torch.ones(1)}),
    ]
    directory.interpreter(effects, state, AfterUpdate(samples=1, run=Run(rank=rank, world_size=2)))
    directory.close()
    found = {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*")}
    assert found == ({"metrics.jsonl", "summary.json", "checkpoints", "tensors"} if written else set())


def test_every_rank_refuses_an_effect_without_a_handler():
    with pytest.raises(LookupError, match="Ring"):
        Interpreter({})([Ring(1)], TrainState(), AfterTraining(run=Run(rank=1, world_size=2)))


def test_logs_are_written_before_the_checkpoint_of_the_event(tmp_path):
    """A checkpoint is never ahead of the logs, which a resume truncates to it."""
    directory, seen = open_run(tmp_path), []
    interpreter = directory.interpreter.with_handlers(
        SaveCheckpoint, lambda *_: seen.append((tmp_path / "metrics.jsonl").read_text())
    )
    interpreter([SaveCheckpoint(), LogScalars({"a": 1})], TrainState().advance(samples=1), AfterUpdate(samples=1))
    assert '"a": 1' in seen[0]


def test_a_single_effect_reaches_its_handlers_unchanged():
    calls, effect = [], LogScalars({"a": 1, "b": 0.5}, frozenset({"b"}))
    Interpreter({LogScalars: [recorder(calls), recorder(calls)]})((effect,), TrainState(), AfterTraining())
    assert [call[1] is effect for call in calls] == [True, True]


def test_handlers_of_scalars_receive_numbers():
    calls, effect = [], LogScalars({"a": torch.tensor(1), "b": torch.tensor(0.5), "c": 2}, frozenset({"b"}))
    Interpreter({LogScalars: [recorder(calls)]})([effect], TrainState(), AfterTraining())
    ((_, read, *_),) = calls
    assert read == LogScalars({"a": 1, "b": 0.5, "c": 2}, frozenset({"b"}))
    assert not any(isinstance(value, torch.Tensor) for value in read.values.values())


# ------------------------------------------------------------------------------------------------ measured effects


def measure_rings(calls):
    """Return measures with one for rings, which returns the number of its calls."""

    def measure(effect, state, event):
        calls.append((effect, state, event))
        return {f"rings/{effect.times}": float(len(calls))}

    return {Ring: measure}


def test_measured_values_are_logged_in_the_line_of_their_event():
    calls, logged, state, event = [], [], TrainState(), AfterTraining()
    interpreter = Interpreter({LogScalars: [recorder(logged)]}, measure_rings(calls))
    interpreter([Ring(3), LogScalars({"loss": torch.tensor(0.5)}, frozenset({"loss"})), Ring(4)], state, event)
    ((_, line, *_),) = logged
    assert line.values == {"rings/3": 1.0, "loss": 0.5, "rings/4": 2.0}
    assert line.quiet == {"loss"}
    assert [effect for effect, *_ in calls] == [Ring(3), Ring(4)]
    assert all(call[1] is state and call[2] is event for call in calls)


def test_measured_values_are_logged_at_an_event_without_other_logs():
    logged = []
    Interpreter({LogScalars: [recorder(logged)]}, measure_rings([]))([Ring(3)], TrainState(), AfterTraining())
    assert [line.values for _, line, *_ in logged] == [{"rings/3": 1.0}]


def test_with_handlers_keeps_the_measures():
    calls, logged = [], []
    first = Interpreter({LogScalars: [recorder(logged)]}, measure_rings(calls))
    second = first.with_handlers(LogText, recorder([])).with_handlers(LogScalars, recorder(logged, "another"))
    second([Ring(3), LogText("hello")], TrainState(), AfterTraining())
    assert [(name, line.values) for name, line, *_ in logged] == [
        ("handler", {"rings/3": 1.0}),
        ("another", {"rings/3": 1.0}),
    ]
    assert len(calls) == 1


def test_a_handler_of_a_measured_effect_is_called_too():
    calls, logged, rings, event = [], [], [], AfterTraining()
    interpreter = Interpreter({LogScalars: [recorder(logged)]}, measure_rings(calls)).with_handlers(
        Ring, recorder(rings)
    )
    interpreter([Ring(3)], TrainState(), event)
    assert [effect for _, effect, *_ in rings] == [Ring(3)]
    assert [line.values for _, line, *_ in logged] == [{"rings/3": 1.0}]


def test_nothing_is_measured_on_another_rank():
    calls, logged = [], []
    interpreter = Interpreter({LogScalars: [recorder(logged)]}, measure_rings(calls))
    interpreter([Ring(3)], TrainState(), AfterTraining(run=Run(rank=1, world_size=2)))
    assert calls == logged == []


def test_nothing_is_measured_if_another_effect_has_no_handler():
    calls = []
    interpreter = Interpreter({LogScalars: []}, measure_rings(calls))
    with pytest.raises(LookupError, match="no handler for the effect LogText"):
        interpreter([Ring(3), LogText("hello")], TrainState(), AfterTraining())
    assert calls == []


def test_the_error_lists_measured_effects_as_handled():
    class Rong(Effect):
        pass

    interpreter = Interpreter({LogScalars: []}, measure_rings([]))
    with pytest.raises(LookupError) as error:
        interpreter([Rong()], TrainState(), AfterTraining())
    assert str(error.value) == (
        "no handler for the effect Rong; did you mean 'Ring'?; add one with interpreter.with_handlers(Rong, handler), "
        "or by run.handlers in YAML. "
        "Handled: LogScalars, Ring"
    )
    with pytest.raises(LookupError, match=r"Handled: none$"):
        Interpreter({})([Rong()], TrainState(), AfterTraining())


def test_a_run_logs_peak_memory_in_the_line_of_the_event(tmp_path):
    seen = []
    interpreter = open_run(tmp_path).interpreter.with_handlers(LogScalars, recorder(seen))
    interpreter([MeasurePeakMemory(key="memory/E1"), LogScalars({"a": 1})], TrainState(), AfterTraining())
    ((_, line, *_),) = seen
    assert line.values["memory/E1"] > 1_000_000
    assert line.values["a"] == 1


def test_a_measure_requires_a_handler_of_scalars():
    interpreter = Interpreter({}, measures={MeasurePeakMemory: lambda effect, state, event: {effect.key: 1}})
    with pytest.raises(UnhandledEffectError, match="no handler for the effect LogScalars"):
        interpreter([MeasurePeakMemory()], TrainState(), AfterTraining())
