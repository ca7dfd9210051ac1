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
    Run,
    SaveCheckpoint,
    SaveTensors,
    SetSummary,
    TrainState,
)
from noether.effects import Interpreter, open_run


@dataclass(frozen=True)
class Ring(Effect):
    times: int


def recorder(calls, name="handler"):
    return lambda effect, state, event: calls.append((name, effect, state, event))


def test_handlers_are_called_in_their_order_with_effect_state_and_event():
    calls, state, event = [], TrainState(), AfterTraining()
    interpreter = Interpreter({Ring: [recorder(calls, "first")]}).handling(Ring, recorder(calls, "second"))
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
    interpreter.handling(Ring, recorder(calls))
    with pytest.raises(LookupError, match="nobody handles the effect Ring"):
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
        "nobody handles the effect LogScalar; did you mean 'LogScalars'?; register it with "
        "interpreter.handling(LogScalar, handler). Handled: LogText, LogScalars"
    )
    assert calls == []


def test_an_effect_may_have_no_handler_at_all():
    Interpreter({Ring: []})([Ring(1)], TrainState(), AfterTraining())


@pytest.mark.parametrize(("rank", "written"), [(0, True), (1, False)])
def test_only_the_first_rank_writes(tmp_path, rank, written):
    run = open_run(tmp_path)
    state = TrainState(params={"weight": torch.ones(2)}).advance(samples=1)
    effects = [
        LogScalars({"a": 1}),
        SetSummary({"b": 2}),
        SaveCheckpoint(),
        SaveTensors(name="c", tensors={"c": torch.ones(1)}),
    ]
    run.interpreter(effects, state, AfterUpdate(samples=1, run=Run(rank=rank, world_size=2)))
    found = {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*")}
    assert found == ({"metrics.jsonl", "summary.json", "checkpoints", "tensors"} if written else set())


def test_every_rank_refuses_what_nobody_handles():
    with pytest.raises(LookupError, match="Ring"):
        Interpreter({})([Ring(1)], TrainState(), AfterTraining(run=Run(rank=1, world_size=2)))


def test_logs_are_written_before_the_checkpoint_of_the_event(tmp_path):
    """So a checkpoint is never ahead of the logs, which a resume cuts back to it."""
    run, seen = open_run(tmp_path), []
    interpreter = run.interpreter.handling(
        SaveCheckpoint, lambda *_: seen.append((tmp_path / "metrics.jsonl").read_text())
    )
    interpreter([SaveCheckpoint(), LogScalars({"a": 1})], TrainState().advance(samples=1), AfterUpdate(samples=1))
    assert '"a": 1' in seen[0]
