"""Events of a loop of the user's own are logged, saved and resumed as the events that they derive from."""

import json
from dataclasses import dataclass

import pytest
import torch

from noether.core.combinators import every_n_updates, on
from noether.core.effect import LogText, SaveCheckpoint
from noether.core.event import AfterUpdate, BeforeTraining, Event
from noether.core.loop import dispatch
from noether.core.metrics import log
from noether.core.pending import dispatch_pending, set_pending
from noether.core.reducer import compose
from noether.core.run import Run
from noether.core.state import TrainState
from noether.effects import open_run
from noether.effects.disk.calls import DISK
from noether.effects.logs.events import event_line_builder, read_events


@dataclass(frozen=True, kw_only=True, eq=False)
class AfterSearch(AfterUpdate):
    temperature: float = 0.0
    plan: object = None


@on(AfterSearch)
def show(state, event):
    return state, (LogText(f"temperature {event.temperature}"),)


@every_n_updates(1)
def save(state, event):
    state, effects = log(state, event, {"loss": 1.0})
    return state, (*effects, SaveCheckpoint(pointers=("latest",)))


def test_a_subclass_is_logged_and_saved_as_its_base(tmp_path):
    reducer = compose(show, save)
    with open_run(tmp_path) as run:
        state = dispatch(TrainState(params={"w": torch.ones(1)}), BeforeTraining(), reducer, run.interpreter)
        dispatch(state.advance(samples=4), AfterSearch(samples=4, temperature=0.5), reducer, run.interpreter)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines] == ["after_update"]
    with open_run(tmp_path) as run:
        assert run.resume().iteration.update == 1


def test_a_pending_subclass_is_dispatched_again():
    state = set_pending(TrainState().advance(samples=4), AfterSearch(samples=4, temperature=0.5, plan=object()))
    found = []
    dispatch_pending(state, Run(), compose(show), lambda effects, state, event: found.append((effects, event)),
                     event_type=AfterSearch)  # fmt: skip
    ((effects, event),) = found
    assert effects == (LogText("temperature 0.5"),)
    assert (type(event), event.samples, event.plan) == (AfterSearch, 4, None)
    with pytest.raises(TypeError, match="AfterUpdate has no field 'temperature'"):
        dispatch_pending(state, Run(), compose(show), lambda effects, state, event: None)


def test_a_callback_on_a_subclass_ignores_its_base():
    state = TrainState().advance(samples=4)
    reducer = compose(show)
    assert reducer(state, AfterUpdate(samples=4))[1] == ()
    assert reducer(state, AfterSearch(samples=4))[1] == (LogText("temperature 0.0"),)
    assert reducer(state, AfterUpdate(samples=4))[1] == ()


@dataclass(frozen=True, kw_only=True, eq=False)
class AfterGeneration(Event):
    temperature: float = 0.0


def test_an_event_of_a_kind_of_its_own_is_recorded_and_left_out_of_a_replay(tmp_path, caplog):
    reducer = compose(on(AfterGeneration)(lambda state, event: log(state, event, {"score": event.temperature})))
    with open_run(tmp_path) as run:
        interpret = run.recording_interpreter(run.interpreter, event_line_builder(["score"], lambda _: {}))
        state = dispatch(TrainState().advance(samples=4), AfterGeneration(temperature=0.5), reducer, interpret)
        dispatch(state.advance(samples=4), AfterUpdate(samples=4), reducer, interpret)
    assert not caplog.records
    lines = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines] == ["after_generation", "after_update"]
    assert lines[0]["measured"] == {"score": 0.5}
    assert [each.kind for each in read_events(tmp_path / "events.jsonl", DISK)] == [AfterUpdate]
